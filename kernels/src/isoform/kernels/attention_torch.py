"""Attention over a sequence as an operation of PyTorch's: autograd, compilation, fake tensors.

As :mod:`isoform.kernels.torch_op`: two opaque operations, forward and backward, on PyTorch's
current stream of the operands' device. The output and lse are kept for the backward; δ, and the
tables of positions where there are such, exist while it runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from isoform.kernels import attention_library
from isoform.kernels.attention_arguments import ATTENTION, Options
from isoform.kernels.attention_choice import BY_NAME, Kernel
from isoform.kernels.launch import Pass
from isoform.kernels.torch_library import differentiable, operation, run
from isoform.reference.attention_contract import DIFFERENTIABLE, PLACES, SequenceShape

Places = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    kernel: Kernel,
    operands: Mapping[str, Any],
    options: Options,
    scale: float,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``out`` and, if it is wanted, ``lse`` of operands that have been checked."""
    q, k, v = (operands[name] for name in DIFFERENTIABLE)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, lse = attend(
        *(q, k, v, *_places(operands)),
        *(options.left, options.right, scale, kernel.name, options.wide, return_lse or save),
    )
    return out, lse


def backward(
    kernel: Kernel,
    arrays: Mapping[str, Any],
    options: Options,
    scale: float,
) -> list[Tensor]:
    """``dq, dk, dv``, by ``lse`` and either ``out`` or ``delta``."""
    found: list[Tensor] = attend_backward(
        *(arrays[name] for name in ("dout", *DIFFERENTIABLE)),
        *_places(arrays),
        *(arrays.get("out"), arrays["lse"], arrays.get("delta")),
        *(options.left, options.right, scale, kernel.name, options.wide, [True] * 3),
    )
    return found


def _places(operands: Mapping[str, Any]) -> Places:
    """Positions and segments as kernels read them: int64 ``[B, L]``."""
    B = operands["q"].shape[0]

    def wide(name: str) -> Tensor | None:
        x = operands.get(name)
        return None if x is None else x.to(torch.int64).expand(B, x.shape[-1])

    positions, key_positions, segments, key_segments = map(wide, PLACES)
    return positions, key_positions, segments, key_segments


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    key_positions: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
    left: int,
    right: int,
    scale: float,
    kernel: str,
    wide: bool,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``; an empty tensor where it is not to be kept."""
    if BY_NAME[kernel].library:
        out, lse = attention_library.forward(kernel, q, k, v, causal=right == 0, scale=scale)
        return out, lse if keep_lse else lse.new_empty(0)
    out, lse = _empty_results(q, wide, keep_lse)
    options = Options(left, right, wide)
    tensors = {
        **_present(q, k, v, positions, key_positions, segments, key_segments),
        "out": out,
        **({"lse": lse} if keep_lse else {}),
    }
    _run(BY_NAME[kernel].forward_of(options), (kernel, options), tensors, scale)
    return out, lse


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    key_positions: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor | None,
    left: int,
    right: int,
    scale: float,
    kernel: str,
    wide: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients ``wanted``; an empty tensor for each that is not."""
    if BY_NAME[kernel].library:
        assert out is not None
        found = attention_library.backward(
            *(kernel, dout, q, k, v, out, lse), causal=right == 0, scale=scale
        )
        # as is said of them beforehand: contiguous
        return [
            x.contiguous() if needed else x.new_empty(0)
            for x, needed in zip(found, wanted, strict=True)
        ]
    gradients = _empty_gradients(q, k, v, wide, wanted)
    asked = {
        name: x for name, x, needed in zip(DIFFERENTIABLE, gradients, wanted, strict=True) if needed
    }
    if delta is None:
        delta = torch.empty_like(lse)
    tensors = {
        **_present(q, k, v, positions, key_positions, segments, key_segments),
        "dout": dout,
        "lse": lse,
        "delta": delta,
        **({"out": out} if out is not None else {}),
        **{f"d{name}": x for name, x in asked.items()},
    }
    options = Options(left, right, wide)
    _run(
        BY_NAME[kernel].backward_of(options, list(asked)), (kernel, options, *asked), tensors, scale
    )
    return gradients


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, wide, keep_lse = others
    return _empty_results(q, wide, keep_lse)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> list[Tensor]:
    *_, wide, wanted = others
    return _empty_gradients(q, k, v, wide, wanted)


attention = operation("attention", _attention, _fake)
attention_backward = operation("attention_backward", _attention_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.left, ctx.right, ctx.scale, ctx.kernel, wide, _ = inputs
    out, lse = output
    ctx.save_for_backward(*operands, out, lse)
    # no gradient is computed of lse, nor of a block's output, and none said to be 0
    ctx.mark_non_differentiable(*((out, lse) if wide else (lse,)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dout is None:  # the output is not used
        return (None,) * 13
    *operands, out, lse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = attend_backward(
        *(dout, *operands, out, lse, None),
        *(ctx.left, ctx.right, ctx.scale, ctx.kernel, False, wanted),
    )
    found = (x if needed else None for x, needed in zip(gradients, wanted, strict=True))
    return (*found, *(None,) * 10)


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "isoform.kernels.attention cannot be differentiated twice; "
        "isoform.reference.torch.attention can"
    )


attend = differentiable(attention, _differentiate, _setup_context)
attend_backward = differentiable(attention_backward, _refuse)


def _present(q: Tensor, k: Tensor, v: Tensor, *places: Tensor | None) -> dict[str, Tensor]:
    named = zip(PLACES, places, strict=True)
    return {"q": q, "k": k, "v": v} | {name: x for name, x in named if x is not None}


def _empty_results(q: Tensor, wide: bool, keep_lse: bool) -> tuple[Tensor, Tensor]:
    B, Q, H, D = q.shape
    return (
        q.new_empty((B, Q, H, D), dtype=torch.float32 if wide else q.dtype),
        q.new_empty((B, H, Q) if keep_lse else 0, dtype=torch.float32),
    )


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, wide: bool, wanted: list[bool]
) -> list[Tensor]:
    dtype = torch.float32 if wide else q.dtype
    return [
        q.new_empty(x.shape if needed else 0, dtype=dtype)
        for x, needed in zip((q, k, v), wanted, strict=True)
    ]


def _run(one: Pass, which: Hashable, tensors: Mapping[str, Tensor], scale: float) -> None:
    """Launch the pass ``one``, known by ``which``, on PyTorch's stream of the tensors' device."""

    def shape() -> SequenceShape:
        B, Q, H, D = tensors["q"].shape
        K, G = tensors["k"].shape[1:3]
        return SequenceShape(B, Q, K, H, G, D)

    run(one, ("attention", which), shape, tensors, scale, ATTENTION)
