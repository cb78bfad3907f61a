"""The kernels as an operation of PyTorch's: autograd, ``torch.compile``, fake tensors, export.

What PyTorch sees is two opaque operations, forward and backward, which it allocates for, schedules
and differentiates like its own. Both run on PyTorch's current stream of the operands' device.

Nothing is kept for the backward but the operands: it computes the softmax again, as it must do to
take δ from an output that is neither gated nor rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoform.kernels import plain
from isoform.kernels.arguments import SCRATCH, View
from isoform.kernels.compiler import toolkit
from isoform.reference.contract import DIFFERENTIABLE, Shape, dtype_name


@torch.library.custom_op("isoform::evoformer_attention", mutates_args=(), device_types="cuda")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of operands that have been checked."""
    shape = _shape(q, k)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _per_query(q)
    views = _views(
        q=q,
        k=k,
        v=v,
        mask=mask,
        mask_bias=mask_bias,
        pair_bias=pair_bias,
        gate=gate,
        out=out,
        lse=lse,
    )
    with _stream_of(q):
        plain.launch(plain.forward_launches(shape), shape, dtype_name(q), views, scale)
    return out, lse


@torch.library.custom_op(
    "isoform::evoformer_attention_backward", mutates_args=(), device_types="cuda"
)
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients ``wanted``, in the contract's order; an empty tensor for each that is not."""
    shape = _shape(q, k)
    operands = {
        "q": q, "k": k, "v": v, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate
    }  # fmt: skip
    gradients = _empty_gradients(operands, wanted)
    asked = [name for name, is_wanted in zip(DIFFERENTIABLE, wanted, strict=True) if is_wanted]
    results = {f"d{name}": x for name, x in zip(DIFFERENTIABLE, gradients, strict=True)}
    written = {name: x for name, x in results.items() if name[1:] in asked}
    scratch = {name: _per_query(q) for name in SCRATCH}
    views = _views(dout=dout, mask=mask, **operands, **written, **scratch)
    with _stream_of(q):
        plain.launch(plain.backward_launches(shape, asked), shape, dtype_name(q), views, scale)
    return gradients


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _per_query(q)


@attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    operands = {
        "q": q, "k": k, "v": v, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate
    }  # fmt: skip
    return _empty_gradients(operands, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands)
    ctx.mark_non_differentiable(output[1])  # its gradient is not computed, and not said to be 0


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    # the arguments of the forward are the operands, mask among them, and the scale
    wanted = [needed for place, needed in enumerate(ctx.needs_input_grad[:7]) if place != 3]
    gradients = attention_backward(dout, *ctx.saved_tensors, ctx.scale, wanted)
    dq, dk, dv, dmask_bias, dpair_bias, dgate = (
        x if needed else None for x, needed in zip(gradients, wanted, strict=True)
    )
    return dq, dk, dv, None, dmask_bias, dpair_bias, dgate, None


attention.register_autograd(_differentiate, setup_context=_setup_context)


def _shape(q: Tensor, k: Tensor) -> Shape:
    B, S, Q, H, D = q.shape
    return Shape(B, S, Q, k.shape[2], H, k.shape[3], D)


def _per_query(q: Tensor) -> Tensor:
    """A number for each query and head ``[B, S, H, Q]``."""
    B, S, Q, H, _ = q.shape
    return q.new_empty((B, S, H, Q), dtype=torch.float32)


def _empty_gradients(operands: Mapping[str, Tensor | None], wanted: list[bool]) -> list[Tensor]:
    q = operands["q"]
    assert q is not None
    return [
        q.new_empty(x.shape if needed and x is not None else 0)
        for x, needed in zip((operands[name] for name in DIFFERENTIABLE), wanted, strict=True)
    ]


def _views(**tensors: Tensor | None) -> dict[str, View]:
    return {name: View(x.data_ptr(), x.stride()) for name, x in tensors.items() if x is not None}


@contextmanager
def _stream_of(q: Tensor) -> Iterator[None]:
    """CuPy's current device and stream set to PyTorch's."""
    toolkit()  # says what to install where CuPy is missing
    import cupy

    stream = _Stream(torch.cuda.current_stream(q.device).cuda_stream)
    with cupy.cuda.Device(q.device.index), cupy.cuda.Stream.from_external(stream):
        yield


@dataclass(frozen=True)
class _Stream:
    """A stream under the CUDA stream protocol, which not every PyTorch speaks that we support."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the version of the protocol, and the stream
