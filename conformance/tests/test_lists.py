"""Lists of what to skip and of what is known to fail are heeded, and kept true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from isoform.conformance.case import UnknownName
from isoform.conformance.lists import Entry, excused, gone, read, skipped
from isoform.conformance.operations import CASES
from isoform.conformance.verdicts import Outcome, Verdict

MakeOutcome = Callable[..., Outcome]
Listed = Callable[..., tuple[Entry, ...]]
CASE = "evoformer/length-17/fp32/all-operands"


@pytest.fixture
def listed(tmp_path: Path) -> Listed:
    def entries(text: str, checks: bool = True) -> tuple[Entry, ...]:
        path = tmp_path / "list.txt"
        path.write_text(text)
        return read(path, CASES, checks=checks)

    return entries


def test_lines(listed: Listed, tmp_path: Path) -> None:
    found = listed(
        f"# ours\n\n{CASE}  # a tile: issue #4\n  evoformer/empty/* out/cond* # not yet\n"
    )
    assert [(x.case, x.check, x.reason) for x in found] == [
        (CASE, "*", "a tile: issue #4"),
        ("evoformer/empty/*", "out/cond*", "not yet"),
    ]
    assert str(found[1]) == f"{tmp_path / 'list.txt'}:4: evoformer/empty/* out/cond*"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (CASE, "list.txt:1: .* has no reason"),
        (f"{CASE} #  ", "has no reason"),
        (f"{CASE} out dq # two checks", "a case and a check and, behind a #, a reason"),
    ],
)
def test_a_line_that_says_too_little_or_too_much(line: str, said: str, listed: Listed) -> None:
    with pytest.raises(ValueError, match=said):
        listed(line)


def test_what_names_no_case_is_refused(listed: Listed) -> None:
    with pytest.raises(UnknownName, match=r"list.txt:2.*'evoformer/lenght-17/\*'"):
        listed(f"{CASE} # there\nevoformer/lenght-17/* # misspelt")
    with pytest.raises(ValueError, match="a case and, behind a #"):
        listed(f"{CASE} out # no check can be skipped", checks=False)


def test_every_check_that_failed_must_be_listed(listed: Listed, make_outcome: MakeOutcome) -> None:
    both = make_outcome(parts={"pattern": False, "condition": False})
    one = listed("evoformer/length-*/fp32/* out/condition # a tile is lost")
    assert excused(both, one).excused == ""
    two = (*one, *listed("evoformer/length-*/fp32/* out/pattern # NaN is lost"))
    assert excused(both, two).excused == "NaN is lost; a tile is lost"
    result = listed(f"{CASE} out # a tile is lost")
    assert excused(both, result).excused == "a tile is lost"
    every = listed("evoformer/length-*/fp32/* # a tile is lost")
    assert excused(both, every).excused == "a tile is lost"
    elsewhere = make_outcome(case="evoformer/empty/fp32/no-keys", parts={"condition": False})
    assert excused(elsewhere, every) == elsewhere


def test_what_does_not_fail_any_more_is_told_and_what_did_not_run_is_not(
    listed: Listed, make_outcome: MakeOutcome
) -> None:
    entries = listed(f"{CASE} out/condition # a tile is lost")
    passing = make_outcome(Verdict.PASS, parts={"pattern": True, "condition": True})
    failing = make_outcome(parts={"pattern": True, "condition": False})
    assert gone([passing], entries) == [*entries]
    assert gone([passing, failing], entries) == []
    assert gone([], entries) == []
    other_part = make_outcome(Verdict.PASS, parts={"bias": True})
    assert gone([other_part], entries) == []
    for verdict in (Verdict.NOT_RUN, Verdict.UNSUPPORTED):
        assert gone([make_outcome(verdict)], entries) == []


def test_skipped(listed: Listed) -> None:
    entries = listed("evoformer/length-*/fp32/* # too slow\n*/all-operands # not yet", checks=False)
    assert skipped(CASE, entries) == "skipped: too slow; not yet"
    assert skipped("evoformer/empty/fp32/no-keys", entries) == ""
