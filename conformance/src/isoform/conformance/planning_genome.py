"""``isoform plan genome``: what it is asked for in words, and how its answer is printed and drawn.

The figures are those of :mod:`isoform.parallel.training.plan`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isoform.conformance.console import line, paragraph
from isoform.conformance.planning import DTYPES, WrongRequest, _size, _width
from isoform.parallel.training.plan import (
    NAMES,
    Compared,
    Longest,
    Machine,
    Peak,
    Run,
    Scheme,
    compare,
    layouts,
    of_scheme,
    schemes,
)
from isoform.parallel.training.published import K, Row
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.torch.genome_lm import CONFIGURATIONS

BYTES = {"": 1, "B": 1}
BYTES |= {f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}
BYTES |= {f"{unit}IB": 1024**power for power, unit in enumerate("KMGT", 1)}

PICTURES = (".png", ".svg", ".pdf")


def size(text: str, option: str) -> int:
    """Bytes: ``40GB``, ``80GiB``, ``1e11``. GB is 10⁹, GiB is 2³⁰.

    Raises:
        WrongRequest: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in BYTES:
        raise WrongRequest(f"{option} must be a size such as 40GB or 80GiB, got {text!r}")
    return int(float(found[1]) * BYTES[found[2].upper()])


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        run: Model and dtype; its length is 0 where the longest is wanted.
        gpus: Ranks.
        machine: What each has.
        schemes: By name, baseline and everything first.
        among: The layouts, where degrees are given; None for all.
    """

    run: Run
    gpus: int
    machine: Machine
    schemes: Mapping[str, Scheme]
    among: tuple[Layout, ...] | None

    def found(self, length: int | None = None) -> dict[str, Longest | None]:
        """Of every scheme, the longest or one of some length; None where it has no layout."""
        options: Any = {"length": length, "among": self.among}
        return {
            name: of_scheme(scheme, self.run, self.gpus, self.machine, **options)
            for name, scheme in self.schemes.items()
        }

    def __str__(self) -> str:
        c, m = self.run.configuration, self.machine
        return (
            f"one step of {c.name}, {c.parameters / 1e9:.3g}·10⁹ parameters, {c.positions} "
            f"positions, in {self.run.dtype} on {self.gpus} {'GPU' if self.gpus == 1 else 'GPUs'} "
            f"with {_size(m.memory)} each, and {_size(m.host)} of the host's"
        )


def request(
    *,
    model: str,
    gpus: int,
    memory: str,
    host: str,
    dtype: str,
    positions: str,
    degrees: Mapping[str, int | None],
    head_groups: int,
    tile: int,
    every: int,
) -> Request:
    """What the options of ``isoform plan genome`` ask for.

    Raises:
        WrongRequest: Options have no meaning, or not together; the message names them.
    """
    if model not in CONFIGURATIONS:
        raise WrongRequest(f"--model must be one of {', '.join(CONFIGURATIONS)}, got {model!r}")
    if dtype not in DTYPES:
        raise WrongRequest(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if positions not in ("rotary", "learned"):
        raise WrongRequest(f"--positions must be rotary or learned, got {positions!r}")
    kind: Any = positions
    c = replace(CONFIGURATIONS[model], positions=kind)
    run = Run(c, Switches(), 0, DTYPES[dtype])
    among = None
    if any(degrees.values()):
        every_layout = {
            one
            for scheme in schemes(c).values()
            for one in layouts(replace(run, switches=scheme.switches), gpus)
        }
        among = tuple(
            one
            for one in sorted(every_layout, key=lambda x: (x.tensor, x.pipeline))
            if all(degree in (None, getattr(one, name)) for name, degree in degrees.items())
        )
        if not among:
            asked = ", ".join(f"--{name} {n}" for name, n in degrees.items() if n)
            raise WrongRequest(f"no layout of {gpus} GPUs for {model} has {asked}")
    found = schemes(c, head_groups=head_groups, tile=tile, every=every)
    return Request(run, gpus, Machine(size(memory, "--memory"), size(host, "--host")), found, among)


# The answer: as tables.


def _tokens(length: int) -> str:
    return f"{length // K}K" if length < K * K else f"{length / K / K:.2f}M"


def _laid_out(layout: Layout) -> str:
    """Degrees that are not 1."""
    said = [f"{name} {n}" for name, n in asdict(layout).items() if n > 1]
    return ", ".join(said) or "one rank"


def print_longest(to: Console, asked: Request, found: Mapping[str, Longest | None]) -> None:
    """Print the longest sequence of every scheme, and what holds memory then."""
    paragraph(to, str(asked))
    to.print()
    rows = []
    for name, one in found.items():
        if one is None:
            rows.append((name, "–", "", "", "no layout", ""))
            continue
        rows.append(
            (
                name,
                _tokens(one.run.length) if one.fits else "–",
                _size(one.peak.bytes),
                _size(one.peak.host_bytes),
                one.limited_by or "–",
                _laid_out(one.run.switches.layout),
            )
        )
    columns = ["scheme", "tokens", "device", "host", "ends with", "shared by"]
    shown, left_out = [*columns], []
    for dropped in ("host", "ends with", "device", "shared by"):
        if _width(to, _table(columns, shown, rows)) <= to.width:
            break
        shown.remove(dropped)
        left_out.append(dropped)
    to.print(_table(columns, shown, rows))
    to.print()
    if left_out:
        paragraph(to, (f"in a wider terminal also: {', '.join(left_out)}", "dim"))
    paragraph(
        to,
        (
            "tokens: the longest sequence whose step fits, in 1024, or that which was asked for; "
            "–: it does not fit, or not even 1K do. Each scheme has the layout that is best for "
            "it. … is everything but for what follows.",
            "dim",
        ),
    )
    to.print()
    print_parts(to, {name: one.peak for name, one in found.items() if one is not None})


def print_parts(to: Console, peaks: Mapping[str, Peak]) -> None:
    """Print what holds memory, by part; as many schemes as there is room for."""
    names, left_out = [*peaks], []
    while len(names) > 1 and _width(to, _parts(peaks, names)) > to.width:
        left_out.append(names.pop())
    to.print(_parts(peaks, names))
    to.print()
    if left_out:
        paragraph(to, ("in a wider terminal, and with --json, also the other schemes", "dim"))
    for name in names:
        paragraph(to, (f"{name}: most is held in the {peaks[name].moment}", "dim"))


def _parts(peaks: Mapping[str, Peak], names: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("on the device")
    for name in names:
        table.add_column(name, justify="right")
    found = {name: (peaks[name].parts(), peaks[name].host_parts()) for name in names}
    for place, title in ((0, ""), (1, "host: ")):
        for part in NAMES:
            sizes = [found[name][place].get(part, 0) for name in names]
            if any(sizes):
                table.add_row(title + part, *(_size(n) if n else "" for n in sizes))
    totals = (_size(peaks[name].bytes) for name in names)
    table.add_row(Text("all on the device", "bold"), *(Text(n, "bold") for n in totals))
    return table


RIGHT = frozenset(
    {"tokens", "device", "host", "GPUs", "Megatron-LM", "old", "plan", "on host", "new"}
    | {"plan ", "on host "}  # of the new, by other names
)


def _table(columns: Sequence[str], shown: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in shown:
        right = name in RIGHT
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[columns.index(name)] for name in shown))
    return table


def as_json(asked: Request, found: Mapping[str, Longest | None]) -> str:
    """Everything asked and found, every line of the arithmetic too."""
    return json.dumps(
        {
            "schema": 1,
            "model": asdict(asked.run.configuration),
            "parameters": asked.run.configuration.parameters,
            "gpus": asked.gpus,
            "dtype": asked.run.dtype,
            **asdict(asked.machine),
            "schemes": {name: _as_dict(one) for name, one in found.items()},
        },
        indent=1,
    )


def _as_dict(found: Longest | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "length": found.run.length,
        "fits": found.fits,
        "limited_by": found.limited_by,
        "switches": asdict(found.run.switches),
        **_peak(found.peak),
    }


def _peak(one: Peak) -> dict[str, Any]:
    return {
        "moment": one.moment,
        "bytes": one.bytes,
        "host_bytes": one.host_bytes,
        "parts": one.parts(),
        "host_parts": one.host_parts(),
        "items": [item._asdict() for item in one.items],
        "host_items": [item._asdict() for item in one.host],
    }


# What others reported.


def print_published(to: Console, rows: Sequence[Row]) -> None:
    """Print the lengths that were reported beside the plan's."""
    paragraph(
        to,
        "the longest sequences reported of GenSLM's models on A100-40GB, and what the plan says; "
        "in 1024 tokens",
    )
    to.print()
    cells = [
        (
            row.published.model,
            f"{row.published.gpus}",
            f"{row.published.megatron}",
            f"{row.published.old}",
            _k(row.old),
            _k(row.old_on_host),
            f"{row.published.new}",
            _k(row.new),
            _k(row.new_offloaded),
            _laid_out(row.old.run.switches.layout),
        )
        for row in rows
    ]
    columns = ["model", "GPUs", "Megatron-LM", "old", "plan", "on host", "new", "plan ", "on host "]
    columns.append("layout of the old plan")
    shown = [*columns]
    for dropped in ("layout of the old plan", "Megatron-LM"):
        if _width(to, _table(columns, shown, cells)) > to.width:
            shown.remove(dropped)
    to.print(_table(columns, shown, cells))
    to.print()
    paragraph(
        to,
        (
            "old: the older scheme, by the layout of tensors and stages that holds most. new: the "
            "sequence shared over all GPUs, everything sharded. on host: what blocks keep is "
            "there, and for the old optimizer states are. Learned positions, float16. Nothing is "
            "fitted; what is assumed, and why figures differ: docs/how-to/plan-a-long-run.",
            "dim",
        ),
    )


