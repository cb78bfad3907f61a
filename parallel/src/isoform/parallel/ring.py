"""Ring attention: keys and values go from rank to rank, and every rank attends to what it holds.

(Liu et al., arXiv 2310.01889. The same as one program over a list of shards:
:func:`isoform.reference.numpy.sequence_parallel.ring`.)

A shard of keys and values is sent on *before* it is used, and the next one waited for after, so
that computing hides sending where the transport moves messages meanwhile. It travels in the
operands' dtype. Outputs and gradients are summed in at least float32, and gradients travel so.

The members of a ring need not be single ranks: in the hybrid strategy each holds some heads of the
shards of a whole group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from isoform.parallel import local
from isoform.parallel.arrays import astype_of, empty, widened
from isoform.parallel.communicator import Communicator, Transfer
from isoform.parallel.local import Gradients, Mask, Saved

Groups = Sequence[Sequence[int]]
"""By member of the ring: the ranks whose shards it holds, in the order in which they lie."""

FORWARD, GRADIENTS = "ring", "ring_gradients"
"""Names in the counts of what is sent."""


def forward(
    q: Any, k: Any, v: Any, comm: Communicator, mask: Mask, groups: Groups
) -> tuple[Any, Saved]:
    """Attention of this member's queries to the keys of all members.

    Args:
        q: ``[B, L_m, H, D]``, L_m positions of this member m.
        k: ``[B, L_m, G, D]``.
        v: ``[B, L_m, G, D]``.
        comm: The members of the ring.
        mask: Who attends to whom.
        groups: What each member holds.

    Returns:
        ``out [B, L_m, H, D]`` in q's dtype, and what the backward needs.
    """
    out: Any = None
    lse: Any = None
    for owner, its_k, its_v in _visits(k, v, comm, mask, groups):
        options = mask.between(groups[comm.rank], groups[owner], q)
        block_out, block_lse = local.attend(q, its_k, its_v, options)
        if owner == comm.rank:
            out, lse = block_out, block_lse
        else:
            out, lse = local.merge(out, lse, block_out, block_lse)
    out = astype_of(out, q)
    return out, Saved(q, k, v, out, lse)


def backward(dout: Any, saved: Saved, comm: Communicator, mask: Mask, groups: Groups) -> Gradients:
    """The gradients of :func:`forward`, at least float32.

    Keys and values go round again. The gradients of a shard begin at the first member that it
    visits, follow it one step behind, and are at home when all others have added their part.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L_m, H, D]``.
        saved: What the forward gave.
        comm, mask, groups: As in the forward.
    """
    q, k, v, out, lse = saved
    delta = None if mask.in_parts(q) else local.delta_of(dout, out)
    dq: Any = 0
    own: Any = ()
    coming: Transfer | None = None
    for owner, its_k, its_v in _visits(k, v, comm, mask, groups):
        options = mask.between(groups[comm.rank], groups[owner], q)
        part = local.differentiate(dout, q, its_k, its_v, lse, delta, options, out)
        dq = local.add(dq, part.dq)
        if owner == comm.rank:
            own = (part.dk, part.dv)
            continue
        found: Any = (part.dk, part.dv)
        if coming is None:
            found = tuple(map(widened, found))
        else:  # what members before this one have found for the visitors
            found = tuple(map(local.add, coming.wait(), found))
        coming = _pass_on(found, owner, comm, mask, groups, GRADIENTS)
    if coming is not None:
        own = tuple(map(local.add, coming.wait(), own))
    return Gradients(dq, *map(widened, own))


def _visits(
    k: Any, v: Any, comm: Communicator, mask: Mask, groups: Groups
) -> Iterator[tuple[int, Any, Any]]:
    """All members' keys and values, with whose they are: first the own, then as they come by.

    Those at hand are on their way to the next member while they are used.
    """
    for step in range(comm.size - 1):
        owner = (comm.rank - step) % comm.size
        transfer = _pass_on((k, v), owner, comm, mask, groups, FORWARD)
        yield owner, k, v
        k, v = transfer.wait()
    yield (comm.rank + 1) % comm.size, k, v


def _pass_on(
    held: Sequence[Any], owner: int, comm: Communicator, mask: Mask, groups: Groups, name: str
) -> Transfer:
    """Begin to send what is the owner's to the next member, and to get what the one before has."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    length = mask.length(groups[(owner - 1) % comm.size])
    arriving = [empty((x.shape[0], length, *x.shape[2:]), x) for x in held]
    return comm.exchange(
        [(after, x) for x in held], [(before, x) for x in arriving], operation=name
    )
