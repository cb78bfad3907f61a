"""The command line of a benchmark whose cases are timed one by one, and held to no bar."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from isoform.kernels.benchmark.calls import Named, select
from isoform.kernels.benchmark.records import Record, Surroundings, append, surroundings


class Listed(Named, Protocol):
    """A case that can be listed."""

    @property
    def quick(self) -> bool:
        """Whether ``--quick`` has it."""

    @property
    def dtype(self) -> str:
        """Of the operands."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis sizes."""


AnyCase = TypeVar("AnyCase", bound=Listed)


@dataclass(frozen=True)
class Benchmark(Generic[AnyCase]):
    """What a command line is made of.

    Attributes:
        name: The module that is run.
        description: What is timed, and how long that takes.
        cases: All there are.
        rounds: Turns of each competitor, and with ``--quick``.
        run: Times a case: given where and when this is, the turns, and whether it is to be quick.
        conclude: What follows from all records, a line each.
        seconds: After how many no further case is begun, unless that is said.
    """

    name: str
    description: str
    cases: Sequence[AnyCase]
    rounds: tuple[int, int]
    run: Callable[[AnyCase, Surroundings, int, bool], tuple[Record, ...]]
    conclude: Callable[[Iterable[Record]], Iterable[Any]]
    seconds: float = math.inf

    def parser(self) -> argparse.ArgumentParser:
        """The command line."""
        rounds, quick_rounds = self.rounds
        made = argparse.ArgumentParser(
            prog=f"python -m isoform.kernels.benchmark.{self.name}",
            description=self.description,
            epilog="Exit codes: 0 timed, 2 usage, 3 no GPU.",
        )
        made.add_argument(
            "--case",
            action="append",
            default=[],
            metavar="PATTERN",
            help="only cases whose name matches; may be given several times",
        )
        made.add_argument("--rounds", type=int, help=f"turns of each, {rounds} if not said")
        made.add_argument(
            "--seconds",
            type=float,
            default=self.seconds,
            metavar="S",
            help=f"begin no case after so many, and say which are left; {self.seconds} if not said",
        )
        made.add_argument(
            "--quick",
            action="store_true",
            help=f"some of the cases, {quick_rounds} turns: half a minute",
        )
        made.add_argument(
            "--record", type=Path, metavar="FILE", help="append the lines of JSON to it"
        )
        made.add_argument("--json", action="store_true", help="print the lines instead of a table")
        made.add_argument(
            "--commit", default="", help="what is checked out, if git cannot be asked"
        )
        made.add_argument("--list", action="store_true", help="list the cases, and exit")
        return made

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; returns the exit code."""
        from isoform.kernels.benchmark.__main__ import no_gpu

        line = self.parser()
        asked = line.parse_args(arguments)
        try:
            chosen = select(self.cases, asked.case)
        except ValueError as problem:
            line.error(str(problem))
        if asked.quick:
            chosen = tuple(case for case in chosen if case.quick)
        if not chosen:
            line.error(f"--quick leaves none of {', '.join(asked.case)}")
        if asked.rounds is not None and asked.rounds < 1:
            line.error("--rounds must be at least 1")
        if asked.list:
            for case in chosen:
                sizes = ",".join(map(str, case.shape))
                print(f"{case.name:28} {case.dtype:9} {sizes}")  # noqa: T201
            return 0
        if why := no_gpu():
            print(why, file=sys.stderr)  # noqa: T201
            return 3

        around = surroundings(asked.commit)
        rounds = asked.rounds or self.rounds[asked.quick]
        records: list[Record] = []
        begun = time.monotonic()
        for place, case in enumerate(chosen):
            if time.monotonic() - begun > asked.seconds:
                left = ", ".join(one.name for one in chosen[place:])
                print(f"not begun after {asked.seconds:g} s: {left}", file=sys.stderr)  # noqa: T201
                break
            found = self.run(case, around, rounds, asked.quick)
            if asked.record:
                append(asked.record, found)
            for record in found:
                print(record.as_json() if asked.json else row(record), flush=True)  # noqa: T201
            records += found
        for conclusion in self.conclude(records):
            print(conclusion, file=sys.stderr, flush=True)  # noqa: T201
        return 0


def row(record: Record) -> str:
    """A line for people."""
    place = f"{record.case:28} {record.dtype:9} {record.competitor:24}"
    if record.not_run:
        return f"{place} not run: {record.not_run}"
    parts = [place]
    for what in ("forward", "backward"):
        ms, floor = (getattr(record, f"{what}_{part}") for part in ("ms", "floor"))
        if ms is not None:
            share = f" ({floor.ms / ms.median:.0%} of the floor)" if floor else ""
            parts.append(f"{what} {ms.median:.4g} ms{share}")
    if record.peak_bytes is not None and record.memory_bytes:
        parts.append(f"{record.peak_bytes / record.memory_bytes:.2f} × least memory")
    return "  ".join(parts)
