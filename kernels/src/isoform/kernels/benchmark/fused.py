"""How near PyTorch comes to the least traffic in the operations between attention and matrices.

LayerNorm, RMSNorm, bias and GeLU, bias, dropout and residual, and the masked softmax of attention
that is not fused. All are limited by memory: their floor is what they must read and write, at the
rate of a copy that is timed in the same turns. Timed are PyTorch's elementary operations, its own
fused function where it has one, what ``torch.compile`` makes of that, and ours where there is one:
docs/decisions/0013 says when one is written, and when kept.

What takes time is to compile, so each operation is compiled for longer at one size, in place of the
plain way, and those sizes come first. No case is begun after some seconds. See ``--help``::

    python -m isoform.kernels.benchmark.fused --record ci/results/fused_benchmarks.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from isoform.kernels.benchmark import calls
from isoform.kernels.benchmark.bars import milliseconds
from isoform.kernels.benchmark.calls import Call, Measured, measure
from isoform.kernels.benchmark.command import Benchmark
from isoform.kernels.benchmark.floors import BYTES, Floor
from isoform.kernels.benchmark.records import Record, Surroundings

ROUNDS, QUICK_ROUNDS = 5, 3
"""Turns of each competitor."""

BEGUN_S = 90
"""After how many seconds no further case is begun."""

REACHED = 0.9
"""Of a copy's bandwidth, what a kernel written by hand reaches: the rotary kernel is held to it."""

MARGIN = 0.1
"""By how much such a kernel has to win before it is written and kept (docs/decisions/0013)."""

TOKENS = 131072
EPSILON = 1e-5
DROPPED = 0.1
SCALE = 128**-0.5

COPY, ELEMENTARY, LIBRARY, OURS = "copy", "elementary", "library", "isoform"
COMPILED, TUNED = "compiled", "compiled, max-autotune"
MODES = {COMPILED: "default", TUNED: "max-autotune-no-cudagraphs"}


# --- Operations -----------------------------------------------------------------------------------


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    """``(x − mean) / √(variance + ε) · weight + bias``, in float32."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return (normal * weight + bias).to(x.dtype)


def library_layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    """The same by PyTorch's fused function."""
    from torch.nn.functional import layer_norm

    return layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def rms_norm(x: Any, weight: Any) -> Any:
    """``x / √(mean(x²) + ε) · weight``, in float32."""
    wide = x.float()
    normal = wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return (normal * weight).to(x.dtype)


def library_rms_norm(x: Any, weight: Any) -> Any:
    """The same by PyTorch's fused function."""
    from torch.nn.functional import rms_norm

    return rms_norm(x, x.shape[-1:], weight, EPSILON)


def bias_gelu(x: Any, bias: Any) -> Any:
    """GeLU of ``x + bias``, by the tangent."""
    from torch.nn.functional import gelu

    return gelu(x + bias, approximate="tanh")


def bias_dropout_residual(x: Any, bias: Any, residual: Any) -> Any:
    """``residual + dropout(x + bias)``."""
    from torch.nn.functional import dropout

    return residual + dropout(x + bias, DROPPED, training=True)


def our_layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    """The same by our kernel."""
    from isoform.kernels import layer_norm

    return layer_norm(x, weight, bias, epsilon=EPSILON)


def our_bias_gelu(x: Any, bias: Any) -> Any:
    """The same by our kernel."""
    from isoform.kernels import bias_gelu

    return bias_gelu(x, bias)


def our_bias_dropout_residual(x: Any, bias: Any, residual: Any) -> Any:
    """``residual + dropout(x + bias)`` by our kernel, which draws a seed in each call."""
    from isoform.kernels import bias_dropout_residual

    return bias_dropout_residual(x, bias, residual, DROPPED)


def masked_softmax(scores: Any, attended: Any) -> Any:
    """Probabilities over the last axis of ``scale · scores`` where ``attended``, in float32."""
    import torch

    logits = torch.where(attended, scores.float() * SCALE, -torch.inf)
    return torch.softmax(logits, -1).to(scores.dtype)


