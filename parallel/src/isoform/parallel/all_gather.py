"""Attention with all keys and values gathered: every rank attends with its own queries to all.

(Llama 3, arXiv 2407.21783, section 3.3.2. The same as one program over a list of shards:
:func:`isoform.reference.numpy.sequence_parallel.all_gather`.)

The gathered keys are put into the order of the sequence, so that they lie the same at every world
size. They are gathered again in the backward rather than kept. What a rank finds of the gradients
of others' keys goes to them by a reduce-scatter, in at least float32.
"""

from __future__ import annotations

from typing import Any

from isoform.parallel import local
from isoform.parallel.arrays import astype_of, widened
from isoform.parallel.communicator import Communicator
from isoform.parallel.local import Gradients, Mask, Saved


def forward(q: Any, k: Any, v: Any, comm: Communicator, mask: Mask) -> tuple[Any, Saved]:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        q: ``[B, L_r, H, D]``.
        k: ``[B, L_r, G, D]``.
        v: ``[B, L_r, G, D]``.
        comm: All ranks.
        mask: Who attends to whom.

    Returns:
        ``out [B, L_r, H, D]`` in q's dtype, and what the backward needs.
    """
    keys, values = gathered(k, comm, mask), gathered(v, comm, mask)
    out, lse = local.attend(q, keys, values, mask.to_all(comm.rank, q))
    out = astype_of(out, q)
    return out, Saved(q, k, v, out, lse)


def backward(dout: Any, saved: Saved, comm: Communicator, mask: Mask) -> Gradients:
    """The gradients of :func:`forward`, at least float32.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        saved: What the forward gave.
        comm, mask: As in the forward.
    """
    q, k, v, out, lse = saved
    keys, values = gathered(k, comm, mask), gathered(v, comm, mask)
    delta = None if mask.in_parts(q) else local.delta_of(dout, out)
    options = mask.to_all(comm.rank, q)
    part = local.differentiate(dout, q, keys, values, lse, delta, options, out)
    dk, dv = (
        comm.reduce_scatter([mask.sharding.shard(widened(dx), rank) for rank in range(comm.size)])
        for dx in (part.dk, part.dv)
    )
    return Gradients(part.dq, dk, dv)


def gathered(x: Any, comm: Communicator, mask: Mask, axis: int = 1) -> Any:
    """All ranks' ``x``, in the order of the sequence, which lies on ``axis``."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    shapes = [(*before, length, *after) for length in mask.sharding.lengths]
    return mask.sharding.unshard(comm.all_gather(x, shapes), axis)
