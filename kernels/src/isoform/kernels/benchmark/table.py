"""The records of benchmarks as tables in a Markdown file, between two comments that mark the place.

python -m isoform.kernels.benchmark.table ci/results/benchmarks.jsonl kernels/README.md
python -m isoform.kernels.benchmark.table --of fused ci/results/fused_benchmarks.jsonl FILE
python -m isoform.kernels.benchmark.table --of attention ci/results/attention_benchmarks.jsonl FILE
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isoform.kernels.benchmark import attention, fused
from isoform.kernels.benchmark.bars import OURS, best_peer, milliseconds
from isoform.kernels.benchmark.cases import CASES
from isoform.kernels.benchmark.floors import Floor
from isoform.kernels.benchmark.records import Record, RecordError, latest, read

NOTHING = "Nothing is recorded yet."


@dataclass(frozen=True)
class Table:
    """What is shown of one device.

    Attributes:
        title: What it is of.
        heads: The columns' heads.
        rows: Cells, a row for each case.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def lines(self) -> Iterator[str]:
        """In Markdown."""
        yield f"{self.title}:"
        yield ""
        for cells in (self.heads, ["---"] * len(self.heads), *self.rows):
            yield f"| {' | '.join(cells)} |"


def marks(of: str) -> tuple[str, str]:
    """The lines before and after the tables of a benchmark."""
    how = f"python -m isoform.kernels.benchmark.table --of {of}"
    return f"<!-- {of}: made by {how}, do not edit -->", f"<!-- end of {of} -->"


def filled(text: str, records: Iterable[Record], of: str) -> str:
    """``text`` with the tables of ``records`` between its marks.

    Args:
        text: Of a Markdown file.
        records: What was measured.
        of: By which benchmark, one of :data:`TABLES`.

    Raises:
        ValueError: The marks are missing.
    """
    begin, end = marks(of)
    pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no place for tables: put in the lines\n{begin}\n{end}")
    made = "\n\n".join("\n".join(one.lines) for one in TABLES[of](records)) or NOTHING
    return pattern.sub(lambda _: f"\n{made}\n\n", text)


# --- Evoformer attention --------------------------------------------------------------------------

HEADS = ("case", "B,S,L,H,D", "ms", "best peer", "no bias", "floor", "host µs", "memory")


def evoformer(records: Iterable[Record]) -> Iterator[Table]:
    """A table for each device and dtype, of the latest records."""
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for one in latest(records):
        if not one.not_run:
            board = found.setdefault((one.surroundings.device, one.dtype), {})
            board.setdefault(one.case, []).append(one)
    order = [case.name for case in CASES]
    for (device, dtype), by_case in found.items():
        cases = sorted(by_case, key=lambda name: [*order, name].index(name))
        rows = [row for case in cases if (row := _row(by_case[case]))]
        yield Table(f"{device}, {dtype}; forward / backward", HEADS, rows)


def _row(ran: Sequence[Record]) -> tuple[str, ...]:
    """A case's cells; none if ours did not run."""
    ours = next((one for one in ran if one.competitor == OURS), None)
    if ours is None:
        return ()
    bound = next((one for one in ran if not one.biases), None)
    peers = (best_peer(ran, what) for what in ("forward", "backward"))
    named = [
        f"{_ms(milliseconds(peer, what))} {peer.competitor}" if peer else "–"
        for peer, what in zip(peers, ("forward", "backward"), strict=True)
    ]
    host = (ours.forward_host_us, ours.backward_host_us)
    memory = ours.peak_bytes / ours.memory_bytes if ours.peak_bytes and ours.memory_bytes else None
    return (
        ours.case,
        ",".join(map(str, ours.shape)),
        _both(ours),
        " / ".join(named),
        _both(bound) if bound else "–",
        " / ".join(_floor(floor) for floor in (ours.forward_floor, ours.backward_floor)),
        " / ".join(f"{us.median:.0f}" if us else "–" for us in host),
        f"{memory:.2f} × least" if memory else "–",
    )


