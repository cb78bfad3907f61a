"""What each strategy sends, in closed form: bytes and messages of every rank, forward and backward.

The counts of a :class:`~isoform.parallel.communicator.Communicator` equal these numbers exactly.
Per rank of P, with L positions in all, L_r of them here, and equal heads, an order of magnitude::

    all_gather   2 B L G D · (P − 1) / P                 k and v
    ring         2 B L G D · (P − 1) / P                 k and v
    ulysses      B L (2 H + 2 G) D / P · (P − 1) / P     q, k, v and out

and about three times that in the backward for the first two, where the gradients of k and v travel
in float32.

Two patterns make up all of it. In an :class:`AllToAll` rank r sends rank j a block whose size is a
number of r times a number of j: its positions times the other's heads, or 1 times the other's
positions. In a :class:`Rotation` blocks go from member to member of a ring. A strategy is the list
of those that it makes (:func:`pattern`), and what is asked of it (bytes, messages, how much crosses
a slow link) is asked of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from isoform.parallel.arrays import Array
from isoform.parallel.ring import FORWARD, GRADIENTS
from isoform.parallel.sharding import Sharding
from isoform.parallel.ulysses import TO_HEADS, TO_POSITIONS, head_shards, shared


@dataclass(frozen=True)
class Sizes:
    """What the bytes depend on besides the sharding.

    Attributes:
        B: Batch.
        H: Query heads.
        G: Key/value heads.
        D: Head dim.
        itemsize: Bytes of an operand's number: 2 for bfloat16.
    """

    B: int
    H: int
    G: int
    D: int
    itemsize: int

    @property
    def wide(self) -> int:
        """Bytes of a number of a sum: float32, or the operands' dtype where that is wider."""
        return max(self.itemsize, 4)


class Sent(NamedTuple):
    """What every rank sends, or sends over one kind of link; ``int64 [P]`` each."""

    bytes: Array
    messages: Array


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Every rank sends each other one of its group a block, some times over (k, then v).

    Attributes:
        operation: Its name in the counts.
        near: Ranks in a group; groups are of consecutive ranks.
        give: ``int64 [P]``. A block from r to j has ``give[r] · take[j]`` units.
        take: ``int64 [P]``.
        unit: Bytes of a unit.
        times: Over how many arrays.
    """

    operation: str
    near: int
    give: Array
    take: Array
    unit: int
    times: int = 1

    def within(self, span: int) -> Sent:
        """What goes to ranks of the same ``span`` consecutive ones, such as those of a node."""
        rank = np.arange(len(self.give))
        first = np.flatnonzero((rank % self.near == 0) | (rank % span == 0))
        counts = np.diff(np.append(first, len(rank)))

        def of_others(x: Array) -> Array:
            """The sum over those of the same group and the same span, but for oneself."""
            others: Array = np.repeat(np.add.reduceat(x, first), counts) - x
            return others

        sends = (self.give > 0) & (self.unit > 0)
        return Sent(
            self.times * self.unit * self.give * of_others(self.take),
            self.times * sends * of_others((self.take > 0).astype(np.int64)),
        )

    @property
    def received(self) -> AllToAll:
        """The same seen from those who receive: what each of them sends is what they get."""
        return AllToAll(self.operation, self.near, self.take, self.give, self.unit, self.times)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Blocks of two arrays go round a ring; of ``near`` rings side by side, in the hybrid.

    Rank r's successor is r + near. Every member sends on each member's block, but for one: that of
    its successor, which is where keys and values end, or its own, which is where gradients do.

    Attributes:
        operation: Its name in the counts.
        near: Ranks in a group: each is in a ring of its own.
        held: ``int64 [P / near]``: positions that the members of a ring hold.
        heads: ``int64 [P]``: key/value heads that a rank has of them.
        unit: Bytes of a position of a head of one of the arrays.
        keeps_own: Whether the block not sent is a member's own.
    """

    operation: str
    near: int
    held: Array
    heads: Array
    unit: int
    keeps_own: bool

    @property
    def hops(self) -> int:
        """How many blocks a member sends at most."""
        return len(self.held) - 1

    @cached_property
    def sent(self) -> Sent:
        """What every rank sends."""
        kept = np.repeat(self.held if self.keeps_own else np.roll(self.held, -1), self.near)
        line = 2 * self.unit * self.heads
        blocks = np.count_nonzero(self.held) - (kept > 0)
        return Sent(line * (self.held.sum() - kept), 2 * (line > 0) * blocks)


Step = AllToAll | Rotation


