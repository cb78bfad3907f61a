"""What each strategy sends, in closed form: bytes by rank, forward and backward.

The counts of a :class:`~isoform.parallel.communicator.Communicator` equal these numbers exactly;
what ranks say to each other to find out whether they agree is not among them. Per rank of P, with
L positions in all, L_r of them here, and equal heads, an order of magnitude::

    all_gather   2 B L G D · (P − 1) / P                 k and v
    ring         2 B L G D · (P − 1) / P                 k and v
    ulysses      B L (2 H + 2 G) D / P · (P − 1) / P     q, k, v and out

and about three times that in the backward for the first two, where the gradients of k and v travel
in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from isoform.parallel.ring import FORWARD, GRADIENTS
from isoform.parallel.sharding import Sharding
from isoform.parallel.ulysses import TO_HEADS, TO_POSITIONS, head_shards, shared

Bytes = Mapping[str, int]
"""By the operation's name, as :attr:`~isoform.parallel.communicator.Traffic.bytes_by` has it."""


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


def bytes_sent(
    strategy: str, sharding: Sharding, sizes: Sizes, rank: int, *, near: int | None = None
) -> tuple[Bytes, Bytes]:
    """The bytes that ``rank`` sends in the forward, and in the backward.

    Args:
        strategy: ``"ring"``, ``"all_gather"``, ``"ulysses"`` or ``"hybrid"``.
        sharding: Which positions each rank has.
        sizes: The other sizes.
        rank: Which rank.
        near: For the hybrid: ranks in a group.

    Raises:
        ValueError: The strategy is unknown.
    """
    P, lengths = sharding.ranks, sharding.lengths
    if strategy == "all_gather":
        kv = 2 * sizes.B * sizes.G * sizes.D
        gathered = Counter(all_gather=(P - 1) * lengths[rank] * kv * sizes.itemsize)
        scattered = Counter(reduce_scatter=(sharding.length - lengths[rank]) * kv * sizes.wide)
        return gathered, gathered + scattered
    if strategy == "ring":
        return _ring(sizes, sharding.length, lengths[rank], lengths[(rank + 1) % P], sizes.G)
    if strategy in ("ulysses", "hybrid"):
        return _hybrid(sharding, sizes, rank, P if near is None else near)
    raise ValueError(f"strategy {strategy!r} is not known")


def _ring(sizes: Sizes, total: int, own: int, after: int, kv_heads: int) -> tuple[Bytes, Bytes]:
    """Of ``total`` positions a member sends on all but those of the member after it.

    With them go the gradients of all but its own ``own`` positions.
    """
    kv = 2 * sizes.B * kv_heads * sizes.D
    forward = Counter({FORWARD: (total - after) * kv * sizes.itemsize})
    return forward, forward + Counter({GRADIENTS: (total - own) * kv * sizes.wide})


def _hybrid(sharding: Sharding, sizes: Sizes, rank: int, near: int) -> tuple[Bytes, Bytes]:
    group, place = divmod(rank, near)

    def members(group: int) -> tuple[int, ...]:
        first = near * (group % (sharding.ranks // near))
        return sharding.lengths[first : first + near]

    own, together, after = sharding.lengths[rank], sum(members(group)), sum(members(group + 1))
    others = together - own
    shards = head_shards(sizes.H, sizes.G, near)
    here = shards[place]

    away_q = sizes.H - len(here.heads)
    away_kv = sum(len(shard.groups) for shard in shards) - len(here.groups)
    line, item = sizes.B * sizes.D, sizes.itemsize
    kv_item = sizes.wide if shared([shard.groups for shard in shards]) else item

    local_kv = len(here.groups) if here.copies is None else len(here.heads)
    ring_forward, ring_backward = _ring(sizes, sharding.length, together, after, local_kv)
    forward = Counter(ring_forward)
    forward[TO_HEADS] = line * item * own * (away_q + 2 * away_kv)
    forward[TO_POSITIONS] = line * item * others * len(here.heads)
    backward = Counter(ring_backward)
    backward[TO_HEADS] = line * item * own * away_q
    backward[TO_POSITIONS] = (
        line * others * (item * len(here.heads) + 2 * kv_item * len(here.groups))
    )
    return forward, backward


@dataclass(frozen=True)
class Choice:
    """A strategy, and what it was chosen over.

    Attributes:
        strategy: Its name.
        near: Ranks in a group, for the hybrid.
        bytes: By what was considered: the most that any rank sends, forward and backward.
    """

    strategy: str
    near: int | None
    bytes: Mapping[str, int]

    def __str__(self) -> str:
        name = self.strategy if self.near is None else f"{self.strategy} near={self.near}"
        listed = ", ".join(f"{other} {count}" for other, count in self.bytes.items())
        return f"{name}: a rank sends at most (bytes) {listed}"


@cache
def choose_strategy(sharding: Sharding, sizes: Sizes) -> Choice:
    """The strategy whose busiest rank sends least, forward and backward together.

    Ulysses and the hybrid are considered only where every rank has a query head to serve. Of equals
    the first is taken of ulysses, hybrid (larger groups first), ring, all_gather: it needs least
    memory.

    Args:
        sharding: Which positions each rank has.
        sizes: The other sizes.
    """
    P = sharding.ranks
    ways: dict[str, tuple[str, int | None]] = {}
    if sizes.H >= P:
        ways["ulysses"] = ("ulysses", None)
    for group in range(min(P - 1, sizes.H), 1, -1):
        if P % group == 0:
            ways[f"hybrid near={group}"] = ("hybrid", group)
    ways |= {"ring": ("ring", None), "all_gather": ("all_gather", None)}

    def most(strategy: str, near: int | None) -> int:
        both = (bytes_sent(strategy, sharding, sizes, rank, near=near) for rank in range(P))
        return max(sum(forward.values()) + sum(backward.values()) for forward, backward in both)

    found = {name: most(*way) for name, way in ways.items()}
    strategy, near = ways[min(found, key=lambda name: found[name])]
    return Choice(strategy, near, found)
