"""Whether ours are as fast as they have to be, by the records of one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from isoform.kernels.benchmark.cases import CASES, DETERMINISTIC, FLOAT32, WORKSPACE
from isoform.kernels.benchmark.records import Record

OURS = "isoform"
REPEATABLE = "isoform, deterministic"
NAIVE = "eager"
CARD = "NVIDIA H100"
"""Devices that the cases' own figures are of have names that begin so."""


@dataclass(frozen=True)
class Bar:
    """Something that a figure must not exceed.

    Attributes:
        case: The case's name.
        dtype: The operands'.
        what: What is looked at: ``"forward"``, ``"backward"`` or ``"memory"``.
        against: What it is held against, in words.
        figure: What was measured: ms, or MiB.
        limit: What it must not exceed.
    """

    case: str
    dtype: str
    what: str
    against: str
    figure: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it does not."""
        return self.figure <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.met else "NOT MET"
        unit = "MiB" if self.what == "memory" else "ms"
        place = f"{self.case} {self.dtype} {self.what}"
        return f"{place}: {self.figure:.4g} of {self.limit:.4g} {unit}, {self.against}: {verdict}"


def bars(records: Iterable[Record]) -> tuple[Bar, ...]:
    """All bars that the records of one device can be held to."""
    by_call: dict[tuple[str, str], dict[str, Record]] = {}
    for one in records:
        if not one.not_run:
            by_call.setdefault((one.case, one.dtype), {})[one.competitor] = one
    return tuple(bar for ran in by_call.values() if OURS in ran for bar in _of_call(ran))


def milliseconds(record: Record, what: str) -> float | None:
    """The median of its ``"forward"`` or ``"backward"``, in ms; None if that was not timed."""
    quartiles = record.forward_ms if what == "forward" else record.backward_ms
    return None if quartiles is None else quartiles.median


def best_peer(ran: Iterable[Record], what: str) -> Record | None:
    """The fastest of those that are not ours and do the biases."""
    timed = [
        one for one in ran if not one.ours and one.biases and milliseconds(one, what) is not None
    ]
    return min(timed, key=lambda one: milliseconds(one, what) or 0.0, default=None)


def _of_call(ran: dict[str, Record]) -> Iterator[Bar]:
    """The bars of one case in one dtype."""
    ours = ran[OURS]
    for what in ("forward", "backward"):
        figure = milliseconds(ours, what)
        if figure is None:
            continue

        def bar(against: str, limit: float, figure: float = figure, what: str = what) -> Bar:
            return Bar(ours.case, ours.dtype, what, against, figure, limit)

        if (absolute := _must_beat(ours, what)) is not None:
            yield bar("which is to be beaten", absolute)
        if ours.dtype == "float32":
            naive = milliseconds(ran[NAIVE], what) if NAIVE in ran else None
            if naive is not None:
                yield bar(f"{NAIVE} over {FLOAT32:g}", naive / FLOAT32)
        elif peer := best_peer(ran.values(), what):
            yield bar(f"the best peer, {peer.competitor}", milliseconds(peer, what) or 0.0)
        if REPEATABLE in ran:
            repeatable = milliseconds(ran[REPEATABLE], what)
            if repeatable is not None:
                limit = DETERMINISTIC * figure
                yield bar(f"deterministic=True, {DETERMINISTIC:g} times ours", limit, repeatable)
    if ours.peak_bytes is not None and ours.memory_bytes is not None:
        least = ours.memory_bytes / 2**20
        yield Bar(
            *(ours.case, ours.dtype, "memory"),
            f"{WORKSPACE:g} times what cannot be done without",
            ours.peak_bytes / 2**20,
            WORKSPACE * least,
        )


def _must_beat(ours: Record, what: str) -> float | None:
    """The case's own figure, where the device and the dtype are those that it is of."""
    if ours.dtype != "bfloat16" or not ours.surroundings.device.startswith(CARD):
        return None
    found = next((case for case in CASES if case.name == ours.case), None)
    return getattr(found.must_beat, what) if found else None
