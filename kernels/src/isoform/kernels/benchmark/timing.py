"""A clock made of CUDA events, and taking turns by it.

What a kernel takes is read off two events on its stream. That is the kernel's time only if the GPU
does not wait for the host in between, and the host is often slower than a small kernel: so the GPU
is first given something to wait for, until all calls of a burst have been queued. Since nothing
waits for the GPU meanwhile, the time in which a call returns is the host's own, and is measured in
the same burst.

Clocks drift with temperature and power. Who is compared takes turns, many short ones, and begins
each with calls that are not counted, so that it finds the cache as it leaves it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

Steps = Sequence[Callable[[], object]]
"""What one call does, in steps that are timed each by itself: a forward and a backward, say."""


class Burst(Protocol):
    """Times a call several times in a row."""

    def __call__(self, steps: Steps, count: int, /) -> Sampled:
        """Time each of the steps ``count`` times, after calls that are not counted."""


@dataclass(frozen=True)
class Sampled:
    """What the steps of some calls took: a list for each step, with a number for each call.

    Attributes:
        gpu_ms: On the GPU, in milliseconds.
        host_us: Until the step returned, with the GPU busy, in microseconds.
    """

    gpu_ms: list[list[float]] = field(default_factory=list)
    host_us: list[list[float]] = field(default_factory=list)

    def extend(self, more: Sampled) -> None:
        """Add the calls of ``more``."""
        for mine, others in ((self.gpu_ms, more.gpu_ms), (self.host_us, more.host_us)):
            mine += [[] for _ in range(len(others) - len(mine))]
            for step, further in zip(mine, others, strict=True):
                step += further


@dataclass(frozen=True)
class Quartiles:
    """Of a sample: its median, and the quarters' ends beside it.

    Attributes:
        median: Half of the sample is below it.
        low: A quarter is.
        high: Three quarters are.
        runs: How many numbers the sample has.
    """

    median: float
    low: float
    high: float
    runs: int

    @staticmethod
    def of(sample: Sequence[float]) -> Quartiles:
        """The quartiles of at least one number."""
        if len(sample) == 1:
            return Quartiles(sample[0], sample[0], sample[0], 1)
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return Quartiles(median, low, high, len(sample))


WARM = 2
"""Calls of each turn that are not counted."""

TURN_S = 0.02
"""What the counted calls of a turn take of the GPU, about."""

MOST = 20
"""Calls of a turn at most: what they queue has to fit into the stream's queue."""


def in_turns(
    competitors: Mapping[str, Steps], rounds: int, burst: Burst
) -> tuple[dict[str, Sampled], dict[str, str]]:
    """Time competitors in turns; who begins a round changes.

    Args:
        competitors: What to time, by name.
        rounds: How often each has its turn.
        burst: Times one of them.

    Returns:
        What each took, and of each that could not be timed the reason; it has no turns after that.
    """
    sampled = {name: Sampled() for name in competitors}
    failed: dict[str, str] = {}

    def timed(name: str, count: int) -> Sampled:
        try:
            return burst(competitors[name], count)
        except TimeoutError as problem:
            failed[name] = str(problem)
            return Sampled()

    counts = {name: _count(timed(name, 1)) for name in competitors}
    names = list(competitors)
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            if name not in failed:
                sampled[name].extend(timed(name, counts[name]))
    return sampled, failed


def _count(once: Sampled) -> int:
    """Calls in a turn, by what one call took."""
    seconds = 1e-3 * sum(step[0] for step in once.gpu_ms)
    return max(1, min(MOST, round(TURN_S / max(seconds, 1e-6))))


class CudaBurst:
    """Times calls by CUDA events on PyTorch's current stream."""

    MOST_AHEAD_S = 1.0
    TRIES = 5

    def __init__(self) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._host_s: dict[tuple[Callable[[], object], ...], float] = {}  # of a call

    def __call__(self, steps: Steps, count: int, /) -> Sampled:
        """As :class:`Burst` says. What a first call compiles or allocates must have been done.

        Raises:
            TimeoutError: The host does not get ahead of the GPU: a step waits for it.
        """
        known, calls = tuple(steps), WARM + count
        for _ in range(self.TRIES):
            ahead = min(1.5 * calls * self._host_s.get(known, 1e-3), self.MOST_AHEAD_S)
            sampled, host_s = self._run(steps, calls, ahead)
            self._host_s[known] = host_s / calls
            if host_s < ahead:
                return Sampled(*([step[WARM:] for step in each] for each in sampled))
        raise TimeoutError(
            f"{calls} calls took the host {host_s:.3f} s with {ahead:.3f} s of work queued before "
            "them: a call waits for the GPU, and its kernels cannot be timed alone"
        )

    def _run(
        self, steps: Steps, calls: int, ahead_s: float
    ) -> tuple[tuple[list[list[float]], list[list[float]]], float]:
        """Times by step and call, of the GPU and of the host, and the host's altogether."""
        cuda = self._cuda
        marks = [
            [cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)] for _ in range(calls)
        ]
        host = [[0.0] * calls for _ in steps]
        cuda.synchronize()
        with _no_collection():
            cuda._sleep(int(ahead_s * 2e9))  # cycles of a clock that no GPU exceeds by much
            began = time.perf_counter()
            for call, events in enumerate(marks):
                events[0].record()
                for number, step in enumerate(steps):
                    before = time.perf_counter()
                    step()
                    host[number][call] = 1e6 * (time.perf_counter() - before)
                    events[number + 1].record()
            host_s = time.perf_counter() - began
        cuda.synchronize()
        gpu = [
            [float(events[number].elapsed_time(events[number + 1])) for events in marks]
            for number in range(len(steps))
        ]
        return (gpu, host), host_s

    def warm_up(self, seconds: float = 0.3) -> None:
        """Keep the GPU busy until its clocks are up."""
        import torch

        x = torch.ones(4096, 4096, device="cuda", dtype=torch.float16)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for _ in range(10):
                x @ x
            self._cuda.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which would come in between."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
