"""Which rank a process is: by torchrun, mpiexec, srun, or alone; and that such ranks meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoform.parallel.communicator import CommunicationError
from isoform.parallel.launch import mpiexec
from isoform.parallel.training import world as worlds
from isoform.parallel.training.world import World, first_host, joined, world

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from isoform.parallel.training.world import joined, world
here = world()
with joined(here) as comm:
    x = comm.all_gather(np.array([here.rank]), [(1,)] * here.ranks)
    said = f"{here.starter} {here.rank} {here.ranks} {[int(r[0]) for r in x]}"
    Path(sys.argv[1], str(here.rank)).write_text(said)  # lines of ranks may be mixed
"""
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "5"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, World("torchrun", 1, 4, 0)),
        ({"RANK": "1"}, World()),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, World("mpiexec", 2, 3, 2)),
        (
            {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0"},
            World("mpiexec", 2, 3, 0),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "6",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            World("mpiexec", 5, 6, 1),
        ),
        (SLURM, World()),  # a batch script
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, World("srun", 3, 8, 1)),
        (
            {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "PMI_RANK": "2", "PMI_SIZE": "3"},
            World("mpiexec", 2, 3, 2),
        ),
        (
            {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "RANK": "9", "WORLD_SIZE": "16"},
            World("torchrun", 9, 16, 9),
        ),
    ],
)
def test_who_says_what(environment, expected):
    assert world(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "torchrun says rank 4 of 4"),
        ({"PMI_RANK": "x", "PMI_SIZE": "3"}, "mpiexec has left no numbers: PMI_RANK=x, PMI_SIZE=3"),
    ],
)
def test_what_makes_no_sense(environment, message):
    with pytest.raises(CommunicationError, match=message):
        world(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[003-005,9],login", "gpu003"),
        ("r[7]n,s", "r7n"),
        ("c-2-[10,12-14]-ib", "c-2-10-ib"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_host(nodes) == first
    with pytest.raises(CommunicationError, match="is no list of nodes"):
        first_host(",")


def test_where_ranks_of_slurm_meet():
    environment = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[4-5]"}
    here = World("srun", 3, 8, 1)
    assert worlds._meeting(here, environment) == "tcp://n4:20035"
    given = {**environment, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert worlds._meeting(here, given) == "tcp://head:1234"
    other = worlds._meeting(here, {**environment, "SLURM_STEP_ID": "1"})
    assert other.startswith("tcp://n4:2") and not other.endswith(":20035")
    assert worlds._meeting(World("torchrun", 3, 8, 1), given) == "env://"


def test_one_process_joins_nobody():
    with joined(World()) as comm:
        assert comm is None


def test_a_rank_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with (
        pytest.raises(CommunicationError, match="rank 5 is number 2 on its node, which has 2 GPUs"),
        joined(World("torchrun", 5, 8, 2), device="cuda"),
    ):
        pass


def said(command: list[str], tmp_path: Path) -> list[str]:
    program, answers = tmp_path / "program.py", tmp_path / "answers"
    answers.mkdir()
    program.write_text(PROGRAM)
    done = subprocess.run(
        [*command, str(program), str(answers)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [path.read_text() for path in sorted(answers.iterdir())]


def test_ranks_of_torchrun_meet(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert said(torchrun, tmp_path) == [f"torchrun {r} 2 [0, 1]" for r in range(2)]


@pytest.mark.mpi
def test_ranks_of_mpiexec_meet(tmp_path):
    found = said([mpiexec(), "-n", "3", sys.executable], tmp_path)
    assert found == [f"mpiexec {r} 3 [0, 1, 2]" for r in range(3)]
