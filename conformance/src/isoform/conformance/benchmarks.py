"""Records of benchmarks, arranged for a report: a board for each device and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from isoform.kernels.benchmark.bars import Bar, bars, best_peer, milliseconds
from isoform.kernels.benchmark.cases import CASES, DTYPES
from isoform.kernels.benchmark.competitors import COMPETITORS
from isoform.kernels.benchmark.records import Record, latest, read

WHATS = ("forward", "backward")


@dataclass(frozen=True)
class Board:
    """What was measured on one device in one dtype: of each case and competitor, the latest.

    Attributes:
        device: The GPU.
        dtype: The operands'.
        records: A record for each case and competitor that was asked for.
    """

    device: str
    dtype: str
    records: tuple[Record, ...]

    @cached_property
    def cases(self) -> tuple[str, ...]:
        """The cases that anyone ran, in the order of the benchmarks."""
        return _in_order([case.name for case in CASES], [x.case for x in self.ran])

    @cached_property
    def competitors(self) -> tuple[str, ...]:
        """Who ran anything, in the order of the benchmarks."""
        return _in_order([one.name for one in COMPETITORS], [x.competitor for x in self.ran])

    @cached_property
    def ran(self) -> tuple[Record, ...]:
        """The records that have figures."""
        return tuple(one for one in self.records if not one.not_run)

    @cached_property
    def bars(self) -> tuple[Bar, ...]:
        """What ours are held to."""
        return bars(self.records)

    @cached_property
    def absent(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Who did not run and why, and in which cases."""
        found: dict[tuple[str, str], tuple[str, ...]] = {}
        for one in self.records:
            if one.not_run:
                key = one.competitor, one.not_run
                found[key] = (*found.get(key, ()), one.case)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """B, S, L, H, D of each case."""
        return {one.case: one.shape for one in self.ran}

    @cached_property
    def families(self) -> dict[str, tuple[str, ...]]:
        """Cases that differ in L alone, S being L, by what they have in common."""
        found: dict[str, tuple[str, ...]] = {}
        for case in self.cases:
            B, S, L, H, D = self.shapes[case]
            if S == L:
                name = f"B={B}, S=L, H={H}, D={D}"
                found[name] = (*found.get(name, ()), case)
        return {name: cases for name, cases in found.items() if len(cases) > 1}

    @cached_property
    def surroundings(self) -> tuple[str, ...]:
        """When and with what the records were made, each said once."""
        said = []
        for around in (one.surroundings for one in self.ran):
            versions = (f"{name} {version}" for name, version in around.versions.items())
            commit = around.commit or "commit unknown"
            said.append(", ".join([around.date[:10], commit, f"driver {around.driver}", *versions]))
        return tuple(dict.fromkeys(said))

    @property
    def name(self) -> str:
        """Device and dtype."""
        return f"{self.device}, {self.dtype}"

    def of(self, case: str, competitor: str) -> Record | None:
        """The figures of a competitor in a case; None if there are none."""
        wanted = (case, competitor)
        return next((one for one in self.ran if (one.case, one.competitor) == wanted), None)

    def ratio(self, record: Record, what: str) -> float | None:
        """How many times the best peer's time it takes, less than 1 if it is faster."""
        peer = best_peer((one for one in self.ran if one.case == record.case), what)
        mine = milliseconds(record, what)
        theirs = milliseconds(peer, what) if peer else None
        return mine / theirs if mine and theirs else None


def boards(path: Path) -> tuple[Board, ...]:
    """What a file of records has to show.

    Raises:
        RecordError: It is no such file.
    """
    grouped: dict[tuple[str, str], list[Record]] = {}
    for one in latest(read(path)):
        grouped.setdefault((one.surroundings.device, one.dtype), []).append(one)
    devices = list(dict.fromkeys(device for device, _ in grouped))
    return tuple(
        Board(device, dtype, tuple(grouped[device, dtype]))
        for device in devices
        for dtype in DTYPES
        if (device, dtype) in grouped
    )


def fraction_of_floor(record: Record, what: str) -> float | None:
    """How much of what it takes cannot be done without."""
    floor = record.forward_floor if what == "forward" else record.backward_floor
    ms = milliseconds(record, what)
    return floor.ms / ms if floor and ms else None


def headline(found: Iterable[Board]) -> str:
    """Against how many of the best peers ours are faster, in a sentence."""
    ratios = [
        ratio
        for board in found
        for record in board.ran
        if record.competitor == COMPETITORS[0].name
        for what in WHATS
        if (ratio := board.ratio(record, what)) is not None
    ]
    if not ratios:
        return "Benchmarks, without anyone to be compared with."
    won = sum(ratio < 1 for ratio in ratios)
    return f"isoform is faster than the best peer in {won} of {len(ratios)} timings."


def _in_order(known: list[str], seen: list[str]) -> tuple[str, ...]:
    """Those of ``known`` that were ``seen``, and then all others."""
    return tuple(dict.fromkeys([*(x for x in known if x in seen), *seen]))
