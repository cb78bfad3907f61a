"""The plots of a report: SVG that can stand in an HTML page, and takes its colours from there.

Each implementation has a panel of its own, of a size that can be read on a telephone; the page puts
as many beside each other as there is room for. Text stays text, and colours are names that the
page's style sheet gives values to, so that one plot serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from isoform.conformance.dtypes import FORMATS
from isoform.conformance.metrics import ULP_EDGES
from isoform.conformance.run import Run
from isoform.conformance.summary import dtype, shares
from isoform.conformance.verdicts import Outcome

RESULTS = ("out", "lse", "dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate", "dx")
"""Results in the order that they are shown in; others follow."""

# Colours that are drawn with, and what the page calls them.
INK, MUTED, GRID, LIMIT, PAPER = "#010203", "#010204", "#010205", "#010206", "#010207"
DTYPE_COLOURS = {name: f"#0203{position:02x}" for position, name in enumerate(FORMATS)}
SERIES_COLOURS = tuple(f"#0204{position:02x}" for position in range(8))
PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    LIMIT: "var(--bad)",
    PAPER: "var(--paper)",
    **{colour: f"var(--{name})" for name, colour in DTYPE_COLOURS.items()},
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES_COLOURS)},
}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "butt",
}

FLOOR, CEILING = 1e-3, 1e6
"""Shares of a budget beyond these are drawn at the border."""

POINTS = 24
"""Points drawn of each strip: the worst, the best, and quantiles between them."""


def results(run: Run) -> tuple[str, ...]:
    """The results that were measured in ``run``, in the order that they are shown in."""
    measured = {outcome.check for outcome in run.outcomes if outcome.errors is not None}
    return (*(x for x in RESULTS if x in measured), *sorted(measured - set(RESULTS)))


def dtypes(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """The dtypes of ``outcomes``, narrow ones first."""
    found = {dtype(outcome.case) for outcome in outcomes}
    return tuple(name for name in FORMATS if name in found)


def budget_strips(run: Run, implementation: str) -> str:
    """Each case's largest error over its budget, by result and dtype, as SVG."""
    strips: dict[tuple[str, str], list[float]] = {}
    for outcome in _measured(run, implementation):
        found = shares(outcome)
        if found:
            share = found.get("condition", max(found.values()))
            strips.setdefault((outcome.check, dtype(outcome.case)), []).append(share)
    shown = [name for name in results(run) if any(name == result for result, _ in strips)]
    kinds = [name for name in FORMATS if any(name == kind for _, kind in strips)]
    top = max((min(max(strip), CEILING) for strip in strips.values()), default=1.0)

    with panel(f"budget-{implementation}") as (figure, axes, svg):
        for position, result in enumerate(shown):
            for offset, kind in enumerate(kinds):
                if strip := strips.get((result, kind)):
                    x = position + 0.8 * ((offset + 0.5) / len(kinds) - 0.5)
                    _strip(axes, x, np.array(strip), DTYPE_COLOURS[kind])
        axes.axhline(1, color=LIMIT, linewidth=1)
        note(axes, "limit", (1, 1), (0, 2), axes.get_yaxis_transform(), ha="right", color=LIMIT)
        axes.set_yscale("log")
        axes.set_ylim(FLOOR * 0.6, max(10.0, 3 * top))
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_xticks(range(len(shown)), [name.replace("_", "_\n") for name in shown])
        axes.set_ylabel("error / budget")
    return svg()


def _strip(axes: Any, x: float, strip: Any, colour: str) -> None:
    """One strip: points, the middle half as a bar, the median as a tick."""
    clipped = np.clip(strip, FLOOR, CEILING)
    if len(clipped) > POINTS:
        points = np.quantile(clipped, np.linspace(0, 1, POINTS), method="nearest")
    else:
        points = np.sort(clipped)
    inside = points[points < CEILING]
    low, middle, high = np.quantile(clipped, (0.25, 0.5, 0.75))
    axes.plot([x, x], [low, high], color=colour, linewidth=4, alpha=0.25)
    axes.plot(np.full(len(inside), x), inside, ".", color=colour, markersize=3.8, markeredgewidth=0)
    axes.plot([x - 0.07, x + 0.07], [middle, middle], color=colour, linewidth=1.4)
    if len(inside) < len(points):
        axes.plot([x], [CEILING], "^", color=colour, markersize=4, markeredgewidth=0)