def _k(found: Longest) -> str:
    return f"{found.run.length // K}" if found.fits else "–"


def published_as_json(rows: Sequence[Row]) -> str:
    """The same with every line of the arithmetic."""
    return json.dumps(
        [
            {
                **asdict(row.published),
                "planned": {
                    name: _as_dict(getattr(row, name))
                    for name in ("old", "old_on_host", "new", "new_offloaded")
                },
            }
            for row in rows
        ],
        indent=1,
    )


# What was measured.


def read_record(path: Path) -> list[Compared]:
    """A record of ``python -m isoform.parallel.benchmark.genome`` beside its plan.

    Raises:
        WrongRequest: It cannot be read, or is no such record.
    """
    try:
        return compare(map(json.loads, path.read_text().splitlines()))
    except OSError as problem:
        raise WrongRequest(f"cannot read {path}: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise WrongRequest(f"{path} is no record of training: {problem}") from problem


def print_compared(to: Console, found: Sequence[Compared], within: float) -> None:
    """Print what was measured beside the plan."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("step", overflow="fold")
    for name in ("measured", "planned", "off"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        style = "red" if abs(one.error) > within else ""
        sizes = (_size(one.measured), _size(one.planned.bytes), f"{100 * one.error:+.1f} %")
        table.add_row(Text(one.what, style), *(Text(x, style) for x in sizes))
    to.print(table)
    to.print()
    off = sum(abs(one.error) > within for one in found)
    worst = max((abs(one.error) for one in found), default=0.0)
    line(to, f"{len(found)} steps, {off} off by more than {100 * within:g} %, at most {worst:.1%}")


def compared_as_json(found: Sequence[Compared]) -> str:
    """The same, with every line of the arithmetic."""
    return json.dumps(
        [
            {
                "what": one.what,
                "measured": {"bytes": one.measured, "host_bytes": one.measured_host},
                "planned": _peak(one.planned),
                "error": one.error,
            }
            for one in found
        ],
        indent=1,
    )


# As a picture.

COLOURS = {
    "parameters": "#1f4f8f",
    "gradients": "#4f7fbf",
    "optimizer states": "#7fb3d5",
    "position table": "#b8d4e8",
    "checkpoints": "#4d8b50",
    "hidden states": "#9bc49d",
    "attention": "#c0392b",
    "exchange": "#e08a80",
    "mask and scores": "#7b241c",
    "MLP": "#e0b040",
    "embedding, logits, loss": "#8e6bb0",
    "tokens": "#bbbbbb",
    "workspace": "#888888",
}


def save_plot(asked: Request, found: Mapping[str, Longest | None], path: Path) -> None:
    """Draw what holds memory at the longest length of every scheme.

    Raises:
        WrongRequest: The file has another suffix.
        OSError: It cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if path.suffix.lower() not in PICTURES:
        raise WrongRequest(f"--plot must be a {', '.join(PICTURES)} file, got {path}")
    known = {name: one for name, one in found.items() if one is not None}
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "isoform",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 1.4 + 0.34 * len(known)), layout="constrained", dpi=120)
        axes = figure.subplots()
        left = [0.0] * len(known)
        for part in NAMES:
            sizes = [one.peak.parts().get(part, 0) / 1e9 for one in known.values()]
            if not any(sizes):
                continue
            axes.barh([*known], sizes, left=left, color=COLOURS[part], label=part, height=0.7)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for row, (end, one) in enumerate(zip(left, known.values(), strict=True)):
            said = _tokens(one.run.length) if one.fits else "does not fit"
            axes.annotate(
                said, (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.axvline(asked.machine.memory / 1e9, color="#bbbbbb", linewidth=1, zorder=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max([*left, asked.machine.memory / 1e9]))
        axes.set_xlabel("GB on the device that holds most; beside it the longest sequence")
        figure.suptitle(str(asked), x=0.01, ha="left", fontsize=8, color="#333333", wrap=True)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(path)