class Passes(NamedTuple):
    """What a strategy makes in its forward, and in its backward."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]


def group_size(strategy: str, ranks: int, near: int | None = None) -> int:
    """How many ranks exchange heads: all in Ulysses, none in a ring, ``near`` in the hybrid.

    Raises:
        ValueError: The strategy is unknown, or ``near`` is not there where it must be, is there
            where it must not, or does not divide the ranks.
    """
    sizes = {"all_gather": 1, "ring": 1, "ulysses": ranks, "hybrid": near}
    if strategy not in sizes:
        raise ValueError(f"strategy must be one of {', '.join(sizes)}, got {strategy!r}")
    if (strategy == "hybrid") != (near is not None):
        raise ValueError(f"near is what the hybrid strategy needs, and no other; got near={near}")
    if near is not None and (near < 1 or ranks % near):
        raise ValueError(f"near must divide the {ranks} ranks, got near={near}")
    size = sizes[strategy]
    assert size is not None
    return size


class Served(NamedTuple):
    """How many heads every rank serves, ``int64 [P]`` each.

    ``local`` are the key/value heads that it attends with: copies for its query heads where these
    do not divide evenly. ``shared`` says whether several ranks serve one and the same.
    """

    heads: Array
    groups: Array
    local: Array
    shared: bool


def served(sizes: Sizes, ranks: int, near: int) -> Served:
    """The heads, of ``sizes``, that are served by ``ranks`` ranks in groups of ``near``."""
    parts = head_shards(sizes.H, sizes.G, near)
    counts = [
        (len(p.heads), len(p.groups), len(p.groups if p.copies is None else p.heads)) for p in parts
    ]
    heads, groups, local = np.tile(np.array(counts, np.int64), (ranks // near, 1)).T
    return Served(heads, groups, local, shared([part.groups for part in parts]))


def pattern(
    strategy: str,
    sharding: Sharding,
    sizes: Sizes,
    *,
    near: int | None = None,
    deterministic: bool = False,
) -> Passes:
    """The exchanges that a strategy makes, forward and backward.

    Args:
        strategy: ``"ring"``, ``"all_gather"``, ``"ulysses"`` or ``"hybrid"``.
        sharding: Which positions each rank has.
        sizes: The other sizes.
        near: For the hybrid: ranks in a group; divides P.
        deterministic: As in :func:`isoform.parallel.attention.attention`: the all-gather then
            sends queries to keys instead of the gradients of keys home.

    Raises:
        ValueError: The strategy is unknown, or ``near`` does not fit it.
    """
    P = sharding.ranks
    near = group_size(strategy, P, near)
    held, one = np.array(sharding.lengths, np.int64), np.ones(P, np.int64)
    line, item, wide = sizes.B * sizes.D, sizes.itemsize, sizes.wide
    if strategy == "all_gather":
        keys = line * sizes.G
        gathered = AllToAll("all_gather", P, held, one, item * keys, 2)
        if deterministic:
            queries = AllToAll("all_gather", P, held, one, item * line * sizes.H, 2)  # and dout
            statistics = AllToAll("all_gather", P, held, one, wide * sizes.B * sizes.H, 2)
            return Passes((gathered,), (gathered, queries, statistics))
        scattered = AllToAll("reduce_scatter", P, one, held, wide * keys, 2)
        return Passes((gathered,), (gathered, scattered))

    heads, groups, local, summed = served(sizes, P, near)
    # Gradients of a key/value head that several ranks serve are summed where they arrive.
    travelling = wide if summed else item
    to_heads = AllToAll(TO_HEADS, near, held, heads, line * item)
    to_positions = AllToAll(TO_POSITIONS, near, heads, held, line * item)
    keys_to_heads = AllToAll(TO_HEADS, near, held, groups, line * item, 2)
    gradients_home = AllToAll(TO_POSITIONS, near, groups, held, line * travelling, 2)
    members = held.reshape(-1, near).sum(1)
    around = Rotation(FORWARD, near, members, local, line * item, keeps_own=False)
    gradients = Rotation(GRADIENTS, near, members, local, line * wide, keeps_own=True)
    return Passes(
        (to_heads, keys_to_heads, around, to_positions),
        (to_heads, around, gradients, to_positions, gradients_home),
    )


def overhead(
    sharding: Sharding,
    *,
    near: int | None = None,
    places: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[Step, ...]:
    """What ranks say to each other besides the strategy's own exchanges, once in a forward.

    Args:
        sharding: Which positions each rank has.
        near: Given for the first call with Ulysses or the hybrid on a communicator, or for one with
            other groups: they are made then, and kept.
        places: For each of ``"positions"`` and ``"segments"`` that the call has: how many rows of
            them (1, or B), and the bytes of a number.
    """
    P, one = sharding.ranks, np.ones(sharding.ranks, np.int64)
    held = np.array(sharding.lengths, np.int64)
    found = [AllToAll("agree", P, one, one, 32)]
    found += [
        AllToAll(name, P, held, one, rows * size) for name, (rows, size) in (places or {}).items()
    ]
    if near is not None:
        found.append(AllToAll("split", P, one, one, 16, 2))
    return tuple(found)


def sent(steps: Iterable[Step], ranks: int) -> Sent:
    """Bytes and messages of every one of P ``ranks``, of some ``steps`` together."""
    total = Sent(np.zeros(ranks, np.int64), np.zeros(ranks, np.int64))
    for step in steps:
        more = step.within(ranks) if isinstance(step, AllToAll) else step.sent
        total = Sent(total.bytes + more.bytes, total.messages + more.messages)
    return total


def sent_by(steps: Iterable[Step], rank: int, ranks: int) -> tuple[Counter[str], Counter[str]]:
    """The bytes that one ``rank`` of ``ranks`` sends in some ``steps``, and its messages, by
    operation: what its ``comm.traffic`` will say.

    Names of which nothing is sent are left out.
    """
    byte_counts: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    for step in steps:
        more = sent([step], ranks)
        byte_counts[step.operation] += int(more.bytes[rank])
        messages[step.operation] += int(more.messages[rank])
    return +byte_counts, +messages
