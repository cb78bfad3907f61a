"""LayerNorm, bias and GeLU, bias, dropout and residual, and the masked softmax, as operations of
PyTorch's: autograd, ``torch.compile``, fake tensors, export.

All run on PyTorch's current stream of the operands' device. The seed of what is dropped is a
tensor there: it is drawn without waiting for the GPU, anew in each call of a compiled graph and in
each replay of a captured one, and kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoform.kernels import layer_norm_launch, softmax_launch
from isoform.kernels.fused_launch import MATRICES, Function, dropout, gelu, launch
from isoform.kernels.layer_norm_launch import LayerNorm
from isoform.kernels.rotary_launch import Lying
from isoform.kernels.softmax_launch import Softmax
from isoform.kernels.torch_library import LIBRARY, operation
from isoform.reference.contract import dtype_name


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the channels."""
    found: Tensor = layer_norm_forward(x, weight, bias, epsilon)[0]
    return found


def bias_gelu(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """GeLU of ``x + bias``."""
    found: Tensor = gelu_forward(x, bias, tanh)
    return found


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    threshold: int,
    seed: Tensor | int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """``residual + dropout(x + bias)``."""
    if seed is None:
        most = 2**62  # no difference of ends overflows, which a compiler of PyTorch's may take
        seed = torch.randint(most, (1,), dtype=torch.int64, device=x.device, generator=generator)
    elif isinstance(seed, int):
        signed = seed - 2**64 if seed >= 2**63 else seed
        seed = torch.full((1,), signed, dtype=torch.int64, device=x.device)
    found: Tensor = dropout_forward(x, bias, residual, seed, threshold)
    return found


def masked_softmax(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Probabilities over the keys, of ``scale * scores``."""
    found: Tensor = softmax_forward(scores, mask, causal, scale)
    return found


# --- Launches -------------------------------------------------------------------------------------


def _launch(function: Function | LayerNorm, **tensors: Tensor) -> None:
    lying = {
        name: _as_matrix(t) if name in MATRICES else t.contiguous() for name, t in tensors.items()
    }
    arrays = {name: _lying(t) for name, t in lying.items()}
    out = tensors["out"]
    parts: list[Tensor] = []  # kept, as copies in `lying` are, until all is queued on the stream

    def scratch(floats: int) -> int:
        parts.append(out.new_empty(floats, dtype=torch.float32))
        return parts[-1].data_ptr()

    def launched(where: tuple[int, int]) -> None:
        if isinstance(function, LayerNorm):
            layer_norm_launch.launch(function, arrays, scratch, where)
        else:
            launch(function, arrays, scratch, where)

    _on_stream(out, launched)


def _launch_softmax(softmax: Softmax, mask: Tensor | None = None, **tensors: Tensor) -> None:
    out = tensors["out"]
    lying = {name: _as_matrix(t) for name, t in tensors.items()}
    if mask is not None:
        adjacent = mask if mask.shape[-1] <= 1 or mask.stride(-1) == 1 else mask.contiguous()
        lying["mask"] = adjacent.expand(out.shape)  # a view, of one row for many where it is one
    arrays = {name: _lying(t) for name, t in lying.items()}
    _on_stream(out, lambda where: softmax_launch.launch(softmax, arrays, where))


def _lying(t: Tensor) -> Lying:
    return Lying(t.data_ptr(), tuple(t.shape), t.stride(), dtype_name(t))


def _on_stream(out: Tensor, launched: Callable[[tuple[int, int]], None]) -> None:
    """Launch on the current stream of the device of ``out``."""
    device = out.device.index
    with torch.cuda.device(device):
        launched((device, torch.cuda.current_stream(device).cuda_stream))


def _as_matrix(x: Tensor) -> Tensor:
    """Rows and columns, adjacent columns: a view if there is one, else a copy."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    columns = x.shape[-1]
    return x.reshape(x.numel() // columns if columns else 0, columns)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- LayerNorm ------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    out, statistics = _like_norm(x, weight, bias, epsilon)
    norm = LayerNorm(epsilon)
    _launch(norm, x=x, weight=weight, bias=bias, out=out, statistics=statistics)
    return out, statistics


def _like_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _contiguous(x), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


def _norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _like_norm_backward(dout, x, weight, statistics)
    given = {"dout": dout, "x": x, "weight": weight, "statistics": statistics}
    _launch(LayerNorm(0.0, backward=True), **given, out=dx, dweight=dweight, dbias=dbias)
    return dx, dweight, dbias


def _like_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(x), _contiguous(weight), _contiguous(weight)


layer_norm_forward = operation("layer_norm", _norm, _like_norm)
layer_norm_backward = operation("layer_norm_backward", _norm_backward, _like_norm_backward)


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, weight, statistics)


def _differentiate_norm(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *layer_norm_backward(dout, *ctx.saved_tensors), None


# --- Bias and GeLU --------------------------------------------------------------------------------


def _gelu(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    out = _contiguous(x)
    _launch(gelu(tanh), x=x, bias=bias, out=out)
    return out


def _gelu_backward(dout: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    dx, dbias = _contiguous(x), _contiguous(bias)
    _launch(gelu(tanh, backward=True), dout=dout, x=x, bias=bias, out=dx, dbias=dbias)
    return dx, dbias


gelu_forward = operation("bias_gelu", _gelu, lambda x, bias, tanh: _contiguous(x))
gelu_backward = operation(
    "bias_gelu_backward",
    _gelu_backward,
    lambda dout, x, bias, tanh: (_contiguous(x), _contiguous(bias)),
)


def _keep_for_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _differentiate_gelu(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = gelu_backward(dout, *ctx.saved_tensors, ctx.tanh)
    return dx, dbias, None


# --- Bias, dropout and residual -------------------------------------------------------------------


def _dropout(x: Tensor, bias: Tensor, residual: Tensor, seed: Tensor, threshold: int) -> Tensor:
    out = _contiguous(x)
    _launch(dropout(threshold), x=x, bias=bias, residual=residual, seed=seed, out=out)
    return out


def _dropout_backward(dout: Tensor, seed: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    dx, dbias = _contiguous(dout), dout.new_empty(dout.shape[-1])
    _launch(dropout(threshold, backward=True), dout=dout, seed=seed, out=dx, dbias=dbias)
    return dx, dbias


dropout_forward = operation(
    "bias_dropout_residual", _dropout, lambda x, bias, residual, seed, threshold: _contiguous(x)
)
dropout_backward = operation(
    "bias_dropout_residual_backward",
    _dropout_backward,
    lambda dout, seed, threshold: (_contiguous(dout), dout.new_empty(dout.shape[-1])),
)


def _keep_for_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, seed, ctx.threshold = inputs
    ctx.save_for_backward(seed)


def _differentiate_dropout(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    if not any(ctx.needs_input_grad[:2]):
        return None, None, dout, None, None
    dx, dbias = dropout_backward(dout, *ctx.saved_tensors, ctx.threshold)
    return dx, dbias, dout, None, None


# --- The masked softmax ---------------------------------------------------------------------------


def _softmax(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    out = _contiguous(scores)
    _, H, Q, _ = scores.shape
    _launch_softmax(Softmax(H, Q, causal, scale), mask, scores=scores, out=out)
    return out


def _softmax_backward(dout: Tensor, probabilities: Tensor, causal: bool, scale: float) -> Tensor:
    dscores = _contiguous(probabilities)
    _, H, Q, _ = probabilities.shape
    softmax = Softmax(H, Q, causal, scale, backward=True)
    _launch_softmax(softmax, probabilities=probabilities, dout=dout, out=dscores)
    return dscores


softmax_forward = operation(
    "masked_softmax", _softmax, lambda scores, mask, causal, scale: _contiguous(scores)
)
softmax_backward = operation(
    "masked_softmax_backward",
    _softmax_backward,
    lambda dout, probabilities, causal, scale: _contiguous(probabilities),
)


def _keep_for_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(output)


def _differentiate_softmax(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dscores = softmax_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return dscores, None, None, None


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "isoform.kernels.layer_norm, bias_gelu, bias_dropout_residual and masked_softmax cannot be "
        "differentiated twice; those of isoform.reference.torch.fused can"
    )


for _name, _backward, _keep in (
    ("layer_norm", _differentiate_norm, _keep_for_norm),
    ("bias_gelu", _differentiate_gelu, _keep_for_gelu),
    ("bias_dropout_residual", _differentiate_dropout, _keep_for_dropout),
    ("masked_softmax", _differentiate_softmax, _keep_for_softmax),
):
    torch.library.register_autograd(
        f"isoform::{_name}", _backward, setup_context=_keep, lib=LIBRARY
    )
    torch.library.register_autograd(f"isoform::{_name}_backward", _refuse, lib=LIBRARY)
