"""What benchmarks over GPUs have in common: ranks that send nothing, clocks, and a command line."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from isoform.parallel.communicator import Communicator, Parcel

ONE, EXPOSED = "one GPU", "nothing sent"
"""Who is timed beside those that a benchmark is of."""


class Seconds(NamedTuple):
    """Of a forward and of a backward."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Timed:
    """What a rank found: seconds by round, and what it sent in both passes of one."""

    rounds: tuple[Seconds, ...]
    bytes: int = 0
    messages: int = 0
    not_run: str = ""


class Silent(Communicator):
    """Ranks that send nothing: what should arrive is copied from what should be sent.

    So all others say what this one says. A rank computes, allocates and copies as among real
    ranks, only with the wrong numbers.
    """

    devices = frozenset({"cpu", "cuda", "cupy"})

    def _post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        for index, parcel in enumerate(receives):
            data = sends[index % len(sends)].data if sends else parcel.data
            if type(data) is type(parcel.data) and len(data) == len(parcel.data):
                parcel.data[:] = data
            else:
                parcel.data[:] = 0
        return lambda: None

    def _subgroup(self, groups: Sequence[Sequence[int]], mine: int) -> Communicator:
        return Silent(list(groups[mine]).index(self.rank), len(groups[mine]), self.traffic)

    def grid(self, near: int) -> tuple[Communicator, Communicator]:
        """As many ranks as in a grid of real ones."""
        return (
            Silent(self.rank % near, near, self.traffic),
            Silent(self.rank // near, self.size // near, self.traffic),
        )


class Mark:
    """A moment where there is no GPU, as ``torch.cuda.Event`` is one on a GPU's stream."""

    at = 0.0

    def record(self) -> None:
        """It is now."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: Mark) -> float:
        """Milliseconds until ``end``."""
        return 1e3 * (end.at - self.at)


def marks(count: int) -> list[Any]:
    """Moments on the GPU's stream, to be recorded."""
    import torch

    if not torch.cuda.is_available():
        return [Mark() for _ in range(count)]
    event: Callable[..., Any] = torch.cuda.Event
    return [event(enable_timing=True) for _ in range(count)]


def slowest(by_rank: Iterable[Timed]) -> Seconds | None:
    """The median round, each as long as on the rank that takes longest; None if there is none."""
    rounds = list(zip(*(one.rounds for one in by_rank if one.rounds), strict=True))
    if not rounds:
        return None
    longest = [Seconds(*(max(times) for times in zip(*each, strict=True))) for each in rounds]
    return Seconds(*(statistics.median(times) for times in zip(*longest, strict=True)))


def why_not(found: Iterable[Timed]) -> str:
    """Why no rank has a time."""
    return next((each.not_run for each in found if each.not_run), "no rank ran it")


def figures(record: Any) -> list[str]:
    """What a line for people says of times."""
    assert record.forward_s is not None and record.backward_s is not None
    parts = [f"forward {1e3 * record.forward_s:9.2f} ms"]
    parts.append(f"backward {1e3 * record.backward_s:9.2f} ms")
    if record.efficiency is not None:
        parts.append(f"{record.efficiency:6.1%} of ideal")
    if record.exposed_s is not None:
        parts.append(f"exposed {1e3 * record.exposed_s:.2f} ms")
    return parts


def command(name: str, document: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all have.

    Args:
        name: The benchmark's module.
        document: Its docstring, of which the first paragraph is shown.
    """
    line = argparse.ArgumentParser(
        prog=f"python -m isoform.parallel.benchmark.{name}",
        description=str(document).partition("\n\n")[0],
        epilog="Exit codes: 0 timed, 2 usage, 3 too few GPUs.",
    )
    line.add_argument("--ranks", type=int, default=2, help="GPUs (%(default)s)")
    line.add_argument("--rounds", type=int, default=3, help="the median counts (%(default)s)")
    line.add_argument(
        "--transport",
        choices=("torch-nccl", "cupy-nccl"),
        default="torch-nccl",
        help="whose NCCL (%(default)s)",
    )
    line.add_argument("--record", type=Path, metavar="FILE", help="append the lines of JSON to it")
    line.add_argument("--json", action="store_true", help="print the lines instead of a table")
    line.add_argument("--commit", default="", help="what is checked out, if git cannot be asked")
    return line


def tell(records: Iterable[Any], row: Callable[[Any], str], asked: argparse.Namespace) -> None:
    """Print records as they come, and append them to the file that was asked for."""
    for record in records:
        written = json.dumps(asdict(record))
        print(written if asked.json else row(record), flush=True)  # noqa: T201
        if asked.record:
            with asked.record.open("a", encoding="utf-8") as file:
                file.write(written + "\n")


def too_few(ranks: int) -> bool:
    """Whether this cannot be run here; then it says why."""
    try:
        import torch

        there = torch.cuda.device_count()
        why = "" if there >= ranks else f"{ranks} ranks need as many GPUs, and here are {there}"
    except ImportError:
        why = "torch is missing: install it with 'pip install \"isoform[torch,cuda13]\"'"
    if why:
        print(why, file=sys.stderr)  # noqa: T201
    return bool(why)
