"""What ranks run in the tests of the training loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from isoform.parallel.communicator import Communicator
from isoform.parallel.training import loop
from isoform.parallel.training.loop import Run, train
from isoform.parallel.training.settings import Settings, parse

LETTERS = "ACGT"


def genome(folder: Path) -> Path:
    """Three records, one with bases that are not known; there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    path = folder / "genome.fa"
    with path.open("w") as out:
        for number, length in enumerate((900, 40, 700)):
            steps = (torch.rand(length, generator=generator) * 5).long().clamp(max=3)
            bases = "".join(LETTERS[int(n) % 4] for n in (1 + steps).cumsum(0))
            bases = bases[:60] + "NN" + bases[62:] if number == 2 else bases
            out.write(f">record{number}\n{bases}\n")
    return path


def settings(
    path: Path, steps: int = 6, tables: Mapping[str, Mapping[str, Any]] | None = None
) -> Settings:
    """Small ones; tables of the caller go over them."""
    given: dict[str, dict[str, Any]] = {
        "data": {"length": 14, "batch": 4, "at_once": 2, "held_out": 0.25, "markov": 2},
        "model": {"layers": 2, "hidden": 16, "heads": 2},
        "training": {"steps": steps, "warmup": 2, "checkpoint_every": 2, "evaluate_every": 3},
    }
    for name, table in (tables or {}).items():
        given[name] = given.get(name, {}) | dict(table)
    found = parse(given)
    return replace(found, data=replace(found.data, fasta=(path,)))


LEARNED = {
    "model": {"layers": 2, "hidden": 16, "heads": 2, "positions": "learned", "max_length": 17},
    "switches": {"position_table": "partitioned"},
}
"""A table of which each rank has some rows."""


def losses(folder: Path) -> list[tuple[str, int, float]]:
    """Every loss of a log, in order."""
    lines = loop.read_log(folder / loop.LOG)
    return [(x["event"], x["step"], x["loss"]) for x in lines if x["event"] != "begin"]


def whole_run(
    comm: Communicator, told: Settings, folder: Path, killed: tuple[int, int] | None = None
) -> float:
    """Train; ``killed`` is a rank and the step, from 0, at which it is gone at once."""
    if killed is not None and comm.rank == killed[0]:
        usual = Run.step

        def step(self: Run, number: int) -> dict[str, Any]:
            if number == killed[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(self, number)

        Run.step = step  # type: ignore[method-assign]
    return train(told, folder, comm=comm).bits


def whole_runs(comm: Communicator, runs: Sequence[tuple[Settings, Path]]) -> None:
    """Train one after the other."""
    for told, folder in runs:
        train(told, folder, comm=comm)
