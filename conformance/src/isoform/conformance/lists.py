"""Lists of what to skip and of what is known to fail: files of an author's own, beside their tests.

A line is a case id or shell pattern, for the second kind of list a check if one alone is meant, and
a reason::

    # what our kernel does not do yet
    evoformer/values/*/subnormal   out     # flushes subnormal operands to zero: issue 12
    evoformer/length-1/*                   # reads beyond a single key: issue 15

An entry that names no case, or whose cases ran and did not fail any more, fails the run, so that a
list stays true. Those that come with isoform, of the implementations registered here, are kept in
:mod:`.expected`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from isoform.conformance.case import UnknownName
from isoform.conformance.verdicts import Outcome, Verdict


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Attributes:
        case: A case id, or a shell pattern of some.
        check: A check such as ``out/condition``, or a shell pattern of some; a result such as
            ``out`` stands for all of its checks.
        reason: Why.
        place: ``file:line``.
    """

    case: str
    check: str
    reason: str
    place: str

    def concerns(self, outcome: Outcome) -> bool:
        """Whether it is about the case and the result of ``outcome``, which ran."""
        return (
            outcome.verdict not in (Verdict.NOT_RUN, Verdict.UNSUPPORTED)
            and fnmatchcase(outcome.case, self.case)
            and fnmatchcase(outcome.check.split("/")[0], self.check.split("/")[0])
        )

    def excuses(self, check: str) -> bool:
        """Whether ``check`` may fail: it, or all of its result."""
        return fnmatchcase(check, self.check) or fnmatchcase(check.split("/")[0], self.check)

    def __str__(self) -> str:
        check = "" if self.check == "*" else f" {self.check}"
        return f"{self.place}: {self.case}{check}"


def read(path: Path, cases: Collection[str], *, checks: bool) -> tuple[Entry, ...]:
    """The entries of a list.

    Args:
        path: The file.
        cases: The ids that there are.
        checks: Whether an entry may name a check.

    Raises:
        OSError: It cannot be read.
        ValueError: A line has no reason, or too many words.
        UnknownName: An entry matches no case at all.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        what, _, reason = (part.strip() for part in line.partition("#"))
        if not what:
            continue
        place = f"{path}:{number}"
        case, *more = what.split()
        if len(more) > checks:
            allowed = "a case and a check" if checks else "a case"
            raise ValueError(f"{place}: {allowed} and, behind a #, a reason; not {what!r}")
        if not reason:
            raise ValueError(f"{place}: {what} has no reason: write it behind a #")
        if not any(fnmatchcase(case_id, case) for case_id in cases):
            raise UnknownName(f"case (of {place})", case, cases)
        entries.append(Entry(case, more[0] if more else "*", reason, place))
    return tuple(entries)


def skipped(case_id: str, entries: Sequence[Entry]) -> str:
    """Why a case is skipped; empty if it is not."""
    reasons = [entry.reason for entry in entries if fnmatchcase(case_id, entry.case)]
    return f"skipped: {'; '.join(dict.fromkeys(reasons))}" if reasons else ""


def excused(outcome: Outcome, entries: Sequence[Entry]) -> Outcome:
    """``outcome``, with the reason if it failed and each check that failed may."""
    concerned = [entry for entry in entries if entry.concerns(outcome)]
    reasons: dict[str, None] = {}
    for check in outcome.failed_checks:
        of_it = [entry.reason for entry in concerned if entry.excuses(check)]
        if not of_it:
            return outcome
        reasons |= dict.fromkeys(of_it)
    return replace(outcome, excused="; ".join(reasons))


def gone(outcomes: Iterable[Outcome], entries: Sequence[Entry]) -> list[Entry]:
    """The entries that some of ``outcomes`` are about, of which none fails any more."""
    ran, failed = standing(outcomes, entries)
    return [entry for entry in entries if entry in ran and entry not in failed]


def standing(
    outcomes: Iterable[Outcome], entries: Sequence[Entry]
) -> tuple[set[Entry], set[Entry]]:
    """The entries that some of ``outcomes`` are about, and those of which some fail as they say."""
    ran, failed = set(), set()
    for outcome in outcomes:
        for entry in entries:
            if not entry.concerns(outcome):
                continue
            judged = {f"{outcome.check}/{part.name}" for part in outcome.parts} or {outcome.check}
            if any(map(entry.excuses, judged | set(outcome.failed_checks))):
                ran.add(entry)
            if any(map(entry.excuses, outcome.failed_checks)):
                failed.add(entry)
    return ran, failed
