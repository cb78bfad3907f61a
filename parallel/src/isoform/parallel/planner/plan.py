"""Which strategy for which call: every candidate's figures, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from isoform.parallel.arrays import Array
from isoform.parallel.planner.memory import peaks
from isoform.parallel.planner.time import Time, pass_time
from isoform.parallel.planner.topology import Topology
from isoform.parallel.planner.work import (
    FLOPS_BACKWARD,
    FLOPS_FORWARD,
    Attended,
    busy_steps,
    work,
)
from isoform.parallel.sharding import Sharding
from isoform.parallel.traffic import Sizes, Step, group_size, pattern, sent

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of a number, by dtype."""


@dataclass(frozen=True)
class Cost:
    """Of one pass, on the rank that has most of it.

    Attributes:
        bytes: Sent.
        messages: Sent.
        memory: Bytes held at once, at most.
        time: What the pass takes; None without a topology.
    """

    bytes: int
    messages: int
    memory: int
    time: Time | None


@dataclass(frozen=True)
class Candidate:
    """A strategy with a sharding, and what it costs.

    Attributes:
        strategy: Its name.
        near: Ranks in a group, for the hybrid.
        sharding: Which positions each rank has.
        bytes: Sent in both passes by the rank that sends most.
        messages: Sent likewise.
        balance: What the busiest rank computes, over the mean of all ranks: 1 is perfect.
        forward: What the forward costs.
        backward: What the backward costs.
        declined: Why it is not to be chosen; empty where it may be.
    """

    strategy: str
    near: int | None
    sharding: Sharding
    bytes: int
    messages: int
    balance: float
    forward: Cost
    backward: Cost
    declined: tuple[str, ...]

    @property
    def name(self) -> str:
        """The strategy, with the size of its groups."""
        return self.strategy if self.near is None else f"{self.strategy} near={self.near}"

    @property
    def memory(self) -> int:
        """Bytes held at once, at most, in any of the passes."""
        return max(self.forward.memory, self.backward.memory)

    @property
    def time(self) -> Time | None:
        """Of both passes."""
        if self.forward.time is None or self.backward.time is None:
            return None
        return self.forward.time.then(self.backward.time)

    def as_dict(self) -> dict[str, Any]:
        """All figures, as JSON can hold them."""
        return {
            "strategy": self.strategy,
            "near": self.near,
            "sharding": self.sharding.kind,
            "block": self.sharding.block,
            "bytes": self.bytes,
            "messages": self.messages,
            "memory": self.memory,
            "balance": self.balance,
            "time": None if self.time is None else self.time.total,
            "forward": asdict(self.forward),
            "backward": asdict(self.backward),
            "declined": list(self.declined),
        }


