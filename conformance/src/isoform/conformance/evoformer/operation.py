"""Evoformer attention, described for the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isoform.conformance.case import Case, Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import Array
from isoform.conformance.evoformer.cases import ALL, CASES, NAME, scale_of, shape_of
from isoform.conformance.evoformer.condition import conditions
from isoform.conformance.evoformer.twin import twin
from isoform.conformance.evoformer.values import draw
from isoform.conformance.frameworks import Framework
from isoform.conformance.operation import InvalidCall, Operation
from isoform.conformance.signatures import EVOFORMER_ATTENTION as SIGNATURE
from isoform.reference.contract import Call, Shape
from isoform.reference.numpy import evoformer_attention, evoformer_attention_backward


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
        wide: dict[str, Any] = {
            name: x if x.dtype == bool else x.astype(np.float64) for name, x in chunk.items()
        }
        dout = wide.pop("dout")
        out, lse = evoformer_attention(**wide, **options, return_lse=True)
        results = {"out": (out,), "lse": (lse,)}
        if gradients:
            found = evoformer_attention_backward(dout, **wide, **options)._asdict()
            results |= {name: (x,) for name, x in found.items() if x is not None}
        return results

    return {
        name: x for name, (x,) in in_chunks(step, operands, shape_of(operands), processor).items()
    }


def zeros(operands: Operands, results: Operands) -> dict[str, Array]:
    """Where a result is exactly zero by contract (rules EVO-4 and EVO-5)."""
    none_left = results["lse"].swapaxes(2, 3) == -np.inf  # [B, S, Q, H]
    dead = np.broadcast_to(none_left[..., None], results["out"].shape)
    fixed = {"out": dead, "dq": dead, "dgate": dead}
    if (mask := operands.get("mask")) is not None:
        dropped = np.broadcast_to(~mask[..., None, None], operands["k"].shape)
        fixed |= {"dk": dropped, "dv": dropped, "dmask_bias": ~mask[:, :, None, None, :]}
        untouched = ~mask[:, :, None, None, :] | none_left.swapaxes(2, 3)[..., None]
        fixed["dpair_bias"] = untouched.all(axis=1, keepdims=True)
    return {name: where for name, where in fixed.items() if name in results}


def memory_case(length: int) -> Case:
    """One row, no pair bias (which is Q·K numbers itself): what is left should grow with L."""
    shape = Shape(1, 1, length, length, 2, 2, 16)
    operands = frozenset({"mask", "mask_bias", "gate"})
    return Case(f"evoformer/memory-{length}/fp32/no-pair-bias", NAME, shape, "float32", operands)


Change = Callable[[Any, Framework], Any]


def _wrong(
    name: str, what: str, change: Change, raises: type[Exception] = ValueError
) -> InvalidCall:
    """A call with one operand spoiled, answered by an exception that names it."""
    return InvalidCall(
        f"{name}: {what}",
        lambda operands, library: operands | {name: change(operands.get(name), library)},
        raises,
        name,
    )


def _three_heads(operands: dict[str, Any], library: Framework) -> dict[str, Any]:
    return operands | {name: operands[name][:, :, :, [0, 1, 1]] for name in ("k", "v")}


INVALID_CALLS = (
    _wrong("q", "an axis missing", lambda x, _: x[0]),
    _wrong("k", "an axis too many", lambda x, _: x[None]),
    _wrong("k", "other rows than q", lambda x, _: x[:, :1]),
    _wrong("k", "another head dim than q", lambda x, _: x[..., :-1]),
    _wrong("v", "another length than k", lambda x, _: x[:, :, :-1]),
    _wrong("v", "another head dim than q", lambda x, _: x[..., :-1]),
    _wrong("v", "fewer heads than k", lambda x, _: x[:, :, :, :1]),
    InvalidCall("heads: G does not divide H", _three_heads, ValueError, "heads"),
    _wrong("mask", "another length than k", lambda x, _: x[..., :-1]),
    _wrong("mask", "one row for all", lambda x, _: x[:, :1]),
    _wrong("mask_bias", "axes missing", lambda x, _: x[:, :, 0, 0]),
    _wrong("mask_bias", "another length than k", lambda x, _: x[..., :-1]),
    _wrong("pair_bias", "no row axis", lambda x, _: x[:, 0]),
    _wrong("pair_bias", "one head for all", lambda x, _: x[:, :, :1]),
    _wrong("pair_bias", "queries and keys exchanged", lambda x, _: x.swapaxes(-1, -2)),
    _wrong("gate", "another length than q", lambda x, _: x[:, :, :-1]),
    _wrong("gate", "one channel for all", lambda x, _: x[..., :1]),
    _wrong("q", "bool", lambda x, _: x > 0, TypeError),
    _wrong("k", "another dtype than q", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("v", "another dtype than q", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("mask", "not bool", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("pair_bias", "bool", lambda x, _: x > 0, TypeError),
    _wrong("gate", "another dtype than q", lambda x, library: library.other_dtype(x), TypeError),
    _wrong("k", "no array", lambda x, _: "k", TypeError),
    _wrong("k", "on another device", lambda x, library: library.other_device(x)),
    _wrong("scale", "infinite", lambda x, _: float("inf")),
    _wrong("scale", "a string", lambda x, _: "1", TypeError),
)

EVOFORMER_ATTENTION = Operation(
    signature=SIGNATURE,
    short="evoformer",
    cases=CASES,
    draw=draw,
    call_for=call_for,
    reference=reference,
    conditions=lambda operands, case, results, gradients: conditions(
        operands, scale_of(case), results, gradients=gradients
    ),
    twin=lambda operands, case, arithmetic, gradients: twin(
        operands, scale_of(case), case.dtype, arithmetic, gradients=gradients
    ),
    zeros=lambda operands, case, results: zeros(operands, results),
    invalid_calls=INVALID_CALLS,
    probe=Case("evoformer/invalid/fp32/probe", NAME, Shape(2, 3, 5, 7, 4, 2, 8), "float32", ALL),
    memory_case=memory_case,
)
