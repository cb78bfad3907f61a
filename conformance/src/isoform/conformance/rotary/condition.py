r"""How large an error may honestly be: the first-order condition of every result.

With c and s the cosine and sine of an angle θ, times the amplitude, ::

    y₁ = x₁c − x₂s,    y₂ = x₂c + x₁s

a relative error of w in c, in s, in both products and in their sum, and one of u in the rounding of
the result, move y₁ by at most a small multiple of u·κ, with ::

    κ(y₁) = |y₁| + w/u · (|x₁c| + |x₂s|)          κ(y₂) = |y₂| + w/u · (|x₂c| + |x₁s|)

where w is float32's unit roundoff, or u where that is smaller: tables and products are float32 at
least, whatever the operands (rule ROT-5). So a short dtype is held to its own last place, even
where the two products cancel.

That takes the angle as given. The contract has it computed in float64, where ω and its product with
the position lose 2⁻⁵³ of it each. What that does to c and s is not relative to them: near a zero of
the cosine it may be all of it. The rotation by a wrong angle moves y₁ along y₂, so to κ is added ::

    |θ| · 2⁻⁵² / u · (|x₁s| + |x₂c|)              and for y₂ alike

which at position 2²¹ is 1/128 for float32, nothing for shorter dtypes, and for float64 operands the
whole of the error: they are turned no more exactly than float64 angles can be.

Channels that pass through have κ = λ = 0: they are copied.

λ, what multiplies the smallest subnormal number: the result's own rounding, and two products, in
float32 at least.
"""

from __future__ import annotations

import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.operation import Condition
from isoform.conformance.rotary.cases import Turn
from isoform.conformance.rotary.values import by_example, shape_of
from isoform.reference.contract import dtype_name
from isoform.reference.numpy.rotary import pairs, rotary_tables
from isoform.reference.rotary_scaling import frequencies

ANGLE = 2.0**-52
"""Relative error of an angle in float64: of the frequency, and of its product with the position."""


def conditions(
    operands: Operands, turn: Turn, *, gradients: bool, processor: Processor | None = None
) -> dict[str, Condition]:
    """The condition of every result of one call.

    Args:
        operands: x, positions and dout.
        turn: How it is turned.
        gradients: Whether that of ``dx`` is wanted too.
        processor: As in :func:`~.chunks.in_chunks`.

    Returns:
        By the name of the result, in its shape.
    """
    x = operands["x"]
    float_format, float32 = FORMATS[dtype_name(x)], FORMATS["float32"]
    unit = float_format.unit_roundoff

    def step(chunk: Operands) -> dict[str, tuple[Array]]:
        found = {"out": (_relative(chunk["x"], chunk["positions"], turn, unit, 1),)}
        if gradients:
            found["dx"] = (_relative(chunk["dout"], chunk["positions"], turn, unit, -1),)
        return found

    underflow = np.zeros(x.shape[-1])
    underflow[: turn.rotary_dim or x.shape[-1]] = (
        2 * min(1.0, float32.smallest / float_format.smallest) + 1
    )
    relative = in_chunks(step, by_example(operands), shape_of(operands), processor)
    return {
        name: Condition(kappa, np.broadcast_to(underflow, kappa.shape))
        for name, (kappa,) in relative.items()
    }


def _relative(x: Array, positions: Array, turn: Turn, unit: float, direction: int) -> Array:
    """κ of turning ``x [B, L, H, D]``, at ``positions [B, L]``, where u is ``unit``."""
    d = turn.rotary_dim or x.shape[-1]
    cos, sin = rotary_tables(positions, d, base=turn.base, scaling=turn.scaling, dtype=np.float64)
    p = positions.astype(np.float64)[..., None]
    angle = np.abs(p * np.asarray(frequencies(d, turn.base, turn.scaling).high, like=p))
    c, s, lost = (table[..., None, :] for table in (cos, direction * sin, angle))
    lost = lost * (ANGLE / unit)
    wide_unit = min(1.0, FORMATS["float32"].unit_roundoff / unit)

    relative = np.zeros_like(x, np.float64)
    with np.errstate(all="ignore"):
        x1, x2 = pairs(x[..., :d].astype(np.float64), turn.layout)
        k1, k2 = pairs(relative[..., :d], turn.layout)
        along, across = np.abs(x1 * c) + np.abs(x2 * s), np.abs(x1 * s) + np.abs(x2 * c)
        k1[...] = np.abs(x1 * c - x2 * s) + wide_unit * along + lost * across
        k2[...] = np.abs(x2 * c + x1 * s) + wide_unit * across + lost * along
    return relative
