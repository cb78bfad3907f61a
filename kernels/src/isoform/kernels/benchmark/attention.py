"""Which kernel is fastest for attention over a sequence, and for which calls, on this GPU.

Where a call has neither documents nor a window, three kernels can do it: ours on tensor cores, and
the two libraries' that PyTorch brings along. Where it has, ours is timed beside FlexAttention with
a block mask. ``isoform.kernels.attention_choice.ORDERS`` is set by what is measured here. See
``--help``::

    python -m isoform.kernels.benchmark.attention --record ci/results/attention_benchmarks.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, cycle, pairwise
from typing import Any

from isoform.kernels.attention_arguments import Options
from isoform.kernels.benchmark import calls
from isoform.kernels.benchmark.bars import milliseconds
from isoform.kernels.benchmark.calls import Call, Measured, measure
from isoform.kernels.benchmark.command import Benchmark
from isoform.kernels.benchmark.floors import (
    BYTES,
    EXPONENTIALS,
    PRODUCTS,
    Card,
    Floor,
    card_of_device,
)
from isoform.kernels.benchmark.records import Record, Surroundings

ROUNDS, QUICK_ROUNDS = 3, 2
"""Turns of each competitor."""

OURS, FLEX = "cuda-tensor", "FlexAttention"
LIBRARIES = ("cuda-flash", "cuda-cudnn")


# --- Cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call, of as many queries as keys.

    Attributes:
        name: Its name.
        B, L, H, G, D: Examples, tokens, heads of queries and of keys, head dim.
        dtype: Of the operands.
        causal: Whether a query looks at no later key.
        window: How many tokens a query looks at, itself among them; 0 for all. Only causally.
        documents: Lengths of the documents that are packed, again and again; only causally.
        quick: Whether ``--quick`` has it.
    """

    name: str
    B: int
    L: int
    H: int
    G: int
    D: int
    dtype: str = "bfloat16"
    causal: bool = True
    window: int = 0
    documents: tuple[int, ...] = ()
    quick: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """B, L, H, G, D."""
        return self.B, self.L, self.H, self.G, self.D

    @property
    def masked(self) -> bool:
        """Whether it is one that libraries cannot do."""
        return bool(self.window or self.documents)

    @property
    def spans(self) -> tuple[int, ...]:
        """The lengths of what attends within itself: of documents, or of all."""
        if not self.documents:
            return (self.L,)
        lengths = cycle(self.documents)
        ends = [0]
        while ends[-1] < self.L:
            ends.append(min(self.L, ends[-1] + next(lengths)))
        return tuple(end - start for start, end in pairwise(ends))

    @property
    def pairs(self) -> int:
        """Of a query and a key that it looks at, in one head."""
        if not self.causal:
            return self.L * self.L
        widest = [min(self.window or length, length) for length in self.spans]
        return sum(
            width * (width + 1) // 2 + (length - width) * width
            for width, length in zip(widest, self.spans, strict=True)
        )

    @property
    def memory_bytes(self) -> int:
        """What cannot be done without above the operands: output, gradients, and lse."""
        rows = 2 * self.H + 2 * self.G
        return self.B * self.L * (BYTES[self.dtype] * rows * self.D + 4 * self.H)


HEADS = {2048: (4, 16), 8192: (1, 16), 32768: (1, 8), 131072: (1, 2)}
"""By length, examples and heads: so many that the GPU is full, and no more."""


def _cases() -> Iterator[Case]:
    def case(what: str, L: int, D: int, **more: Any) -> Case:
        B, H = HEADS[L]
        return Case(f"{what}-{D}-{L // 1024}k", B, L, H, more.pop("G", H), D, **more)

    for D in (64, 96, 128, 256):
        for L in HEADS:
            yield case("causal", L, D, quick=L in (8192, 32768))
        yield case("causal-float16", 8192, D, dtype="float16")
        yield case("full", 8192, D, causal=False)
    yield case("full", 32768, 128, causal=False)
    for D, L in ((64, 8192), (128, 8192), (128, 32768)):
        yield case("grouped", L, D, G=2)
    for D in (64, 128):
        yield case("window-4096", 32768, D, window=4096)
        yield case("documents", 32768, D, documents=(512, 4096, 1024, 2560))


CASES = tuple(_cases())


# --- Competitors ----------------------------------------------------------------------------------


def by_kernel(name: str, case: Case, segments: Any, q: Any, k: Any, v: Any) -> Any:
    """By one of the kernels that there are, whatever it declares."""
    from isoform.kernels import attention_torch
    from isoform.kernels.attention_choice import BY_NAME

    window = (case.window - 1, 0) if case.window else None
    operands = {"q": q, "k": k, "v": v}
    if segments is not None:
        operands |= {"segments": segments, "key_segments": segments}
    options = Options.of(causal=case.causal, window=window)
    out, _ = attention_torch.forward(
        BY_NAME[name], operands, options, case.D**-0.5, return_lse=False
    )
    return out


