"""Which rank a process is, of how many, by the words of whoever started it; and joining them.

``torchrun``, MPI's ``mpiexec`` (MPICH and its kin, Open MPI) and Slurm's ``srun`` each tell a
process in variables of its environment. A process that is told nothing is alone.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from isoform.parallel.communicator import CommunicationError, Communicator

STARTERS = (
    # who, rank, ranks, rank on its node
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""In this order: an ``mpiexec`` within a job of Slurm starts its ranks by ``srun``, and theirs are
the numbers of MPI. A batch script, which is one process, has no ``SLURM_STEP_NUM_TASKS``."""


@dataclass(frozen=True)
class World:
    """Where a process stands.

    Attributes:
        starter: ``"torchrun"``, ``"mpiexec"``, ``"srun"``, or ``""`` for a process alone.
        rank, ranks: Which, of how many.
        local: Which of those on its node; of its GPUs, it takes the one of this number.
    """

    starter: str = ""
    rank: int = 0
    ranks: int = 1
    local: int = 0


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Where this process stands.

    Raises:
        CommunicationError: The environment says a part of it, or what is no number.
    """
    for starter, *names in STARTERS:
        if names[0] not in environment or names[1] not in environment:
            continue
        try:
            rank, ranks = int(environment[names[0]]), int(environment[names[1]])
            local = int(environment.get(names[2], rank))
        except ValueError as problem:
            said = ", ".join(f"{name}={environment.get(name)}" for name in names)
            raise CommunicationError(f"{starter} has left no numbers: {said}") from problem
        if not 0 <= rank < ranks:
            raise CommunicationError(f"{starter} says rank {rank} of {ranks}")
        return World(starter, rank, ranks, local)
    return World()


def first_host(nodes: str) -> str:
    """The first of a list of nodes as Slurm writes it: ``gpu[003-005,9],login`` is ``gpu003``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise CommunicationError(f"SLURM_STEP_NODELIST is no list of nodes: {nodes!r}")
    return "".join(part or "" for part in found.groups())


@contextmanager
def joined(
    here: World, *, device: str = "cpu", patience: float = 1800.0, group: bool = False
) -> Iterator[Communicator | None]:
    """All ranks, joined by ``torch.distributed``; None where there is one, and no group is wanted.

    Args:
        here: Which this is.
        device: ``"cpu"``, or ``"cuda"``: then this rank's GPU becomes the current one.
        patience: Seconds that a rank waits for another before it fails.
        group: One rank makes a group too, as PyTorch's engines need it.

    Raises:
        ImportError: torch is missing; or mpi4py, where nothing else says how to meet.
        CommunicationError: There are fewer GPUs than ranks on the node.
    """
    if device == "cuda":
        _take_gpu(here)
    if here.ranks == 1 and not group:
        yield None
        return
    from isoform.parallel.communicators.torch_distributed import TorchCommunicator, load

    dist = load()
    limit = datetime.timedelta(seconds=patience)
    # torchrun's store outlives a restart: ranks must not find addresses of those before them there
    if here.ranks == 1:
        store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous(_meeting(here), here.rank, here.ranks, timeout=limit))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store),
        rank=here.rank,
        world_size=here.ranks,
        timeout=limit,
    )
    try:
        comm = TorchCommunicator()
        yield comm
        comm.barrier()  # a rank that leaves early may take others' messages with it
    finally:
        dist.destroy_process_group()


def _take_gpu(here: World) -> None:
    import torch

    if (there := torch.cuda.device_count()) <= here.local:
        raise CommunicationError(
            f"rank {here.rank} is number {here.local} on its node, which has {there} GPUs"
        )
    torch.cuda.set_device(here.local)


def _meeting(here: World, environment: Mapping[str, str] = os.environ) -> str:
    """Where rank 0 waits for the others, as PyTorch wants it said."""
    if here.starter == "torchrun":
        return "env://"
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return "tcp://{MASTER_ADDR}:{MASTER_PORT}".format_map(environment)
    if here.starter == "srun":
        # one port for each step of a job, which other jobs on the node are unlikely to take
        step = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
        return f"tcp://{first_host(environment['SLURM_STEP_NODELIST'])}:{20_000 + step % 12_000}"
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as missing:
        raise ImportError(
            "ranks that mpiexec starts meet through mpi4py: install it with 'pip install "
            '"isoform[mpi]"\', or set MASTER_ADDR and MASTER_PORT to a host and a free port of it'
        ) from missing
    mine = ""
    if here.rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            mine = f"tcp://{socket.gethostname()}:{free.getsockname()[1]}"
    return str(MPI.COMM_WORLD.bcast(mine))
