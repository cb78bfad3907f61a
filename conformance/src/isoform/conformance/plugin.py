"""The suite as a pytest plugin: ``pytest -p isoform.conformance.plugin``, with ``--impl NAME``.

It is loaded only when asked for. Together with :mod:`isoform.conformance.suite` it judges any
implementation in its author's own test run::

    pytest -p isoform.conformance.plugin --pyargs isoform.conformance.suite --impl mypackage:KERNEL

Tests are grouped case by case, so that parallel workers (``-n``) ask the oracle once per case.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from isoform.conformance.case import UnknownName, select
from isoform.conformance.implementation import FRAMEWORKS, Implementation
from isoform.conformance.operations import CASES
from isoform.conformance.registry import Unavailable, find
from isoform.conformance.verdicts import GROUPS


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


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and have one case's tests run by one worker."""
    for group in GROUPS:
        config.addinivalue_line("markers", f"{group}: the suite's checks of this group")
    config.addinivalue_line("markers", "xdist_group(name): tests to be run by one worker")
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the suite's tests by case and implementation."""
    names = metafunc.fixturenames
    if "isoform_implementation" not in names:
        return
    try:
        implementations = _implementations(metafunc.config)
        cases = select(
            CASES,
            patterns=metafunc.config.option.case,
            tags=metafunc.config.option.tag,
            dtypes=metafunc.config.option.dtype,
        )
    except (UnknownName, Unavailable, TypeError) as fault:
        raise pytest.UsageError(str(fault)) from None
    if "isoform_case" not in names:
        metafunc.parametrize("isoform_implementation", implementations, ids=lambda i: i.name)
        return
    metafunc.parametrize(
        ("isoform_case", "isoform_implementation"),
        [
            pytest.param(
                case,
                implementation,
                id=f"{case.id}-{implementation.name}",
                marks=pytest.mark.xdist_group(case.id),
            )
            for case in cases
            for implementation in implementations
            if implementation.operation == case.operation
        ],
    )


def _implementations(config: pytest.Config) -> Sequence[Implementation]:
    wanted = config.option.impl
    if not wanted:
        raise pytest.UsageError("whom to judge? give --impl NAME or --impl module:OBJECT")
    return [find(name, framework=config.option.framework) for name in wanted]
