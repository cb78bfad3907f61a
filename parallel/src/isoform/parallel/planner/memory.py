"""How much memory a rank needs at most, by strategy: which arrays live at once, and when.

Counted is what a rank holds of one call: operands, what has arrived of others, sums, results, and
the tiles that the NumPy reference works on. Not counted are the transport's own buffers and what
other layers keep. Each strategy has a few moments at which it may hold most, and each of them is a
sum of the arrays that live then. A reader finds them one by one in :mod:`~isoform.parallel.ring`,
:mod:`~isoform.parallel.hybrid` and :mod:`~isoform.parallel.all_gather`. A rank to which a causal
mask leaves nothing to compute holds less; the rank that holds most is the one to plan for.

Peaks of whole runs, as ``tracemalloc`` sees them, lie within 5 % (``test_planner_memory.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isoform.parallel.arrays import Array
from isoform.parallel.local import BLOCK_K, BLOCK_Q
from isoform.parallel.sharding import Sharding
from isoform.parallel.traffic import Sizes, group_size, served

Moments = Mapping[str, Array]
"""By what is being done: bytes that every rank holds then, ``int64 [P]``."""

PLACE = 8
"""Bytes of a position."""


class Peaks(NamedTuple):
    """The most bytes that every rank holds, ``int64 [P]`` each."""

    forward: Array
    backward: Array


def peaks(strategy: str, sharding: Sharding, sizes: Sizes, *, near: int | None = None) -> Peaks:
    """The most bytes that every rank holds in the forward, and in the backward.

    Args:
        strategy: ``"ring"``, ``"all_gather"``, ``"ulysses"`` or ``"hybrid"``.
        sharding: Which positions each rank has.
        sizes: The other sizes.
        near: For the hybrid: ranks in a group; divides P.

    Raises:
        ValueError: The strategy is unknown, or ``near`` does not fit it.
    """
    return Peaks(
        *(
            np.max([*moments.values()], axis=0)
            for moments in moments_of(strategy, sharding, sizes, near=near)
        )
    )


def moments_of(
    strategy: str, sharding: Sharding, sizes: Sizes, *, near: int | None = None
) -> tuple[Moments, Moments]:
    """The moments of the forward, and of the backward, with what every rank holds then.

    Args:
        strategy, sharding, sizes, near: As in :func:`peaks`.
    """
    near = group_size(strategy, sharding.ranks, near)
    own = np.array(sharding.lengths, np.int64)
    # What the sharding keeps of its chunks is of their number: of the sequence's for stripes of 1.
    places = 4 * PLACE * np.full_like(own, sharding.chunk_count)
    if strategy == "all_gather":
        found = _all_gather(own, sharding.length, sharding.ranks, sizes)
    else:
        found = _hybrid(own, sharding.ranks, near, sizes, exchanged=strategy != "ring")
    forward, backward = (
        {name: number + places for name, number in moments.items()} for moments in found
    )
    return forward, backward


@dataclass(frozen=True)
class _Block:
    """Attention of Q queries with h heads to K keys with g heads: what it makes, and needs."""

    sizes: Sizes
    Q: Array
    K: Array
    h: Array
    g: Array

    @property
    def out(self) -> Array:
        """The output, and as much for dq, in the dtype of sums."""
        return _bytes(self.sizes, self.Q, self.h, self.sizes.wide)

    @property
    def lse(self) -> Array:
        """lse, and as much for δ."""
        return _bytes(self.sizes, self.Q, self.h, self.sizes.wide) // self.sizes.D

    @property
    def dkv(self) -> Array:
        """The gradients dk and dv, in the dtype of sums."""
        return 2 * _bytes(self.sizes, self.K, self.g, self.sizes.wide)

    def _tiles(self, logits: int, rows_of_queries: int, rows_of_keys: int) -> Array:
        """Some tiles of logits, and blocks of queries, and of keys, with all heads.

        With few heads the mask of a tile counts, which all of them share: 11 bytes a pair while it
        is made, when one of the tiles is not there yet, and 1 afterwards.
        """
        rows, columns = np.minimum(self.Q, BLOCK_Q), np.minimum(self.K, BLOCK_K)
        number = self.sizes.B * self.h * self.sizes.wide
        tile, mask = number * rows * columns, rows * columns
        blocks = number * self.sizes.D * (rows_of_queries * rows + rows_of_keys * columns)
        found: Array = blocks + (logits - 1) * tile + np.maximum(tile + mask, 11 * mask)
        return found

    @property
    def attending(self) -> Array:
        """The forward's most: its results beside the tiles, then beside their rounded copies."""
        results = self.out + self.lse
        found: Array = results + np.maximum(self._tiles(4, 1, 3), results)
        return found

    @property
    def differentiating(self) -> Array:
        """The backward's most, likewise."""
        results = self.out + self.dkv
        found: Array = results + np.maximum(self._tiles(6, 3, 5), results)
        return found

    @property
    def merging(self) -> Array:
        """What merging needs beside the two sides: weights, and three times the output."""
        found: Array = 3 * self.out + 7 * self.lse
        return found


def _bytes(sizes: Sizes, positions: Array, heads: Array | int, itemsize: int) -> Array:
    """Of an array ``[B, positions, heads, D]``."""
    return sizes.B * sizes.D * itemsize * positions * heads