def our_causal_softmax(scores: Any, attended: Any) -> Any:
    """The same of a causal mask by our kernel, which needs none."""
    from isoform.kernels import masked_softmax

    return masked_softmax(scores, causal=True, scale=SCALE)


def our_padded_softmax(scores: Any, attended: Any) -> Any:
    """The same of any mask by our kernel."""
    from isoform.kernels import masked_softmax

    return masked_softmax(scores, mask=attended, scale=SCALE)


def as_dropped(results: Sequence[Any], operands: Sequence[Any], dout: Any) -> list[Any]:
    """What results have to be if those numbers are dropped which ``dx`` says were.

    Raises:
        ArithmeticError: More or fewer of them than is asked for.
    """
    x, bias, residual = operands
    _, dx, _, _ = results
    kept = (dx != 0) | (dout == 0)
    share = float(kept.float().mean())
    if abs(share - (1 - DROPPED)) > 0.01:
        raise ArithmeticError(f"{1 - share:.1%} are dropped, and not {DROPPED:.0%}")
    factor = kept / (1 - DROPPED)
    expected = (residual + factor * (x + bias)).to(x.dtype), (factor * dout).to(x.dtype)
    return [*expected, dx.sum(0), dout]


@dataclass(frozen=True)
class Operation:
    """An operation, and what it must read and write.

    Attributes:
        elementary: By operations of PyTorch's that each do one thing.
        passes: How often the forward and the backward must read or write an array of the size of
            the activations; vectors and masks are not counted. A causal softmax need not read
            what is masked, but has to write its zeros.
        vectors: How many operands are a number for each channel, after the activations.
        residual: Whether there is another array of the activations' size, after those.
        masked: Which scores are not looked at: ``"causal"``, ``"padding"``, or none.
        library: By a fused function of PyTorch's, if there is one.
        ours: By a kernel of ours, if there is one.
        expected: What results and gradients have to be, where equal calls differ.
    """

    elementary: Callable[..., Any]
    passes: tuple[float, float]
    vectors: int = 0
    residual: bool = False
    masked: str = ""
    library: Callable[..., Any] | None = None
    ours: Callable[..., Any] | None = None
    expected: Callable[[Sequence[Any], Sequence[Any], Any], list[Any]] | None = None


LAYER_NORM = Operation(
    layer_norm, (2, 3), vectors=2, library=library_layer_norm, ours=our_layer_norm
)
RMS_NORM = Operation(rms_norm, (2, 3), vectors=1, library=library_rms_norm)
BIAS_GELU = Operation(bias_gelu, (2, 3), vectors=1, ours=our_bias_gelu)
BIAS_DROPOUT_RESIDUAL = Operation(
    bias_dropout_residual,
    (3, 2),
    vectors=1,
    residual=True,
    ours=our_bias_dropout_residual,
    expected=as_dropped,
)
CAUSAL_SOFTMAX = Operation(masked_softmax, (1.5, 2), masked="causal", ours=our_causal_softmax)
PADDED_SOFTMAX = Operation(masked_softmax, (2, 3), masked="padding", ours=our_padded_softmax)


# --- Cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: Its name.
        operation: What is computed.
        shape: Tokens and channels, or B, H, queries and keys.
        dtype: Of the operands.
        quick: Whether ``--quick`` has it.
        tuned: Whether it is compiled for longer, unless ``--quick``.
    """

    name: str
    operation: Operation
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    quick: bool = False
    tuned: bool = False

    @property
    def array_bytes(self) -> int:
        """Of an array of the activations' size."""
        return BYTES[self.dtype] * prod(self.shape)


def _of_width(width: int, *, first: bool = False) -> Iterator[Case]:
    """Of the operations on tokens, the likeliest to have room first."""
    for name, operation in (
        ("bias-dropout-residual", BIAS_DROPOUT_RESIDUAL),
        ("bias-gelu", BIAS_GELU),
        ("layer-norm", LAYER_NORM),
        ("rms-norm", RMS_NORM),
    ):
        yield Case(f"{name}-{width}", operation, (TOKENS, width), quick=first, tuned=first)


