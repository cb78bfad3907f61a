"""The plots of benchmarks: a panel for each question, a mark for each competitor in each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from isoform.conformance.benchmarks import WHATS, Board, fraction_of_floor
from isoform.conformance.plots import LIMIT, SERIES_COLOURS, note, panel
from isoform.kernels.benchmark.bars import milliseconds
from isoform.kernels.benchmark.records import Record

MARKERS = {"o": "●", "D": "◆", "s": "■", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
"""Marks of matplotlib's, and letters that look like them: who does not see colours sees these."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Style:
    """How a competitor is drawn: the name of its colour on the page, and its mark."""

    colour: str
    marker: str

    @property
    def letter(self) -> str:
        """A letter that looks like the mark."""
        return MARKERS[self.marker]


def styles(board: Board) -> dict[str, Style]:
    """How each competitor of a board is drawn; the ninth as the first."""
    looks = [Style(*each) for each in zip(SERIES_COLOURS, MARKERS, strict=True)]
    return {name: looks[number % len(looks)] for number, name in enumerate(board.competitors)}


def panels(board: Board) -> dict[str, str]:
    """All plots of a board, as SVG, by their captions."""
    found: dict[str, str] = {}
    for family, cases in board.families.items():
        for what in WHATS:
            caption = f"{what.capitalize()} against L, {family}"
            found[caption] = _against_length(board, caption, cases, what)
    questions: list[tuple[str, str, Callable[[Record, str], float | None]]] = [
        ("milliseconds", "", milliseconds),
        ("times the best peer's", "best peer", board.ratio),
        ("fraction of the floor", "floor", fraction_of_floor),
    ]
    for question, line, figure_of in questions:
        for what in WHATS:
            caption = f"{what.capitalize()}, {question}"
            found[caption] = _by_case(board, caption, _asked(figure_of, what), line)
    caption = "Peak memory, times what cannot be done without"
    found[caption] = _by_case(board, caption, _memory, "least")
    return {caption: svg for caption, svg in found.items() if svg}


def _asked(
    figure_of: Callable[[Record, str], float | None], what: str
) -> Callable[[Record], float | None]:
    return lambda record: figure_of(record, what)


def _memory(record: Record) -> float | None:
    least, peak = record.memory_bytes, record.peak_bytes
    return peak / least if peak and least else None


def _against_length(board: Board, caption: str, cases: Sequence[str], what: str) -> str:
    """A line for each competitor over the lengths of a family; empty without two lengths."""
    found: dict[str, Points] = {}
    for name in board.competitors:
        records = [record for case in cases if (record := board.of(case, name))]
        found[name] = [(x.shape[2], y) for x in records if (y := milliseconds(x, what))]
    lengths = sorted({x for points in found.values() for x, _ in points})
    if len(lengths) < 2:
        return ""
    with panel(f"{board.name}-{caption}") as (_, axes, svg):
        _draw(axes, board, found, linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.set_xlabel("L")
        axes.set_ylabel("ms")
    return svg()


def _by_case(
    board: Board, caption: str, figure_of: Callable[[Record], float | None], line: str
) -> str:
    """A mark for each competitor in each case; empty if there is nothing to draw.

    Args:
        board: Where the records are.
        caption: What the plot is called.
        figure_of: The figure of a record.
        line: What a line at 1 is called; without, there is none.
    """
    found: dict[str, Points] = {}
    for number, name in enumerate(board.competitors):
        aside = 0.6 * ((number + 0.5) / len(board.competitors) - 0.5)
        records = [(place, board.of(case, name)) for place, case in enumerate(board.cases)]
        found[name] = [(place + aside, y) for place, x in records if x and (y := figure_of(x))]
    if not any(found.values()):
        return ""
    with panel(f"{board.name}-{caption}") as (_, axes, svg):
        if line:
            axes.axhline(1, color=LIMIT, linewidth=1)
            note(axes, line, (1, 1), (0, 2), axes.get_yaxis_transform(), ha="right", color=LIMIT)
        _draw(axes, board, found, linewidth=0)
        axes.set_xlim(-0.5, len(board.cases) - 0.5)
        axes.set_xticks(range(len(board.cases)), ["\n".join(x.rsplit("-", 1)) for x in board.cases])
        if not line:
            axes.set_ylabel("ms")
    return svg()


def _draw(axes: Any, board: Board, found: dict[str, Points], linewidth: float) -> None:
    """Points of each competitor on a logarithmic axis, ours above the others'."""
    for name, style in reversed(styles(board).items()):
        if found[name]:
            x, y = zip(*found[name], strict=True)
            axes.plot(
                *(x, y),
                color=style.colour,
                marker=style.marker,
                markersize=5,
                markeredgewidth=0,
                linewidth=linewidth,
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.2, high * 1.2)