def _both(record: Record) -> str:
    return " / ".join(_ms(milliseconds(record, what)) for what in ("forward", "backward"))


def _ms(ms: float | None) -> str:
    return "–" if ms is None else f"{ms:.3g}"


def _floor(floor: Floor | None) -> str:
    return _ms(floor.ms if floor else None)


# --- Benchmarks that hold nobody to a bar ---------------------------------------------------------


def of_fused(records: Iterable[Record]) -> Iterator[Table]:
    """A table for each device: what each takes, and whether there is room for a kernel."""
    columns = (fused.ELEMENTARY, fused.LIBRARY, fused.COMPILED, fused.TUNED, fused.OURS)
    heads = ("case", *columns, "floor", "fastest forward", "fastest backward")
    for device, by_case in _by_device(records):
        rows = []
        for case, ran in by_case.items():
            judged = {one.what: one for one in fused.verdicts(ran.values())}
            best = [judged.get(what) for what in ("forward", "backward")]
            floor = " / ".join(_ms(one.floor_ms if one else None) for one in best)
            rows.append([case, *_times(ran, columns), floor, *map(_verdict, best)])
        yield Table(f"{device}; forward / backward in ms, and shares of the floor", heads, rows)


def of_attention(records: Iterable[Record]) -> Iterator[Table]:
    """A table for each device: what each kernel takes, and the fastest of both passes together."""
    columns = (attention.OURS, *attention.LIBRARIES, attention.FLEX)
    heads = ("case", "B,L,H,G,D", *columns, "floor", "fastest")
    for device, by_case in _by_device(records):
        rows = []
        for case, ran in by_case.items():
            one = next(iter(ran.values()))
            floor = " / ".join(map(_floor, (one.forward_floor, one.backward_floor)))
            both = [x for x in attention.rankings(ran.values()) if x.what == "both"]
            rows.append(
                [
                    case.removeprefix("attention "),
                    ",".join(map(str, one.shape)),
                    *_times(ran, columns),
                    floor,
                    both[0].ms[0][0] if both else "–",
                ]
            )
        yield Table(f"{device}; forward / backward in ms", heads, rows)


def _by_device(
    records: Iterable[Record],
) -> Iterator[tuple[str, dict[str, dict[str, Record]]]]:
    """By device, the latest records by case and competitor."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for one in latest(records):
        by_case = found.setdefault(one.surroundings.device, {})
        by_case.setdefault(one.case, {})[one.competitor] = one
    yield from found.items()


def _times(ran: Mapping[str, Record], columns: Iterable[str]) -> list[str]:
    return [_both(ran[name]) if name in ran else "–" for name in columns]


def _verdict(one: fused.Verdict | None) -> str:
    if one is None:
        return "–"
    ours = "" if one.gain is None else f"; ours faster by {one.gain:.0%}"
    return f"{one.best}, {one.share:.0%}{', room' if one.room else ''}{ours}"


TABLES: Mapping[str, Callable[[Iterable[Record]], Iterator[Table]]] = {
    "evoformer": evoformer,
    "fused": of_fused,
    "attention": of_attention,
}
"""What makes the tables of a benchmark's records."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill in the tables of a file."""
    line = argparse.ArgumentParser(
        prog="python -m isoform.kernels.benchmark.table", description=main.__doc__
    )
    line.add_argument(
        "--of",
        choices=tuple(TABLES),
        default="evoformer",
        help="which benchmark the records are of; evoformer if not said",
    )
    line.add_argument("records", type=Path, help="ci/results/benchmarks.jsonl")
    line.add_argument("file", type=Path, help="the Markdown file, kernels/README.md")
    asked = line.parse_args(arguments)
    try:
        text = filled(asked.file.read_text(encoding="utf-8"), read(asked.records), asked.of)
    except (OSError, RecordError, ValueError) as problem:
        line.error(str(problem))
    asked.file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
