"""The 2-D hybrid: Ulysses within groups of ranks, and rings from group to group.

(Fang and Zhao, arXiv 2405.07719. The same as one program over a list of shards:
:func:`isoform.reference.numpy.sequence_parallel.hybrid`.)

``near`` consecutive ranks form a group. With one group it is Ulysses alone, with groups of one rank
a ring alone; both are run by these lines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from isoform.parallel import local, ring
from isoform.parallel.arrays import astype_of
from isoform.parallel.communicator import Communicator
from isoform.parallel.local import Gradients, Mask
from isoform.parallel.ulysses import (
    copied,
    head_shards,
    shared,
    summed_copies,
    to_heads,
    to_positions,
)


class Grid(NamedTuple):
    """The ranks as groups of ``near``, seen from one of them."""

    group: Communicator  # of this rank's group
    around: Communicator  # of the ranks with this one's place, one of each group: a ring
    groups: list[range]  # the ranks of every group
    lengths: list[int]  # positions of the ranks of this group


class Saved(NamedTuple):
    """What the backward needs of the forward."""

    inner: local.Saved  # all positions of the group, some heads
    H: int
    G: int


def forward(q: Any, k: Any, v: Any, comm: Communicator, mask: Mask, near: int) -> tuple[Any, Saved]:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        q: ``[B, L_r, H, D]``.
        k: ``[B, L_r, G, D]``.
        v: ``[B, L_r, G, D]``.
        comm: All ranks.
        mask: Who attends to whom.
        near: Ranks in a group; divides P.

    Returns:
        ``out [B, L_r, H, D]`` in q's dtype, and what the backward needs.
    """
    H, G = q.shape[2], k.shape[2]
    group, around, groups, lengths = _grid(comm, mask, near)
    shards = head_shards(H, G, near)
    heads, sources = [s.heads for s in shards], [s.groups for s in shards]
    own = shards[group.rank]

    inner_q = to_heads(q, heads, lengths, group)
    inner_k, inner_v = (copied(to_heads(x, sources, lengths, group), own) for x in (k, v))
    inner_out, inner = ring.forward(inner_q, inner_k, inner_v, around, mask, groups)
    return to_positions(inner_out, heads, lengths, group), Saved(inner, H, G)


def backward(dout: Any, saved: Saved, comm: Communicator, mask: Mask, near: int) -> Gradients:
    """The gradients of :func:`forward`: dq in dout's dtype, dk and dv at least float32 if summed.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        saved: What the forward gave.
        comm, mask, near: As in the forward.
    """
    inner, H, G = saved
    group, around, groups, lengths = _grid(comm, mask, near)
    shards = head_shards(H, G, near)
    heads, sources = [s.heads for s in shards], [s.groups for s in shards]
    own = shards[group.rank]

    inner_dout = to_heads(dout, heads, lengths, group)
    found = ring.backward(inner_dout, inner, around, mask, groups)
    dq = to_positions(astype_of(found.dq, dout), heads, lengths, group)
    dk, dv = (summed_copies(dx, own) for dx in (found.dk, found.dv))
    if not shared(sources):  # nobody adds to it any more
        dk, dv = astype_of(dk, dout), astype_of(dv, dout)
    return Gradients(
        dq, to_positions(dk, sources, lengths, group), to_positions(dv, sources, lengths, group)
    )


def _grid(comm: Communicator, mask: Mask, near: int) -> Grid:
    group, around = comm.grid(near)
    groups = [range(first, first + near) for first in range(0, comm.size, near)]
    return Grid(group, around, groups, [mask.length([rank]) for rank in groups[around.rank]])
