"""Labels and loss weights where no rank has the whole sequence.

The label of a token is the next token. At the end of each of a rank's chunks that one is on another
rank, so the tokens at the borders are exchanged; nothing else is.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from isoform.parallel.arrays import as_like, check_array, check_axis, concatenate, take, where
from isoform.parallel.communicator import Communicator
from isoform.parallel.sharding import IGNORE, Sharding, loss_weights


def shift_labels(
    tokens: Any,
    *,
    comm: Communicator,
    sharding: Sharding,
    axis: int = -1,
    segments: Any = None,
    ignore: int = IGNORE,
) -> Any:
    """The labels of this rank's tokens for next-token prediction. Collective.

    The same as :meth:`~isoform.parallel.Sharding.labels`, from shards.

    Args:
        tokens: This rank's tokens, an integer array or tensor with L_r positions on ``axis``.
        comm: The ranks.
        sharding: Which positions each rank has.
        axis: The axis of the sequence; the last for ``[B, L_r]``.
        segments: This rank's segment ids, which broadcast against ``tokens`` (as ``[L_r]`` or
            ``[B, L_r]``); the last token of a segment has no label.
        ignore: The label of a token that has none.

    Returns:
        The labels, in the shape and dtype of ``tokens``.

    Raises:
        TypeError: Tokens or segments are no arrays.
        ValueError: They have not the rank's L_r positions, or the sharding is for other ranks.
    """
    if sharding.ranks != comm.size:
        raise ValueError(f"the sharding is for {sharding.ranks} ranks, but there are {comm.size}")
    given = {"tokens": tokens} if segments is None else {"tokens": tokens, "segments": segments}
    held = sharding.lengths[comm.rank]
    for name, x in given.items():
        check_array(name, x)
        check_axis(name, x, axis)
        if x.shape[axis] != held:
            raise ValueError(
                f"{name} must have the {held} positions of rank {comm.rank} on axis {axis}, "
                f"got shape {tuple(x.shape)}"
            )
    axis -= len(tokens.shape) if axis >= 0 else 0  # from the end, as broadcasting counts
    along = [-1] + [1] * (-axis - 1)
    last = sharding.successors(comm.rank).rank == -1
    none = as_like(last.reshape(along), tokens)
    if segments is not None:
        none = none | (segments != _following(segments, comm, sharding, axis))
    return where(none, ignore, _following(tokens, comm, sharding, axis))


def _following(x: Any, comm: Communicator, sharding: Sharding, axis: int) -> Any:
    """What each of this rank's positions is followed by; its own where nothing follows."""
    wanted = [sharding.successors(rank) for rank in range(comm.size)]
    own = wanted[comm.rank]

    def shape(count: int) -> tuple[int, ...]:
        full = list(x.shape)
        full[axis] = count
        return tuple(full)

    received = comm.all_to_all(
        [take(x, rank.place[rank.rank == comm.rank], axis) for rank in wanted],
        [shape(int((own.rank == source).sum())) for source in range(comm.size)],
        operation="labels",
    )
    # They lie by source. Put after them what the last position of all keeps, and sort it out.
    alone = np.flatnonzero(own.rank == -1)
    found = concatenate([*received, take(x, alone, axis)], axis)
    lie = [np.flatnonzero(own.rank == source) for source in range(comm.size)]
    return take(found, np.argsort(np.concatenate([*lie, alone])), axis)


def global_loss_weights(
    labels: Any,
    *,
    comm: Communicator,
    ignore: int = IGNORE,
    reduction: Literal["mean", "sum"] = "mean",
) -> Any:
    """:func:`~isoform.parallel.sharding.loss_weights`, with the tokens counted here. Collective.

    Args:
        labels: This rank's labels, any shape.
        comm: The ranks.
        ignore: The label that does not count.
        reduction: As in :func:`~isoform.parallel.sharding.loss_weights`.

    Returns:
        The weights of this rank's token losses.

    Raises:
        ValueError: The reduction is unknown.
    """
    counted = labels != ignore
    own = np.array([int(counted.sum())], np.int64)
    counts = comm.all_gather(own, [own.shape] * comm.size, operation="loss_weights")
    return loss_weights(counted, int(np.sum(counts)), comm.size, reduction=reduction)
