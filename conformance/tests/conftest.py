"""What several tests share: made-up outcomes, made-up known faults, kernels to be spoiled."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path
from typing import Any

import pytest

from isoform.conformance import expected
from isoform.conformance.verdicts import GROUPS, Outcome, Part, Verdict
from isoform.kernels.emulate import build, calls
from isoform.kernels.emulate.program import CUDA


def pytest_configure(config: pytest.Config) -> None:
    """The suite's marks are known here too, where its parts are imported."""
    for group in GROUPS:
        config.addinivalue_line("markers", f"{group}: the suite's checks of this group")


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    """An outcome of a check of ``out``; parts are given as a dictionary: which holds?"""

    def make(
        verdict: Verdict = Verdict.WRONG, *, parts: dict[str, bool] | None = None, **more: Any
    ) -> Outcome:
        described = {
            "implementation": "mine",
            "case": "evoformer/length-17/fp32/all-operands",
            "group": "conformance",
            "check": "out",
            "message": "" if verdict is Verdict.PASS else f"it is {verdict}",
        }
        judged = tuple(Part(name, holds, 2.0, 1.0) for name, holds in (parts or {}).items())
        return Outcome(**described | more, verdict=verdict, parts=judged)

    return make


@pytest.fixture
def known_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts other expected failures in force: tables with the fields of an ExpectedFailure."""
    path = tmp_path / "expected_failures.toml"

    def record(*entries: dict[str, str | bool]) -> None:
        tables = (
            "\n".join(["[[failure]]", *(f"{key} = {dumps(x)}" for key, x in entry.items())])
            for entry in entries
        )
        path.write_text("\n\n".join(tables))
        expected.expected_failures.cache_clear()

    monkeypatch.setattr(expected, "PATH", path)
    record()
    yield record
    expected.expected_failures.cache_clear()


@pytest.fixture(scope="session")
def faulty_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for programs of changed kernels, which share what runs their threads."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, faulty_programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels, which are run instead of ours."""
    copy = tmp_path / "cuda"
    shutil.copytree(CUDA, copy)
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(faulty_programs))
    monkeypatch.setattr(calls, "build", functools.partial(build, folder=copy))
    return copy
