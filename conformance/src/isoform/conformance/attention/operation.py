"""Attention over a sequence, described for the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isoform.conformance.attention.cases import (
    CASES,
    CAUSAL,
    scale_of,
    shape_of,
    window_of,
)
from isoform.conformance.attention.condition import conditions
from isoform.conformance.attention.twin import twin
from isoform.conformance.attention.values import draw, with_places
from isoform.conformance.case import Case, Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import Array
from isoform.conformance.frameworks import Framework
from isoform.conformance.operation import InvalidCall, Operation
from isoform.conformance.signatures import ATTENTION as SIGNATURE
from isoform.reference.attention_contract import NAME, PLACES, SequenceShape
from isoform.reference.contract import Call
from isoform.reference.numpy import attention, attention_backward


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

    def step(chunk: Operands) -> dict[str, tuple[Array, ...]]:
        wide: dict[str, Any] = {
            name: x if name in PLACES else x.astype(np.float64) for name, x in chunk.items()
        }
        dout = wide.pop("dout")
        out, lse = attention(**wide, **options, return_lse=True)
        results: dict[str, tuple[Array, ...]] = {"out": (out,), "lse": (lse,)}
        if gradients:
            found = attention_backward(dout, **wide, **options)._asdict()
            results |= {name: (x,) for name, x in found.items()}
        return results

    whole = in_chunks(step, with_places(operands), shape_of(operands), processor)
    return {name: x for name, (x,) in whole.items()}


def zeros(operands: Operands, case: Case, results: Operands) -> dict[str, Array]:
    """Where a result is exactly zero by contract (rules SEQ-4 and SEQ-5)."""
    none_left = results["lse"].swapaxes(1, 2) == -np.inf  # [B, Q, H]
    dead = np.broadcast_to(none_left[..., None], results["out"].shape)
    fixed = {"out": dead, "dq": dead}
    padding = with_places(operands)["key_segments"] < 0
    if padding.any():
        dropped = np.broadcast_to(padding[..., None, None], operands["k"].shape)
        fixed |= {"dk": dropped, "dv": dropped}
    return {name: where for name, where in fixed.items() if name in results}


def memory_case(length: int) -> Case:
    """Packed documents under a causal mask: no mask of size L × L should be made of them."""
    shape = SequenceShape(1, length, length, 2, 2, 16)
    return Case(
        f"attention/memory-{length}/fp32/packed",
        NAME,
        shape,
        "float32",
        frozenset({"segments", "causal"}),
        values="packed",
        options=CAUSAL,
    )


Change = Callable[[Any, Framework], Any]


def _wrong(
    name: str, what: str, change: Change, raises: type[Exception] = ValueError
) -> InvalidCall:
    """A call with one argument spoiled, answered by an exception that names it."""
    return InvalidCall(
        f"{name}: {what}",
        lambda arguments, library: arguments | {name: change(arguments.get(name), library)},
        raises,
        name,
    )


def _without(name: str, needed: str) -> InvalidCall:
    """A call that leaves out ``needed``, where ``name`` is given."""
    return InvalidCall(
        f"{name}: without {needed}",
        lambda arguments, library: {key: x for key, x in arguments.items() if key != needed},
        ValueError,
        needed,
    )


def _three_heads(arguments: dict[str, Any], library: Framework) -> dict[str, Any]:
    return arguments | {name: arguments[name][:, :, [0, 1, 1]] for name in ("k", "v")}


INVALID_CALLS = (
    _wrong("q", "an axis missing", lambda x, _: x[0]),
    _wrong("k", "an axis too many", lambda x, _: x[None]),
    _wrong("k", "other examples than q", lambda x, _: x[:1]),
    _wrong("k", "another head dim than q", lambda x, _: x[..., :-1]),
    _wrong("v", "another length than k", lambda x, _: x[:, :-1]),
    _wrong("v", "another head dim than q", lambda x, _: x[..., :-1]),
    _wrong("v", "fewer heads than k", lambda x, _: x[:, :, :1]),
    InvalidCall("heads: G does not divide H", _three_heads, ValueError, "heads"),
    _wrong("positions", "another length than q", lambda x, _: x[..., :-1]),
    _wrong("key_positions", "another length than k", lambda x, _: x[..., :-1]),
    _wrong("segments", "another length than q", lambda x, _: x[..., :-1]),
    _wrong("key_segments", "fewer examples", lambda x, _: x[None][:, :1]),
    _wrong("key_segments", "an axis too many", lambda x, _: x[None, None]),
    _without("key_positions", "positions"),
    _without("key_segments", "segments"),
    _without("positions", "key_positions"),
    _without("segments", "key_segments"),
    _wrong("window", "below −1", lambda x, _: (-2, 0)),
    _wrong("window", "three sides", lambda x, _: (1, 2, 3)),
    _wrong("window", "no integer", lambda x, _: 1.5, TypeError),
    _wrong("causal", "no bool", lambda x, _: "yes", TypeError),
    _wrong("q", "bool", lambda x, _: x > 0, TypeError),
    _wrong("k", "another dtype than q", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("v", "another dtype than q", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("positions", "floats", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("segments", "bool", lambda x, _: x > 0, TypeError),
    _wrong("k", "no array", lambda x, _: "k", TypeError),
    _wrong("k", "on another device", lambda x, library: library.other_device(x)),
    _wrong("positions", "on another device", lambda x, library: library.other_device(x)),
    _wrong("scale", "infinite", lambda x, _: float("inf")),
    _wrong("scale", "a string", lambda x, _: "1", TypeError),
)

ATTENTION = Operation(
    signature=SIGNATURE,
    short="attention",
    cases=CASES,
    draw=draw,
    call_for=call_for,
    reference=reference,
    conditions=lambda operands, case, results, gradients: conditions(
        operands, scale_of(case), window_of(case), results, gradients=gradients
    ),
    twin=lambda operands, case, arithmetic, gradients: twin(
        operands, scale_of(case), window_of(case), case.dtype, arithmetic, gradients=gradients
    ),
    zeros=zeros,
    invalid_calls=INVALID_CALLS,
    probe=Case(
        "attention/invalid/fp32/probe",
        NAME,
        SequenceShape(2, 5, 7, 4, 2, 8),
        "float32",
        frozenset({*PLACES, "causal"}),
        values="packed-pair",
        options=CAUSAL,
    ),
    memory_case=memory_case,
)
