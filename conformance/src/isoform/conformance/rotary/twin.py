"""The definition, run with an implementation's declared arithmetic: its twin.

Angles are exact; cosine and sine are rounded to ``accumulate``, products and their sum are done in
it, and the result is rounded once, to the operands' dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import FORMATS, Array, rounded
from isoform.conformance.rotary.cases import Turn
from isoform.conformance.rotary.values import by_example, shape_of
from isoform.reference.contract import Arithmetic
from isoform.reference.numpy.rotary import pairs, rotary_tables


def twin(
    operands: Operands,
    turn: Turn,
    dtype: str,
    arithmetic: Arithmetic,
    *,
    gradients: bool,
    processor: Processor | None = None,
) -> Operands:
    """All results of one call, with every step rounded as ``arithmetic`` declares.

    Args:
        operands: x, positions and dout, in the call's dtype.
        turn: How it is turned.
        dtype: The call's dtype.
        arithmetic: The declared arithmetic.
        gradients: Whether ``dx`` is wanted too.
        processor: As in :func:`~.chunks.in_chunks`.

    Returns:
        By the name of the result, in float64, rounded to the call's dtype.
    """
    wide = FORMATS[arithmetic.resolve("accumulate", dtype)].dtype

    def step(chunk: Operands) -> dict[str, tuple[Array]]:
        found = {"out": (_turned(chunk["x"], chunk["positions"], turn, dtype, wide, 1),)}
        if gradients:
            found["dx"] = (_turned(chunk["dout"], chunk["positions"], turn, dtype, wide, -1),)
        return found

    turned = in_chunks(step, by_example(operands), shape_of(operands), processor)
    return {name: x for name, (x,) in turned.items()}


def _turned(x: Array, positions: Array, turn: Turn, dtype: str, wide: Any, direction: int) -> Array:
    d = turn.rotary_dim or x.shape[-1]
    cos, sin = rotary_tables(positions, d, base=turn.base, scaling=turn.scaling, dtype=wide)
    cos, sin = cos[..., None, :], direction * sin[..., None, :]
    out = x.astype(np.float64)
    y1, y2 = pairs(out[..., :d], turn.layout)
    with np.errstate(all="ignore"):
        x1, x2 = (part.astype(wide) for part in pairs(x[..., :d], turn.layout))
        y1[...] = rounded(x1 * cos - x2 * sin, dtype)
        y2[...] = rounded(x2 * cos + x1 * sin, dtype)
    return out
