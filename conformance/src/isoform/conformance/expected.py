"""Expected failures: faults that registered implementations are known to have, each with a reason.

They are kept in ``expected_failures.toml``. A failure that is expected does not fail a run; one
that is expected and does not happen any more does, so that the list stays true.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from isoform.conformance.verdicts import Outcome, Verdict

CPUINFO = Path("/proc/cpuinfo")
PATH = Path(__file__).with_name("expected_failures.toml")


@dataclass(frozen=True)
class ExpectedFailure:
    """A fault that is known.

    Attributes:
        implementation: Who has it.
        case: On which cases; a shell pattern of case ids.
        check: Which check it fails, such as ``out/condition``; a shell pattern.
        reason: What the fault is, and where it is known from.
        processor: A processor feature that the fault comes with, as ``/proc/cpuinfo`` names it;
            elsewhere the entry says nothing.
        device: Where alone it has it, ``cpu`` or ``cuda``; everywhere if empty.
        sometimes: Whether it shows on some of those cases alone, as numbers fall: that one passes
            then tells nothing.
    """

    implementation: str
    case: str
    check: str
    reason: str
    processor: str = ""
    device: str = ""
    sometimes: bool = False

    def covers(self, outcome: Outcome, device: str) -> bool:
        """Whether this is about the implementation, the case and the result of ``outcome``."""
        return (
            outcome.implementation == self.implementation
            and self.device in ("", device)
            and fnmatchcase(outcome.case, self.case)
            and fnmatchcase(outcome.check.split("/")[0], self.check.split("/")[0])
        )


@cache
def expected_failures() -> tuple[ExpectedFailure, ...]:
    """All that are recorded for a machine like this."""
    entries = tomllib.loads(PATH.read_text()).get("failure", [])
    recorded = [ExpectedFailure(**entry) for entry in entries]
    features = processor_features()
    return tuple(entry for entry in recorded if entry.processor in ("", *features))


def processor_features() -> frozenset[str]:
    """The features of this machine's processor, as Linux names them; elsewhere none."""
    if not CPUINFO.exists():
        return frozenset()
    lines = CPUINFO.read_text().splitlines()
    return frozenset(
        word
        for line in lines
        if line.lower().startswith(("flags", "features"))
        for word in line.split()
    )


def explain(outcome: Outcome, device: str = "cpu") -> str | None:
    """The recorded reason for a failure on ``device``; None where the outcome is no failure or not
    expected.

    Every check that failed must be expected, not just one of them.
    """
    if outcome.excused:
        return outcome.excused
    entries = [entry for entry in expected_failures() if entry.covers(outcome, device)]
    reasons = {
        check: entry.reason
        for check in outcome.failed_checks
        for entry in entries
        if fnmatchcase(check, entry.check)
    }
    if not outcome.failed_checks or set(reasons) != set(outcome.failed_checks):
        return None
    return "; ".join(dict.fromkeys(reasons.values()))


def no_longer_fails(outcome: Outcome, device: str = "cpu") -> ExpectedFailure | None:
    """The entry that expects ``outcome`` to fail on ``device``, where it passes."""
    if outcome.verdict is not Verdict.PASS:
        return None
    judged = {f"{outcome.check}/{part.name}" for part in outcome.parts} or {outcome.check}
    for entry in expected_failures():
        if entry.sometimes:
            continue
        if entry.covers(outcome, device) and any(
            fnmatchcase(check, entry.check) for check in judged
        ):
            return entry
    return None
