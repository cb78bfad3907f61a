"""One test per case, implementation and group of checks."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from isoform.conformance.case import Case
from isoform.conformance.expected import explain, no_longer_fails
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.lists import excused, skipped, standing
from isoform.conformance.plugin import FAILED, KNOWN, RAN, SKIPPED
from isoform.conformance.verdicts import Outcome, Verdict


def settle(outcomes: Iterable[Outcome], device: str = "cpu") -> None:
    """Fail, xfail, skip or pass, as the outcomes say; what is expected to fail must do so."""
    outcomes = list(outcomes)
    faults = [outcome for outcome in outcomes if outcome.verdict.fails]
    reasons = [explain(outcome, device) for outcome in faults]
    unexpected = [
        f"{', '.join(outcome.failed_checks)}: {outcome.verdict}: {outcome.message}"
        for outcome, reason in zip(faults, reasons, strict=True)
        if reason is None
    ]
    if unexpected:
        pytest.fail("\n".join(unexpected), pytrace=False)
    for outcome in outcomes:
        if entry := no_longer_fails(outcome, device):
            message = f"{outcome.check} passes, but is expected to fail: {entry.reason}"
            pytest.fail(message, pytrace=False)
    if faults:
        pytest.xfail("; ".join(reason for reason in reasons if reason))
    if all(outcome.verdict in (Verdict.NOT_RUN, Verdict.UNSUPPORTED) for outcome in outcomes):
        pytest.skip("; ".join(dict.fromkeys(outcome.message for outcome in outcomes)))


def heed(request: pytest.FixtureRequest, outcomes: Iterable[Outcome]) -> None:
    """Settle the outcomes by the lists that are given, and tell the plugin of their entries."""
    known = request.config.stash[KNOWN]
    outcomes = [excused(outcome, known) for outcome in outcomes]
    for key, entries in zip((RAN, FAILED), standing(outcomes, known), strict=True):
        told = ((key, entry.place) for entry in known if entry in entries)
        request.node.user_properties.extend(told)
    settle(outcomes, request.config.option.device)


def judged(
    request: pytest.FixtureRequest, implementation: Implementation, case: Case, group: str
) -> None:
    """Settle one group of checks."""
    if why := skipped(case.id, request.config.stash[SKIPPED]):
        pytest.skip(why)
    option = request.config.option
    heed(
        request,
        judge(implementation, case, groups=[group], device=option.device, large=option.large),
    )


@pytest.mark.conformance
def test_results(
    isoform_case: Case, isoform_implementation: Implementation, request: pytest.FixtureRequest
) -> None:
    """The results are right, operands are left alone, nothing is kept between calls."""
    judged(request, isoform_implementation, isoform_case, "conformance")


@pytest.mark.gradients
def test_gradients(
    isoform_case: Case, isoform_implementation: Implementation, request: pytest.FixtureRequest
) -> None:
    """The gradients are right."""
    if not isoform_case.differentiate:
        pytest.skip("operands are not finite: the gradients are not defined")
    judged(request, isoform_implementation, isoform_case, "gradients")


@pytest.mark.precision
def test_precision(
    isoform_case: Case, isoform_implementation: Implementation, request: pytest.FixtureRequest
) -> None:
    """Results and gradients are as exact as the declared arithmetic makes them, without bias."""
    judged(request, isoform_implementation, isoform_case, "precision")


@pytest.mark.conformance
def test_invalid_calls(
    isoform_implementation: Implementation, request: pytest.FixtureRequest
) -> None:
    """Wrong calls get the right exception, which names the operand."""
    heed(request, judge_invalid_calls(isoform_implementation, request.config.option.device))


@pytest.mark.conformance
def test_memory(isoform_implementation: Implementation, request: pytest.FixtureRequest) -> None:
    """Peak memory grows with the length as declared."""
    heed(request, judge_memory(isoform_implementation, request.config.option.device))
