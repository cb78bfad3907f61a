"""The suite as a pytest plugin: ``pytest -p isoform.conformance.plugin``, with ``--impl NAME``.

It is loaded only when asked for. Together with :mod:`isoform.conformance.suite` it judges any
implementation in its author's own test run::

    pytest -p isoform.conformance.plugin --pyargs isoform.conformance.suite --impl mypackage:KERNEL

Tests run case by case, so that a worker (``-n``), who gets several in a row, asks the oracle once
for all of a case's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from isoform.conformance.case import Case, UnknownName, select
from isoform.conformance.implementation import FRAMEWORKS, Implementation
from isoform.conformance.judge import MEMORY_LENGTHS as LENGTHS
from isoform.conformance.lists import Entry, read
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.ranks import Joined, Ranks
from isoform.conformance.registry import Unavailable, find
from isoform.conformance.signatures import SIGNATURES
from isoform.conformance.verdicts import GROUPS

SKIPPED = pytest.StashKey[Sequence[Entry]]()
KNOWN = pytest.StashKey[Sequence[Entry]]()
"""What the lists say that are given."""
RAN, FAILED = "isoform-xfail-ran", "isoform-xfail-failed"
"""Properties by which tests tell of the entries that they are about, and that fail as they say."""

JUDGED = pytest.StashKey[tuple[Sequence[Implementation], Sequence[Case]]]()
"""Whom to judge, and on what."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Whom to judge, on what, where."""
    group = parser.getgroup("isoform", "conformance of attention implementations")
    group.addoption(
        "--impl",
        action="append",
        default=[],
        metavar="NAME|module:OBJECT",
        help="an implementation to judge; repeatable",
    )
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help="cases to judge on, by id or shell pattern; repeatable; default: all",
    )
    group.addoption(
        "--tag", action="append", default=[], help="only cases with this tag; repeatable"
    )
    group.addoption(
        "--dtype", action="append", default=[], help="only cases of this dtype; repeatable"
    )
    group.addoption("--device", default="cpu", help="where to run: cpu (default) or cuda")
    group.addoption(
        "--large", action="store_true", help="run cases on a CPU that are too large for it"
    )
    group.addoption(
        "--framework",
        choices=FRAMEWORKS,
        default="torch",
        help="whose arrays a bare function takes (default: torch)",
    )
    group.addoption(
        "--operation",
        choices=SIGNATURES,
        help="which operation a bare function is (default: what its operands say)",
    )

    group.addoption(
        "--skip",
        action="append",
        default=[],
        metavar="FILE",
        help="a list of cases to leave out: an id or shell pattern and, behind a #, a reason",
    )
    group.addoption(
        "--xfail",
        action="append",
        default=[],
        metavar="FILE",
        help="a list of what is known to fail: an id or shell pattern, a check if one alone is "
        "meant and, behind a #, a reason; what does not fail any more fails the run",
    )
    group.addoption(
        "--ranks",
        type=int,
        default=Ranks.size,
        metavar="P",
        help="over how many ranks to run those that run over many (default: 4)",
    )
    group.addoption(
        "--communicator",
        choices=get_args(Joined),
        default=Ranks.communicator,
        help="what the ranks are: threads of this process (default), or processes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and find out whom to judge and on what."""
    for group in GROUPS:
        config.addinivalue_line("markers", f"{group}: the suite's checks of this group")
    option = config.option
    try:
        ranks = Ranks(option.ranks, option.communicator).on(option.device)
        config.stash[JUDGED] = (
            [
                find(name, framework=option.framework, operation=option.operation).on(ranks)
                for name in option.impl
            ],
            select(CASES, patterns=option.case, tags=option.tag, dtypes=option.dtype),
        )
        once = [
            case_id
            for operation in OPERATIONS.values()
            for case_id in (operation.probe.id, *(operation.memory_case(n).id for n in LENGTHS))
        ]
        for key, files, checks in ((SKIPPED, option.skip, False), (KNOWN, option.xfail, True)):
            known = [*CASES, *(once if checks else ())]
            config.stash[key] = tuple(
                entry for file in files for entry in read(Path(file), known, checks=checks)
            )
        config.pluginmanager.register(KnownFaults(config.stash[KNOWN]), "isoform-known-faults")
    except (OSError, UnknownName, Unavailable, TypeError, ValueError) as fault:
        raise pytest.UsageError(str(fault)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the suite's tests by case and implementation."""
    names = metafunc.fixturenames
    if "isoform_implementation" not in names:
        return
    implementations, cases = metafunc.config.stash[JUDGED]
    if not implementations:
        message = "whom to judge? give --impl NAME or --impl module:OBJECT"
        pytest.fail(message, pytrace=False)
    if "isoform_case" not in names:
        wanted = {case.operation for case in cases}
        offered = [
            one
            for implementation in implementations
            for one in implementation.offers
            if one.operation in wanted
        ]
        metafunc.parametrize(
            "isoform_implementation", offered, ids=lambda one: f"{one.name}-{one.operation}"
        )
        return
    metafunc.parametrize(
        ("isoform_case", "isoform_implementation"),
        [
            pytest.param(case, implementation, id=f"{case.id}-{implementation.name}")
            for case in cases
            for implementation in implementations
            if implementation.of(case.operation) is not None
        ],
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by case; those without one come first."""
    places = {case_id: place for place, case_id in enumerate(CASES)}

    def place(item: Any) -> int:
        case = item.callspec.params.get("isoform_case") if hasattr(item, "callspec") else None
        return -1 if case is None else places.get(case.id, len(places))

    items.sort(key=place)


class KnownFaults:
    """What the tests say of the entries of ``--xfail``, those of other workers too: one of which
    something ran and nothing failed fails the run.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.places: dict[str, set[str]] = {RAN: set(), FAILED: set()}

    @property
    def gone(self) -> list[Entry]:
        """The entries that do not fail any more."""
        left = self.places[RAN] - self.places[FAILED]
        return [entry for entry in self.entries if entry.place in left]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather what a test said."""
        if report.when == "call":
            for key, place in report.user_properties:
                if key in self.places:
                    self.places[key].add(str(place))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run."""
        worker = hasattr(session.config, "workerinput")  # it has seen a part alone
        if self.gone and not worker and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say so."""
        for entry in self.gone:
            line = f"{entry}: does not fail any more: take it out"
            terminalreporter.write_line(line, red=True)