def flex(case: Case, segments: Any) -> Callable[[Any, Any, Any], Any]:
    """FlexAttention, compiled, which passes over blocks in which nothing attends."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def attends(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = query >= key
        if case.window:
            seen = seen & (query < key + case.window)
        if segments is not None:
            seen = seen & (segments[query] == segments[key])
        return seen

    torch.compiler.reset()  # each case is compiled for its own sizes
    mask = create_block_mask(attends, None, None, case.L, case.L, device=calls.DEVICE)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def forward(q: Any, k: Any, v: Any) -> Any:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(query, key, value, block_mask=mask).transpose(1, 2)

    return forward


def makers(case: Case, operands: Sequence[Any], segments: Any) -> dict[str, Callable[[], Call]]:
    """By name, what makes the call of each competitor; the first is what others are held to."""
    *leaves, dout = operands

    def made(make: Callable[[], Callable[..., Any]]) -> Call:
        return Call(partial(make(), *leaves), leaves, dout)

    def kernel(name: str) -> Callable[[], Call]:
        return partial(made, lambda: partial(by_kernel, name, case, segments))

    if case.masked:
        return {OURS: kernel(OURS), FLEX: partial(made, partial(flex, case, segments))}
    ours = {OURS: kernel(OURS)} if case.D <= 128 else {}
    return ours | {name: kernel(name) for name in LIBRARIES}


def drawn(case: Case) -> tuple[list[Any], Any]:
    """q, k, v and the output's cotangent, and the segments or None."""
    import torch

    generator = torch.Generator(calls.DEVICE).manual_seed(1)
    B, L, H, G, D = case.shape
    dtype = getattr(torch, case.dtype)
    operands = [
        torch.randn(B, L, heads, D, generator=generator, device=calls.DEVICE, dtype=dtype)
        for heads in (H, G, G, H)
    ]
    for x in operands[:3]:
        x.requires_grad_()
    if not case.documents:
        return operands, None
    ends = torch.tensor(list(accumulate(case.spans)), device=calls.DEVICE)
    return operands, torch.bucketize(torch.arange(L, device=calls.DEVICE), ends, right=True)


def run(case: Case, around: Surroundings, rounds: int, quick: bool) -> tuple[Record, ...]:
    """Time all competitors of a case in turns: a record of each."""
    operands, segments = drawn(case)
    found = measure(makers(case, operands, segments), rounds, ours=(OURS,))
    return records_of(case, around, found, card_of_device())


def records_of(
    case: Case, around: Surroundings, found: dict[str, Measured], card: Card
) -> tuple[Record, ...]:
    """The records of a case, with what its products cannot take less than."""
    forward, backward = floors(case, card) or (None, None)
    settings = {"causal": str(case.causal), "window": str(case.window)}
    settings |= {"documents": ",".join(map(str, case.documents))}
    blank = Record(
        *(around, f"attention {case.name}", case.shape, case.dtype, ""),
        biases=False,
        ours=False,
        settings=settings,
        memory_bytes=case.memory_bytes,
        forward_floor=forward,
        backward_floor=backward,
    )
    return tuple(
        replace(blank, competitor=name, ours=name == OURS, **measured.fields)
        for name, measured in found.items()
    )


def floors(case: Case, card: Card) -> tuple[Floor, Floor] | None:
    """As :func:`.floors.floors`, of a call without biases: two products, and five."""
    if card.architecture not in PRODUCTS:
        return None
    rate = card.multiprocessors * card.clock_hz
    logits = case.B * case.H * case.pairs
    products = PRODUCTS[card.architecture][0]
    rows = BYTES[case.dtype] * case.B * case.L * case.D

    def floor(arrays: int, multiplied: int) -> Floor:
        return Floor(
            1e3 * arrays * rows / card.bytes_per_s,
            1e3 * logits / (EXPONENTIALS * rate),
            1e3 * 2 * multiplied * logits * case.D / (products * rate),
        )

    operands = case.H + 2 * case.G
    return floor(operands + case.H, 2), floor(2 * operands + 2 * case.H, 5)


# --- What follows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Who is how fast in a case, the fastest first.

    Attributes:
        case: The case's name.
        what: ``"forward"``, ``"backward"``, or ``"both"`` together.
        ms: Milliseconds by competitor.
    """

    case: str
    what: str
    ms: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        (first, best), *others = self.ms
        beside = "".join(f", {name} {ms / best:.2f} ×" for name, ms in others)
        return f"{self.case} {self.what}: {first} {best:.4g} ms{beside}"


def rankings(records: Iterable[Record]) -> tuple[Ranking, ...]:
    """Of each case in the records: forward, backward, and both."""
    by_case: dict[str, list[Record]] = {}
    for one in records:
        if not one.not_run:
            by_case.setdefault(one.case, []).append(one)
    found = []
    for case, ran in by_case.items():
        for what in ("forward", "backward", "both"):
            times = {one.competitor: _taken(one, what) for one in ran}
            ranked = sorted(times.items(), key=lambda item: item[1])
            found.append(Ranking(case, what, tuple(ranked)))
    return tuple(found)


def _taken(record: Record, what: str) -> float:
    passes = ("forward", "backward") if what == "both" else (what,)
    return sum(milliseconds(record, one) or 0.0 for one in passes)


BENCHMARK = Benchmark(
    "attention",
    "Time attention over a sequence on this GPU, forward and backward: our kernel on tensor cores, "
    "PyTorch's flash attention and cuDNN's; and with windows and documents ours and FlexAttention. "
    "All take turns. About two minutes.",
    CASES,
    (ROUNDS, QUICK_ROUNDS),
    run,
    rankings,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
