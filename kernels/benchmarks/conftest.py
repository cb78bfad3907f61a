"""What the benchmarks can be told, as `python -m isoform.kernels.benchmark` can."""

from pathlib import Path

import pytest

from isoform.kernels.benchmark.__main__ import no_gpu
from isoform.kernels.benchmark.cases import DTYPES
from isoform.kernels.benchmark.competitors import FLEX_MODES
from isoform.kernels.benchmark.run import ROUNDS


def pytest_addoption(parser):
    group = parser.getgroup("isoform's benchmarks")
    group.addoption("--dtype", action="append", choices=DTYPES, help="bfloat16 if not said")
    group.addoption("--rounds", type=int, default=ROUNDS, help="turns of each competitor")
    group.addoption("--flex-mode", choices=FLEX_MODES, default=FLEX_MODES[0])
    group.addoption("--commit", default="", help="what is checked out, if git cannot be asked")
    group.addoption("--record", type=Path, help="append a line of JSON for each competitor to it")


def pytest_configure(config):
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks share one GPU: run them in one process, without -n")


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """Fail, rather than skip, where nothing can be timed."""
    if why := no_gpu():
        pytest.exit(why, returncode=3)
