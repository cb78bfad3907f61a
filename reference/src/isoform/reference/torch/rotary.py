r"""Rotary embedding in PyTorch: :mod:`isoform.reference.numpy.rotary` once more, differentiable as
often as need be, on any device, and traced whole by ``torch.compile``.

Its derivative is written out, not left to autograd: the gradient is turned back by the opposite
angle, which needs the tables of cosine and sine but not x. The derivative of that is again a
rotation, so the second derivative is had by the same lines.

float16 and bfloat16 operands are lifted to float32, multiplied with tables that were rounded to
float32 once, and results rounded once. Angles are had in float64 throughout.

Under ``torch.compile`` the base, the rotary dim and the scaling are constants of the graph; batch
and length may vary. (``dynamic=True``, which makes symbols of the former too, cannot be traced.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoform.reference.rotary_contract import resolve_rotary_dim, rotary_call
from isoform.reference.rotary_scaling import FIELDS, SCALINGS, Scaling, frequencies


def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Tensor:
    """Turn pairs of channels by angles that grow with the position.

    Args:
        x: Queries or keys ``[B, L, H, D]``, any float dtype.
        positions: Integers ``[L]``, or ``[B, L]`` where they differ between examples; in any order,
            negative ones too.
        base: Of the frequencies, above 1.
        rotary_dim: How many channels are turned, an even number; None for all D.
        layout: ``"half"`` for pairs (i, i + d/2), ``"interleaved"`` for pairs (2i, 2i + 1).
        scaling: What is done to the frequencies for longer contexts
            (:mod:`isoform.reference.rotary_scaling`).

    Returns:
        ``out [B, L, H, D]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape or device, or the value of another argument, is wrong.

    Source:
        Su et al., arXiv 2104.09864, equation 34; :mod:`isoform.reference.numpy.rotary`.
    """
    rotary_call(x, positions, base=base, rotary_dim=rotary_dim, layout=layout, scaling=scaling)
    d = resolve_rotary_dim(rotary_dim, x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = rotary_tables(positions, d, base=base, scaling=scaling, dtype=wide)
    return _turned(x, cos, sin, layout)


def rotary_embedding_backward(
    dout: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
) -> Tensor:
    """The gradient of :func:`rotary_embedding` by x: what autograd computes, for those who do
    without it.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L, H, D]``.
        positions, base, rotary_dim, layout, scaling: As in the forward.

    Returns:
        ``dx [B, L, H, D]`` in dout's dtype; differentiable itself.

    Raises:
        TypeError, ValueError: As in the forward.

    Source:
        :mod:`isoform.reference.numpy.rotary`.
    """
    rotary_call(
        dout,
        positions,
        base=base,
        rotary_dim=rotary_dim,
        layout=layout,
        scaling=scaling,
        called="dout",
    )
    d = resolve_rotary_dim(rotary_dim, dout.shape[-1])
    wide = torch.promote_types(dout.dtype, torch.float32)
    cos, sin = rotary_tables(positions, d, base=base, scaling=scaling, dtype=wide)
    return _turned(dout, cos, -sin, layout)


def rotary_tables(
    positions: Tensor,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, times the amplitude of the scaling.

    Args:
        positions: Integers of any shape ``[...]``; exact up to 2²¹, of either sign (rule ROT-4).
        rotary_dim: How many channels are turned, an even number.
        base: As in :func:`rotary_embedding`.
        scaling: As in :func:`rotary_embedding`.
        dtype: What they are rounded to, once.

    Returns:
        ``cos [..., rotary_dim / 2]`` and ``sin`` alike, on the device of ``positions``.

    Source:
        Su et al., arXiv 2104.09864, equation 34; the angle in two parts, rule ROT-4.
    """
    high, low, amplitude = _frequencies(rotary_dim, float(base), *_plain(scaling))
    p = positions.to(torch.float64)[..., None]
    coarse, fine = p * p.new_tensor(high), p * p.new_tensor(low)  # the first is exact
    cos = coarse.cos() * fine.cos() - coarse.sin() * fine.sin()
    sin = coarse.sin() * fine.cos() + coarse.cos() * fine.sin()
    return (amplitude * cos).to(dtype), (amplitude * sin).to(dtype)


def _plain(scaling: Scaling | None) -> tuple[str, tuple[Any, ...]]:
    """A scaling's name and arguments, which any ``torch.compile`` can hold as constants."""
    if scaling is None:
        return "", ()
    return scaling.name, tuple([getattr(scaling, field) for field in FIELDS[scaling.name]])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _frequencies(
    rotary_dim: int, base: float, name: str, arguments: tuple[Any, ...]
) -> tuple[list[float], list[float], float]:
    """The frequencies as plain numbers: constants of the graph that ``torch.compile`` traces."""
    scaling = SCALINGS[name](*arguments) if name else None
    high, low, amplitude = frequencies(rotary_dim, base, scaling)
    return high.tolist(), low.tolist(), amplitude


def _turned(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    turned: Tensor = _Rotation.apply(x, cos, sin, layout)  # type: ignore[no-untyped-call]
    return turned


class _Rotation(torch.autograd.Function):
    """Turn the pairs of the first channels of ``x [B, L, H, D]``, by tables ``[(B,) L, d/2]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        cos, sin = cos[..., None, :], sin[..., None, :]  # all heads of a token turn alike
        d = 2 * cos.shape[-1]
        turning = x[..., :d].to(cos.dtype)
        if layout == "half":
            x1, x2 = turning[..., : d // 2], turning[..., d // 2 :]
            y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
        else:
            x1, x2 = turning[..., 0::2], turning[..., 1::2]
            y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).reshape(turning.shape)
        return torch.cat((y.to(x.dtype), x[..., d:]), -1)  # what passes through keeps its bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.layout = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (dout,) = gradients
        return _turned(dout, cos, -sin, ctx.layout), None, None, None
