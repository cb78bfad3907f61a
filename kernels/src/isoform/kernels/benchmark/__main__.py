"""Time Evoformer attention and its peers on this GPU: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from isoform.kernels.benchmark import cases, competitors
from isoform.kernels.benchmark.bars import bars
from isoform.kernels.benchmark.cases import DTYPES
from isoform.kernels.benchmark.competitors import COMPETITORS, FLEX_MODES, Settings
from isoform.kernels.benchmark.records import Record, append, surroundings
from isoform.kernels.benchmark.run import ROUNDS, run
from isoform.kernels.compiler import CompilerUnavailable

QUICK_ROUNDS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m isoform.kernels.benchmark",
        description="Time Evoformer attention, ours and others', on this GPU: milliseconds of a "
        "forward and a backward (median, and quartiles in the record), memory, and the host's "
        "microseconds. All competitors of a case take turns.",
        epilog="Exit codes: 0 all bars are met (or --no-bars), 1 one is not, 2 usage, 3 no GPU.",
    )
    made.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only cases whose name matches, such as 'triangle-*'; may be given several times",
    )
    made.add_argument(
        "--competitor",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one; may be given several times: "
        + ", ".join(one.name for one in COMPETITORS),
    )
    made.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="may be given several times; bfloat16 if not said",
    )
    made.add_argument("--rounds", type=_positive, help=f"turns of each, {ROUNDS} if not said")
    made.add_argument(
        "--quick", action="store_true", help=f"ours alone, {QUICK_ROUNDS} turns: under two minutes"
    )
    made.add_argument(
        "--flex-mode",
        choices=FLEX_MODES,
        default=FLEX_MODES[0],
        help="how long FlexAttention is compiled: max-autotune takes minutes a case",
    )
    made.add_argument("--record", type=Path, metavar="FILE", help="append the lines of JSON to it")
    made.add_argument("--json", action="store_true", help="print the lines instead of a table")
    made.add_argument("--no-bars", action="store_true", help="exit with 0 whatever the times are")
    made.add_argument("--commit", default="", help="what is checked out, if git cannot be asked")
    made.add_argument("--list", action="store_true", help="list cases and competitors, and exit")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    line = parser()
    asked = line.parse_args(arguments)
    try:
        chosen = cases.select(asked.case)
        who = competitors.select(asked.competitor)
    except ValueError as problem:
        line.error(str(problem))
    if asked.list:
        for case in chosen:
            print(f"{case.name:20} {case.B},{case.S},{case.L},{case.H},{case.D}")  # noqa: T201
        for one in who:
            print(one.name)  # noqa: T201
        return 0
    if asked.quick and not asked.competitor:
        who = tuple(one for one in who if one.ours)
    if why := no_gpu():
        _say(why)
        return 3

    around = surroundings(asked.commit)
    records: list[Record] = []
    for dtype in asked.dtype or DTYPES[:1]:
        for case in chosen:
            found = run(
                case,
                dtype,
                who,
                around,
                settings=Settings(flex_mode=asked.flex_mode),
                rounds=asked.rounds or (QUICK_ROUNDS if asked.quick else ROUNDS),
                say=_say,
            )
            if asked.record:
                append(asked.record, found)
            for record in found:
                print(record.as_json() if asked.json else row(record), flush=True)  # noqa: T201
            records += found
    held = bars(records)
    for bar in held:
        _say(str(bar))
    return int(not asked.no_bars and not all(bar.met for bar in held))


def row(record: Record) -> str:
    """A line for people."""
    place = f"{record.case:20} {record.dtype:9} {record.competitor:23}"
    if record.not_run:
        return f"{place} not run: {record.not_run}"
    parts = [place]
    for what in ("forward", "backward"):
        ms, host, floor = (getattr(record, f"{what}_{part}") for part in ("ms", "host_us", "floor"))
        if ms is not None:
            share = f", {100 * floor.ms / ms.median:.0f} % of the floor" if floor else ""
            parts.append(f"{what} {ms.median:.4g} ms (host {host.median:.0f} µs{share})")
    if record.peak_bytes is not None and record.memory_bytes:
        least = record.peak_bytes / record.memory_bytes
        parts.append(f"{record.peak_bytes / 2**20:.0f} MiB, {least:.2f} × least")
    return "  ".join(parts)


def no_gpu() -> str:
    """Why nothing can be timed here; empty if it can."""
    try:
        import torch
    except ImportError:
        return "benchmarks need PyTorch: install isoform[torch,cuda13], or isoform[torch,cuda12]"
    if not torch.cuda.is_available():
        return "benchmarks need an NVIDIA GPU, and PyTorch sees none here"
    from isoform.kernels.compiler import toolkit

    try:
        toolkit()
    except CompilerUnavailable as problem:
        return str(problem)
    return ""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
