"""``isoform plan``: what it is asked for in words, and how its answer is printed and drawn.

The figures are those of :mod:`isoform.parallel.planner`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from isoform.conformance.console import Step, line, number, paragraph
from isoform.parallel.planner import (
    ITEMSIZE,
    Attended,
    Candidate,
    Level,
    Plan,
    Sizes,
    Topology,
    load_topology,
    plan,
)
from isoform.parallel.sharding import Kind, Sharding

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class WrongRequest(ValueError):
    """Something that was asked for has no meaning; the message says what has."""


# What is asked.


def positions(text: str, option: str) -> int:
    """A number of positions: ``4096``, ``512K``, ``1M``. K is 1024, as lengths are called.

    Raises:
        WrongRequest: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.strip().replace("_", ""), re.IGNORECASE)
    count = float(found[1]) * UNITS[found[2].upper()] if found else -1.0
    if count < 0 or count != int(count):
        raise WrongRequest(f"{option} must be a number such as 4096, 512K or 1M, got {text!r}")
    return int(count)


def level(text: str, name: str) -> Level:
    """A level of links from ``RANKS,GB/s,µs``; without ranks it joins all.

    Raises:
        WrongRequest: It is none.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        ranks = int(parts[0]) if len(parts) == 3 and parts[0] else None
        bandwidth, latency = (float(part) for part in parts[-2:])
        if len(parts) not in (2, 3):
            raise ValueError("two or three numbers are needed")
        return Level(name, bandwidth * 1e9, latency * 1e-6, ranks)
    except ValueError as problem:
        raise WrongRequest(
            f"--level must be RANKS,GB/s,MICROSECONDS, as 8,450,5, or for the last level without "
            f"ranks, as 50,10; got {text!r}: {problem}"
        ) from problem


@dataclass(frozen=True)
class Request:
    """A call, and the machine that it is planned for.

    Attributes:
        length: L.
        ranks: P.
        sizes: The other sizes.
        dtype: As the contract names it.
        attended: Which keys queries attend to.
        shardings: Kinds, and blocks of those that have some.
        topology: Links and ranks.
        memory: Bytes of a rank, or None for the topology's.
    """

    length: int
    ranks: int
    sizes: Sizes
    dtype: str
    attended: Attended
    shardings: tuple[tuple[Kind, int], ...]
    topology: Topology
    memory: float | None

    def plan(self, ranks: int | None = None) -> Plan:
        """All candidates, on other ranks than asked for if need be.

        Raises:
            WrongRequest: The topology does not join so many, or does not know the dtype.
        """
        count = self.ranks if ranks is None else ranks
        try:
            return plan(
                [Sharding(kind, self.length, count, block) for kind, block in self.shardings],
                self.sizes,
                dtype=self.dtype,
                attended=self.attended,
                topology=self.topology,
                memory=self.memory,
            )
        except ValueError as problem:
            raise WrongRequest(str(problem)) from problem

    def __str__(self) -> str:
        B, H, G, D, _ = asdict(self.sizes).values()
        what = "causal attention" if self.attended.causal else "attention"
        if self.attended.window is not None:
            what += f" in a window of {self.attended.window}"
        if self.attended.documents is not None:
            what += f" within {len(self.attended.documents)} documents"
        return (
            f"{what}, forward and backward: B={B} L={self.length} H={H} G={G} D={D} {self.dtype} "
            f"on {self.ranks} {'rank' if self.ranks == 1 else 'ranks'} of: {self.topology.name}"
        )


def request(
    *,
    length: str,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    batch: int,
    dtype: str,
    ranks: int,
    causal: bool,
    window: str,
    document: str,
    shardings: Sequence[str],
    topology: str,
    levels: Sequence[str],
    tflops: float | None,
    memory: float | None,
) -> Request:
    """What the options of ``isoform plan`` ask for.

    Raises:
        WrongRequest: Options have no meaning, or not together; the message names them.
    """
    groups = heads if kv_heads is None else kv_heads
    if heads % groups:
        raise WrongRequest(f"--kv-heads must divide --heads, got {groups} and {heads}")
    if dtype not in DTYPES:
        raise WrongRequest(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if memory is not None and not memory > 0:
        raise WrongRequest(f"--memory must be positive, got {memory:g}")
    total = positions(length, "--length")
    name = DTYPES[dtype]
    try:
        attended = Attended(causal, _window(window), _documents(document, total))
        machine = _topology(topology, levels, tflops, name)
    except ValueError as problem:
        raise WrongRequest(str(problem)) from problem
    return Request(
        total,
        ranks,
        Sizes(batch, heads, groups, head_dim, ITEMSIZE[name]),
        name,
        attended,
        tuple(map(_sharding, shardings or get_args(Kind))),
        machine,
        None if memory is None else memory * 1e9,
    )


def _window(text: str) -> int | tuple[int, int] | None:
    if not text:
        return None
    sides = [
        -1 if side.strip() == "-1" else positions(side, "--window") for side in text.split(",")
    ]
    if len(sides) > 2:
        raise WrongRequest(f"--window must be N or LEFT,RIGHT, got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _documents(text: str, length: int) -> tuple[int, ...] | None:
    """Documents of one length that fill the sequence, the last of them shorter."""
    if not text:
        return None
    each = positions(text, "--documents")
    if each < 1:
        raise WrongRequest(f"--documents must be at least 1 position long, got {text!r}")
    whole, rest = divmod(length, each)
    return (each,) * whole + ((rest,) if rest else ())


def _sharding(text: str) -> tuple[Kind, int]:
    kind, colon, block = text.partition(":")
    for known in get_args(Kind):
        if kind == known and (not colon or known == "striped"):
            size = positions(block, "--sharding") if colon else 1
            if size < 1:
                raise WrongRequest(f"--sharding: stripes must have 1 position at least, got {text}")
            return known, size
    listed = ", ".join(get_args(Kind))
    raise WrongRequest(f"--sharding must be one of {listed}, or striped:BLOCK, got {text!r}")


def _topology(name: str, levels: Sequence[str], tflops: float | None, dtype: str) -> Topology:
    """A topology that is known or in a file, or made of the levels given; with the rate given."""
    rate = {} if tflops is None else {dtype: tflops * 1e12}
    if not levels:
        found = load_topology(name)
        return replace(found, flops={**found.flops, **rate})
    if not rate:
        raise WrongRequest("--level needs --tflops too: how fast a rank computes")
    read = [level(text, f"level {n}") for n, text in enumerate(levels, 1)]
    return Topology(f"the levels given, {number(tflops or 0)} Tflop/s", tuple(read), rate)


# The answer: as a table.

Cell = Callable[[Candidate], str]


def _three(x: float, units: Sequence[tuple[float, str]]) -> str:
    """A number in three digits, in the largest unit in which it is at least 1, or the last."""
    size, unit = next(((size, unit) for size, unit in units if x >= 0.9995 * size), units[-1])
    digits = max(2 - len(f"{x / size:.0f}") + 1, 0)
    return f"{x / size:.{digits}f} {unit}"


def _seconds(seconds: float) -> str:
    return _three(seconds, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def _size(count: float) -> str:
    """Bytes; units are powers of 1000."""
    return _three(count, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))) if count else "0"


def _kind(sharding: Sharding) -> str:
    return sharding.kind if sharding.block == 1 else f"{sharding.kind}:{sharding.block}"


def _exposed(candidate: Candidate) -> str:
    time = candidate.time
    assert time is not None
    share = 100 * time.exposed / time.total if time.total else 0.0
    return f"{share:.0f} %" if share >= 9.95 or share == 0 else f"{share:.1f} %"


CELLS: Mapping[str, Cell] = {
    "time": lambda c: _seconds(c.time.total if c.time else 0),
    "waiting": _exposed,
    "sent": lambda c: _size(c.bytes),
    "messages": lambda c: f"{c.messages}",
    "memory": lambda c: _size(c.memory),
    "balance": lambda c: f"{c.balance:.2f}",
}
"""The columns of figures."""

NARROW = ("messages", "waiting", "balance", "memory")
"""What is left out where there is no room, first things first."""

LEGEND = {
    "time": "forward and backward",
    "waiting": "of that, for other ranks",
    "sent": "by the rank that sends most",
    "messages": "likewise",
    "memory": "the most that a rank holds, operands included",
    "balance": "work of the busiest rank by the mean",
}


def print_plan(to: Console, asked: Request, found: Plan) -> None:
    """Print the candidates, best first, then those declined and why, and which to take."""
    paragraph(to, str(asked))
    to.print()
    if found.ranked:
        rows = _rows(found.ranked)
        shown, left_out = [*CELLS], []
        for name in NARROW:
            if _width(to, _table(rows, shown)) <= to.width:
                break
            shown.remove(name)
            left_out.append(name)
        to.print(_table(rows, shown))
        to.print()
        legend = "; ".join(f"{name}: {LEGEND[name]}" for name in shown)
        paragraph(to, (legend, "dim"))
        if left_out:
            paragraph(to, (f"in a wider terminal also: {', '.join(left_out)}", "dim"))
    for reason, who in _declined(found).items():
        paragraph(to, ("declined: ", "yellow"), f"{', '.join(who)}: {reason}")
    to.print()
    if not found.ranked:
        line(to, ("no strategy will do", "red"))
        return
    best = found.ranked[0]
    paragraph(
        to,
        ("take ", ""),
        (_call(best), "bold cyan"),
        f": {_seconds(best.time.total if best.time else 0)}, {_exposed(best)} of it waiting",
    )


def _call(candidate: Candidate) -> str:
    """What to write in a program."""
    near = "" if candidate.near is None else f", near={candidate.near}"
    block = "" if candidate.sharding.block == 1 else f", block={candidate.sharding.block}"
    sharding = f"Sharding.{candidate.sharding.kind}(length, comm.size{block})"
    return f'strategy="{candidate.strategy}"{near}, sharding={sharding}'


def _rows(candidates: Iterable[Candidate]) -> list[tuple[str, str, Mapping[str, str]]]:
    """Strategy, shardings, figures; shardings of which all figures read alike share a row."""
    found: dict[tuple[str, ...], tuple[str, list[str], Mapping[str, str]]] = {}
    for candidate in candidates:
        figures = {name: cell(candidate) for name, cell in CELLS.items()}
        row = (candidate.name, *figures.values())
        found.setdefault(row, (candidate.name, [], figures))[1].append(_kind(candidate.sharding))
    return [
        (name, "any" if len(kinds) > 2 else ", ".join(kinds), figures)
        for name, kinds, figures in found.values()
    ]


def _width(to: Console, table: Table) -> int:
    """Columns that it needs to show everything."""
    return Measurement.get(to, to.options.update_width(10**4), table).maximum


def _table(rows: Sequence[tuple[str, str, Mapping[str, str]]], shown: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("strategy", no_wrap=True)
    table.add_column("sharding", overflow="fold")
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for place, (name, kinds, figures) in enumerate(rows):
        style = "bold" if place == 0 else ""
        table.add_row(
            Text(name, style), Text(kinds, style), *(Text(figures[c], style) for c in shown)
        )
    return table


def _declined(found: Plan) -> dict[str, list[str]]:
    """By reason: who. Shardings of one strategy that are all declined are named once."""
    spared = {candidate.name for candidate in found.ranked}
    reasons: dict[str, str] = {}
    for candidate in found.candidates:
        if candidate.declined:
            kind = f" ({_kind(candidate.sharding)})" if candidate.name in spared else ""
            reasons.setdefault(f"{candidate.name}{kind}", "; ".join(candidate.declined))
    return {why: [who for who in reasons if reasons[who] == why] for why in reasons.values()}


def as_json(asked: Request, found: Plan) -> str:
    """Everything asked and found, candidates that may be chosen first, best first."""
    refused = [candidate for candidate in found.candidates if candidate.declined]
    return json.dumps(
        {
            "schema": 1,
            "length": asked.length,
            "ranks": asked.ranks,
            **asdict(asked.sizes),
            "dtype": asked.dtype,
            "causal": asked.attended.causal,
            "window": asked.attended.window,
            "documents": asked.attended.documents,
            "topology": asdict(asked.topology),
            "memory": asked.topology.memory if asked.memory is None else asked.memory,
            "candidates": [each.as_dict() for each in (*found.ranked, *refused)],
        },
        indent=1,
    )


# As a picture.

LINES: Mapping[str, tuple[str, str, float]] = {
    "ulysses": ("#e0b040", "-", 5.0),
    "hybrid, best groups": ("#c0392b", "-", 3.0),
    "all_gather": ("#4d8b50", "-", 1.4),
    "ring, zigzag": ("#1f4f8f", "-", 1.4),
    "ring, striped": ("#7fb3d5", "--", 1.4),
    "ring, contiguous": ("#1f4f8f", ":", 1.4),
}
"""Colour, dashes and width. Where lines lie on each other the wider ones are below."""


def world_sizes(most: int, asked: int) -> list[int]:
    """The numbers of ranks that are drawn: powers of 2, up to ``most`` and past ``asked``."""
    end = max(most, asked)
    found = [2**n for n in range(end.bit_length()) if 2**n <= end]
    return found if found[-1] >= asked else [*found, 2 * found[-1]]


def save_plot(asked: Request, path: Path, counts: Sequence[int], step: Step) -> None:
    """Draw the time against the number of ranks, and how much of it is waiting.

    Args:
        asked: What is planned; its number of ranks is marked.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
        counts: Numbers of ranks. Those that the topology does not join are left out.
        step: Told of each.

    Raises:
        WrongRequest: The file has another suffix.
        OSError: It cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    known = (".png", ".svg", ".pdf")
    if path.suffix.lower() not in known:
        raise WrongRequest(f"--plot must be a {', '.join(known)} file, got {path}")
    farthest = asked.topology.levels[-1].ranks or max(counts)
    plans = {}
    for ranks in counts:
        if ranks <= farthest:
            step(f"{ranks} ranks")
            plans[ranks] = asked.plan(ranks)
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6,
        "axes.edgecolor": "#888888",
        "svg.hashsalt": "isoform",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(7, 5.4), layout="constrained", dpi=120)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw(above, below, asked, plans)
        figure.suptitle(
            _title(asked), x=0.01, ha="left", fontsize=9, color="#333333", linespacing=1.4
        )
        figure.legend(
            *above.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8.5,
        )
        figure.savefig(path)


