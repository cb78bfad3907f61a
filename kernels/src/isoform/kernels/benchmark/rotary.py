"""How fast rotary embedding of queries and keys is on this GPU: ours, a copy, and PyTorch's.

A rotation reads q and k and writes them once, and so does a copy of them, which is the floor. Both
forms of the PyTorch expression get their tables of cosine and sine for nothing: they are computed
before anything is timed. See ``--help``::

    python -m isoform.kernels.benchmark.rotary --record ci/results/rotary_benchmarks.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from isoform.kernels.benchmark import calls
from isoform.kernels.benchmark.bars import Bar, milliseconds
from isoform.kernels.benchmark.calls import times
from isoform.kernels.benchmark.records import Record, Surroundings, append, surroundings
from isoform.kernels.benchmark.timing import CudaBurst, Steps, in_turns

ROUNDS = 7
"""Turns of each competitor."""

DTYPES = ("bfloat16", "float16", "float32")

SHARE = 0.9
"""Of a copy's bandwidth, what ours must reach where :attr:`Case.held` says so."""


@dataclass(frozen=True)
class Case:
    """Queries and keys to turn.

    Attributes:
        name: Its name.
        B, L, H, G, D: Examples, tokens, heads of queries and of keys, head dim.
        rotary_dim: How many channels are turned; None for all.
        layout: Which channels are a pair.
        held: Whether ours is held to :data:`SHARE` of a copy: there is enough to copy for that, and
            rows that can be read 16 bytes at a time.
    """

    name: str
    B: int
    L: int
    H: int
    G: int
    D: int
    rotary_dim: int | None = None
    layout: str = "half"
    held: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """B, L, H, G, D."""
        return self.B, self.L, self.H, self.G, self.D


CASES = (
    Case("genome-128", 1, 131072, 16, 16, 128),
    Case("genome-128-interleaved", 1, 131072, 16, 16, 128, layout="interleaved"),
    Case("genome-64", 1, 524288, 4, 4, 64),
    Case("llama-3.1-8b", 1, 32768, 32, 8, 128),
    Case("gpt-neox-20b", 2, 8192, 64, 64, 96, rotary_dim=24, held=False),
    Case("esm2-650m", 4, 1024, 20, 20, 64, held=False),
    Case("one-token", 64, 1, 32, 8, 128, held=False),
)

OURS, IN_PLACE, COPY = "isoform", "isoform, in place", "copy"
EAGER, COMPILED = "eager", "compiled"


def select(patterns: Iterable[str]) -> tuple[Case, ...]:
    """The cases that match any of ``patterns``; all, if there are none.

    Raises:
        ValueError: A pattern matches no case.
    """
    return calls.select(CASES, patterns)


def expression(x: Any, cos: Any, sin: Any, layout: str) -> Any:
    """What a model writes: by tables ``[L, d/2]``, in float32 (rule ROT-5)."""
    import torch

    cos, sin = cos[:, None], sin[:, None]  # all heads of a token turn alike
    d = 2 * cos.shape[-1]
    turning = x[..., :d].float()
    if layout == "half":
        x1, x2 = turning[..., : d // 2], turning[..., d // 2 :]
        y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    else:
        x1, x2 = turning[..., 0::2], turning[..., 1::2]
        y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)
    return torch.cat((y.to(x.dtype), x[..., d:]), -1)


Forward = Callable[..., tuple[Any, Any]]
Calls = tuple[dict[str, Steps], dict[str, Callable[[], tuple[Any, Any]]]]
"""By competitor, the steps that are timed, and what gives its results."""


def prepared(case: Case, dtype: str) -> Calls:
    """All competitors, each with its forward and, if it has one, its backward."""
    import torch

    from isoform.kernels import rotary_embedding_qk, rotary_embedding_qk_
    from isoform.reference.torch import rotary_tables

    torch.compiler.reset()  # each case is compiled for its own sizes
    B, L, H, G, D = case.shape
    generator = torch.Generator("cuda").manual_seed(1)
    kind = getattr(torch, dtype)

    def drawn(*sizes: int) -> Any:
        return torch.randn(*sizes, generator=generator, device="cuda", dtype=kind)

    both = drawn(B * L * (H + G) * D)  # one piece of memory, so that one copy copies it
    copied = torch.empty_like(both)
    parts = both.split([B * L * H * D, B * L * G * D])
    q, k = (part.view(B, L, -1, D) for part in parts)
    packed = torch.cat((q, k, drawn(B, L, G, D)), 2)
    positions = torch.arange(L, device="cuda")
    how: dict[str, Any] = {"rotary_dim": case.rotary_dim, "layout": case.layout}
    ours = partial(rotary_embedding_qk, positions=positions, **how)
    cos, sin = rotary_tables(positions, case.rotary_dim or D)

    def theirs(q: Any, k: Any) -> tuple[Any, Any]:
        return expression(q, cos, sin, case.layout), expression(k, cos, sin, case.layout)

    forwards: dict[str, Forward] = {
        OURS: ours,
        EAGER: theirs,
        COMPILED: torch.compile(theirs, fullgraph=True),
    }
    steps: dict[str, Steps] = {
        COPY: [lambda: copied.copy_(both)],
        IN_PLACE: [
            lambda: rotary_embedding_qk_(
                packed[:, :, :H], packed[:, :, H : H + G], positions, **how
            )
        ],
    }
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    cotangents = [torch.randn_like(x) for x in (q, k)]
    for name, forward in forwards.items():
        steps[name] = _with_backward(forward, leaves, cotangents)
    return steps, {name: partial(forward, q, k) for name, forward in forwards.items()}


