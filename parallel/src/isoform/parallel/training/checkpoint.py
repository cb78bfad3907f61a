"""Checkpoints: a run goes on bit for bit on as many ranks, and to rounding on any other number.

One folder holds one checkpoint, written by all ranks through ``torch.distributed.checkpoint``, each
its own part::

    step-00000700/
        __metadata__, *.distcp     the model, the optimizer's states, random states of each rank
        run.json                   the step, and what the run that wrote it was told

It is written as ``step-00000700.unfinished`` and takes its name when all ranks have done their
part, which is on disk by then: a save that is killed leaves the one before it as it was.

Numbers are saved whole, in float32, under the names of the reference's parameters, whoever holds
what of them, and in how many bits.
Rows of a partitioned table lie with ranks as tokens do, which no format of arrays describes; to be
saved, they are passed to ranks in order, and back when they are read.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint.state_dict_loader as loader
import torch.distributed.checkpoint.state_dict_saver as saver
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from isoform.parallel.communicator import Communicator
from isoform.parallel.communicators.torch_distributed import TorchCommunicator
from isoform.parallel.sharding import Sharding
from isoform.parallel.training.model import TABLE, TrainingLM
from isoform.parallel.training.optimizer import NamedAdamW
from isoform.parallel.training.position_table import PartitionedTable

UNFINISHED = ".unfinished"

State = dict[str, Any]


class WrongCheckpoint(ValueError):
    """A checkpoint is of another run; the message says how the two differ."""


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, None where there is none."""
    return max(_whole(folder), default=None)


