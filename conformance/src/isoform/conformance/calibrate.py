"""Calibration: measure how far implementations known to be right are off, and record it.

The trusted implementations (:mod:`.trusted`) differ in the order of their sums, in tiling and in
library, and share no code with the twin. Which constant follows from what is measured is said
in :mod:`.budgets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from isoform.conformance.budgets import (
    MARGIN,
    SMALLEST,
    calibration,
    calibration_path,
    digest,
    result_format,
)
from isoform.conformance.case import CASES_VERSION, Case
from isoform.conformance.frameworks import framework
from isoform.conformance.implementation import Implementation
from isoform.conformance.metrics import pattern_fault
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.oracle import expected, figures, measure
from isoform.conformance.run import environment
from isoform.conformance.trusted import TRUSTED


def calibrate(
    operation: str, progress: Callable[[Case], None] = lambda case: None
) -> dict[str, Any]:
    """Run the trusted implementations over all cases and return the record of their errors.

    Raises:
        RuntimeError: One of them breaks the pattern of a result: it cannot be trusted.
    """
    limits: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for case in OPERATIONS[operation].cases.values():
        if case.large:
            continue
        progress(case)
        for implementation in TRUSTED:
            for result, figure, value in _observe(implementation, case):
                seen = limits.setdefault(case.dtype, {}).setdefault(result, {})
                if value >= seen.get(figure, {"observed": -1.0})["observed"]:
                    seen[figure] = {
                        "observed": value,
                        "implementation": implementation.name,
                        "case": case.id,
                    }
    return {
        "operation": operation,
        "cases_version": CASES_VERSION,
        "digest": digest(),
        "margin": MARGIN,
        "smallest": SMALLEST,
        "environment": environment(TRUSTED, "cpu"),
        "limits": {
            dtype: {result: _limits(seen) for result, seen in results.items()}
            for dtype, results in limits.items()
        },
    }


def _limits(seen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        figure: {"limit": max(SMALLEST[figure], _two_digits(MARGIN * found["observed"])), **found}
        for figure in SMALLEST
        for found in [seen.get(figure, {"observed": 0.0})]
    }


def _two_digits(x: float) -> float:
    return float(f"{x:.2g}")


def _observe(implementation: Implementation, case: Case) -> Sequence[tuple[str, str, float]]:
    """What one implementation shows on one case: result, figure, value."""
    operation = OPERATIONS[case.operation]
    capabilities = implementation.capabilities
    wanted = [
        name
        for name in operation.differentiable
        if case.differentiate and (name in ("q", "k", "v") or name in case.operands)
    ]
    call = operation.call_for(case, gradients=frozenset(wanted), lse=capabilities.lse)
    if capabilities.unsupported_reasons(call):
        return []
    library = framework(implementation.framework)
    truth = expected(case, case.differentiate)
    operands = library.upload(truth.operands, "cpu")
    returned = library.run(
        implementation, operands, case.scale, lse=capabilities.lse, gradients=wanted
    )
    observed = []
    for result, x in returned.items():
        actual = library.download(x)
        dtype = result_format(result, case.dtype)
        fault = pattern_fault(
            actual, truth.results[result], truth.zeros.get(result), dtype, lse=result == "lse"
        )
        if fault is not None:
            raise RuntimeError(f"{implementation.name} on {case.id}, {result}: {fault}")
        errors = measure(case, capabilities.arithmetic, result, actual, truth)
        observed.append((result, "condition", errors.ratio_max))
        found = figures(case, capabilities.arithmetic, result, errors, truth) or {}
        observed += [(result, figure, value) for figure, value in found.items()]
    return observed


def save(record: dict[str, Any]) -> None:
    """Put a calibration in force."""
    if not all(np.isfinite(limit) for limit in _all_limits(record)):
        raise RuntimeError("a calibrated limit is not finite; nothing was saved")
    path = calibration_path(record["operation"])
    path.write_text(json.dumps(record, indent=1) + "\n")
    calibration.cache_clear()


def _all_limits(record: dict[str, Any]) -> list[float]:
    return [
        figure["limit"]
        for results in record["limits"].values()
        for result in results.values()
        for figure in result.values()
    ]