CASES = (
    *_of_width(2560, first=True),  # which is no power of two
    Case("softmax-causal-4096", CAUSAL_SOFTMAX, (1, 16, 4096, 4096), quick=True, tuned=True),
    *_of_width(8192),
    *_of_width(1024),
    Case("softmax-padding-4096", PADDED_SOFTMAX, (1, 16, 4096, 4096)),
    Case("layer-norm-2560-float32", LAYER_NORM, (TOKENS, 2560), "float32"),
    Case("softmax-causal-1024", CAUSAL_SOFTMAX, (16, 16, 1024, 1024)),
    Case("softmax-padding-16384", PADDED_SOFTMAX, (1, 1, 16384, 16384)),
    Case("softmax-padding-32768", PADDED_SOFTMAX, (1, 1, 8192, 32768)),
)
"""Every operation once, then at further widths of genome models. Of the rows of a softmax, a warp
has one of 1024 keys, a block one of 16384, and none can hold 32768.
"""


@dataclass(frozen=True)
class Operands:
    """What is computed from.

    Attributes:
        leaves: The operands that get a gradient, the activations first.
        others: Further ones.
        dout: The output's cotangent.
    """

    leaves: tuple[Any, ...]
    others: tuple[Any, ...]
    dout: Any

    @staticmethod
    def draw(case: Case) -> Operands:
        """The same numbers each time."""
        import torch

        device = calls.DEVICE
        generator = torch.Generator(device).manual_seed(1)
        dtype, operation = getattr(torch, case.dtype), case.operation

        def drawn(*sizes: int) -> Any:
            return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

        *_, rows, columns = case.shape
        vectors = [drawn(columns) for _ in range(operation.vectors)]
        leaves = [drawn(*case.shape), *vectors]
        leaves += [drawn(*case.shape)] if operation.residual else []
        others: tuple[Any, ...] = ()
        if operation.masked == "causal":
            ones = torch.ones(rows, columns, device=device, dtype=torch.bool)
            others = (ones.tril(),)
        elif operation.masked:  # the last eighth of the keys
            places = torch.arange(columns, device=device)
            others = ((places < columns - columns // 8).expand(case.shape[0], 1, 1, -1),)
        return Operands(tuple(x.requires_grad_() for x in leaves), others, drawn(*case.shape))


# --- Timing ---------------------------------------------------------------------------------------


def functions(case: Case, *, tuned: bool) -> dict[str, Callable[..., Any]]:
    """All competitors, the elementary operations first."""
    import torch

    torch.compiler.reset()  # each case is compiled for its own sizes
    operation = case.operation
    fused = operation.library or operation.elementary
    found = {ELEMENTARY: operation.elementary}
    if operation.library:
        found[LIBRARY] = operation.library
    if operation.ours:
        found[OURS] = operation.ours
    name = TUNED if tuned else COMPILED
    found[name] = torch.compile(fused, fullgraph=True, dynamic=False, mode=MODES[name])
    return found


def run(case: Case, around: Surroundings, rounds: int, quick: bool) -> tuple[Record, ...]:
    """Time all competitors of a case in turns: a record of each.

    Args:
        case: The case.
        around: Where and when this is.
        rounds: How many turns each has.
        quick: Nothing is compiled for longer.
    """
    import torch

    operands = Operands.draw(case)
    x = operands.leaves[0].detach()
    copied = torch.empty_like(x)
    makers = {
        name: partial(
            Call,
            partial(function, *operands.leaves, *operands.others),
            operands.leaves,
            operands.dout,
        )
        for name, function in functions(case, tuned=case.tuned and not quick).items()
    }

    def expected(results: Sequence[Any], standard: Sequence[Any]) -> Sequence[Any]:
        given = case.operation.expected
        if given is None:
            return standard
        with torch.no_grad():
            return given(results, operands.leaves, operands.dout)

    found = measure(
        makers, rounds, ours=(OURS,), others={COPY: [lambda: copied.copy_(x)]}, expected=expected
    )
    return records_of(case, around, found)


def records_of(case: Case, around: Surroundings, found: dict[str, Measured]) -> tuple[Record, ...]:
    """The records of a case, with the floors that the copy among them gives."""
    blank = Record(*(around, case.name, case.shape, case.dtype, ""), biases=False, ours=False)
    held = replace(blank, memory_bytes=2 * case.array_bytes)  # the output and one gradient
    if not found[COPY].not_run:
        per_pass = found[COPY].fields["forward_ms"].median / 2  # it reads one and writes one
        forward, backward = (Floor(passes * per_pass, 0.0, 0.0) for passes in case.operation.passes)
        held = replace(held, forward_floor=forward, backward_floor=backward)
    return tuple(
        replace(
            blank if name == COPY else held,
            competitor=name,
            ours=name == OURS,
            settings={"mode": MODES[name]} if name in MODES else {},
            **measured.fields,
        )
        for name, measured in found.items()
    )


# --- What follows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel written by hand could win, or does.

    Attributes:
        case: The case's name.
        dtype: The operands'.
        what: ``"forward"`` or ``"backward"``.
        best: Who is fastest, but for ours.
        ms: What that takes.
        floor_ms: What nothing can take less than.
        ours_ms: What ours takes, if there is one.
    """

    case: str
    dtype: str
    what: str
    best: str
    ms: float
    floor_ms: float
    ours_ms: float | None = None

    @property
    def share(self) -> float:
        """What the fastest reaches of a copy's bandwidth."""
        return self.floor_ms / self.ms

    @property
    def room(self) -> bool:
        """Whether a kernel that reaches :data:`REACHED` would win by :data:`MARGIN`."""
        return self.ms >= (1 + MARGIN) * self.floor_ms / REACHED

    @property
    def gain(self) -> float | None:
        """By what share the fastest takes longer than ours; it has to be :data:`MARGIN`."""
        return None if self.ours_ms is None else self.ms / self.ours_ms - 1

    def __str__(self) -> str:
        room = "room for a kernel" if self.room else "no room"
        said = (
            f"{self.case} {self.what}: {self.best}, {self.ms:.4g} ms, "
            f"{self.share:.0%} of the floor: {room}"
        )
        if self.ours_ms is None or self.gain is None:
            return said
        verdict = "kept" if self.gain >= MARGIN else "not to be kept"
        return (
            f"{said}; ours, {self.ours_ms:.4g} ms, {self.floor_ms / self.ours_ms:.0%}: faster by "
            f"{self.gain:.0%}, {verdict}"
        )


def verdicts(records: Iterable[Record]) -> tuple[Verdict, ...]:
    """Of each case and pass in the records, who wins and whether there is room."""
    by_case: dict[str, list[Record]] = {}
    for one in records:
        if one.competitor != COPY and not one.not_run:
            by_case.setdefault(one.case, []).append(one)
    found = []
    for ran in by_case.values():
        for what in ("forward", "backward"):
            times = {one.competitor: milliseconds(one, what) for one in ran}
            timed = {name: ms for name, ms in times.items() if ms is not None}
            ours = timed.pop(OURS, None)
            floor = getattr(ran[0], f"{what}_floor")
            if timed and floor is not None:
                best = min(timed, key=timed.__getitem__)
                place = ran[0].case, ran[0].dtype, what
                found.append(Verdict(*place, best, timed[best], floor.ms, ours))
    return tuple(found)


BENCHMARK = Benchmark(
    "fused",
    "Time LayerNorm, RMSNorm, bias and GeLU, bias, dropout and residual, and the masked softmax on "
    "this GPU, as PyTorch does them: elementary operations, fused functions, torch.compile; by our "
    "kernel where there is one; and a copy, whose bandwidth is the floor. All take turns. "
    "Under two minutes.",
    CASES,
    (ROUNDS, QUICK_ROUNDS),
    run,
    verdicts,
    BEGUN_S,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
