r"""Rotary embedding, defined.

A transformer learns where a token is from what is done to its queries and keys. Rotary embedding
turns them: the first d of a head's D channels form d/2 pairs, and pair i of the token at position p
is turned by the angle p·ω_i (Su et al., arXiv 2104.09864, equation 34)::

    y₁ = a (x₁ cos pω_i − x₂ sin pω_i)
    y₂ = a (x₂ cos pω_i + x₁ sin pω_i)          ω_i = base^(−2i/d),  i = 0 … d/2 − 1

with a = 1 unless a scaling multiplies (:mod:`isoform.reference.rotary_scaling`). The other D − d
channels pass through untouched. What is gained: the product of a query at p and a key at r depends
on p − r alone, for turning both by the same angle changes no product::

    R(pω) q · R(rω) k = q · R((r − p)ω) k

Which channels are a pair is a matter of convention, and models were trained with both: ``half``
pairs (i, i + d/2), ``interleaved`` pairs (2i, 2i + 1).

Backward
--------
The operation is linear in x, and what is turned is turned back: the transpose of a rotation is the
rotation by the opposite angle. So with a bar for the gradient of the loss ::

    x̅ = a R(−pω) y̅

which is the same function with the sign of the sine changed. The amplitude stays: the transpose of
a·R is a·Rᵀ, not its inverse.

The angle
---------
p·ω is where implementations go wrong. In float32, ω has 24 bits and so has the product: at position
512K the angle is off by up to 3·10⁻², and the first pairs are noise. Here ω = high + low, exact to
more than 80 bits, and the product of p ≤ 2²¹ with the 32 bits of high is exact in float64::

    cos(p·ω) = cos(p·high) cos(p·low) − sin(p·high) sin(p·low)        and sin alike

so that every cosine and sine, however small, is right to float32's last bit.

Rules are numbered in the specification, ``docs/spec/rotary.md``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from isoform.reference.contract import ORACLE_DTYPES
from isoform.reference.numpy.evoformer import resolve_compute_dtype
from isoform.reference.rotary_contract import resolve_rotary_dim, rotary_call
from isoform.reference.rotary_scaling import Scaling, frequencies

Array = npt.NDArray[Any]


def rotary_embedding(
    x: Array,
    positions: Array,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
    compute_dtype: npt.DTypeLike | None = None,
) -> Array:
    """Turn pairs of channels by angles that grow with the position.

    Args:
        x: Queries or keys ``[B, L, H, D]``, any float dtype (complex128 too).
        positions: Integers ``[L]``, or ``[B, L]`` where they differ between examples; in any order,
            negative ones too.
        base: Of the frequencies, above 1.
        rotary_dim: How many channels are turned, an even number; None for all D.
        layout: ``"half"`` for pairs (i, i + d/2), ``"interleaved"`` for pairs (2i, 2i + 1).
        scaling: What is done to the frequencies for longer contexts
            (:mod:`isoform.reference.rotary_scaling`).
        compute_dtype: Arithmetic to use once angles are had; float64 by default, or x's dtype where
            that is wider. Angles are had in float64 whatever this is.

    Returns:
        ``out [B, L, H, D]`` in x's dtype.

    Raises:
        TypeError: An operand's dtype, or the type of another argument, is wrong.
        ValueError: An operand's shape, or the value of another argument, is wrong.

    Source:
        Su et al., arXiv 2104.09864, equation 34; partial turning as in GPT-J and GPT-NeoX.
    """
    rotary_call(
        x,
        positions,
        base=base,
        rotary_dim=rotary_dim,
        layout=layout,
        scaling=scaling,
        dtypes=ORACLE_DTYPES,
    )
    d = resolve_rotary_dim(rotary_dim, x.shape[-1])
    compute = resolve_compute_dtype(x, compute_dtype)
    cos, sin = rotary_tables(positions, d, base=base, scaling=scaling, dtype=compute)
    return _turned(x, cos, sin, d, layout)


def rotary_embedding_backward(
    dout: Array,
    positions: Array,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Scaling | None = None,
    compute_dtype: npt.DTypeLike | None = None,
) -> Array:
    """The gradient of :func:`rotary_embedding` by x, given that of its output: the rotation by the
    opposite angle. x itself is not needed.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L, H, D]``.
        positions, base, rotary_dim, layout, scaling, compute_dtype: As in the forward.

    Returns:
        ``dx [B, L, H, D]`` in dout's dtype.

    Raises:
        TypeError, ValueError: As in the forward.

    Source:
        The derivation is in this module's docstring.
    """
    rotary_call(
        dout,
        positions,
        base=base,
        rotary_dim=rotary_dim,
        layout=layout,
        scaling=scaling,
        dtypes=ORACLE_DTYPES,
        called="dout",
    )
    d = resolve_rotary_dim(rotary_dim, dout.shape[-1])
    compute = resolve_compute_dtype(dout, compute_dtype)
    cos, sin = rotary_tables(positions, d, base=base, scaling=scaling, dtype=compute)
    return _turned(dout, cos, -sin, d, layout)


def rotary_tables(
    positions: Array,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> tuple[Array, Array]:
    """Cosine and sine of every angle, times the amplitude of the scaling.

    Args:
        positions: Integers of any shape ``[...]``; exact up to 2²¹, of either sign (rule ROT-4).
        rotary_dim: How many channels are turned, an even number.
        base: As in :func:`rotary_embedding`.
        scaling: As in :func:`rotary_embedding`.
        dtype: What they are rounded to, once.

    Returns:
        ``cos [..., rotary_dim / 2]`` and ``sin`` alike.
    """
    *parts, amplitude = frequencies(rotary_dim, float(base), scaling)
    p = positions.astype(np.float64)[..., None]
    high, low = (np.asarray(part, like=p) for part in parts)  # on a GPU, if positions are there
    coarse, fine = p * high, p * low  # the first is exact
    cos = np.cos(coarse) * np.cos(fine) - np.sin(coarse) * np.sin(fine)
    sin = np.sin(coarse) * np.cos(fine) + np.cos(coarse) * np.sin(fine)
    return (amplitude * cos).astype(dtype), (amplitude * sin).astype(dtype)


def pairs(x: Array, layout: str) -> tuple[Array, Array]:
    """Views of the first and of the second channel of every pair: ``[..., d]`` to ``[..., d/2]``
    (rule ROT-3).
    """
    half = x.shape[-1] // 2
    if layout == "half":
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def _turned(x: Array, cos: Array, sin: Array, d: int, layout: str) -> Array:
    """A copy of ``x`` with the first d channels turned, in the arithmetic of the tables."""
    cos, sin = cos[..., None, :], sin[..., None, :]  # all heads of a token turn alike
    x1, x2 = (part.astype(cos.dtype) for part in pairs(x[..., :d], layout))
    out = x.copy()  # what passes through keeps its bits
    y1, y2 = pairs(out[..., :d], layout)
    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN propagate as IEEE says
        y1[...] = (x1 * cos - x2 * sin).astype(x.dtype)
        y2[...] = (x2 * cos + x1 * sin).astype(x.dtype)
    return out
