"""Running a case: all competitors are prepared, held against ours, measured, and timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from isoform.kernels.benchmark import calls
from isoform.kernels.benchmark.calls import FAR, distance, reason
from isoform.kernels.benchmark.cases import Case
from isoform.kernels.benchmark.competitors import Competitor, Forward, Settings
from isoform.kernels.benchmark.floors import card_of_device, floors, memory_bytes
from isoform.kernels.benchmark.records import Record, Surroundings
from isoform.kernels.benchmark.timing import CudaBurst, Quartiles, Sampled, in_turns

ROUNDS = 7
"""Turns of each competitor."""


@dataclass(frozen=True)
class Operands:
    """What is attended to, in one layout, and the output's cotangent."""

    q: Any
    k: Any
    v: Any
    mask: Any
    pair_bias: Any
    dout: Any

    @staticmethod
    def draw(case: Case, dtype: str, *, heads_first: bool) -> Operands:
        """The same numbers in either layout.

        The first key of each row is never dropped: not every peer can do a query without a key.
        """
        import torch

        generator = torch.Generator(calls.DEVICE).manual_seed(1)
        B, S, L, H, D = case.B, case.S, case.L, case.H, case.D

        def drawn(*sizes: int) -> Any:
            x = torch.randn(*sizes, generator=generator, device=calls.DEVICE)
            return x.to(getattr(torch, dtype))

        q, k, v, dout = (drawn(B, S, L, H, D) for _ in range(4))
        if heads_first:
            rows = (q, k, v, dout)
            q, k, v, dout = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in rows)
        mask = pair_bias = None
        if case.mask:
            mask = torch.rand(B, S, L, generator=generator, device=calls.DEVICE) > 0.1
            mask[..., 0] = True
        if case.pair_bias:
            pair_bias = drawn(B, 1, H, L, L)
        for x in (q, k, v, pair_bias):
            if x is not None:
                x.requires_grad_(case.gradients)
        return Operands(q, k, v, mask, pair_bias, dout)


@dataclass
class Call:
    """A competitor's call, ready to be made again and again.

    Attributes:
        forward: The function that is timed.
        operands: What it is given.
        biases: Whether it looks at the pair bias.
    """

    forward: Forward
    operands: Operands
    biases: bool
    _out: Any = field(default=None, init=False)

    @property
    def leaves(self) -> list[Any]:
        """The operands that get a gradient."""
        it = self.operands
        return [
            x
            for x in (it.q, it.k, it.v, it.pair_bias if self.biases else None)
            if x is not None and x.requires_grad
        ]

    @property
    def steps(self) -> tuple[Callable[[], object], ...]:
        """What is timed."""
        return (self.run_forward, self.run_backward) if self.leaves else (self.run_forward,)

    def run_forward(self) -> None:
        """The forward; its output stays until the backward or the next forward."""
        it = self.operands
        self._out = self.forward(it.q, it.k, it.v, it.mask, it.pair_bias)

    def run_backward(self) -> tuple[Any, ...]:
        """The gradients of the last forward."""
        import torch

        out, self._out = self._out, None
        return torch.autograd.grad(out, self.leaves, self.operands.dout)

    def results(self) -> list[Any]:
        """The output, and the gradients of the leaves."""
        self.run_forward()
        out = self._out.detach()
        return [out, *(self.run_backward() if self.leaves else ())]


@dataclass
class _Entry:
    """A competitor in a case, and what is known of it so far."""

    competitor: Competitor
    call: Call | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    not_run: str = ""


def run(
    case: Case,
    dtype: str,
    competitors: Iterable[Competitor],
    around: Surroundings,
    *,
    settings: Settings,
    rounds: int = ROUNDS,
    say: Callable[[str], None],
    keep: dict[str, Sampled] | None = None,
) -> tuple[Record, ...]:
    """Time one case for all ``competitors``.

    Args:
        case: The case.
        dtype: The operands'.
        competitors: Who.
        around: Where and when this is.
        settings: What else is asked of competitors.
        rounds: How many turns each has.
        say: Told what is being done.
        keep: Is given every time that was measured, by competitor.

    Returns:
        A record of each, in their order. What a peer raises is the reason why it was not run.

    Raises:
        Exception: Whatever ours raise.
    """
    import torch

    entries = [_Entry(one, not_run=one.missing(dtype)) for one in competitors]
    layouts: dict[bool, Operands] = {}
    standard: list[Any] = []
    for entry in entries:
        if entry.not_run:
            continue
        one = entry.competitor
        say(f"{case.name} {dtype}: {one.name} is prepared")
        if one.heads_first not in layouts:
            layouts[one.heads_first] = Operands.draw(case, dtype, heads_first=one.heads_first)
        try:
            _prepare(entry, layouts[one.heads_first], settings, standard)
        except Exception as problem:
            if one.ours:
                raise
            entry.call, entry.not_run = None, reason(problem)
        torch.cuda.empty_cache()
    standard.clear()

    calls = {entry.competitor.name: entry.call.steps for entry in entries if entry.call}
    say(f"{case.name} {dtype}: {len(calls)} in turns, {rounds} each")
    burst = CudaBurst()
    burst.warm_up()
    sampled, failed = in_turns(calls, rounds, burst)
    if keep is not None:
        keep |= sampled
    for entry in entries:
        entry.not_run = entry.not_run or failed.get(entry.competitor.name, "")
    blank = _blank(case, dtype, around)
    return tuple(_record(entry, blank, sampled, settings) for entry in entries)


def _prepare(entry: _Entry, operands: Operands, settings: Settings, standard: list[Any]) -> None:
    """Make the call, compile it, measure its memory, and compare it with ``standard``, which the
    first of ours fills.
    """
    import torch

    one = entry.competitor
    call = Call(one.make(settings), operands, one.biases)
    call.results()  # compiles, and may take memory to choose kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call.results()
    entry.peak_bytes = torch.cuda.max_memory_allocated() - before
    if one.biases and standard:
        entry.difference = max(map(distance, results, standard))
        if entry.difference > FAR and not one.ours:
            raise ArithmeticError(f"its results differ from ours by {entry.difference:.2g}")
    elif one.ours:
        standard += results
    entry.call = call


def _blank(case: Case, dtype: str, around: Surroundings) -> Record:
    """What the records of a case have in common."""
    known = floors(case, dtype, card_of_device())
    return Record(
        surroundings=around,
        case=case.name,
        shape=(case.B, case.S, case.L, case.H, case.D),
        dtype=dtype,
        competitor="",
        biases=True,
        ours=False,
        memory_bytes=memory_bytes(case, dtype),
        forward_floor=known[0] if known else None,
        backward_floor=known[1] if known and case.gradients else None,
    )


def _record(
    entry: _Entry, blank: Record, sampled: dict[Any, Sampled], settings: Settings
) -> Record:
    one = entry.competitor
    named = replace(
        blank,
        competitor=settings.called(one.name) if one.configurable else one.name,
        biases=one.biases,
        ours=one.ours,
        settings=asdict(settings) if one.configurable else {},
        not_run=entry.not_run,
    )
    if entry.not_run:
        return named
    gpu, host = (
        [Quartiles.of(step) for step in each]
        for each in (sampled[one.name].gpu_ms, sampled[one.name].host_us)
    )
    backward_ms, backward_host_us = (gpu[1], host[1]) if len(gpu) > 1 else (None, None)
    return replace(
        named,
        forward_ms=gpu[0],
        backward_ms=backward_ms,
        forward_host_us=host[0],
        backward_host_us=backward_host_us,
        peak_bytes=entry.peak_bytes,
        difference=entry.difference,
    )
