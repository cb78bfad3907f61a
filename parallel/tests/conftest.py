"""What the tests of the parallel layer share: ways to run one function on several ranks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isoform.parallel import launch as launching
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.launch import launch

# World sizes of each transport. A rank of torch's takes seconds to start.
SIZES = {"simulated": (1, 2, 3, 4, 8), "mpi": (1, 2, 3, 4, 8), "gloo": (3,)}
WORLDS = [
    pytest.param((transport, size), id=f"{transport}-{size}", marks=marks)
    for transport, sizes in SIZES.items()
    for size in sizes
    for marks in ([pytest.mark.mpi] if transport == "mpi" else [],)
]


def load(name: str) -> ModuleType:
    """A module of functions that ranks run, from this folder, without pytest in it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def _ranks_are_forked() -> Iterator[None]:
    """But where a test asks for ``started_anew``."""
    forked = load("forked_ranks")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launching, "_start", forked.start)
        yield
    forked.end()


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are fresh interpreters, as users have them."""
    monkeypatch.setattr(launching, "_start", load("forked_ranks").usual_start)


@pytest.fixture(scope="session")
def programs() -> ModuleType:
    """The functions that ranks run."""
    return load("parallel_programs")


@pytest.fixture(scope="session")
def axial_programs() -> ModuleType:
    """Those of the Evoformer."""
    return load("axial_programs")


@pytest.fixture(scope="session")
def training_programs() -> ModuleType:
    """Those of the genome model."""
    return load("training_programs")


@pytest.fixture(scope="session")
def loop_programs() -> ModuleType:
    """Those of the training loop."""
    return load("loop_programs")


@pytest.fixture(scope="session")
def engine_programs() -> ModuleType:
    """Those of all kinds of parallelism together."""
    return load("engine_programs")


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A transport and how many ranks."""
    return request.param


LIMIT = 300.0
"""Seconds for ranks that are not expected to hang, on a machine however busy."""


@pytest.fixture
def run() -> Callable[..., list[Any]]:
    """Run a function on every rank of a world; what each returned, by rank."""

    def on_all_ranks(function: Any, world: tuple[str, int], *args: Any, **kwargs: Any) -> list[Any]:
        transport, size = world
        if transport == "simulated":
            return simulate(function, size, *args, **kwargs)
        return launch(function, size, *args, transport=transport, limit=LIMIT, **kwargs)

    return on_all_ranks
