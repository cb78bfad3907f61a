"""What joins the ranks: bandwidth and latency by level, and how fast a rank computes. As data.

A *level* is a kind of link, and how many consecutive ranks it joins: eight in a node by NVLink, all
by the network. Two ranks use the first level that joins both. Topologies are TOML files (those in
``topologies/`` go by their names)::

    name = "two nodes of four"
    memory = 80e9            # bytes of a rank; may be left out

    [flops]                  # a second and rank, by dtype
    bfloat16 = 5e14

    [[levels]]
    name = "NVLink"
    ranks = 4                # left out for the last: it joins all
    bandwidth = 450e9        # bytes a second that a rank can send, and receive at the same time
    latency = 5e-6           # seconds a message
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Level:
    """A kind of link.

    Attributes:
        name: What it is called.
        bandwidth: Bytes that a rank can send in a second, while it receives as many.
        latency: Seconds that a message takes besides.
        ranks: How many consecutive ranks it joins; None for all.

    Raises:
        ValueError: A number is not positive (a latency may be 0).
    """

    name: str
    bandwidth: float
    latency: float
    ranks: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < float("inf"):
            raise ValueError(f"{self.name}: bandwidth must be positive, got {self.bandwidth}")
        if not 0 <= self.latency < float("inf"):
            raise ValueError(f"{self.name}: latency must not be negative, got {self.latency}")
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"{self.name}: ranks must be at least 1, got {self.ranks}")


@dataclass(frozen=True)
class Topology:
    """Links and ranks.

    Attributes:
        name: What it is called.
        levels: Near ones first; each but the last says how many ranks it joins.
        flops: By dtype (``"bfloat16"``, ``"float32"``): floating-point operations of attention that
            a rank does in a second.
        memory: Bytes that a rank has for attention; None where that is no matter.

    Raises:
        ValueError: Levels do not rise, or a number is not positive.
    """

    name: str
    levels: tuple[Level, ...]
    flops: Mapping[str, float] = field(hash=False)
    memory: float | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError(f"{self.name}: there must be at least one level")
        *inner, last = self.levels
        for level in inner:
            if level.ranks is None:
                raise ValueError(f"{self.name}: only the last level joins all, not {level.name}")
        for level, farther in pairwise(self.levels):
            if farther.ranks is not None and (level.ranks is None or farther.ranks <= level.ranks):
                raise ValueError(
                    f"{self.name}: {farther.name} must join more ranks than {level.name}"
                )
        for dtype, rate in self.flops.items():
            if not 0 < rate < float("inf"):
                raise ValueError(f"{self.name}: flops of {dtype} must be positive, got {rate}")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"{self.name}: memory must be positive, got {self.memory}")

    def rate(self, dtype: str) -> float:
        """Floating-point operations a second.

        Raises:
            ValueError: It is not known for this dtype.
        """
        if dtype not in self.flops:
            known = ", ".join(self.flops) or "none"
            raise ValueError(f"{self.name} has no flops for {dtype}, only for: {known}")
        return self.flops[dtype]

    def spans(self, ranks: int) -> tuple[tuple[int, Level], ...]:
        """How many of ``ranks`` ranks each level joins, with the level.

        Raises:
            ValueError: The last level does not join all.
        """
        farthest = self.levels[-1]
        if farthest.ranks is not None and farthest.ranks < ranks:
            raise ValueError(
                f"{self.name} joins {farthest.ranks} ranks by {farthest.name}, asked for {ranks}"
            )
        return tuple(
            (ranks if level.ranks is None else min(level.ranks, ranks), level)
            for level in self.levels
        )


def topologies() -> dict[str, Topology]:
    """Those that come with the package, by name."""
    folder = files("isoform.parallel.planner").joinpath("topologies")
    return {
        entry.name.removesuffix(".toml"): _parse(entry.read_text(encoding="utf-8"), entry.name)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def load_topology(name: str) -> Topology:
    """A topology by its name, or from a TOML file.

    Raises:
        ValueError: There is none of that name and no such file, or the file is no topology.
    """
    known = topologies()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix != ".toml":
        listed = ", ".join(known)
        raise ValueError(f"no topology is called {name}; there are {listed}, or name a .toml file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"cannot read {name}: {problem.strerror}") from problem
    return _parse(text, name)


def _parse(text: str, source: str) -> Topology:
    try:
        read = tomllib.loads(text)
        levels = [_fields(Level, level, "level") for level in read.pop("levels", ())]
        found: Topology = _fields(Topology, {**read, "levels": tuple(levels)}, "topology")
    except (ValueError, TypeError) as problem:  # of TOML's syntax too
        raise ValueError(f"{source} is no topology: {problem}") from problem
    return found


def _fields(kind: Any, found: Mapping[str, Any], what: str) -> Any:
    """An object of a dataclass from a table of TOML; what is unknown or missing is named."""
    known = kind.__dataclass_fields__
    if unknown := sorted(found.keys() - known.keys()):
        raise ValueError(f"a {what} has no {', '.join(unknown)}; it has {', '.join(known)}")
    needed = ("name", "bandwidth", "latency") if kind is Level else ("name", "levels", "flops")
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"a {what} needs {', '.join(missing)}")
    return kind(**found)
