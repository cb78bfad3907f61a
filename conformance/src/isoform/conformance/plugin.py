"""The suite as a pytest plugin: ``pytest -p isoform.conformance.plugin``, with ``--impl NAME``.

It is loaded only when asked for. Together with :mod:`isoform.conformance.suite` it judges any
implementation in its author's own test run::

    pytest -p isoform.conformance.plugin --pyargs isoform.conformance.suite --impl mypackage:KERNEL

Tests run case by case, so that a worker (``-n``), who gets several in a row, asks the oracle once
for all of a case's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest

from isoform.conformance.case import Case, UnknownName, select
from isoform.conformance.implementation import FRAMEWORKS, Implementation
from isoform.conformance.operations import CASES
from isoform.conformance.ranks import Joined, Ranks
from isoform.conformance.registry import Unavailable, find
from isoform.conformance.signatures import SIGNATURES
from isoform.conformance.verdicts import GROUPS

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
        ranks = Ranks(option.ranks, option.communicator)
        config.stash[JUDGED] = (
            [
                find(name, framework=option.framework, operation=option.operation).on(ranks)
                for name in option.impl
            ],
            select(CASES, patterns=option.case, tags=option.tag, dtypes=option.dtype),
        )
    except (UnknownName, Unavailable, TypeError, ValueError) as fault:
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
