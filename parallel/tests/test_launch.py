"""Ranks as processes: results come back, faults come back with tracebacks, nothing is left over."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isoform.parallel import launch as launching
from isoform.parallel.launch import LaunchError, launch

ROOT = Path(__file__).parents[2]
TRANSPORTS = ["gloo", pytest.param("mpi", marks=pytest.mark.mpi)]


def startup(programs: Any, transport: Any) -> float:
    """Seconds that ranks take to be there, and to end: importing torch takes 2 of them, or 20."""
    began = time.monotonic()
    launch(programs.own_rank, 3, 0, transport=transport)
    return time.monotonic() - began


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [("one_raises", "ArithmeticError: the planted fault"), ("one_exits", "SystemExit: 3")],
)
def test_the_rank_that_fails_ends_all_and_speaks_first(
    started_anew, programs, transport, fault, words
):
    slow = startup(programs, transport)
    began = time.monotonic()
    with pytest.raises(LaunchError, match="failed: no result of ranks 0, 1, 2 of 3") as caught:
        launch(getattr(programs, fault), 3, transport=transport)
    assert next(iter(caught.value.tracebacks)) == 2
    assert words in caught.value.tracebacks[2]
    assert f"in {fault}" in caught.value.tracebacks[2]
    assert str(caught.value).index("--- rank 2 of 3 ---") < 100
    assert time.monotonic() - began < 10 + 3 * slow


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_ends_all(started_anew, programs, transport, tmp_path):
    slow = startup(programs, transport)
    began = time.monotonic()
    with pytest.raises(LaunchError, match="failed: no result of ranks 0, 1, 2 of 3"):
        launch(programs.one_is_killed, 3, str(tmp_path), transport=transport)
    assert time.monotonic() - began < 10 + 3 * slow
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_time_is_up_for_all_and_they_say_where_they_were(programs, transport, tmp_path):
    limit = 3 + math.ceil(2 * startup(programs, transport))
    with pytest.raises(LaunchError, match=f"not done after {limit} s: no result") as caught:
        launch(programs.one_sleeps, 2, str(tmp_path), transport=transport, limit=limit)
    assert set(caught.value.tracebacks) == {0, 1}
    assert "in barrier" in caught.value.tracebacks[0]
    assert "in one_sleeps" in caught.value.tracebacks[1]
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.mpi
def test_a_mismatched_call_does_not_wait_for_ever(programs):
    with pytest.raises(LaunchError):
        launch(programs.other_lengths, 3, limit=10)


def test_wrong_calls_are_refused(programs):
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        launch(programs.strided, 0)
    with pytest.raises(
        ValueError, match="transport must be one of mpi, gloo, torch-nccl, cupy-nccl"
    ):
        launch(programs.strided, 1, transport="smoke")
    with pytest.raises(TypeError, match="<lambda> is not at the top level of a module"):
        launch(lambda comm: None, 1)


def test_a_missing_mpiexec_is_named(programs, monkeypatch):
    monkeypatch.setattr(launching.shutil, "which", lambda name, path=None: None)
    with pytest.raises(ImportError, match=re.escape('pip install "isoform[mpi]"')):
        launch(programs.strided, 1)


PROGRAM = """
import sys, time
from mpi4py import MPI
from isoform.parallel.communicators.mpi import end_job_on_error
{guard}
if MPI.COMM_WORLD.rank == 1:
    raise ArithmeticError("the planted fault")
MPI.COMM_WORLD.Barrier()
"""


@pytest.mark.mpi
def test_an_error_ends_a_job_under_plain_python(tmp_path):
    """Without the hook the job hangs, which is what the hook is for."""

    def start(guard: str, limit: float) -> Any:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(guard=guard))
        command = [launching.mpiexec(), "-n", "2", sys.executable, str(program)]
        return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)

    done = start("end_job_on_error()", 20)
    assert done.returncode != 0
    assert "ArithmeticError: the planted fault" in done.stderr
    assert "on rank 1 of 2: the job ends here" in done.stderr
    with pytest.raises(subprocess.TimeoutExpired):
        start("", 4)


@pytest.mark.mpi
def test_the_programs_of_the_how_to_run(tmp_path):
    text = (ROOT / "docs/how-to/attention-over-many-ranks.md").read_text()
    program, simulated = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "program.py"
    path.write_text(program + simulated)
    command = [launching.mpiexec(), "-n", "3", sys.executable, "-m", "mpi4py", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"rank \d sent \d+ bytes", done.stdout)) == 3


@pytest.mark.parametrize("transport", ["torch-nccl", "cupy-nccl"])
def test_ranks_of_nccl_want_a_gpu_each(programs, transport, monkeypatch):
    """Two ranks on one GPU are refused with both numbers, before NCCL hangs or fails."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as ranks inherit it
    with pytest.raises(LaunchError, match="2 ranks of NCCL need as many GPUs, and here are 0"):
        launch(programs.strided, 2, transport=transport)
