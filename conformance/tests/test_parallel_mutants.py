"""Every fault of a sequence-parallel strategy is found, by the check that is meant to find it."""

from __future__ import annotations

import pytest

from isoform.conformance.attention.parallel_mutants import MUTANTS, without_fault
from isoform.conformance.implementation import Implementation
from isoform.conformance.judge import judge, judge_memory
from isoform.conformance.mutant import Mutant
from isoform.conformance.operations import CASES
from isoform.conformance.verdicts import Outcome, Verdict


def outcomes(implementation: Implementation, mutant: Mutant) -> list[Outcome]:
    """What the check that is meant for ``mutant`` says of ``implementation``."""
    if mutant.case:
        return judge(implementation, CASES[mutant.case])
    return judge_memory(implementation)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed_by_its_check(mutant: Mutant) -> None:
    said = outcomes(mutant.implementation, mutant)
    failed = {check for outcome in said for check in outcome.failed_checks}
    assert mutant.killed_by in failed, f"{mutant.fault}: not seen by {mutant.killed_by}"


@pytest.mark.parametrize(
    "mutant",
    {(m.case, m.implementation.spread): m for m in MUTANTS}.values(),
    ids=lambda mutant: mutant.name,
)
def test_without_its_fault_it_passes(mutant: Mutant) -> None:
    said = outcomes(without_fault(mutant), mutant)
    assert {outcome.verdict for outcome in said} <= {Verdict.PASS, Verdict.UNSUPPORTED}
    assert Verdict.PASS in {outcome.verdict for outcome in said}


def test_every_strategy_and_every_sharding_has_a_mutant() -> None:
    spread = [m.implementation.spread for m in MUTANTS if m.implementation.spread is not None]
    assert len(spread) == len(MUTANTS) == len({mutant.name for mutant in MUTANTS})
    assert {each.kind for each in spread} == {"contiguous", "zigzag", "striped"}
    assert len({str(each.vjp) for each in spread}) == 4
