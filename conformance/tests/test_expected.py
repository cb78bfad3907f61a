"""Known faults are excused, each for its own check alone, and only as long as they are there."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from isoform.conformance import expected
from isoform.conformance.expected import (
    ExpectedFailure,
    expected_failures,
    explain,
    no_longer_fails,
    processor_features,
)
from isoform.conformance.operations import CASES
from isoform.conformance.registry import registered
from isoform.conformance.verdicts import Outcome, Verdict

MakeOutcome = Callable[..., Outcome]
KnownFaults = Callable[..., None]

ENTRY = {
    "implementation": "mine",
    "case": "evoformer/length-*/fp32/*",
    "check": "out/condition",
    "reason": "a tile is lost",
}
BROKEN = {"pattern": True, "condition": False}


def test_a_known_fault_is_explained(make_outcome: MakeOutcome, known_faults: KnownFaults) -> None:
    assert explain(make_outcome(parts=BROKEN)) is None
    known_faults(ENTRY)
    assert explain(make_outcome(parts=BROKEN)) == "a tile is lost"


@pytest.mark.parametrize(
    "change",
    [
        {"implementation": "mine-too"},
        {"case": "evoformer/length-17/bf16/all-operands"},
        {"check": "dq"},
        {"check": "outer"},
        {"parts": {"pattern": False, "condition": True}},
    ],
)
def test_another_fault_is_not(
    change: dict[str, object], make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    known_faults(ENTRY)
    assert explain(make_outcome(**{"parts": BROKEN} | change)) is None


def test_every_check_that_failed_must_be_known(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    both = make_outcome(parts={"pattern": False, "condition": False})
    known_faults(ENTRY)
    assert explain(both) is None
    known_faults(ENTRY, ENTRY | {"check": "out/pattern", "reason": "NaN is lost"})
    assert set(explain(both).split("; ")) == {"a tile is lost", "NaN is lost"}  # type: ignore[union-attr]
    known_faults(ENTRY | {"check": "out/*"})
    assert explain(both) == "a tile is lost"
    known_faults(ENTRY | {"check": "*"})
    assert explain(both) == "a tile is lost"


def test_behaviours_and_errors_are_known_by_the_check_alone(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    outcomes = {
        check: make_outcome(verdict, check=check)
        for check, verdict in {
            "case": Verdict.ERROR,
            "determinism": Verdict.WRONG,
            "invalid/pair_bias: one head for all": Verdict.WRONG,
        }.items()
    }
    for check, outcome in outcomes.items():
        known_faults(ENTRY | {"check": check})
        assert explain(outcome) == "a tile is lost"
        assert all(explain(other) is None for name, other in outcomes.items() if name != check)


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if not verdict.fails], ids=str)
def test_what_is_no_failure_needs_no_reason(
    verdict: Verdict, make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    known_faults(ENTRY | {"check": "*"})
    assert explain(make_outcome(verdict)) is None


def test_a_known_fault_that_is_gone_is_told(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    passing = make_outcome(Verdict.PASS, parts={"pattern": True, "condition": True})
    assert no_longer_fails(passing) is None
    known_faults(ENTRY | {"check": "dq/condition"}, ENTRY)
    assert no_longer_fails(passing) == ExpectedFailure(**ENTRY)
    known_faults(ENTRY | {"check": "*"})
    assert no_longer_fails(passing) is not None
    known_faults(ENTRY | {"check": "determinism"})
    assert no_longer_fails(make_outcome(Verdict.PASS, check="determinism")) is not None


def test_a_fault_that_shows_sometimes_may_pass_and_one_of_a_device_is_known_there_alone(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    failing, passing = make_outcome(parts=BROKEN), make_outcome(Verdict.PASS, parts=BROKEN)
    known_faults(ENTRY | {"sometimes": True, "device": "cuda"})
    assert explain(failing, "cuda") == "a tile is lost"
    assert explain(failing, "cpu") is None
    assert no_longer_fails(passing, "cuda") is None
    known_faults(ENTRY | {"device": "cuda"})
    assert no_longer_fails(passing, "cuda") is not None
    assert no_longer_fails(passing, "cpu") is None


def test_a_known_fault_that_was_not_looked_for_is_not_gone(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    known_faults(ENTRY)
    other_part = make_outcome(Verdict.PASS, parts={"twin_max": True, "bias": True})
    assert no_longer_fails(other_part) is None
    for verdict in set(Verdict) - {Verdict.PASS}:
        assert no_longer_fails(make_outcome(verdict, parts=BROKEN)) is None
    elsewhere = make_outcome(Verdict.PASS, implementation="other", parts={"condition": True})
    assert no_longer_fails(elsewhere) is None


def test_a_fault_of_some_processors_is_known_on_them_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_outcome: MakeOutcome,
    known_faults: KnownFaults,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(expected, "CPUINFO", cpuinfo)
    of_some = ENTRY | {"processor": "avx512_bf16"}

    assert processor_features() == frozenset()  # a system without such a file
    known_faults(of_some)
    assert expected_failures() == ()

    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512_bf16_not\n\nprocessor : 1\n")
    known_faults(of_some)
    assert explain(make_outcome(parts=BROKEN)) is None

    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx512_bf16 amx\nmodel name : flags\n")
    assert {"fpu", "avx512_bf16", "amx"} <= processor_features()
    known_faults(of_some)
    assert explain(make_outcome(parts=BROKEN)) == "a tile is lost"
    passing = make_outcome(Verdict.PASS, parts={"condition": True})
    assert no_longer_fails(passing) == ExpectedFailure(**of_some)


@pytest.mark.parametrize("entry", [{"case": "evoformer/*"}, ENTRY | {"colour": "red"}])
def test_a_table_with_fields_missing_or_unknown_is_refused(
    entry: dict[str, str], known_faults: KnownFaults
) -> None:
    known_faults(entry)
    with pytest.raises(TypeError):
        expected_failures()


def test_what_is_recorded_is_about_something() -> None:
    """An entry that fits no implementation or no case would never be missed."""
    recorded = tomllib.loads(expected.PATH.read_text()).get("failure", [])
    for entry in (ExpectedFailure(**fields) for fields in recorded):
        assert entry.implementation in registered()
        assert any(fnmatchcase(case_id, entry.case) for case_id in CASES)
        assert len(entry.reason.split()) > 3
