"""Records of attention over several GPUs, arranged for a report: a chart for each kind of call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullLocator

from isoform.conformance.benchmark_plots import MARKERS, Style
from isoform.conformance.plots import LIMIT, SERIES_COLOURS, note, panel
from isoform.parallel.benchmark.gpus import ONE
from isoform.parallel.benchmark.scaling import Record, read


@dataclass(frozen=True)
class Chart:
    """What was measured with so many ranks of a device, of calls that differ in L alone.

    Attributes:
        device: The GPU.
        transport: What joined the ranks; ``"simulated"`` where they shared one GPU.
        ranks: P.
        heads: H, G and D.
        records: The latest of each competitor at each L, one GPU's among them.
    """

    device: str
    transport: str
    ranks: int
    heads: tuple[int, int, int]
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """What it is of, in a line."""
        H, G, D = self.heads
        joined = "one GPU in turns" if self.transport == "simulated" else f"GPUs, {self.transport}"
        return f"{self.ranks} ranks on {joined}: H={H}, G={G}, D={D}"

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """All L."""
        return tuple(sorted({one.point.L for one in self.records}))

    @cached_property
    def competitors(self) -> tuple[str, ...]:
        """Who, as recorded, but for one GPU."""
        found = dict.fromkeys(one.competitor for one in self.records)
        return tuple(name for name in found if name != ONE)

    @property
    def rows(self) -> tuple[Record, ...]:
        """By length; one GPU first."""
        return tuple(sorted(self.records, key=lambda one: one.point.L))

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How each competitor is drawn."""
        looks = cycle(zip(SERIES_COLOURS, MARKERS, strict=True))
        return {name: Style(*look) for name, look in zip(self.competitors, looks, strict=False)}

    @property
    def surroundings(self) -> tuple[str, ...]:
        """When and with what, each said once."""
        said = []
        for around in (one.surroundings for one in self.records):
            versions = (f"{name} {version}" for name, version in around["versions"].items())
            commit = around["commit"] or "commit unknown"
            said.append(", ".join([around["date"][:10], commit, *versions]))
        return tuple(dict.fromkeys(said))

    @cached_property
    def svg(self) -> str:
        """Of ideal, against L: a line for each competitor."""
        with panel(self.name) as (_, axes, svg):
            axes.axhline(1, color=LIMIT, linewidth=1)
            where: Any = axes.get_yaxis_transform()
            note(axes, "ideal", (1, 1), (0, 2), where, ha="right", color=LIMIT)
            for name, style in self.styles.items():
                points = [
                    (one.point.L, one.efficiency)
                    for one in self.rows
                    if one.competitor == name and one.efficiency is not None
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    look = {"color": style.colour, "marker": style.marker, "linewidth": 1.2}
                    axes.plot(x, y, markersize=5, markeredgewidth=0, **look)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(self.lengths, [f"{length:,}" for length in self.lengths])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
            axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
            axes.set_xlabel("L")
        return svg()


def charts(path: Path) -> tuple[Chart, ...]:
    """What a file of records has to show.

    Raises:
        ValueError: It is no such file.
    """
    grouped: dict[tuple[str, str, int, tuple[int, int, int]], dict[Any, Record]] = {}
    records = read(path)
    several = {
        (one.surroundings["device"], one.transport, one.point): one.ranks
        for one in records
        if one.ranks > 1
    }
    for one in records:
        device, at = one.surroundings["device"], one.point
        ranks = several.get((device, one.transport, at), one.ranks)
        key = device, one.transport, ranks, (at.H, at.G, at.D)
        grouped.setdefault(key, {})[at.L, one.competitor] = one  # the latest
    return tuple(Chart(*key, tuple(found.values())) for key, found in grouped.items())


def headline(found: Iterable[Chart]) -> str:
    """How near to ideal the best strategy comes, in a sentence."""
    reached = [
        (one.efficiency, one, chart)
        for chart in found
        if chart.transport != "simulated"
        for one in chart.records
        if one.efficiency is not None
    ]
    if not reached:
        return "Nothing was run on several GPUs."
    best, one, chart = max(reached, key=lambda each: each[0])
    where = f"{chart.ranks} GPUs at {one.point.L:,} positions"
    return f"{one.competitor} reaches {best:.0%} of ideal on {where}."
