"""The records of benchmarks as tables in a Markdown file, between two comments that mark the place.

python -m isoform.kernels.benchmark.table ci/results/benchmarks.jsonl kernels/README.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from isoform.kernels.benchmark.bars import OURS, best_peer, milliseconds
from isoform.kernels.benchmark.cases import CASES
from isoform.kernels.benchmark.floors import Floor
from isoform.kernels.benchmark.records import Record, RecordError, latest, read

BEGIN = "<!-- benchmarks: made by python -m isoform.kernels.benchmark.table, do not edit -->"
END = "<!-- end of benchmarks -->"
NOTHING = "Nothing is recorded yet."

HEADS = ("case", "B,S,L,H,D", "ms", "best peer", "no bias", "floor", "host µs", "memory")


def filled(text: str, records: Iterable[Record]) -> str:
    """``text`` with the tables of ``records`` between its marks.

    Raises:
        ValueError: The marks are missing.
    """
    pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no place for tables: put in the lines\n{BEGIN}\n{END}")
    made = "\n".join(tables(records)) or NOTHING
    return pattern.sub(lambda _: f"\n{made}\n\n", text)


def tables(records: Iterable[Record]) -> Iterator[str]:
    """The lines of a table for each device and dtype, of the latest records."""
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for one in latest(records):
        if not one.not_run:
            board = found.setdefault((one.surroundings.device, one.dtype), {})
            board.setdefault(one.case, []).append(one)
    order = [case.name for case in CASES]
    for number, ((device, dtype), by_case) in enumerate(found.items()):
        if number:
            yield ""
        yield f"{device}, {dtype}; forward / backward:"
        yield ""
        yield _line(HEADS)
        yield _line(["---"] * len(HEADS))
        for case in sorted(by_case, key=lambda name: [*order, name].index(name)):
            if row := _row(by_case[case]):
                yield _line(row)


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


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill in the tables of a file."""
    line = argparse.ArgumentParser(
        prog="python -m isoform.kernels.benchmark.table", description=main.__doc__
    )
    line.add_argument("records", type=Path, help="ci/results/benchmarks.jsonl")
    line.add_argument("file", type=Path, help="the Markdown file, kernels/README.md")
    asked = line.parse_args(arguments)
    try:
        text = filled(asked.file.read_text(encoding="utf-8"), read(asked.records))
    except (OSError, RecordError, ValueError) as problem:
        line.error(str(problem))
    asked.file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
