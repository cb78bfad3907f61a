"""Proof that the suite can fail: every fault is found, by the check that is meant to find it."""

from __future__ import annotations

import pytest

from isoform.conformance.case import Case
from isoform.conformance.evoformer.mutants import MUTANTS, without_fault
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.mutant import Mutant
from isoform.conformance.operations import CASES
from isoform.conformance.verdicts import Outcome, Verdict

PARTS = {"pattern", "condition", "twin_max", "twin_mean", "bias", "shape", "dtype", "growth"}
RESULTS = {"out", "lse", "dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate"}
BEHAVIOURS = {"unmodified", "determinism", "independence", "case"}


def outcomes(implementation: Implementation, mutant: Mutant) -> list[Outcome]:
    """What the check that is meant for ``mutant`` says of ``implementation``."""
    if mutant.case:
        return judge(implementation, CASES[mutant.case])
    if mutant.killed_by.startswith("memory"):
        return [judge_memory(implementation)]
    return judge_invalid_calls(implementation)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed_by_its_check(mutant: Mutant) -> None:
    failed = {
        check
        for outcome in outcomes(mutant.implementation, mutant)
        for check in outcome.failed_checks
    }
    assert mutant.killed_by in failed, f"{mutant.fault}: not seen by {mutant.killed_by}"


@pytest.mark.parametrize(
    "mutant",
    {mutant.killed_by + mutant.case: mutant for mutant in MUTANTS}.values(),
    ids=lambda mutant: mutant.name,
)
def test_without_its_fault_it_passes(mutant: Mutant) -> None:
    said = outcomes(without_fault(mutant), mutant)
    assert said
    assert {outcome.verdict for outcome in said} <= {Verdict.PASS}


def test_no_check_is_without_a_mutant() -> None:
    killers = {mutant.killed_by for mutant in MUTANTS}
    assert {check.split("/")[1] for check in killers if "/" in check} >= PARTS
    assert {check for check in killers if "/" not in check} == BEHAVIOURS
    assert {check.split("/")[0] for check in killers if check.endswith("condition")} == RESULTS
    assert any(check.startswith("invalid/") for check in killers)


def test_declarations_are_judged() -> None:
    verdicts = {
        mutant.name: {outcome.verdict for outcome in outcomes(mutant.implementation, mutant)}
        for mutant in MUTANTS
        if mutant.killed_by == "case" or mutant.name == "mutant-undeclared"
    }
    assert verdicts == {
        "mutant-refusing": {Verdict.BROKEN_DECLARATION},
        "mutant-crashing": {Verdict.BAD_REFUSAL},
        "mutant-undeclared": verdicts["mutant-undeclared"],
    }
    assert {Verdict.UNDECLARED, Verdict.WRONG} <= verdicts["mutant-undeclared"]


def test_names_and_cases_are_unique_and_known() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    cases: list[Case] = [CASES[mutant.case] for mutant in MUTANTS if mutant.case]
    assert not any(case.large for case in cases)
