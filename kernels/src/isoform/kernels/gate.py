"""The compile gate: what every variant of every kernel takes of a GPU, and whether it got worse.

No continuous-integration machine has a GPU, but each can compile for all of them. A kernel that
still compiles may have become slow without a test failing: one variable too many, and its registers
spill to memory or half as many blocks fit on a multiprocessor. So the assembler's figures are
recorded, a line each, in ``kernels/compile_gate.jsonl``, and :func:`complaints` says which of the
present ones are worse than those.

The figures depend on the compiler's version; the gate refuses to compare across versions, and the
checks pin one. After a change that is meant to cost what it costs (or gains), record anew and have
the difference reviewed with the change::

    python -m isoform.kernels.gate kernels/compile_gate.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from isoform.kernels import plain
from isoform.kernels.compiler import (
    Compiled,
    Define,
    Resources,
    compile_source,
    resources,
    toolkit,
)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
"""Ampere, Hopper, Blackwell in data centres, Blackwell in workstations."""


@dataclass(frozen=True)
class Grid:
    """Which variants of a source are compiled: every combination of these.

    Attributes:
        defines: The definitions that choose a variant, and the values tried of each.
        architectures: What to compile for.
    """

    defines: Mapping[str, Sequence[Define]]
    architectures: Sequence[str] = ARCHITECTURES


GRIDS: Mapping[str, Grid] = {
    plain.SOURCE: Grid(
        {"ELEMENT": tuple(plain.ELEMENTS.values()), "HEAD_DIM": plain.HEAD_DIMS},
        architectures=("sm_75", *ARCHITECTURES),  # Turing too: it needs no newer instruction
    ),
}
"""What the gate compiles of every source in ``isoform/kernels/cuda``."""

REGISTERS_AT_A_TIME = 8
"""A thread is given registers in eights: 97 cost what 104 do, and 105 may cost a block."""

Figures = dict[str, dict[str, Resources]]
"""Of every variant, by its name as a string, what each of its kernels takes."""


@dataclass(frozen=True)
class Variant:
    """One source with its definitions, compiled for one architecture."""

    name: str
    defines: Mapping[str, Define]
    architecture: str

    def __str__(self) -> str:
        chosen = (f"{key}={value}" for key, value in self.defines.items())
        return " ".join([self.name, *chosen, self.architecture])

    def compile(self) -> Compiled:
        """Compile it; what :func:`~isoform.kernels.compiler.compile_source` raises, this does."""
        return compile_source(self.name, architecture=self.architecture, defines=self.defines)


def variants(grids: Mapping[str, Grid] = GRIDS) -> list[Variant]:
    """Every variant that the gate compiles."""
    return [
        Variant(name, dict(zip(grid.defines, values, strict=True)), architecture)
        for name, grid in grids.items()
        for values in itertools.product(*grid.defines.values())
        for architecture in grid.architectures
    ]


def measure(chosen: Iterable[Variant]) -> Figures:
    """Compile each variant and read what its kernels take.

    Raises:
        ValueError: There is a variant without a kernel: to the compiler that is no error.
    """
    figures = {str(variant): resources(variant.compile().log) for variant in chosen}
    if empty := [variant for variant, found in figures.items() if not found]:
        raise ValueError(f"no kernels in {', '.join(empty)}")
    return figures


def complaints(variant: str, found: Mapping[str, Resources], recorded: Figures) -> list[str]:
    """What is worse in ``variant`` than recorded, a sentence each; empty if nothing is.

    A kernel may take more registers than recorded as long as it is given no more than then
    (:data:`REGISTERS_AT_A_TIME`), and not a byte more of anything else.
    """
    if variant not in recorded:
        return [f"{variant}: not recorded"]
    before = recorded[variant]
    said = [f"{variant}: {kernel} is recorded and gone" for kernel in before if kernel not in found]
    for kernel, now in found.items():
        if kernel not in before:
            said.append(f"{variant}: {kernel} is not recorded")
            continue
        for figure, is_now in asdict(now).items():
            was = getattr(before[kernel], figure)
            step = REGISTERS_AT_A_TIME if figure == "registers" else 1
            if -(-is_now // step) > -(-was // step):
                said.append(f"{variant}: {kernel} has {figure} {is_now}, recorded are {was}")
    return said


# --- The record -----------------------------------------------------------------------------------


def compiler_version() -> str:
    """The version of NVRTC that is installed, e.g. ``"13.0"``."""
    return ".".join(str(part) for part in toolkit().version)


def read(record: Path) -> tuple[str, Figures]:
    """The recorded figures, and the version of the compiler that they are of."""
    first, *rows = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    figures: Figures = {}
    for row in rows:
        variant, kernel = row.pop("variant"), row.pop("kernel")
        figures.setdefault(variant, {})[kernel] = Resources(**row)
    return first["compiler"], figures


def write(record: Path, compiler: str, figures: Figures) -> None:
    """Record the figures: the compiler's version, then a line per kernel, so that a diff reads."""
    rows: list[dict[str, object]] = [{"compiler": compiler}]
    rows += [
        {"variant": variant, "kernel": kernel, **asdict(found)}
        for variant, kernels in figures.items()
        for kernel, found in sorted(kernels.items())
    ]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile every variant and record what it takes."""
    parser = argparse.ArgumentParser(
        prog="python -m isoform.kernels.gate", description=main.__doc__
    )
    parser.add_argument("record", type=Path, help="the file to write, kernels/compile_gate.jsonl")
    write(parser.parse_args(arguments).record, compiler_version(), measure(variants()))


if __name__ == "__main__":
    main()
