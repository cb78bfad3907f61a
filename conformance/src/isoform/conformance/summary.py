"""What a run comes to: the figures that the terminal, the HTML report and JUnit show alike."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import inf

from isoform.conformance.budgets import SMALLEST
from isoform.conformance.dtypes import SHORT_NAMES
from isoform.conformance.expected import explain, no_longer_fails
from isoform.conformance.implementation import DEFAULT_OPERATION
from isoform.conformance.operations import CASES
from isoform.conformance.run import Run
from isoform.conformance.verdicts import Outcome, Verdict

CAPTURED = "captured file"
"""Under what a run's environment names the file that its operands were captured in."""


@dataclass(frozen=True)
class Worst:
    """The figure that came closest to its limit, or went furthest beyond.

    Attributes:
        share: The figure over its limit: more than 1 is wrong.
        case: The case's id.
        check: The check's full name, such as ``out/condition``.
    """

    share: float
    case: str
    check: str


@dataclass(frozen=True)
class Failure:
    """Everything that failed of one implementation in one case.

    Attributes:
        case: The case's id.
        outcomes: What failed.
        command: What shows it again.
    """

    case: str
    outcomes: tuple[Outcome, ...]
    command: str

    @property
    def messages(self) -> tuple[tuple[str, str], ...]:
        """The full name and the message of everything that failed."""
        return tuple(found for outcome in self.outcomes for found in messages(outcome))


@dataclass(frozen=True)
class Summary:
    """What a run says about one implementation.

    Attributes:
        implementation: Its name.
        counts: How many checks came to each verdict, expected failures aside.
        failures: What failed, case by case, those with the least work first.
        expected: Failures that are known, each with its reason.
        mended: What is known to fail and passed, each with the reason that was recorded.
        worst: The largest error over its budget; None where no error was measured.
    """

    implementation: str
    counts: dict[Verdict, int]
    failures: tuple[Failure, ...]
    expected: tuple[tuple[Outcome, str], ...]
    mended: tuple[tuple[Outcome, str], ...]
    worst: Worst | None

    @property
    def failed(self) -> int:
        """How many checks failed, expected failures aside."""
        return sum(count for verdict, count in self.counts.items() if verdict.fails)

    @property
    def ran(self) -> bool:
        """Whether anything was checked at all."""
        idle = {Verdict.NOT_RUN, Verdict.UNSUPPORTED}
        return bool(self.expected) or any(self.counts.keys() - idle)

    @property
    def failed_checks(self) -> dict[str, int]:
        """In how many cases each check failed, by its full name, the commonest first."""
        names = Counter(
            name
            for failure in self.failures
            for outcome in failure.outcomes
            for name in outcome.failed_checks
        )
        return dict(names.most_common())

    @property
    def tally(self) -> dict[str, dict[str, int]]:
        """The same by result or behaviour, and then by the part of the budget."""
        found: dict[str, dict[str, int]] = {}
        for name, n in self.failed_checks.items():
            result, _, part = name.partition("/")
            found.setdefault(result, {})[part] = n
        return found


def summaries(run: Run) -> tuple[Summary, ...]:
    """What ``run`` says, implementation by implementation."""
    found = []
    for name in run.implementations:
        outcomes = [outcome for outcome in run.outcomes if outcome.implementation == name]
        reasons = [(outcome, reason(run, outcome)) for outcome in outcomes if outcome.verdict.fails]
        expected = tuple((outcome, why) for outcome, why in reasons if why is not None)
        unexpected = [outcome for outcome, why in reasons if why is None]
        counts = Counter(outcome.verdict for outcome in outcomes)
        counts.subtract(outcome.verdict for outcome, _ in expected)
        counted = {verdict: n for verdict in Verdict if (n := counts[verdict])}
        failures = _failures(run, unexpected)
        mended = () if name in run.sources else _mended(outcomes, device_of(run))
        found.append(Summary(name, counted, failures, expected, mended, worst(outcomes)))
    return tuple(found)


def _mended(outcomes: Iterable[Outcome], device: str) -> tuple[tuple[Outcome, str], ...]:
    entries = ((outcome, no_longer_fails(outcome, device)) for outcome in outcomes)
    return tuple((outcome, entry.reason) for outcome, entry in entries if entry is not None)


