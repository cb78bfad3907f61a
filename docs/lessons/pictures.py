"""How the lessons draw: one look for all pictures, and the few shapes that several use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK, MUTED, PAPER = "#1f2933", "#8a97a5", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE, GOLD = (
    "#2b6cb0",
    "#dd6b20",
    "#2f855a",
    "#c53030",
    "#6b46c1",
    "#b7791f",
)
RANKS = (BLUE, ORANGE, GREEN, PURPLE, RED, GOLD, "#0987a0", "#97266d")
"""A colour for each rank."""

set_matplotlib_formats("svg")
mpl.rcParams.update(
    {
        "figure.figsize": (7.2, 3.2),
        "figure.facecolor": PAPER,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "path",
        "svg.hashsalt": "isoform",
        "font.size": 9.5,
        "font.family": "DejaVu Sans",
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": mpl.cycler(color=RANKS),
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "image.cmap": "Blues",
        "image.interpolation": "nearest",
        "lines.linewidth": 1.8,
    }
)


def bare(ax: Axes, title: str = "") -> Axes:
    """An axes without ticks and frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title)
    return ax


def framed(ax: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """An image's axes: a thin frame, no ticks, the names of both axes."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.6)
    ax.set(title=title, xlabel=x, ylabel=y)
    return ax


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str = "", **style: Any
) -> None:
    """A rounded box with text in it; ``color`` fills it, pale unless ``solid``."""
    color, solid = style.pop("color", BLUE), style.pop("solid", False)
    size = style.pop("size", 9)
    patch = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=color if solid else mpl.colors.to_rgba(color, 0.16),
        edgecolor=color,
        linewidth=1.0,
        **style,
    )
    ax.add_patch(patch)
    ink = PAPER if solid else INK
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=size)


def cells(ax: Axes, values: Any, x: float = 0, y: float = 0, size: float = 1, **style: Any) -> None:
    """A matrix as squares, ``values [rows, columns]`` of colours or None, its first row on top."""
    for i, row in enumerate(values):
        for j, color in enumerate(row):
            if color is None:
                continue
            corner = (x + j * size, y - (i + 1) * size)
            ax.add_patch(
                Rectangle(
                    corner, size, size, facecolor=color, edgecolor=PAPER, linewidth=0.8, **style
                )
            )


def arrow(
    ax: Axes, start: Sequence[float], end: Sequence[float], bend: float = 0.0, **style: Any
) -> None:
    """An arrow from ``start`` to ``end``."""
    style = {"color": MUTED, "linewidth": 1.1} | style
    ax.annotate(
        "",
        xy=tuple(end),
        xytext=tuple(start),
        arrowprops={
            "arrowstyle": "-|>",
            "connectionstyle": f"arc3,rad={bend}",
            "shrinkA": 1,
            "shrinkB": 1,
        }
        | style,
    )


def bytes_in_words(size: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024 or unit == "PiB":
            return f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError


def rng(seed: int = 0) -> np.random.Generator:
    """The lessons' random numbers."""
    return np.random.default_rng(seed)
