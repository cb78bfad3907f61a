"""One differentiable call, by several competitors: held against the first, measured, and timed.

What benchmarks share whose calls have one output and some operands that get a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

from isoform.kernels.benchmark.timing import CudaBurst, Quartiles, Sampled, Steps, in_turns

DEVICE = "cuda"

FAR = 0.1
"""A competitor whose results differ from those they are held against by more computes something
else."""


class Named(Protocol):
    """A case."""

    @property
    def name(self) -> str:
        """Its name."""


AnyNamed = TypeVar("AnyNamed", bound=Named)


def select(cases: Sequence[AnyNamed], patterns: Iterable[str]) -> tuple[AnyNamed, ...]:
    """The cases whose name matches one of these shell patterns; all, if there are no patterns.

    Raises:
        ValueError: A pattern matches nothing.
    """
    asked = tuple(patterns)
    for pattern in asked:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            there = ", ".join(case.name for case in cases)
            raise ValueError(f"no case {pattern}; there are {there}")
    return tuple(
        case
        for case in cases
        if not asked or any(fnmatchcase(case.name, pattern) for pattern in asked)
    )


@dataclass
class Call:
    """A competitor's call, ready to be made again and again.

    Attributes:
        forward: Gives the output.
        leaves: The operands that get a gradient.
        cotangent: The gradient of the loss by the output.
    """

    forward: Callable[[], Any]
    leaves: Sequence[Any]
    cotangent: Any
    _out: Any = field(default=None, init=False)

    @property
    def steps(self) -> Steps:
        """What is timed."""
        return self.run_forward, self.run_backward

    def run_forward(self) -> None:
        """The forward; its output stays until the backward or the next forward."""
        self._out = self.forward()

    def run_backward(self) -> tuple[Any, ...]:
        """The gradients of the last forward."""
        import torch

        out, self._out = self._out, None
        return torch.autograd.grad(out, self.leaves, self.cotangent)

    def results(self) -> list[Any]:
        """The output and the gradients."""
        self.run_forward()
        out = self._out.detach()
        return [out, *self.run_backward()]


@dataclass(frozen=True)
class Measured:
    """What is known of a competitor in a case.

    Attributes:
        sampled: What its steps took.
        peak_bytes: Memory above the operands, over forward and backward, results included.
        difference: The largest ‖x − y‖ / ‖y‖ of its results x and what they are held against.
        not_run: Why it was not run; then there is nothing else.
    """

    sampled: Sampled = field(default_factory=Sampled)
    peak_bytes: int | None = None
    difference: float | None = None
    not_run: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Those of a record that are known by it."""
        return {
            **times(self.sampled),
            "peak_bytes": self.peak_bytes,
            "difference": self.difference,
            "not_run": self.not_run,
        }


Expected = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""Of a competitor's results and the standard's, those that its results are held against."""


def measure(
    makers: Mapping[str, Callable[[], Call]],
    rounds: int,
    *,
    ours: Collection[str] = (),
    others: Mapping[str, Steps] | None = None,
    expected: Expected = lambda results, standard: standard,
) -> dict[str, Measured]:
    """Prepare all competitors of a case, and time them in turns.

    Args:
        makers: What makes the call of each. The results of the first that can be made are the
            standard.
        rounds: How many turns each has.
        ours: The names of those that are this package's.
        others: What else has turns, and has no results that are looked at.
        expected: What results are held against, if not the standard's.

    Returns:
        Of each, what was found. What a peer raises is the reason why it was not run.

    Raises:
        Exception: Whatever ours raise.
    """
    import torch

    found: dict[str, Measured] = {}
    steps: dict[str, Steps] = dict(others or {})
    standard: list[Any] = []
    for name, make in makers.items():
        try:
            call = make()
            found[name] = _tried(call, standard, expected)
            steps[name] = call.steps
        except Exception as problem:
            if name in ours:
                raise
            found[name] = Measured(not_run=reason(problem))
        torch.cuda.empty_cache()
    standard.clear()

    for step in (step for each in (others or {}).values() for step in each):
        step()  # what a first call compiles
    burst = CudaBurst()
    burst.warm_up()
    sampled, failed = in_turns(steps, rounds, burst)
    for name in steps:
        known = found.get(name, Measured())
        found[name] = (
            Measured(not_run=failed[name])
            if name in failed
            else Measured(sampled[name], known.peak_bytes, known.difference)
        )
    return found


def _tried(call: Call, standard: list[Any], expected: Expected) -> Measured:
    """Compile the call, measure its memory, and hold it against ``standard``, which the first
    fills.
    """
    import torch

    call.results()  # compiles, and may take memory to choose kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call.results()
    peak = torch.cuda.max_memory_allocated() - before
    first = not standard
    if first:
        standard += results
    off = max(map(distance, results, expected(results, standard)))
    if off > FAR:
        raise ArithmeticError(f"its results differ from the first's by {off:.2g}")
    return Measured(peak_bytes=peak, difference=None if first else off)


def times(sampled: Sampled) -> dict[str, Any]:
    """The fields of a record that say what a forward took, and a backward if there was one."""
    names = ("forward", "backward")
    gpu, host = zip(names, sampled.gpu_ms, strict=False), zip(names, sampled.host_us, strict=False)
    return {
        **{f"{name}_ms": Quartiles.of(ms) for name, ms in gpu},
        **{f"{name}_host_us": Quartiles.of(us) for name, us in host},
    }


def distance(x: Any, y: Any) -> float:
    """‖x − y‖ / ‖y‖; without a number in it, infinity."""
    import torch

    wide = torch.float32
    off = torch.linalg.vector_norm(x - y, dtype=wide) / torch.linalg.vector_norm(y, dtype=wide)
    found = float(off)
    return found if found == found else float("inf")


def reason(problem: Exception) -> str:
    """What an exception says, in a line."""
    import torch

    if isinstance(problem, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = str(problem).strip().partition("\n")[0]
    return f"{type(problem).__name__}: {first[:200]}"
