"""How long a strategy takes on a topology: a model with a bandwidth and a latency for each level.

A message over a level takes latency + bytes / bandwidth, and messages of one rank queue up, also
those that it receives. All ranks start together, so a step is as long as the busiest rank's.

- An all-to-all hides behind nothing: all of it is *exposed*.
- In a ring of n members, block s is used while block s + 1 arrives: a step takes the longer of the
  two. What is computed is spread evenly over the steps in which there is any
  (:func:`~isoform.parallel.planner.work.busy_steps`). Gradients take one more hop at the end.

Left out: what else uses the links, the time to merge and to copy, and that several kinds of links
can send at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isoform.parallel.arrays import Array
from isoform.parallel.planner.topology import Topology
from isoform.parallel.traffic import AllToAll, Rotation, Sent, Step


@dataclass(frozen=True)
class Time:
    """Seconds of a pass.

    Attributes:
        compute: Of the rank that computes most.
        communication: Of all exchanges, were nothing computed meanwhile.
        exposed: Of communication, what no computing hides.
    """

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """Both together: what a clock shows."""
        return self.compute + self.exposed

    def then(self, following: Time) -> Time:
        """This pass and another one after it."""
        return Time(
            self.compute + following.compute,
            self.communication + following.communication,
            self.exposed + following.exposed,
        )


def pass_time(
    steps: tuple[Step, ...], compute: float, topology: Topology, ranks: int, busy: int
) -> Time:
    """How long a pass takes.

    Args:
        steps: What is exchanged.
        compute: Seconds that the busiest rank computes.
        topology: Links between the ranks.
        ranks: P.
        busy: In how many of its steps a ring has anything to compute.
    """
    switching = sum(_switch(step, topology, ranks) for step in steps if isinstance(step, AllToAll))
    rings = [step for step in steps if isinstance(step, Rotation) and step.hops > 0]
    if not rings:
        return Time(compute, switching, switching)
    hops = rings[0].hops
    times = [_hop(step, topology, ranks) for step in rings]
    hop = sum(times)  # keys and values, and in the backward gradients beside them
    trailing = sum(times[1:])
    hidden = min(busy, hops)
    around = hidden * max(compute / busy, hop) + (hops - hidden) * hop + trailing
    around += compute / busy if busy > hops else 0.0  # the last block, when nobody comes any more
    communication = switching + hops * hop + trailing
    return Time(compute, communication, switching + max(around - compute, 0.0))


def _switch(step: AllToAll, topology: Topology, ranks: int) -> float:
    """Of the rank that sends, or receives, longest."""
    return max(float(_queue(way, topology, ranks).max()) for way in (step, step.received))


def _queue(step: AllToAll, topology: Topology, ranks: int) -> Array:
    """Seconds that each rank takes to send all that it sends."""
    total = np.zeros(ranks)
    nearer = Sent(np.zeros(ranks, np.int64), np.zeros(ranks, np.int64))
    for span, level in topology.spans(ranks):
        inside = step.within(span)
        total += (inside.bytes - nearer.bytes) / level.bandwidth
        total += (inside.messages - nearer.messages) * level.latency
        nearer = inside
    return total


def _hop(step: Rotation, topology: Topology, ranks: int) -> float:
    """Of the longest way from a member to the next: two messages with the largest block."""
    rank = np.arange(ranks)
    after = (rank + step.near) % ranks
    size = 2 * step.unit * step.heads * step.held.max()
    total = np.zeros(ranks)
    for span, level in reversed(topology.spans(ranks)):
        total = np.where(
            rank // span == after // span, size / level.bandwidth + 2 * level.latency, total
        )
    return float(np.where(size > 0, total, 0.0).max())
