"""The kernels as an operation of PyTorch's: autograd, ``torch.compile``, fake tensors, export.

What PyTorch sees is two opaque operations, forward and backward, which it allocates for, schedules
and differentiates like its own. Both run on PyTorch's current stream of the operands' device.

What is kept for the backward is up to the kernel: nothing but the operands, or the output and two
numbers for each query.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from isoform.kernels.arguments import EVOFORMER
from isoform.kernels.choice import BY_NAME, Kernel
from isoform.kernels.launch import Pass
from isoform.kernels.torch_library import differentiable, operation, run
from isoform.reference.contract import DIFFERENTIABLE, Shape

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""q, k, v, mask, mask_bias, pair_bias, gate."""


def forward(
    kernel: Kernel, operands: Operands, scale: float, *, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """``out`` and, if it is wanted, ``lse`` of operands that have been checked."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    save = wanted and bool(kernel.saved)
    out, lse, _ = attend(*operands, scale, kernel.name, return_lse, save)
    return out, lse


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    kernel: str,
    return_lse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``lse`` and what the backward wants kept; an empty tensor for what is not wanted."""
    out, lse, saved = _empty_results(q, BY_NAME[kernel], return_lse, save)
    tensors = {
        **_present(q, k, v, mask, mask_bias, pair_bias, gate),
        "out": out,
        **({"lse": lse} if return_lse else {}),
        **(_parts(BY_NAME[kernel], saved) if save else {}),
    }
    _run(BY_NAME[kernel].forward, kernel, tensors, scale)
    return out, lse, saved


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    out: Tensor | None,
    saved: Tensor | None,
    scale: float,
    kernel: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients ``wanted``, in the contract's order; an empty tensor for each that is not."""
    operands = _present(q, k, v, mask, mask_bias, pair_bias, gate)
    gradients = _empty_gradients(operands, wanted)
    asked = {
        name: x for name, x, needed in zip(DIFFERENTIABLE, gradients, wanted, strict=True) if needed
    }
    tensors = {**operands, "dout": dout, **{f"d{name}": x for name, x in asked.items()}}
    if out is not None and saved is not None:
        tensors |= {"out": out, **_parts(BY_NAME[kernel], saved)}
    _run(BY_NAME[kernel].backward_of(list(asked)), (kernel, *asked), tensors, scale)
    return gradients


def _fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, kernel, return_lse, save = others
    return _empty_results(q, BY_NAME[kernel], return_lse, save)


def _fake_backward(dout: Tensor, *others: Any) -> list[Tensor]:
    *operands, _, _, _, _, wanted = others
    return _empty_gradients(_present(*operands), wanted)


attention = operation("evoformer_attention", _attention, _fake)
attention_backward = operation("evoformer_attention_backward", _attention_backward, _fake_backward)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *operands, ctx.scale, ctx.kernel, _, save = inputs
    out, lse, saved = output
    ctx.save_for_backward(*operands, *((out, saved) if save else (None, None)))
    ctx.mark_non_differentiable(lse, saved)  # no gradient is computed, and none said to be 0
    ctx.set_materialize_grads(False)  # nor are zeros made for what is passed over


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dsaved: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None:  # the output is not used
        return (None,) * 11
    # the arguments of the forward are the operands, mask among them, and four that are no tensors
    wanted = [needed for place, needed in enumerate(ctx.needs_input_grad[:7]) if place != 3]
    gradients = attend_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.kernel, wanted)
    dq, dk, dv, dmask_bias, dpair_bias, dgate = (
        x if needed else None for x, needed in zip(gradients, wanted, strict=True)
    )
    return dq, dk, dv, None, dmask_bias, dpair_bias, dgate, None, None, None, None


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "isoform.kernels.evoformer_attention cannot be differentiated twice; "
        "isoform.reference.torch.evoformer_attention can"
    )


attend = differentiable(attention, _differentiate, _setup_context)
attend_backward = differentiable(attention_backward, _refuse)


def _present(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
) -> dict[str, Tensor]:
    optional = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    return {"q": q, "k": k, "v": v} | {n: x for n, x in optional.items() if x is not None}


def _empty_results(
    q: Tensor, kernel: Kernel, return_lse: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, Q, H, _ = q.shape
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((B, S, H, Q) if return_lse else 0, dtype=torch.float32),
        q.new_empty((sum(kernel.saved.values()), B, S, H, Q) if save else 0, dtype=torch.uint8),
    )


def _parts(kernel: Kernel, saved: Tensor) -> dict[str, Tensor]:
    """What the kernel saves, in the one tensor that PyTorch keeps for it."""
    parts = torch.split(saved, list(kernel.saved.values()))
    return dict(zip(kernel.saved, parts, strict=True))


def _empty_gradients(operands: Mapping[str, Tensor], wanted: list[bool]) -> list[Tensor]:
    q = operands["q"]
    return [
        q.new_empty(operands[name].shape if needed and name in operands else 0)
        for name, needed in zip(DIFFERENTIABLE, wanted, strict=True)
    ]


def _run(one: Pass, which: Hashable, tensors: Mapping[str, Tensor], scale: float) -> None:
    """Launch the pass ``one``, known by ``which``, on PyTorch's stream of the tensors' device."""

    def shape() -> Shape:
        B, S, Q, H, D = tensors["q"].shape
        K, G = tensors["k"].shape[2:4]
        return Shape(B, S, Q, K, H, G, D)

    run(one, which, shape, tensors, scale, EVOFORMER)
