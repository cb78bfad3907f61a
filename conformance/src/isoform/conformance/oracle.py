"""The oracle: what the definition says about a case, and how far a result is from it.

What is asked last is kept, so that many implementations can be judged on a case for the price of
one oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from isoform.conformance.budgets import ENOUGH, result_format, units
from isoform.conformance.case import Case, Operands
from isoform.conformance.chunks import CPU, GPU, gpu_memory, gpu_present
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.metrics import Errors, errors, pattern_fault
from isoform.conformance.operation import Condition
from isoform.conformance.operations import OPERATIONS
from isoform.reference.contract import Arithmetic

T = TypeVar("T")


@dataclass(frozen=True)
class Expected:
    """What the definition says about one case."""

    operands: Operands
    results: Operands
    conditions: dict[str, Condition]
    zeros: dict[str, Array]


@lru_cache(maxsize=2)
def expected(case: Case, gradients: bool) -> Expected:
    """The oracle's results for ``case``; the last ones are kept, for the next implementation."""
    if case.large:  # gigabytes: nothing is kept beside it
        expected.cache_clear()
        _twin.cache_clear()
    operation = OPERATIONS[case.operation]
    operands = operation.operands(case)
    results = operation.reference(operands, case, gradients)
    return Expected(
        operands,
        results,
        operation.conditions(operands, case, results, gradients),
        operation.zeros(operands, case, results),
    )


@lru_cache(maxsize=8)
def _twin(case: Case, arithmetic: Arithmetic, gradients: bool) -> Operands:
    """Its results, kept in the format that they are rounded to."""
    operands = expected(case, gradients).operands
    found = OPERATIONS[case.operation].twin(operands, case, arithmetic, gradients)
    return {
        name: x.astype(FORMATS[result_format(name, case.dtype)].dtype) for name, x in found.items()
    }


def measure(
    case: Case, arithmetic: Arithmetic, name: str, actual: Array, truth: Expected
) -> Errors:
    """The errors of result ``name``."""
    u, eta = units(name, case.dtype, arithmetic)

    def measured(actual: Array, reference: Array, relative: Array, underflow: Array) -> Errors:
        with np.errstate(invalid="ignore"):
            allowed = np.nan_to_num(u * relative + eta * underflow)
        return errors(actual, reference, allowed, result_format(name, case.dtype))

    return _where_fast(measured, actual, truth.results[name], *truth.conditions[name])


def fault(case: Case, name: str, actual: Array, truth: Expected) -> str | None:
    """What is wrong with the NaN, infinities and exact zeros of result ``name``, or None."""
    dtype, zeros = result_format(name, case.dtype), truth.zeros.get(name)

    def found(actual: Array, reference: Array, zeros: Array | None = None) -> str | None:
        return pattern_fault(actual, reference, zeros, dtype, lse=name == "lse")

    fixed = () if zeros is None else (zeros,)
    return _where_fast(found, actual, truth.results[name], *fixed)


def _where_fast(compute: Callable[..., T], *arrays: Array) -> T:
    """``compute`` of ``arrays``: on a GPU, if there is one, where they are large.

    To sort 10⁸ errors takes a CPU ten seconds, and every result is looked at three times.
    """
    if arrays[0].size <= CPU.limit or not gpu_present():
        return compute(*arrays)
    with gpu_memory():
        return compute(*map(GPU.put, arrays))


def figures(
    case: Case, arithmetic: Arithmetic, name: str, measured: Errors, truth: Expected
) -> dict[str, float] | None:
    """What is compared with the twin's.

    None where there are too few elements to say, and for float64, where the twin is the oracle.
    """
    if measured.count < ENOUGH or case.dtype == "float64":
        return None
    gradients = any(result.startswith("d") for result in truth.results)
    twins = measure(case, arithmetic, name, _twin(case, arithmetic, gradients)[name], truth)

    def sizes(reference: Array, underflow: Array) -> tuple[float, float, float]:
        size = np.abs(reference[np.isfinite(reference)])
        return float(size.max()), float(size.mean()), float(underflow.mean())

    underflow = truth.conditions[name].underflow
    largest, mean, absolute = _where_fast(sizes, truth.results[name], underflow)
    # beside the twin's own error, a part of what rounding the result costs: it may be lucky
    u, eta = units(name, case.dtype, arithmetic)
    return {
        "twin_max": measured.max_abs / (twins.max_abs + u / 4 * largest + eta * absolute),
        "twin_mean": measured.mean_abs / (twins.mean_abs + u / 16 * mean + eta * absolute),
        "bias": max(0.0, measured.bias - twins.bias - 4 / float(np.sqrt(measured.count))),
    }