def _whole(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first: their names sort as their steps do."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def told(path: Path) -> dict[str, Any]:
    """What is written in words: the step, and what :func:`save` was given."""
    return cast(dict[str, Any], json.loads((path / "run.json").read_text()))


def save(
    folder: Path,
    step: int,
    model: TrainingLM,
    optimizer: NamedAdamW,
    *,
    comm: Communicator | None = None,
    facts: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint. Collective.

    Args:
        folder: Where checkpoints are, which all ranks see; made if need be.
        step: Steps that have been taken.
        model: This rank's.
        optimizer: Of the model's parameters.
        comm: All ranks, of ``torch.distributed``; None for one.
        facts: What another run must have been told to go on from here.
        keep: How many are kept; older ones are removed when this one is whole.

    Returns:
        The checkpoint.

    Raises:
        ValueError: ``keep`` is less than 1.
        OSError: It cannot be written.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    path = folder / f"step-{step:08}"
    unfinished = path.with_name(path.name + UNFINISHED)
    first = comm is None or comm.rank == 0
    if first:
        for left in folder.glob(f"step-*{UNFINISHED}"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
    _together(comm)
    rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
    state = _state(model, optimizer) | {"random": _random(rank)}
    with _quiet():
        saver.save(state, checkpoint_id=unfinished, no_dist=comm is None)
    if first:
        document = {"step": step, "ranks": ranks, "facts": dict(facts or {})}
        (unfinished / "run.json").write_text(json.dumps(document, indent=1))
        if path.exists():  # of a run that went on from before
            shutil.rmtree(path)
        unfinished.rename(path)
        for old in _whole(folder)[:-keep]:
            gone = old.rename(old.with_name(old.name + UNFINISHED))
            shutil.rmtree(gone)
    _together(comm)
    return path


def restore(
    path: Path,
    model: TrainingLM,
    optimizer: NamedAdamW,
    *,
    comm: Communicator | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Put a model and its optimizer into the state of a checkpoint. Collective.

    Args:
        path: The checkpoint.
        model, optimizer, comm, facts: As for :func:`save`. On another number of ranks random states
            of those that the checkpoint does not know are left as they are.

    Returns:
        Steps that had been taken.

    Raises:
        WrongCheckpoint: The facts are others.
        OSError: It cannot be read.
    """
    document = told(path)
    _check_facts(path, document["facts"], json.loads(json.dumps(dict(facts or {}))))
    rank = 0 if comm is None else comm.rank
    state = _state(model, optimizer)
    if rank < document["ranks"]:
        state["random"] = _random(rank)
    with _quiet():
        loader.load(state, checkpoint_id=path, no_dist=comm is None)
    if "random" in state:
        _set_random(state["random"], rank)
    _set_state(model, optimizer, state)
    return int(document["step"])


def _check_facts(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    names = sorted(saved.keys() | asked.keys())
    differing = [
        f"{name} was {json.dumps(saved.get(name))}, is {json.dumps(asked.get(name))}"
        for name in names
        if saved.get(name) != asked.get(name)
    ]
    if differing:
        raise WrongCheckpoint(f"{path} is of another run: {'; '.join(differing)}")


def _together(comm: Communicator | None) -> None:
    if comm is not None:
        comm.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
        yield


# --- random states ---


def _random(rank: int) -> State:
    """Those of this rank, under its own name."""
    found = {f"cpu-{rank}": torch.get_rng_state()}
    if _on_gpu():
        found[f"cuda-{rank}"] = torch.cuda.get_rng_state()
    return found


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _set_random(state: Mapping[str, Tensor], rank: int) -> None:
    torch.set_rng_state(state[f"cpu-{rank}"])
    if _on_gpu():
        torch.cuda.set_rng_state(state[f"cuda-{rank}"])


# --- numbers under the names of the reference ---


def _state(model: TrainingLM, optimizer: NamedAdamW) -> State:
    """Model and optimizer, as all ranks' checkpoint has them."""
    weights: State = {**model.state_dict(), **optimizer.copies}
    moments: State = dict(optimizer.state())
    table = model.position_table
    if isinstance(table, PartitionedTable):
        weights[TABLE] = _in_order(weights[TABLE], table)
        moments[TABLE] = {
            name: _in_order(x, table) if x.ndim else x for name, x in moments[TABLE].items()
        }
    return {"model": weights, "optimizer": moments}


def _set_state(model: TrainingLM, optimizer: NamedAdamW, state: State) -> None:
    weights, moments = state["model"], state["optimizer"]
    table = model.position_table
    if isinstance(table, PartitionedTable):
        weights[TABLE] = _as_tokens(weights[TABLE], table)
        moments[TABLE] = {
            name: _as_tokens(x, table) if x.ndim else x for name, x in moments[TABLE].items()
        }
    optimizer.load(weights, moments)


def _ordered(rows: Sharding) -> Sharding:
    """Rows in order, each rank a run of them, as PyTorch cuts an axis."""
    return Sharding.striped(rows.length, rows.ranks, block=-(-rows.length // rows.ranks))


def _in_order(x: Tensor, table: PartitionedTable) -> DTensor:
    """A rank's rows of a table, as a part of the whole that PyTorch knows. Collective."""
    own = reshard(x, table.rows, _ordered(table.rows), table.comm)
    assert isinstance(table.comm, TorchCommunicator)  # checkpoints are of torch.distributed's ranks
    mesh = DeviceMesh.from_group(table.comm.group, x.device.type)
    shape = torch.Size([table.rows.length, *x.shape[1:]])
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=shape, stride=own.stride()
    )


def _as_tokens(x: DTensor, table: PartitionedTable) -> Tensor:
    """The opposite. Collective."""
    return reshard(x.to_local(), _ordered(table.rows), table.rows, table.comm)


def reshard(x: Tensor, source: Sharding, target: Sharding, comm: Communicator) -> Tensor:
    """Rows from ranks as one sharding has them to ranks as another has. Collective.

    Args:
        x: ``[L_r, …]``, this rank's rows by ``source``.
        source, target: Of as many rows and ranks.
        comm: The ranks.

    Returns:
        This rank's rows by ``target``.
    """
    going = target.owners(source.positions(comm.rank))
    coming = source.owners(target.positions(comm.rank))
    to = [torch.from_numpy((going == rank).nonzero()[0]) for rank in range(comm.size)]
    at = [torch.from_numpy((coming == rank).nonzero()[0]) for rank in range(comm.size)]
    received = comm.all_to_all(
        [x[one.to(x.device)] for one in to],
        [(len(one), *x.shape[1:]) for one in at],
        operation="reshard",
    )
    found = x.new_empty(target.lengths[comm.rank], *x.shape[1:])
    for place, part in zip(at, received, strict=True):
        found[place.to(x.device)] = part
    return found
