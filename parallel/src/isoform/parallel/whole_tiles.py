"""All-gather attention whose every bit is the same at every world size and with every sharding.

A sum in floating point depends on the order of its terms, and a product of matrices on more than
that: a library may treat a matrix by its size, and a row by its place in it, as OpenBLAS does. So
the sequence is cut into tiles of :data:`TILE` positions that have nothing to do with ranks. A rank
computes whole tiles, those in which it holds a position, each of them as one rank with the whole
sequence would: its own rows at their places among rows of zeros, all keys in the order of the
sequence, and masks, which say what may be passed over, of all rows. Rows of others are thrown away.

Gradients of keys are sums over queries. A reduce-scatter would add them up rank by rank; here the
queries come to the keys, and each rank adds up its own over all of them, tile by tile.

This costs, next to :mod:`isoform.parallel.all_gather`: in the backward twice the work, and q, dout,
lse and δ of all ranks, which travel and are held; and work on the rows that are thrown away, little
where chunks are longer than tiles, P times the whole for stripes of one position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from isoform.parallel import local
from isoform.parallel.all_gather import gathered
from isoform.parallel.arrays import Array, as_like, astype_of, concatenate, take, zeros
from isoform.parallel.communicator import Communicator
from isoform.parallel.local import Gradients, Mask, Saved
from isoform.parallel.sharding import Sharding

TILE = local.BLOCK_Q
"""Positions in a tile, of queries and of keys; fewer in the last one."""


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
    keys, values = (gathered(x, comm, mask) for x in (k, v))
    options = mask.in_order(q)
    outs, lses = [], []
    for tile in _tiles(mask.sharding, comm.rank):
        rows = _of(options, queries=tile.span)
        out, lse = local.attend(_placed(q, tile), keys, values, rows)
        outs.append(take(out, tile.places, 1))
        lses.append(take(lse, tile.places, 2))
    out = astype_of(concatenate(outs, 1), q)
    return out, Saved(q, k, v, out, concatenate(lses, 2))


def backward(dout: Any, saved: Saved, comm: Communicator, mask: Mask) -> Gradients:
    """The gradients of :func:`forward`, at least float32.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        saved: What the forward gave.
        comm, mask: As in the forward.
    """
    q, k, v, out, lse = saved
    tiles = [*_tiles(mask.sharding, comm.rank)]
    delta = concatenate(
        [take(local.delta_of(_placed(dout, t), _placed(out, t)), t.places, 2) for t in tiles], 2
    )
    keys, values, queries, douts = (gathered(x, comm, mask) for x in (k, v, q, dout))
    lse, delta = (gathered(x, comm, mask, axis=2) for x in (lse, delta))
    options = mask.in_order(q)

    found = []
    for tile in tiles:
        span = tile.span
        of_rows = (douts[:, span], queries[:, span], keys, values, lse[..., span], delta[..., span])
        of_keys = (douts, queries, keys[:, span], values[:, span], lse, delta)
        dq, _, _ = local.differentiate(*of_rows, _of(options, queries=span))
        _, dk, dv = local.differentiate(*of_keys, _of(options, keys=span))
        found.append([take(dx, tile.places, 1) for dx in (dq, dk, dv)])
    return Gradients(*(concatenate(parts, 1) for parts in zip(*found, strict=True)))


class _Tile(NamedTuple):
    """A tile of the sequence, and what one rank holds of it."""

    span: slice  # of the sequence
    own: slice  # of the rank's shard, whose positions rise
    places: Array  # int64: where in the tile those are


def _tiles(sharding: Sharding, rank: int) -> Iterator[_Tile]:
    """The tiles in which a rank holds a position; the first one, for a rank that holds none."""
    held = sharding.positions(rank)
    for number in np.unique(held // TILE).tolist() or [0]:
        start, stop = number * TILE, min((number + 1) * TILE, sharding.length)
        own = slice(*np.searchsorted(held, (start, stop)).tolist())
        yield _Tile(slice(start, stop), own, held[own] - start)


def _placed(x: Any, tile: _Tile) -> Any:
    """The own rows of ``x [B, L_r, H, D]`` at their places in a tile of zeros."""
    B, _, *rest = x.shape
    rows = zeros((B, tile.span.stop - tile.span.start, *rest), x)
    rows[:, as_like(tile.places, x)] = x[:, tile.own]
    return rows


def _of(
    options: dict[str, Any], queries: slice = slice(None), keys: slice = slice(None)
) -> dict[str, Any]:
    """The options of attention from some queries to some keys of the whole."""
    cuts = {
        "positions": queries,
        "segments": queries,
        "key_positions": keys,
        "key_segments": keys,
    }
    return {name: x[..., cuts[name]] if name in cuts else x for name, x in options.items()}
