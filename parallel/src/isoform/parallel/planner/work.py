"""How much each rank computes: pairs of a query and a key, in closed form, and when in a ring.

A query at position p of a document of n attends, with a window of (left, right), to

    min(p, left) + 1 + min(n − 1 − p, right)

keys: right is 0 where it is causal, and both are n − 1 where there is no end. Summed over a piece
of the sequence it is a difference of two sums from the beginning, each a quadratic (:func:`_ramp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from isoform.parallel.arrays import Array
from isoform.parallel.sharding import Documents, Sharding
from isoform.parallel.traffic import Sizes, served
from isoform.reference.attention_contract import UNLIMITED, resolve_window

FLOPS_FORWARD, FLOPS_BACKWARD = 4, 10
"""Of a pair, a head and a channel: two matrix products, and five (arXiv 2205.14135)."""


@dataclass(frozen=True)
class Attended:
    """Which keys queries attend to.

    Attributes:
        causal: No query attends to a later position.
        window: ``(left, right)``, −1 for no end; a number stands for both sides.
        documents: Lengths of documents packed into the sequence; what they leave is padding. None
            where all is one.

    Raises:
        TypeError: The window or a length is no integer.
        ValueError: The window is below −1, or a length is negative.
    """

    causal: bool = False
    window: int | tuple[int, int] | None = None
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        resolve_window(self.window, self.causal)
        if self.documents is not None:
            Documents(self.documents)

    def reach(self, length: int) -> tuple[int, int]:
        """How many positions before and after its own a query sees at most, of ``length``."""
        farthest = max(max(self._lengths(length), default=0) - 1, 0)
        left, right = resolve_window(self.window, self.causal)
        return (
            farthest if left == UNLIMITED else min(left, farthest),
            farthest if right == UNLIMITED else min(right, farthest),
        )

    def before(self, positions: Array, length: int) -> Array:
        """How many pairs the queries before each of ``positions`` are in, ``int64``.

        Args:
            positions: Of a sequence, 0 to ``length``, any shape.
            length: L.

        Raises:
            ValueError: The documents are longer than the sequence.
        """
        if self.documents is not None and sum(self.documents) > length:
            raise ValueError(
                f"the documents have {sum(self.documents)} tokens, the sequence has L={length}"
            )
        lengths = np.array(self._lengths(length), np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        left, right = self.reach(length)

        def pairs(x: Array, n: Array) -> Array:
            """Of the first x queries of a document of n."""
            return x + _ramp(x, left) + _ramp(n, right) - _ramp(n - x, right)

        earlier = np.concatenate([[0], np.cumsum(pairs(lengths, lengths))]).astype(np.int64)
        document = np.searchsorted(starts, positions, side="right") - 1
        inside = np.append(lengths, 0)[document]
        found: Array = earlier[document] + pairs(
            np.minimum(positions - starts[document], inside), inside
        )
        return found

    def _lengths(self, length: int) -> tuple[int, ...]:
        return (length,) if self.documents is None else self.documents


def _ramp(x: Array, most: int) -> Array:
    """Σ over p < x of min(p, most)."""
    rising = np.minimum(x, most)
    total: Array = rising * (rising - 1) // 2 + (x - rising) * most
    return total


@cache
def pairs_by_rank(sharding: Sharding, attended: Attended) -> Array:
    """How many pairs the queries of each rank are in, ``int64 [P]``. Not to be written to."""
    starts, owners = sharding.cuts
    total = np.zeros(sharding.ranks, np.int64)
    np.add.at(total, owners, np.diff(attended.before(starts, sharding.length)))
    return total


def work(sharding: Sharding, sizes: Sizes, attended: Attended, near: int) -> Array:
    """What each rank computes: pairs, for each of its query heads, ``int64 [P]``.

    Args:
        sharding: Which positions each rank has.
        sizes: The other sizes.
        attended: Which keys queries attend to.
        near: Ranks in a group that exchange heads (1 for a ring): each has all positions of the
            group and some heads.
    """
    own = pairs_by_rank(sharding, attended)
    together = np.repeat(own.reshape(-1, near).sum(1), near)
    done: Array = together * served(sizes, sharding.ranks, near).heads
    return done


def busy_steps(sharding: Sharding, attended: Attended, near: int) -> int:
    """In how many of its steps a ring of groups of ``near`` ranks has anything to compute, for what
    is ``attended`` to under a ``sharding``.

    With a narrow window, or short documents, keys come by that nobody attends to. A count of the
    chunks within reach: exact, or one or two too many, since not every query reaches as far.
    """
    members = sharding.ranks // near
    before, after = attended.reach(sharding.length)
    if sharding.kind == "striped":
        chunk = near * sharding.block
    else:
        chunk = max(near * sharding.length // max(sharding.chunk_count, 1), 1)
    if sharding.kind == "zigzag":  # late chunks go the other way round
        before = after = max(before, after)
    return min(members, 1 + -(-before // chunk) + -(-after // chunk))