def _with_backward(forward: Forward, leaves: Sequence[Any], cotangents: Sequence[Any]) -> Steps:
    """A forward that is to be differentiated, and its backward."""
    import torch

    kept: list[tuple[Any, Any]] = []

    def turn() -> None:
        kept[:] = [forward(*leaves)]

    def turn_back() -> None:
        torch.autograd.grad(kept.pop(), leaves, cotangents)

    turn()
    turn_back()  # and both are compiled
    return [turn, turn_back]


def run(case: Case, dtype: str, around: Surroundings, rounds: int = ROUNDS) -> tuple[Record, ...]:
    """Time all competitors of a case in turns: a record of each."""
    import torch

    steps, results = prepared(case, dtype)
    differences = _differences(results)
    for name in (COPY, IN_PLACE):
        steps[name][0]()  # compiles
    burst = CudaBurst()
    burst.warm_up()
    sampled, failed = in_turns(steps, rounds, burst)
    found = tuple(
        Record(
            around,
            f"rotary {case.name}",
            case.shape,
            dtype,
            name,
            biases=False,
            ours=name in (OURS, IN_PLACE),
            settings=_settings(case),
            difference=differences.get(name),
            not_run=failed.get(name, ""),
            **(times(sampled[name]) if name not in failed else {}),
        )
        for name in steps
    )
    del steps, results
    torch.cuda.empty_cache()
    return found


def _settings(case: Case) -> dict[str, str]:
    turned = case.D if case.rotary_dim is None else case.rotary_dim
    return {"layout": case.layout, "rotary_dim": str(turned)}


def _differences(results: Mapping[str, Callable[[], tuple[Any, Any]]]) -> dict[str, float]:
    """‖x − ours‖ / ‖ours‖ of the others, the larger of q's and k's."""
    import torch

    with torch.no_grad():
        ours = [x.float() for x in results[OURS]()]

        def distance(found: tuple[Any, Any]) -> float:
            pairs = zip(found, ours, strict=True)
            return max(float((x.float() - y).norm() / y.norm()) for x, y in pairs)

        return {name: distance(call()) for name, call in results.items() if name != OURS}


def bars(records: Iterable[Record]) -> tuple[Bar, ...]:
    """What ours is held to, by the records of one run: a share of a copy, and both expressions."""
    by_call: dict[tuple[str, str], dict[str, Record]] = {}
    for one in records:
        by_call.setdefault((one.case, one.dtype), {})[one.competitor] = one
    held = {f"rotary {case.name}" for case in CASES if case.held}
    found = []
    for (case, dtype), ran in by_call.items():
        limits = {
            f"{name}, {what}": (what, ms)
            for name in (EAGER, COMPILED)
            for what in ("forward", "backward")
            if (ms := milliseconds(ran[name], what)) is not None
        }
        copy = milliseconds(ran[COPY], "forward")
        if case in held and copy is not None:
            for what in ("forward", "backward"):
                limits[f"{what} at {SHARE:.0%} of a copy"] = what, copy / SHARE
        for against, (what, limit) in limits.items():
            figure = milliseconds(ran[OURS], what)
            assert figure is not None
            found.append(Bar(case, dtype, what, against, figure, limit))
    return tuple(found)


def row(record: Record, copy: Record) -> str:
    """A line for people."""
    place = f"{record.case:30} {record.dtype:9} {record.competitor:18}"
    if record.not_run:
        return f"{place} not run: {record.not_run}"
    floor, parts = milliseconds(copy, "forward"), [place]
    for what in ("forward", "backward"):
        ms = milliseconds(record, what)
        if ms is not None and floor is not None:
            host = getattr(record, f"{what}_host_us").median
            share = f"{floor / ms:.0%} of a copy"
            parts.append(f"{what} {ms:.4g} ms (host {host:.0f} µs, {share})")
    return "  ".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m isoform.kernels.benchmark.rotary",
        description="Time rotary embedding of queries and keys on this GPU: ours, a copy of them, "
        "and the PyTorch expression, eager and compiled. All take turns.",
        epilog="Exit codes: 0 all bars are met (or --no-bars), 1 one is not, 2 usage, 3 no GPU.",
    )
    made.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only cases whose name matches; may be given several times",
    )
    made.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="may be given several times; bfloat16 if not said",
    )
    made.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each, {ROUNDS}")
    made.add_argument("--record", type=Path, metavar="FILE", help="append the lines of JSON to it")
    made.add_argument("--json", action="store_true", help="print the lines instead of a table")
    made.add_argument("--no-bars", action="store_true", help="exit with 0 whatever the times are")
    made.add_argument("--commit", default="", help="what is checked out, if git cannot be asked")
    made.add_argument("--list", action="store_true", help="list the cases, and exit")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from isoform.kernels.benchmark.__main__ import no_gpu

    line = parser()
    asked = line.parse_args(arguments)
    try:
        chosen = select(asked.case)
    except ValueError as problem:
        line.error(str(problem))
    if asked.rounds < 1:
        line.error("--rounds must be at least 1")
    if asked.list:
        for case in chosen:
            print(f"{case.name:24} {','.join(map(str, case.shape))}")  # noqa: T201
        return 0
    if why := no_gpu():
        print(why, file=sys.stderr)  # noqa: T201
        return 3

    around = surroundings(asked.commit)
    records: list[Record] = []
    for dtype in asked.dtype or DTYPES[:1]:
        for case in chosen:
            found = run(case, dtype, around, asked.rounds)
            if asked.record:
                append(asked.record, found)
            copy = next(one for one in found if one.competitor == COPY)
            for record in found:
                print(record.as_json() if asked.json else row(record, copy), flush=True)  # noqa: T201
            records += found
    held = bars(records)
    for bar in held:
        print(bar, file=sys.stderr, flush=True)  # noqa: T201
    return int(not asked.no_bars and not all(bar.met for bar in held))


if __name__ == "__main__":
    sys.exit(main())
