"""One test per case, implementation and group of checks."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from isoform.conformance.case import Case
from isoform.conformance.expected import explain, no_longer_fails
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.verdicts import Outcome, Verdict


def settle(outcomes: Iterable[Outcome]) -> None:
    """Fail, xfail, skip or pass, as the outcomes say; what is expected to fail must do so."""
    outcomes = list(outcomes)
    faults = [outcome for outcome in outcomes if outcome.verdict.fails]
    reasons = [explain(outcome) for outcome in faults]
    unexpected = [
        f"{', '.join(outcome.failed_checks)}: {outcome.verdict}: {outcome.message}"
        for outcome, reason in zip(faults, reasons, strict=True)
        if reason is None
    ]
    if unexpected:
        pytest.fail("\n".join(unexpected), pytrace=False)
    for outcome in outcomes:
        if entry := no_longer_fails(outcome):
            message = f"{outcome.check} passes, but is expected to fail: {entry.reason}"
            pytest.fail(message, pytrace=False)
    if faults:
        pytest.xfail("; ".join(reason for reason in reasons if reason))
    if all(outcome.verdict in (Verdict.NOT_RUN, Verdict.UNSUPPORTED) for outcome in outcomes):
        pytest.skip("; ".join(dict.fromkeys(outcome.message for outcome in outcomes)))


def judged(
    config: pytest.Config, implementation: Implementation, case: Case, group: str
) -> list[Outcome]:
    """The outcomes of one group of checks."""
    option = config.option
    return judge(implementation, case, groups=[group], device=option.device, large=option.large)


@pytest.mark.conformance
def test_results(
    isoform_case: Case, isoform_implementation: Implementation, pytestconfig: pytest.Config
) -> None:
    """The results are right, operands are left alone, nothing is kept between calls."""
    settle(judged(pytestconfig, isoform_implementation, isoform_case, "conformance"))


@pytest.mark.gradients
def test_gradients(
    isoform_case: Case, isoform_implementation: Implementation, pytestconfig: pytest.Config
) -> None:
    """The gradients are right."""
    if not isoform_case.differentiate:
        pytest.skip("operands are not finite: the gradients are not defined")
    settle(judged(pytestconfig, isoform_implementation, isoform_case, "gradients"))


@pytest.mark.precision
def test_precision(
    isoform_case: Case, isoform_implementation: Implementation, pytestconfig: pytest.Config
) -> None:
    """Results and gradients are as exact as the declared arithmetic makes them, without bias."""
    settle(judged(pytestconfig, isoform_implementation, isoform_case, "precision"))


@pytest.mark.conformance
def test_invalid_calls(isoform_implementation: Implementation, pytestconfig: pytest.Config) -> None:
    """Wrong calls get the right exception, which names the operand."""
    settle(judge_invalid_calls(isoform_implementation, pytestconfig.option.device))


@pytest.mark.conformance
def test_memory(isoform_implementation: Implementation, pytestconfig: pytest.Config) -> None:
    """Peak memory grows with the length as declared."""
    settle(judge_memory(isoform_implementation, pytestconfig.option.device))
