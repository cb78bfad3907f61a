"""Ulysses: ranks exchange positions for heads, attend with a few heads to everything, and back.

(Jacobs et al., arXiv 2309.14509. The same as one program over a list of shards:
:func:`isoform.reference.numpy.sequence_parallel.ulysses`.)

Query heads are divided as evenly as can be; with more ranks than heads some have none. A key/value
head is sent to every rank that serves one of its query heads, once. Where several ranks get the
same one, its gradients come back from each of them in at least float32, and are summed; that and
the copies are what uneven heads cost.

What is done between the two exchanges is the caller's: attention by itself, or a ring of groups
(:mod:`isoform.parallel.hybrid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from isoform.parallel.arrays import Array, concatenate, take, zeros
from isoform.parallel.communicator import Communicator

TO_HEADS, TO_POSITIONS = "to_heads", "to_positions"
"""Names in the counts of what is sent."""


@dataclass(frozen=True)
class HeadShard:
    """What one of P ranks serves.

    Attributes:
        heads: Its query heads.
        groups: The key/value heads that these need.
        copies: For each of the query heads, the place of its key/value head among ``groups``; None
            where the query heads divide evenly among them, as attention takes it.
    """

    heads: range
    groups: range
    copies: Array | None


@cache
def head_shards(H: int, G: int, P: int) -> tuple[HeadShard, ...]:
    """How H query heads and G key/value heads are divided among P ranks. Not to be written to."""
    each = H // max(G, 1)
    found = []
    for part in np.array_split(np.arange(H), P):
        if len(part) == 0:
            found.append(HeadShard(range(0), range(0), None))
            continue
        sources = part // each
        groups = range(int(sources[0]), int(sources[-1]) + 1)
        places = sources - groups.start
        even = np.array_equal(places, np.repeat(np.arange(len(groups)), len(part) // len(groups)))
        found.append(
            HeadShard(range(int(part[0]), int(part[-1]) + 1), groups, None if even else places)
        )
    return tuple(found)


def shared(parts: Sequence[range]) -> bool:
    """Whether some head goes to more than one rank."""
    return sum(len(part) for part in parts) > len({head for part in parts for head in part})


def to_heads(x: Any, parts: Sequence[range], lengths: Sequence[int], comm: Communicator) -> Any:
    """From this rank's positions of all heads to all positions of this rank's heads.

    Args:
        x: ``[B, L_r, H, D]``.
        parts: By rank, the heads that it gets.
        lengths: By rank, how many positions it has.
        comm: The ranks.

    Returns:
        ``[B, L, H_r, D]``, positions in the order of ranks.
    """
    B, _, _, D = x.shape
    own = len(parts[comm.rank])
    received = comm.all_to_all(
        [x[:, :, part.start : part.stop] for part in parts],
        [(B, length, own, D) for length in lengths],
        operation=TO_HEADS,
    )
    return concatenate(received, 1)


def to_positions(x: Any, parts: Sequence[range], lengths: Sequence[int], comm: Communicator) -> Any:
    """From all positions of this rank's heads to this rank's positions of all heads.

    Undoes :func:`to_heads`, and is its adjoint: what several ranks have of one head is summed.

    Args:
        x: ``[B, L, H_r, D]``, positions in the order of ranks.
        parts, lengths, comm: As in :func:`to_heads`.

    Returns:
        ``[B, L_r, H, D]`` in x's dtype; summed in the order of ranks where heads are shared.
    """
    B, _, _, D = x.shape
    ends = np.cumsum([0, *lengths])
    received = comm.all_to_all(
        [x[:, start:stop] for start, stop in pairwise(ends)],
        [(B, lengths[comm.rank], len(part), D) for part in parts],
        operation=TO_POSITIONS,
    )
    if not shared(parts):
        return concatenate(received, 2)
    total = zeros((B, lengths[comm.rank], max(part.stop for part in parts), D), x)
    for part, piece in zip(parts, received, strict=True):
        total[:, :, part.start : part.stop] += piece
    return total


def copied(x: Any, shard: HeadShard) -> Any:
    """One key/value head for every query head, where they do not divide evenly."""
    return x if shard.copies is None else take(x, shard.copies, 2)


def summed_copies(dx: Any, shard: HeadShard) -> Any:
    """The adjoint of :func:`copied`."""
    if shard.copies is None:
        return dx
    B, L, _, D = dx.shape
    total = zeros((B, L, len(shard.groups), D), dx)
    for n, place in enumerate(shard.copies):
        total[:, :, int(place)] += dx[:, :, n]
    return total