def _title(asked: Request) -> str:
    what, _, where = str(asked).partition(f" on {asked.ranks} rank")
    return f"{what}\n{where.partition(': ')[2]}"


def series(plans: Mapping[int, Plan]) -> dict[str, dict[int, Candidate]]:
    """The lines of the plot: by name, and by number of ranks, the best that may be chosen."""
    found: dict[str, dict[int, Candidate]] = {name: {} for name in LINES}
    for ranks, each in sorted(plans.items()):
        for candidate in each.ranked:  # best first
            name = candidate.strategy
            name = {"hybrid": "hybrid, best groups"}.get(name, name)
            if name == "ring":
                name = f"ring, {candidate.sharding.kind}"
            found[name].setdefault(ranks, candidate)
    return {name: points for name, points in found.items() if points}


def _draw(above: Any, below: Any, asked: Request, plans: Mapping[int, Plan]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    lines = series(plans)
    for name, points in lines.items():
        times = [(ranks, c.time) for ranks, c in points.items() if c.time is not None]
        colour, dashes, width = LINES[name]
        look: Any = {"color": colour, "linestyle": dashes, "linewidth": width}
        look |= {"marker": "o", "markersize": width + 2}
        ranks = [ranks for ranks, _ in times]
        above.plot(ranks, [time.total for _, time in times], label=name, **look)
        below.plot(ranks, [time.exposed / max(time.total, 1e-300) for _, time in times], **look)

    computing = {
        ranks: min(c.time.compute for c in each.candidates if c.time is not None)
        for ranks, each in plans.items()
    }
    ideal = min(ranks * seconds for ranks, seconds in computing.items())
    above.plot(
        [*plans], [ideal / ranks for ranks in plans], color="#999999", linewidth=0.8, zorder=1,
        label="computing, shared perfectly",
    )  # fmt: skip
    for axes in (above, below):
        axes.axvline(asked.ranks, color="#bbbbbb", linewidth=5, alpha=0.35, zorder=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    above.set_yscale("log")
    above.yaxis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.0+ ", " ", _seconds(x))))
    above.yaxis.set_minor_locator(NullLocator())
    above.set_ylabel("forward and backward")
    below.set_ylim(0, 1)
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylabel("waiting")
    below.set_xlabel("ranks")
    below.set_xticks([*plans], [str(ranks) for ranks in plans], fontsize=8)
