"""``python -m isoform.parallel.benchmark``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import isoform.parallel.benchmark as package
from isoform.parallel.benchmark.run import KINDS, STRATEGIES, Call, Event, measure, shares, timeline
from isoform.parallel.launch import launch
from isoform.parallel.planner import Attended, Sizes, plan
from isoform.parallel.sharding import Sharding

COLOURS = dict(zip(KINDS, ("#1f4f8f", "#e0b040", "#c0392b"), strict=True))


def draw(found: dict[str, list[tuple[float, list[Event]]]], path: Path) -> None:
    """A panel for each strategy, a row for each rank."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = len(next(iter(found.values())))
    figure = Figure(figsize=(7, 0.8 + len(found) * (0.5 + 0.28 * ranks)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (strategy, by_rank) in zip(panels, found.items(), strict=True):
        for rank, (_, events) in enumerate(by_rank):
            for what, colour in COLOURS.items():
                bars = [(e.start, e.end - e.start) for e in events if e.what == what]
                axes.broken_barh(bars, (rank - 0.4, 0.8), color=colour, linewidth=0)
        axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axes.invert_yaxis()
        axes.set_title(strategy, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds, forward and backward")
    handles = [Patch(color=colour, label=what) for what, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> None:
    """Print a table, and draw what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m isoform.parallel.benchmark",
        description=str(package.__doc__).partition("\n\n")[0],
    )
    parser.add_argument("--length", type=int, default=Call.L, help="positions (%(default)s)")
    parser.add_argument("--heads", type=int, default=Call.H, help="(%(default)s)")
    parser.add_argument("--head-dim", type=int, default=Call.D, help="(%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="beside one (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts (%(default)s)")
    parser.add_argument("--transport", choices=("mpi", "gloo"), default="mpi")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a timeline")
    asked = parser.parse_args()
    call = Call(asked.length, asked.heads, asked.head_dim)
    speed = measure(call, asked.ranks, asked.rounds, asked.transport)
    found: dict[str, list[tuple[float, list[Event]]]] = {
        strategy: launch(
            timeline,
            asked.ranks,
            Call(call.L, call.H, call.D, strategy),
            transport=asked.transport,
            limit=600,
        )
        for strategy in STRATEGIES
    }
    sizes = Sizes(1, call.H, call.H, call.D, 4)
    planned = plan([Sharding.zigzag(call.L, asked.ranks)], sizes, attended=Attended(causal=True))
    balance = {candidate.name: candidate.balance for candidate in planned.candidates}
    _say(f"one rank: {speed.one:.2f} s, L={call.L} H={call.H} D={call.D}, {asked.transport}")
    _say(f"{asked.ranks} ranks    {'s':>7}{'gain':>7}{'merging':>9}{'waiting':>9}{'balance':>9}")
    for strategy, taken in speed.several.items():
        of = shares(found[strategy])
        _say(
            f"{strategy:<10}{taken:8.2f}{speed.gain(strategy):7.2f}{of['merging']:9.1%}"
            f"{of['waiting']:9.1%}{balance[strategy]:9.3f}"
        )
    if asked.plot:
        draw(found, asked.plot)
        _say(f"timeline: {asked.plot}")


if __name__ == "__main__":
    main()
