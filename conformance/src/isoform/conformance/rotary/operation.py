"""Rotary embedding, described for the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isoform.conformance.case import Case, Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import Array
from isoform.conformance.frameworks import Framework
from isoform.conformance.operation import InvalidCall, Operation
from isoform.conformance.rotary.cases import CASES, Turn, features, turn_of
from isoform.conformance.rotary.condition import conditions
from isoform.conformance.rotary.twin import twin
from isoform.conformance.rotary.values import by_example, draw, shape_of
from isoform.conformance.signatures import ROTARY_EMBEDDING as SIGNATURE
from isoform.reference.contract import Call
from isoform.reference.numpy import rotary_embedding, rotary_embedding_backward
from isoform.reference.numpy.rotary import pairs
from isoform.reference.rotary_contract import NAME, RotaryShape
from isoform.reference.rotary_scaling import LongRoPE


def call_for(
    case: Case,
    *,
    gradients: frozenset[str] = frozenset(),
    lse: bool = False,
    device: str = "cpu",
    architecture: str = "",
) -> Call:
    """The call that ``case`` makes."""
    return Call(NAME, case.shape, case.dtype, case.operands, gradients, lse, device, architecture)


def reference(
    operands: Operands, case: Case, gradients: bool, processor: Processor | None = None
) -> Operands:
    """The oracle's results in float64, by name."""
    options = dict(case.options)

    def step(chunk: Operands) -> dict[str, tuple[Array]]:
        x, dout = (chunk[name].astype(np.float64) for name in ("x", "dout"))
        results = {"out": (rotary_embedding(x, chunk["positions"], **options),)}
        if gradients:
            results["dx"] = (rotary_embedding_backward(dout, chunk["positions"], **options),)
        return results

    found = in_chunks(step, by_example(operands), shape_of(operands), processor)
    return {name: x for name, (x,) in found.items()}


def zeros(operands: Operands, results: Operands, turn: Turn) -> dict[str, Array]:
    """Where a result is exactly zero by contract: a pair of zeros, whatever its angle (ROT-2)."""
    sources = {"out": operands["x"], "dx": operands["dout"]}
    return {name: _zeros(sources[name], turn) for name in results}


def _zeros(x: Array, turn: Turn) -> Array:
    fixed: Array = x == 0
    first, second = pairs(fixed[..., : turn.rotary_dim], turn.layout)
    first[...] = second[...] = first & second
    return fixed


def memory_case(length: int) -> Case:
    """Two heads: what is held besides them are the tables."""
    shape = RotaryShape(1, length, 2, 64)
    operands = features(shape, Turn(), "normal")
    return Case(f"rotary/memory-{length}/fp32/plain", NAME, shape, "float32", operands)


Change = Callable[[Any, Framework], Any]


def _wrong(
    name: str, what: str, change: Change, raises: type[Exception] = ValueError
) -> InvalidCall:
    """A call with one argument spoiled, answered by an exception that names it."""
    return InvalidCall(
        f"{name}: {what}",
        lambda operands, library: operands | {name: change(operands.get(name), library)},
        raises,
        name,
    )


INVALID_CALLS = (
    _wrong("x", "an axis missing", lambda x, _: x[0]),
    _wrong("x", "an axis too many", lambda x, _: x[None]),
    _wrong("x", "bool", lambda x, _: x > 0, TypeError),
    _wrong("x", "no array", lambda x, _: "x", TypeError),
    _wrong("positions", "another length than x", lambda x, _: x[:-1]),
    _wrong("positions", "another batch than x", lambda x, _: x[None][[0, 0, 0]]),
    _wrong("positions", "an axis too many", lambda x, _: x[None, None]),
    _wrong("positions", "floating", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("positions", "no array", lambda x, _: 3, TypeError),
    _wrong("positions", "on another device", lambda x, library: library.other_device(x)),
    _wrong("base", "1", lambda x, _: 1.0),
    _wrong("base", "infinite", lambda x, _: float("inf")),
    _wrong("base", "a string", lambda x, _: "10000", TypeError),
    _wrong("rotary_dim", "odd", lambda x, _: 3),
    _wrong("rotary_dim", "0", lambda x, _: 0),
    _wrong("rotary_dim", "more than D", lambda x, _: 10),
    _wrong("rotary_dim", "no integer", lambda x, _: 4.0, TypeError),
    _wrong("layout", "unknown", lambda x, _: "thirds"),
    _wrong("scaling", "a name", lambda x, _: "yarn", TypeError),
    _wrong("scaling", "too few factors", lambda x, _: LongRoPE((1.0,), (1.0,), 2048, 4096)),
)

ROTARY_EMBEDDING = Operation(
    signature=SIGNATURE,
    short="rotary",
    cases=CASES,
    draw=draw,
    call_for=call_for,
    reference=reference,
    conditions=lambda operands, case, results, gradients: conditions(
        operands, turn_of(case), gradients=gradients
    ),
    twin=lambda operands, case, arithmetic, gradients: twin(
        operands, turn_of(case), case.dtype, arithmetic, gradients=gradients
    ),
    zeros=lambda operands, case, results: zeros(operands, results, turn_of(case)),
    invalid_calls=INVALID_CALLS,
    probe=Case(
        "rotary/invalid/fp32/probe",
        NAME,
        RotaryShape(2, 5, 3, 8),
        "float32",
        features(RotaryShape(2, 5, 3, 8), Turn(), "normal"),
    ),
    memory_case=memory_case,
)
