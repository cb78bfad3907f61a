"""What budgets are calibrated with: the definition, in float32, done five ways."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import NUMPY, NUMPY_TILED
from isoform.conformance.implementations.torch import REFERENCE, SDPA, TILED
from isoform.reference.contract import Arithmetic


def _in_float32(implementation: Implementation) -> Implementation:
    """The NumPy reference, computing in float32 (in float64 where operands are)."""
    assert implementation.backward is not None
    narrow = frozenset({"float16", "bfloat16", "float32"})
    return replace(
        implementation,
        name=f"{implementation.name}-float32",
        capabilities=replace(implementation.capabilities, dtypes=narrow, arithmetic=Arithmetic()),
        forward=partial(implementation.forward, compute_dtype="float32"),
        backward=partial(implementation.backward, compute_dtype="float32"),
    )


TRUSTED: tuple[Implementation, ...] = (
    _in_float32(NUMPY),
    _in_float32(NUMPY_TILED),
    REFERENCE,
    TILED,
    SDPA,
)