def _all_gather(own: Array, length: int, ranks: int, sizes: Sizes) -> tuple[Moments, Moments]:
    H, G, item, wide = sizes.H, sizes.G, sizes.itemsize, sizes.wide
    one = np.ones_like(own)
    block = _Block(sizes, own, length * one, H * one, G * one)
    q, mine = _bytes(sizes, own, H, item), _bytes(sizes, own, G, item)
    all_keys = _bytes(sizes, length * one, G, item)
    operands = q + 2 * mine
    keys, order = 2 * all_keys, PLACE * length
    # They come in P pieces, are put together, and into order: three times one of the two.
    gathering = all_keys + (all_keys - mine) + 2 * all_keys + 2 * order
    forward = {
        "gathering": operands + gathering,
        "attending": operands + keys + order + block.attending,
    }
    before = operands + q + q + block.lse  # dout, and what the forward kept
    summed, home = block.dkv // 2, _bytes(sizes, own, G, wide)
    backward = {
        "gathering": before + gathering,
        "differentiating": before + keys + order + block.lse + block.differentiating,
        # Of one of dk and dv: what goes to each, what came from each, and the sum.
        "scattering": (
            before + keys + block.lse + block.out + block.dkv + summed + (ranks + 1) * home
        ),
    }
    return forward, backward


def _hybrid(
    own: Array, ranks: int, near: int, sizes: Sizes, *, exchanged: bool
) -> tuple[Moments, Moments]:
    """Also Ulysses, and the ring, which exchanges no heads."""
    H, G, item, wide = sizes.H, sizes.G, sizes.itemsize, sizes.wide
    h, g, local, summing = served(sizes, ranks, near)
    held = np.repeat(own.reshape(-1, near).sum(1), near)
    block = _Block(sizes, held, held, h, local)
    q, kv = _bytes(sizes, own, H, item), 2 * _bytes(sizes, own, G, item)
    operands = q + kv
    inner_q, inner_kv = _bytes(sizes, held, h, item), 2 * _bytes(sizes, held, local, item)
    forward_ring, backward_ring = _ring(block, ranks // near, inner_kv)

    if not exchanged:  # the operands themselves go round
        before = operands + q + q + block.lse
        return (
            {name: operands + more for name, more in forward_ring.items()},
            {name: before + more for name, more in backward_ring.items()},
        )

    def switching(away: Array, coming: Array, whole: Array) -> Array:
        """An exchange: what goes and what comes, then what came and the whole of it."""
        return coming + np.maximum(away, whole)

    def to_heads(heads: Array, total: int) -> Array:
        away = _bytes(sizes, own, total - heads, item)
        coming = _bytes(sizes, held - own, heads, item)
        return switching(away, coming, _bytes(sizes, held, heads, item))

    def to_positions(heads: Array, total: int, itemsize: int) -> Array:
        # Positions of one example lie together: they are sent from where they are.
        away = (sizes.B > 1) * _bytes(sizes, held - own, heads, itemsize)
        coming = _bytes(sizes, own, total - heads, itemsize)
        return switching(away, coming, _bytes(sizes, own, total, itemsize))

    inner = inner_q + inner_kv
    kept = inner + inner_q + block.lse  # the output within is kept, and the rounded one goes home
    forward = {
        "to heads": operands + inner_q + inner_kv // 2 + to_heads(g, G),
        "q to heads": operands + to_heads(h, H),
        **{name: operands + inner + more for name, more in forward_ring.items()},
        "to positions": operands + kept + to_positions(h, H, item),
    }
    before = operands + q + q + kept  # dout and out
    # Gradients of k and v are rounded before they go home, unless several ranks' are summed there.
    copied = g != local
    travelling = wide if summing else item
    summed_up = 2 * _bytes(sizes, held, g, wide)
    rounded = 0 * own if summing else 2 * _bytes(sizes, held, g, item)
    backward = {
        "to heads": before + to_heads(h, H),
        **{name: before + inner_q + more for name, more in backward_ring.items()},
        "to positions": (
            before
            + inner_q
            + block.out
            + block.dkv
            + q
            + np.where(copied, np.maximum(rounded, summed_up), rounded)
            + _bytes(sizes, own, G, travelling)
            + to_positions(g, G, travelling)
        ),
    }
    return forward, backward


def _ring(block: _Block, members: int, inner_kv: Array) -> tuple[Moments, Moments]:
    """Of keys and values that go round ``members``, beside the operands of the member itself."""
    places = 2 * PLACE * block.Q
    results, gradients = block.out + block.lse, block.out + block.dkv
    if members == 1:
        return (
            {"attending": places + block.attending},
            {"differentiating": places + block.lse + block.differentiating},
        )
    # All that can be held is held by the fourth block, but for the last block's: then nobody comes.
    attending, merging, differentiating = [], [], []
    for step in range(1, min(members, 4)):
        visitors = inner_kv * (2 if step < members - 1 else 1)
        # The results so far, and from the third block on the last block's.
        attending.append(visitors + min(step, 2) * results + block.attending)
        merging.append(visitors + 2 * results + block.merging)
        # dq so far and the last block's gradients. Of dk and dv from the third block on also one's
        # own and those that come, and from the fourth on the sums that are passed on.
        sums = block.out + gradients + (0, 0, 2, 3)[step] * block.dkv
        differentiating.append(visitors + sums + block.differentiating)
    return (
        {
            "attending": places + np.maximum.reduce(attending),
            "merging": places + np.maximum.reduce(merging),
        },
        {"differentiating": places + block.lse + np.maximum.reduce(differentiating)},
    )
