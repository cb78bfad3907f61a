"""The oracle: what the definition says about a case, and how far a result is from it.

What is asked last is kept, so that many implementations can be judged on a case for the price of
one oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from isoform.conformance.budgets import ENOUGH, result_format, units
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import Array
from isoform.conformance.metrics import Errors, errors
from isoform.conformance.operation import Condition
from isoform.conformance.operations import OPERATIONS
from isoform.reference.contract import Arithmetic


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
    operation = OPERATIONS[case.operation]
    operands = operation.operands(case)
    results = operation.reference(operands, case, gradients)
    return Expected(
        operands,
        results,
        operation.conditions(operands, case, results, gradients),
        operation.zeros(operands, results),
    )


@lru_cache(maxsize=8)
def _twin(case: Case, arithmetic: Arithmetic, gradients: bool) -> Operands:
    operands = expected(case, gradients).operands
    return OPERATIONS[case.operation].twin(operands, case, arithmetic, gradients)


def measure(
    case: Case, arithmetic: Arithmetic, name: str, actual: Array, truth: Expected
) -> Errors:
    """The errors of result ``name``."""
    u, eta = units(name, case.dtype, arithmetic)
    condition = truth.conditions[name]
    with np.errstate(invalid="ignore"):
        allowed = np.nan_to_num(u * condition.relative + eta * condition.underflow)
    return errors(actual, truth.results[name], allowed, result_format(name, case.dtype))


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
    size = np.abs(truth.results[name][np.isfinite(truth.results[name])])
    # beside the twin's own error, a part of what rounding the result costs: it may be lucky
    u, eta = units(name, case.dtype, arithmetic)
    underflow = eta * float(truth.conditions[name].underflow.mean())
    return {
        "twin_max": measured.max_abs / (twins.max_abs + u / 4 * float(size.max()) + underflow),
        "twin_mean": measured.mean_abs / (twins.mean_abs + u / 16 * float(size.mean()) + underflow),
        "bias": max(0.0, measured.bias - twins.bias - 4 / float(np.sqrt(measured.count))),
    }