@dataclass(frozen=True)
class Plan:
    """All candidates for a call, in the order in which they are preferred where all else is equal.

    Attributes:
        candidates: With their figures.
        topology: What they were timed on; None where only bytes are known.
    """

    candidates: tuple[Candidate, ...]
    topology: Topology | None

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Those that may be chosen, best first: by time, or without a topology by bytes sent."""
        return tuple(sorted((c for c in self.candidates if not c.declined), key=self._cost))

    @property
    def best(self) -> Candidate:
        """The one to take.

        Raises:
            ValueError: All are declined; the message says why.
        """
        if not self.ranked:
            raise ValueError(f"no strategy will do: {self._refusals}")
        return self.ranked[0]

    def __str__(self) -> str:
        """What was chosen, over what, and what was declined, in a line."""
        if self.topology is None:
            what = "a rank sends at most (bytes)"
        else:
            what = f"on {self.topology.name} it takes (ms)"
        listed = ", ".join(f"{c.name} {_figure(c)}" for c in self.candidates if not c.declined)
        refused = f"; declined: {self._refusals}" if self._refusals else ""
        return f"{self.best.name}: {what} {listed}{refused}"

    @property
    def _refusals(self) -> str:
        return ", ".join(
            f"{c.name} ({'; '.join(c.declined)})" for c in self.candidates if c.declined
        )

    @staticmethod
    def _cost(candidate: Candidate) -> float:
        time = candidate.time
        return candidate.bytes if time is None else time.total


def _figure(candidate: Candidate) -> str:
    """What counts, in bytes or in milliseconds."""
    time = candidate.time
    return f"{candidate.bytes}" if time is None else f"{1e3 * time.total:.4g}"


def plan(
    shardings: Iterable[Sharding],
    sizes: Sizes,
    *,
    dtype: str | None = None,
    attended: Attended | None = None,
    topology: Topology | None = None,
    memory: float | None = None,
) -> Plan:
    """Every strategy, with every grouping of the hybrid, under some shardings.

    Of equals the first is best of ulysses, hybrid (larger groups first), ring, all_gather: it needs
    least memory. Equal on all ranks: it is arithmetic on what they have agreed on, and nothing that
    is measured.

    Args:
        shardings: Of one length and number of ranks.
        sizes: The other sizes.
        dtype: ``"bfloat16"``, ``"float32"``: at which rate a topology's ranks compute.
        attended: Which keys queries attend to; all by default.
        topology: What to predict times with, and by default the memory of a rank.
        memory: Bytes that a rank has; candidates that need more are declined.

    Raises:
        ValueError: The topology does not join so many ranks, or does not know the dtype; or the
            documents are longer than the sequence.
    """
    attended = attended or Attended()
    if topology is not None and memory is None:
        memory = topology.memory
    rate = None if topology is None else topology.rate(str(dtype))
    return Plan(
        tuple(
            _candidate(strategy, near, sharding, sizes, attended, topology, rate, memory)
            for sharding in shardings
            for strategy, near in ways(sharding.ranks)
        ),
        topology,
    )


def ways(ranks: int) -> Iterator[tuple[str, int | None]]:
    """All strategies, with the sizes of groups that divide the ranks."""
    yield "ulysses", None
    yield from (("hybrid", near) for near in range(ranks - 1, 1, -1) if ranks % near == 0)
    yield "ring", None
    yield "all_gather", None


def _candidate(
    strategy: str,
    near: int | None,
    sharding: Sharding,
    sizes: Sizes,
    attended: Attended,
    topology: Topology | None,
    rate: float | None,
    memory: float | None,
) -> Candidate:
    P = sharding.ranks
    group = group_size(strategy, P, near)
    passes = pattern(strategy, sharding, sizes, near=near)
    pairs = work(sharding, sizes, attended, group)
    most, total = int(pairs.max()), int(pairs.sum())
    busy = busy_steps(sharding, attended, group)
    held = peaks(strategy, sharding, sizes, near=near)

    def cost(steps: tuple[Step, ...], flops: int, at_most: Array) -> Cost:
        time = None
        if topology is not None and rate is not None:
            compute = flops * sizes.B * sizes.D * most / rate
            time = pass_time(steps, compute, topology, P, busy)
        out = sent(steps, P)
        return Cost(int(out.bytes.max()), int(out.messages.max()), int(at_most.max()), time)

    forward = cost(passes.forward, FLOPS_FORWARD, held.forward)
    backward = cost(passes.backward, FLOPS_BACKWARD, held.backward)
    declined = []
    if group > max(sizes.H, 1):
        declined.append(f"{group} ranks share {sizes.H} query heads, some would have none")
    needed = max(forward.memory, backward.memory)
    if memory is not None and needed > memory:
        declined.append(f"needs {needed / 1e9:.3g} GB a rank, which has {memory / 1e9:.3g}")
    out = sent(passes.forward + passes.backward, P)
    return Candidate(
        strategy,
        near,
        sharding,
        int(out.bytes.max()),
        int(out.messages.max()),
        most * P / total if total else 1.0,
        forward,
        backward,
        tuple(declined),
    )
