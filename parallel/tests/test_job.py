"""Ranks that stay: answers come back, faults end them, and the next call has new ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isoform.parallel import launch as launching
from isoform.parallel.job import Job
from isoform.parallel.launch import LaunchError

TRANSPORTS = ["gloo", pytest.param("mpi", marks=pytest.mark.mpi)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"


def soon_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_same_ranks_answer_one_call_after_the_other(programs, transport):
    with Job(3, transport=transport) as job:
        first, again = job.run(programs.own_rank, "a"), job.run(programs.own_rank, x="b")
        assert [(rank, x) for rank, _, x in first] == [(0, "a"), (1, "a"), (2, "a")]
        pids = [pid for _, pid, _ in first]
        assert again == [(rank, pids[rank], "b") for rank in range(3)]
        assert len(set(pids)) == 3
        assert all(job.run(programs.strided))
    assert soon_gone(pids)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_fault_ends_all_ranks_and_new_ones_answer_the_next_call(programs, transport):
    with Job(3, transport=transport) as job:
        before = [pid for _, pid, _ in job.run(programs.own_rank, 0)]
        with pytest.raises(LaunchError, match="ArithmeticError: the planted fault") as caught:
            job.run(programs.one_raises)
        assert next(iter(caught.value.tracebacks)) == 2
        assert soon_gone(before)
        after = [pid for _, pid, _ in job.run(programs.own_rank, 0)]
        assert not {*before} & {*after}


@pytest.mark.mpi
def test_a_killed_rank_and_one_that_sleeps_end_all(programs, tmp_path):
    began = time.monotonic()
    with Job(3) as job:
        with pytest.raises(LaunchError, match="failed: no result of ranks 0, 1, 2 of 3"):
            job.run(programs.one_is_killed)
        with pytest.raises(LaunchError) as caught:
            job.run(programs.one_sleeps, str(tmp_path), limit=1.5)
    assert set(caught.value.tracebacks) == {0, 1, 2}
    assert "Timeout" in caught.value.tracebacks[0]
    assert "in barrier" in caught.value.tracebacks[0]
    assert "in one_sleeps" in caught.value.tracebacks[2]
    assert soon_gone([int(path.name) for path in tmp_path.iterdir()])
    assert time.monotonic() - began < 20


@pytest.mark.mpi
def test_a_call_in_time_leaves_no_alarm_behind(programs):
    with Job(2) as job:
        job.run(programs.strided, limit=1.0)
        time.sleep(2.5)
        assert all(job.run(programs.strided))


OWNER = """
import sys, time
sys.path.insert(0, {tests!r})
import parallel_programs as programs
from isoform.parallel.job import Job

job = Job(2)
print(*(pid for _, pid, _ in job.run(programs.own_rank, 0)), flush=True)
time.sleep(1000)
"""


@pytest.mark.mpi
def test_ranks_do_not_outlive_whoever_started_them(tmp_path):
    """Not even where that one is killed, and can end nothing any more."""
    program = tmp_path / "owner.py"
    program.write_text(OWNER.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert soon_gone(pids)


def test_wrong_calls_are_refused(programs, monkeypatch):
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        Job(0).run(programs.strided)
    with pytest.raises(
        ValueError, match="transport must be one of mpi, gloo, torch-nccl, cupy-nccl"
    ):
        Job(1, transport="smoke").run(programs.strided)
    with pytest.raises(TypeError, match="<lambda> is not at the top level of a module"):
        Job(1).run(lambda comm: None)
    monkeypatch.setattr(launching.shutil, "which", lambda name, path=None: None)
    with pytest.raises(ImportError, match=re.escape('pip install "isoform[mpi]"')):
        Job(1).run(programs.strided)
