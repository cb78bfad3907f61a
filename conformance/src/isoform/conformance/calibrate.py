"""Calibration: measure how far implementations known to be right are off, and record it.

The trusted implementations (:mod:`.trusted`) differ in the order of their sums, in tiling and in
library, and share no code with the twin. Which constant follows from what is measured is said
in :mod:`.budgets`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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

Observed = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""By dtype, result and figure: the largest value, and whose it was on which case."""


Figures = list[tuple[str, str, str, float]]
"""What a case showed: implementation, result, figure and value."""


def calibrate(
    operation: str,
    *,
    device: str = "cpu",
    jobs: int = 1,
    progress: Callable[[Case], None] = lambda case: None,
) -> dict[str, Any]:
    """Run the trusted implementations on ``device`` over all cases of a CPU's size.

    What other devices showed is kept from the calibration in force: each machine renews its own
    part, and a limit follows from the largest figure that any device showed.

    Args:
        operation: Which one.
        device: Where: what is recorded is that device's part.
        jobs: Processes over which the cases are spread; what is recorded is the same.
        progress: Told of every case whose turn has come.

    Returns:
        The new record.

    Raises:
        RuntimeError: One of the implementations breaks the pattern of a result: it cannot be
            trusted. Or the device is not there.
    """
    found: Observed = {}
    trusted = _trusted(operation, device)
    if not all(device in framework(one.framework).devices() for one in trusted):
        raise RuntimeError(f"no device {device} here to calibrate on")
    cases = [  # operands that are not finite have no condition
        case
        for case in OPERATIONS[operation].cases.values()
        if not case.large and case.differentiate
    ]
    for case, figures_of_it in zip(cases, _spread(cases, device, jobs, progress), strict=True):
        for name, result, figure, value in figures_of_it:
            seen = found.setdefault(case.dtype, {}).setdefault(result, {})
            if value >= seen.get(figure, {"value": -1.0})["value"]:
                seen[figure] = {"value": value, "implementation": name, "case": case.id}
    here = {"digest": digest(OPERATIONS[operation]), "environment": environment(trusted, device)}
    before = _in_force(operation)
    observed = {**before["observed"], device: found}
    return {
        "operation": operation,
        "cases_version": CASES_VERSION,
        "margin": MARGIN,
        "smallest": SMALLEST,
        "devices": {**before["devices"], device: here},
        "limits": _limits(observed),
        "observed": observed,
    }


def _trusted(operation: str, device: str) -> list[Implementation]:
    """The trusted implementations of ``operation`` that run on ``device``."""
    return [
        one for one in TRUSTED if one.operation == operation and device in one.capabilities.devices
    ]


def _spread(
    cases: Sequence[Case], device: str, jobs: int, progress: Callable[[Case], None]
) -> Iterable[Figures]:
    """What each case showed, in order: here, or by ``jobs`` processes of one thread each."""
    if jobs == 1:
        for case in cases:
            progress(case)
            yield _figures(case.operation, case.id, device)
        return
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(dict.fromkeys(threads, "1"))  # the cores are shared: read by what is spawned
    ask = partial(_figures, device=device)
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(jobs, len(cases)), spawn) as pool:
            names = [case.operation for case in cases], [case.id for case in cases]
            for case, figures_of_it in zip(cases, pool.map(ask, *names), strict=True):
                progress(case)
                yield figures_of_it
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _figures(operation: str, case_id: str, device: str) -> Figures:
    """What the trusted implementations show on one case; a process of its own can be asked."""
    case = OPERATIONS[operation].cases[case_id]
    return [
        (one.name, *observed)
        for one in _trusted(operation, device)
        for observed in _observe(one, case, device)
    ]


def _in_force(operation: str) -> dict[str, Any]:
    """The calibration in force, if it is of this version of the cases."""
    nothing: dict[str, Any] = {"cases_version": None, "devices": {}, "observed": {}}
    record = calibration(operation) if calibration_path(operation).exists() else nothing
    return record if record["cases_version"] == CASES_VERSION else nothing


def _limits(observed: dict[str, Observed]) -> dict[str, dict[str, dict[str, float]]]:
    """The limits of every dtype, result and figure, from what all devices showed."""
    pairs = {
        (dtype, result)
        for found in observed.values()
        for dtype, results in found.items()
        for result in results
    }
    limits: dict[str, dict[str, dict[str, float]]] = {}
    for dtype, result in sorted(pairs):
        limits.setdefault(dtype, {})[result] = {
            figure: max(smallest, _two_digits(MARGIN * _largest(observed, dtype, result, figure)))
            for figure, smallest in SMALLEST.items()
        }
    return limits


def _largest(observed: dict[str, Observed], dtype: str, result: str, figure: str) -> float:
    """The largest value that any device showed; 0 where none was looked at."""
    nothing = {"value": 0.0}
    return max(
        float(found.get(dtype, {}).get(result, {}).get(figure, nothing)["value"])
        for found in observed.values()
    )


def _two_digits(x: float) -> float:
    return float(f"{x:.2g}")


def _observe(
    implementation: Implementation, case: Case, device: str
) -> Sequence[tuple[str, str, float]]:
    """What one implementation shows on one case: result, figure, value."""
    operation = OPERATIONS[case.operation]
    capabilities = implementation.capabilities
    wanted = operation.differentiable(case) if case.differentiate else []
    call = operation.call_for(
        case, gradients=frozenset(wanted), lse=capabilities.lse, device=device
    )
    if capabilities.unsupported_reasons(call):
        return []
    library = framework(implementation.framework)
    truth = expected(case, case.differentiate)
    operands = library.upload(truth.operands, device)
    returned = library.run(
        implementation, operands, dict(case.options), lse=capabilities.lse, gradients=wanted
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
    limits = [
        limit
        for results in record["limits"].values()
        for figures in results.values()
        for limit in figures.values()
    ]
    if not np.isfinite(limits).all():
        raise RuntimeError("a calibrated limit is not finite; nothing was saved")
    path = calibration_path(record["operation"])
    path.write_text(json.dumps(record, indent=1) + "\n")
    calibration.cache_clear()