def ulp_histogram(run: Run, implementation: str) -> str:
    """How many elements are off by how many units of the last place, by dtype, as SVG."""
    counts: dict[tuple[str, bool], Any] = {}
    for outcome in _measured(run, implementation):
        assert outcome.errors is not None
        key = dtype(outcome.case), outcome.check not in ("out", "lse")
        counts[key] = counts.get(key, 0) + np.array(outcome.errors.histogram, dtype=np.float64)
    counts = {key: found for key, found in counts.items() if found.sum() > 0}
    last = max((int(np.flatnonzero(found)[-1]) for found in counts.values()), default=3)
    edges = np.arange(max(last, 8) + 2)  # at least to 64

    with panel(f"ulp-{implementation}") as (figure, axes, svg):
        for (kind, gradient), found in counts.items():
            part = found[: len(edges) - 1] / found.sum()
            colour = DTYPE_COLOURS.get(kind, MUTED)
            axes.stairs(
                part,
                edges,
                baseline=1e-9,
                color=colour,
                linewidth=0.9 if gradient else 1.6,
                linestyle=(0, (2, 1.2)) if gradient else "-",
            )
        axes.axvline(2, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        note(axes, "½ ulp", (2, 1), (2, -2), axes.get_xaxis_transform(), va="top", color=MUTED)
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 1.5)
        axes.set_yticks([1e-6, 1e-4, 1e-2, 1], ["10⁻⁴ %", "0.01 %", "1 %", "100 %"])
        axes.set_xlim(0, edges[-1])
        named = [edge for edge in range(len(edges)) if edge < 4 or (edge - 3) % 4 == 0]
        axes.set_xticks(named, [_ulps(ULP_EDGES[edge]) for edge in named])
        axes.set_ylabel("elements")
        axes.set_xlabel("error in units of the last place")
    return svg()


def _ulps(edge: float) -> str:
    """An edge of the histogram in few letters."""
    if edge > 4096:
        power = str(round(np.log2(edge))) if edge < float("inf") else ""
        return "2" + power.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if power else "∞"
    return {0.25: "¼", 0.5: "½"}.get(edge, f"{edge:g}")


def _measured(run: Run, implementation: str) -> list[Outcome]:
    """The outcomes with errors, one for each case and result: several groups look at the same.

    Where a result has no elements there are none.
    """
    found: dict[tuple[str, str], Outcome] = {}
    for outcome in run.outcomes:
        if outcome.implementation != implementation or outcome.errors is None:
            continue
        if outcome.errors.count:
            found.setdefault((outcome.case, outcome.check), outcome)
    return list(found.values())


def note(axes: Any, text: str, at: Any, offset: Any, coordinates: Any, **style: Any) -> None:
    """A few words, ``offset`` points from where they belong."""
    axes.annotate(text, at, offset, coordinates, "offset points", **style)


@contextmanager
def panel(name: str) -> Iterator[tuple[Figure, Any, Callable[[], str]]]:
    """A figure with one pair of axes, and a function that gives it as SVG."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(6, 2.7), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)

        def svg() -> str:
            with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
                return _inline(figure, re.sub(r"\W", "-", name))

        yield figure, axes, svg


def _inline(figure: Figure, prefix: str) -> str:
    """``figure`` as SVG that can stand in a page beside others."""
    buffer = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # ids are those of matplotlib: only the ones that are referred to are kept, made unique
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    kept = {name for pair in used for name in pair if name}
    text = re.sub(
        r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in kept else "", text
    )
    text = re.sub(r'href="#|url\(#', lambda m: f"{m[0]}{prefix}-", text)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)  # the page's own
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, name)
    return re.sub(r"\s*\n\s*", "\n", text).replace("<svg", '<svg aria-hidden="true"', 1)
