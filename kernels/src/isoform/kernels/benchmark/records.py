"""The record of benchmarks: a line of JSON for each competitor in each case.

Also lines of competitors that did not run, with the reason, since a comparison that leaves someone
out has to say so.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from isoform.kernels.benchmark.floors import Floor
from isoform.kernels.benchmark.timing import Quartiles

SCHEMA = 1
"""Version of the lines."""

VERSIONS = ("isoform", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "cuequivariance-torch")
"""Distributions whose version is recorded, if they are installed."""


class RecordError(ValueError):
    """A file is no record of benchmarks; the message names file and line."""


@dataclass(frozen=True)
class Surroundings:
    """What someone needs to know to see the same again.

    Attributes:
        date: When, in UTC, as ISO 8601.
        commit: What was checked out.
        device: The GPU.
        driver: Its driver's version.
        versions: Versions of libraries, by name.
    """

    date: str
    commit: str
    device: str
    driver: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """What one competitor took for one case, or why it was not run.

    Attributes:
        surroundings: Where and when.
        case: The case's name.
        shape: Its axis sizes B, S, L, H, D.
        dtype: Of the operands.
        competitor: Who.
        biases: Whether it did the mask and the pair bias of the case.
        ours: Whether it is this package's.
        settings: What else was asked for, such as the compiler's mode.
        forward_ms: Of the GPU, with gradients wanted if the case wants them.
        backward_ms: Of the GPU; None where the case has no backward.
        forward_host_us: Until the call returned.
        backward_host_us: Until the backward returned.
        peak_bytes: Memory above the operands, over forward and backward, results included.
        memory_bytes: What cannot be done without of that.
        forward_floor: What the forward cannot take less than on this card, if that is known.
        backward_floor: The same of the backward.
        difference: How far results are from those of the first of ours in the run: the largest
            ‖x − ours‖ / ‖ours‖ of output and gradients. None for ours, and for a bound.
        not_run: Why it was not run; then there are no figures.
    """

    surroundings: Surroundings
    case: str
    shape: tuple[int, ...]
    dtype: str
    competitor: str
    biases: bool
    ours: bool
    settings: Mapping[str, str] = field(default_factory=dict)
    forward_ms: Quartiles | None = None
    backward_ms: Quartiles | None = None
    forward_host_us: Quartiles | None = None
    backward_host_us: Quartiles | None = None
    peak_bytes: int | None = None
    memory_bytes: int | None = None
    forward_floor: Floor | None = None
    backward_floor: Floor | None = None
    difference: float | None = None
    not_run: str = ""

    def as_json(self) -> str:
        """One line, the surroundings' fields among the others."""
        fields = asdict(self)
        return json.dumps({"schema": SCHEMA, **fields.pop("surroundings"), **fields})

    @staticmethod
    def from_json(line: str) -> Record:
        """What :meth:`as_json` wrote.

        Raises:
            RecordError: It did not write that.
        """
        try:
            fields: dict[str, Any] = json.loads(line)
            if (schema := fields.pop("schema")) != SCHEMA:
                raise RecordError(f"schema {schema}, and this version reads {SCHEMA}")
            for name, kind in _PARTS.items():
                if fields[name] is not None:
                    fields[name] = kind(**fields[name])
            around = {name: fields.pop(name) for name in Surroundings.__dataclass_fields__}
            fields["shape"] = tuple(fields["shape"])
            return Record(Surroundings(**around), **fields)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as problem:
            raise RecordError(f"no record of a benchmark: {problem!r}") from problem


_PARTS: Mapping[str, Any] = {
    **dict.fromkeys(("forward_ms", "backward_ms"), Quartiles),
    **dict.fromkeys(("forward_host_us", "backward_host_us"), Quartiles),
    **dict.fromkeys(("forward_floor", "backward_floor"), Floor),
}


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a record, which need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{record.as_json()}\n" for record in records)


def read(path: Path) -> tuple[Record, ...]:
    """All records of a file, oldest first.

    Raises:
        RecordError: A line is none.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(Record.from_json(line))
        except RecordError as problem:
            raise RecordError(f"{path}, line {number}: {problem}") from problem
    return tuple(found)


def latest(records: Iterable[Record]) -> tuple[Record, ...]:
    """Of each device, dtype, case and competitor, the newest that ran, or else the newest."""
    found: dict[tuple[str, ...], Record] = {}
    for one in records:
        key = (one.surroundings.device, one.dtype, one.case, one.competitor)
        if key not in found or not one.not_run or found[key].not_run:
            found[key] = one
    return tuple(found.values())


def installed(distribution: str) -> str | None:
    """The version of a distribution; None if there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def surroundings(commit: str = "") -> Surroundings:
    """Of this process.

    Args:
        commit: What is checked out, where git cannot be asked.
    """
    import torch

    from isoform.kernels.compiler import toolkit

    found = {name: said for name in VERSIONS if (said := installed(name))}
    found["nvrtc"] = ".".join(map(str, toolkit().version))
    return Surroundings(
        datetime.now(UTC).isoformat(timespec="seconds"),
        commit or _commit(),
        torch.cuda.get_device_name(),
        _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        found,
    )


def _commit() -> str:
    """What is checked out, and whether anything was changed since; empty where that is unknown."""
    return _said("git", "describe", "--always", "--abbrev=12", "--dirty")


def _said(*command: str) -> str:
    """The first line that a program prints; empty where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
