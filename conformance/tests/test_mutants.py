"""Proof that the suite can fail: every fault is found, by the check that is meant to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from isoform.conformance.attention import mutants as attention
from isoform.conformance.case import Case
from isoform.conformance.evoformer import mutants as evoformer
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_invalid_calls, judge_memory
from isoform.conformance.mutant import Mutant
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.rotary import mutants as rotary
from isoform.conformance.verdicts import Outcome, Verdict

PARTS = {"pattern", "condition", "twin_max", "twin_mean", "bias", "shape", "dtype", "growth"}
BEHAVIOURS = {"unmodified", "determinism", "independence", "case"}

SETS: dict[str, tuple[tuple[Mutant, ...], Callable[[Mutant], Implementation]]] = {
    "evoformer_attention": (evoformer.MUTANTS, evoformer.without_fault),
    "rotary_embedding": (rotary.MUTANTS, rotary.without_fault),
    "attention": (attention.MUTANTS, attention.without_fault),
}
ALL = [mutant for mutants, _ in SETS.values() for mutant in mutants]


def outcomes(implementation: Implementation, mutant: Mutant) -> list[Outcome]:
    """What the check that is meant for ``mutant`` says of ``implementation``."""
    if mutant.case:
        return judge(implementation, CASES[mutant.case])
    if mutant.killed_by.startswith("memory"):
        return judge_memory(implementation)
    return judge_invalid_calls(implementation)


def mended() -> Iterator[Any]:
    """The implementations without their faults, each once for every check and case."""
    for mutants, without_fault in SETS.values():
        for mutant in {mutant.killed_by + mutant.case: mutant for mutant in mutants}.values():
            yield pytest.param(without_fault(mutant), mutant, id=mutant.name)


def test_every_operation_has_mutants() -> None:
    assert SETS.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_mutant_is_killed_by_its_check(mutant: Mutant) -> None:
    failed = {
        check
        for outcome in outcomes(mutant.implementation, mutant)
        for check in outcome.failed_checks
    }
    assert mutant.killed_by in failed, f"{mutant.fault}: not seen by {mutant.killed_by}"


@pytest.mark.parametrize(("implementation", "mutant"), [*mended()])
def test_without_its_fault_it_passes(implementation: Implementation, mutant: Mutant) -> None:
    said = outcomes(implementation, mutant)
    assert said
    assert {outcome.verdict for outcome in said} <= {Verdict.PASS}


@pytest.mark.parametrize("operation", SETS)
def test_no_check_is_without_a_mutant(operation: str) -> None:
    signature = OPERATIONS[operation].signature
    results = {*signature.results, *(f"d{name}" for name in signature.differentiable)}
    killers = {mutant.killed_by for mutant in SETS[operation][0]}
    assert {check.split("/")[1] for check in killers if "/" in check} >= PARTS
    assert {check for check in killers if "/" not in check} == BEHAVIOURS
    assert {check.split("/")[0] for check in killers if check.endswith("condition")} == results
    assert any(check.startswith("invalid/") for check in killers)


def test_declarations_are_judged() -> None:
    verdicts = {
        mutant.name: {outcome.verdict for outcome in outcomes(mutant.implementation, mutant)}
        for mutant in evoformer.MUTANTS
        if mutant.killed_by == "case" or mutant.name == "mutant-undeclared"
    }
    assert verdicts == {
        "mutant-refusing": {Verdict.BROKEN_DECLARATION},
        "mutant-crashing": {Verdict.BAD_REFUSAL},
        "mutant-undeclared": verdicts["mutant-undeclared"],
    }
    assert {Verdict.UNDECLARED, Verdict.WRONG} <= verdicts["mutant-undeclared"]


def test_names_and_cases_are_unique_and_known() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL)
    assert all(len(mutants) >= 20 for mutants, _ in SETS.values())
    cases: list[Case] = [CASES[mutant.case] for mutant in ALL if mutant.case]
    assert not any(case.large for case in cases)
