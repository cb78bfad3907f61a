"""What a run comes to: the figures that the terminal, the HTML report and JUnit show alike."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import inf

from isoform.conformance.budgets import SMALLEST
from isoform.conformance.dtypes import SHORT_NAMES
from isoform.conformance.expected import explain
from isoform.conformance.operations import CASES
from isoform.conformance.run import Run
from isoform.conformance.verdicts import Outcome, Verdict


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
        worst: The largest error over its budget; None where no error was measured.
    """

    implementation: str
    counts: dict[Verdict, int]
    failures: tuple[Failure, ...]
    expected: tuple[tuple[Outcome, str], ...]
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
        found.append(Summary(name, counted, failures, expected, worst(outcomes)))
    return tuple(found)


def _failures(run: Run, outcomes: Iterable[Outcome]) -> tuple[Failure, ...]:
    def work(outcome: Outcome) -> tuple[float, str]:
        case = CASES.get(outcome.case)
        return case.shape.logits if case else inf, outcome.case

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
    """Why ``outcome`` was expected to fail, or None. Known faults are those of registered
    implementations: someone's own object is not excused by having the same name.
    """
    return None if outcome.implementation in run.sources else explain(outcome)


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
    return next((SHORT_NAMES[part] for part in case_id.split("/") if part in SHORT_NAMES), "")


def command(run: Run, outcome: Outcome) -> str:
    """The command that shows ``outcome`` again."""
    words = ["isoform", "check"]
    source = run.sources.get(outcome.implementation)
    words += ["--impl", source] if source else [outcome.implementation]
    if source and run.capabilities.get(outcome.implementation, {}).get("framework") == "numpy":
        words += ["--framework", "numpy"]
    words += ["--case", outcome.case]
    device = run.environment.get("device", "cpu")
    if device != "cpu":
        words += ["--device", device]
    elif outcome.case in CASES and CASES[outcome.case].large:
        words.append("--large")
    return shlex.join(words)


def grouped(run: Run, verdict: Verdict) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Outcomes of ``verdict`` by implementation and message, each with the cases concerned."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for outcome in run.outcomes:
        if outcome.verdict is verdict:
            key = (outcome.implementation, outcome.message)
            found.setdefault(key, {})[outcome.case] = None
    return tuple((name, message, tuple(cases)) for (name, message), cases in found.items())
