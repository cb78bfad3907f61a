"""The calibration is in force, true to the code, and covers what is judged."""

from __future__ import annotations

import json

import pytest

from isoform.conformance import budgets
from isoform.conformance.budgets import budget, calibration, digest
from isoform.conformance.case import CASES_VERSION
from isoform.conformance.operation import Operation
from isoform.conformance.operations import CASES, OPERATIONS


@pytest.mark.parametrize("operation", OPERATIONS)
def test_calibration_is_not_stale(operation: str) -> None:
    assert calibration(operation)["devices"]["cpu"]["digest"] == digest(OPERATIONS[operation]), (
        "what the budgets were measured with has changed: run 'isoform calibrate'"
    )
    assert calibration(operation)["cases_version"] == CASES_VERSION


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("part", ["DEPENDS_ON", "OF_THE_OPERATION"])
def test_digest_follows_what_it_depends_on(
    monkeypatch: pytest.MonkeyPatch, operation: Operation, part: str
) -> None:
    before = digest(operation)
    monkeypatch.setattr(budgets, part, getattr(budgets, part)[1:])
    assert digest(operation) != before


def test_every_operation_has_a_digest_of_its_own() -> None:
    assert len({digest(operation) for operation in OPERATIONS.values()}) == len(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_result_of_every_dtype_has_a_budget(operation: str) -> None:
    signature = OPERATIONS[operation].signature
    results = {*signature.results, *(f"d{name}" for name in signature.differentiable)}
    for dtype in {case.dtype for case in CASES.values() if case.operation == operation}:
        for result in results:
            limits = budget(operation, dtype, result)
            assert all(limit > 0 for limit in vars(limits).values())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_limits_follow_from_what_was_observed(operation: str) -> None:
    record = calibration(operation)
    for dtype, results in record["limits"].items():
        for result, figures in results.items():
            for figure, limit in figures.items():
                largest = max(
                    found.get(dtype, {}).get(result, {}).get(figure, {"value": 0.0})["value"]
                    for found in record["observed"].values()
                )
                computed = float(f"{record['margin'] * largest:.2g}")
                assert limit == max(record["smallest"][figure], computed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_condition_is_a_sharp_measure(operation: str) -> None:
    """Honest errors are of the order of u·κ: were they far below, κ would hide faults."""
    limits = calibration(operation)["limits"]
    for dtype, results in limits.items():
        for result, figures in results.items():
            assert figures["condition"] < 10, (dtype, result)


def test_record_is_plain_json() -> None:
    for operation in OPERATIONS:
        assert json.loads(budgets.calibration_path(operation).read_text())["operation"] == operation