def _failures(run: Run, outcomes: Iterable[Outcome]) -> tuple[Failure, ...]:
    def work(outcome: Outcome) -> tuple[float, str]:
        case = CASES.get(outcome.case)
        return case.shape.largest if case else inf, outcome.case

    return tuple(
        Failure(case_id, tuple(failed := list(group)), command(run, failed[0]))
        for case_id, group in groupby(sorted(outcomes, key=work), key=lambda x: x.case)
    )


def messages(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """The full name and the message of each check that failed in ``outcome``, whose own message
    says them all in one.
    """
    names = outcome.failed_checks
    kind = "" if outcome.verdict is Verdict.WRONG else f"{outcome.verdict}: "
    said = outcome.message.removeprefix(f"{outcome.check}: ").split(f"; {outcome.check}: ")
    if len(said) != len(names):
        return ((", ".join(names), kind + outcome.message),)
    return tuple(zip(names, (kind + part for part in said), strict=True))


def reason(run: Run, outcome: Outcome) -> str | None:
    """Why ``outcome`` was expected to fail, or None. Known faults are those of a list that the run
    was given, and those of registered implementations: someone's own object is not excused by
    having the same name as one.
    """
    if outcome.implementation in run.sources:
        return outcome.excused or None
    return explain(outcome, device_of(run))


def device_of(run: Run) -> str:
    """Where ``run`` was."""
    return run.environment.get("device", "cpu")


def shares(outcome: Outcome) -> dict[str, float]:
    """Each measured figure over its limit, by the part of the budget."""
    return {
        part.name: part.figure / part.limit
        for part in outcome.parts
        if part.name in SMALLEST and part.limit > 0
    }


def worst(outcomes: Iterable[Outcome]) -> Worst | None:
    """The error that came closest to its budget. The condition decides, where it was looked at:
    the other parts judge all elements of a result together.
    """
    candidates = [
        Worst(share, outcome.case, f"{outcome.check}/{part}")
        for outcome in outcomes
        for part, share in shares(outcome).items()
    ]
    pointwise = [found for found in candidates if found.check.endswith("/condition")]
    return max(pointwise or candidates, key=lambda found: found.share, default=None)


def dtype(case_id: str) -> str:
    """The dtype of a case, from its id."""
    return SHORT_NAMES[case_id.split("/")[2]]


def command(run: Run, outcome: Outcome) -> str:
    """The command that shows ``outcome`` again."""
    name = outcome.implementation
    source = run.sources.get(name)
    if outcome.case.startswith("captured/"):
        file = run.environment.get(CAPTURED, "FILE")
        words = ["isoform", "replay", file, "--impl", source or name]
        words += ["--call", outcome.case.rpartition("/")[2]]
    else:
        words = ["isoform", "check", *(["--impl", source] if source else [name])]
        words += ["--case", outcome.case]
    declared = run.capabilities.get(name, {})
    if source and any(each["framework"] == "numpy" for each in declared.values()):
        words += ["--framework", "numpy"]
    if source and [*declared] not in ([], [DEFAULT_OPERATION]):
        words += ["--operation", next(iter(declared))]  # told to one that knows, it does nothing
    if any("ranks" in each for each in declared.values()):
        words += ["--ranks", run.environment["ranks"]]
        words += ["--communicator", run.environment["communicator"]]
    device = device_of(run)
    if device != "cpu":
        words += ["--device", device]
    elif outcome.case in CASES and CASES[outcome.case].large:
        words.append("--large")
    return shlex.join(words)


def idle(run: Run, verdict: Verdict) -> dict[str, dict[str, tuple[str, ...]]]:
    """What was not run or is not supported: by reason and implementation, the cases concerned."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for outcome in run.outcomes:
        if outcome.verdict is verdict:
            for why in _reasons(outcome.message):
                cases = found.setdefault(why, {}).setdefault(outcome.implementation, {})
                cases[outcome.case] = None
    return {why: {name: tuple(cases) for name, cases in who.items()} for why, who in found.items()}


_DECLARED = "declared unsupported: "


def _reasons(message: str) -> set[str]:
    """The reasons that a message gives, each without what is true of its case alone."""
    if not message.startswith(_DECLARED):
        return {message}
    reasons = message.removeprefix(_DECLARED).split("; ")
    return {
        "gradients" if why.startswith("gradient of ") else _SIZES.sub("…", why) for why in reasons
    }


_SIZES = re.compile(r"\b[A-Z]=\d+(?:,[A-Z]=\d+)+|(?<==)\d+")
