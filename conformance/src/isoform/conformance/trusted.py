"""What budgets are calibrated with: the definitions, in float32, each done several ways."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import (
    NUMPY,
    NUMPY_ATTENTION,
    NUMPY_ATTENTION_TILED,
    NUMPY_ROTARY,
    NUMPY_TILED,
)
from isoform.conformance.implementations.torch import REFERENCE, ROTARY, SDPA, TILED
from isoform.conformance.implementations.torch_attention import (
    REFERENCE_ATTENTION,
    SDPA_ATTENTION,
    TILED_ATTENTION,
)
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


def _in_base_2(implementation: Implementation) -> Implementation:
    """The same, lse by way of its logarithm to base 2, which is what kernels work with."""

    def forward(*operands: Any, **arguments: Any) -> Any:
        returned = implementation.forward(*operands, **arguments)
        if not arguments.get("return_lse"):
            return returned
        out, lse = returned
        ln2 = lse.dtype.type(np.log(2))
        return out, lse / ln2 * ln2

    return replace(implementation, name=f"{implementation.name}-base-2", forward=forward)


def _on_processors(implementation: Implementation) -> Implementation:
    """The same, trusted on a CPU alone: on a GPU it is a kernel that the suite knows faults of
    (``expected_failures.toml``), whose errors would become everybody's budget.
    """
    devices = frozenset({"cpu"})
    capabilities = replace(implementation.capabilities, devices=devices)
    return replace(implementation, capabilities=capabilities)


TRUSTED: tuple[Implementation, ...] = (
    _in_float32(NUMPY),
    _in_float32(NUMPY_TILED),
    REFERENCE,
    TILED,
    _on_processors(SDPA),
    _in_float32(NUMPY_ROTARY),
    ROTARY,
    _in_float32(NUMPY_ATTENTION),
    _in_base_2(_in_float32(NUMPY_ATTENTION_TILED)),
    REFERENCE_ATTENTION,
    TILED_ATTENTION,
    _on_processors(SDPA_ATTENTION),
)
