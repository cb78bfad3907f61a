r"""Attention over a sequence that is spread over P ranks: each strategy, as one program.

A sequence too long for one device is cut into shards, and rank r holds the queries, keys and values
at some positions t ∈ T_r. A query attends to keys that other ranks hold, so something must travel.
What, is all that tells the strategies from each other::

    all_gather   all keys and values to everybody
    ring         keys and values from rank to rank, one shard at a time
    ulysses      all positions of some heads to each rank, and the output back
    hybrid       ulysses among near ranks, ring among far ones

Here the P ranks are the P entries of a list, and sending is taking from another entry. That shows
what is computed and what travels, and is what the programs for real ranks
(:mod:`isoform.parallel`) are checked against. Every function takes and returns lists of shards; a
shard may be of any length, 0 included.

The adjoint of each movement of data is the movement of its gradients, backwards: of a copy to
everybody a sum over everybody, of an exchange the exchange back. That is the whole of the backward
passes below. (Korthikanti et al., arXiv 2205.05198, section 4.2.)

Positions say where queries and keys lie, so that neither their order within a shard nor the
division among ranks matters to the result. All is computed in float64 (or in q's dtype where that
is wider) and rounded once, to q's dtype.

Letters: B batch, L_r positions of rank r, H query heads, G key/value heads, D head dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from isoform.reference.numpy.attention import (
    attention,
    attention_backward,
    attention_block,
    attention_block_backward,
    attention_delta,
    merge,
)
from isoform.reference.numpy.evoformer import Array, resolve_compute_dtype

Shards = Sequence[Array]
"""One array per rank, rank 0 first."""


class ShardedGradients(NamedTuple):
    """The gradients of q, k and v, by rank, in the shape and dtype of each shard."""

    dq: list[Array]
    dk: list[Array]
    dv: list[Array]


# --- all-gather: all keys and values to everybody ---


def all_gather(
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    **options: Any,
) -> list[Array]:
    """Every rank gets all keys and values, and attends to them with its own queries.

    Simple; but every rank must have room for all keys and values. Used where these are few, as with
    grouped heads: Llama 3, arXiv 2407.21783, section 3.3.2.

    Args:
        q: By rank, ``[B, L_r, H, D]``, any float dtype.
        k: By rank, ``[B, L_r, G, D]``; G divides H.
        v: By rank, ``[B, L_r, G, D]``.
        positions: By rank, int32 or int64 ``[L_r]`` or ``[B, L_r]``.
        segments: By rank, likewise; all are one segment by default.
        options: ``causal``, ``window`` and ``scale``, as in :func:`~.numpy.attention.attention`.

    Returns:
        By rank, ``out [B, L_r, H, D]`` in q's dtype.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention`.
        ValueError: As :func:`~.numpy.attention.attention`.
    """
    (q, k, v), rounded = _wide(q, k, v)
    places = _places(positions, segments)
    keys, values, everywhere = _joined(k), _joined(v), _together(places)
    out = [
        attention(q_r, keys, values, **_between(own, everywhere), **options)
        for q_r, own in zip(q, places, strict=True)
    ]
    return rounded(out)


def all_gather_backward(
    dout: Shards,
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    **options: Any,
) -> ShardedGradients:
    """The gradients of :func:`all_gather`, given that of its output.

    Every rank finds a part of *every* key's gradient, the part of its own queries. What a key gets
    is the sum of all ranks' parts: to cut out the own shard of the own part is the usual fault.

    Args:
        dout: By rank, gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        q, k, v, positions, segments, options: As in :func:`all_gather`.

    Returns:
        ``dq, dk, dv`` by rank.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_backward`.
        ValueError: As :func:`~.numpy.attention.attention_backward`.
    """
    (q, k, v, dout), rounded = _wide(q, k, v, dout)
    places = _places(positions, segments)
    keys, values, everywhere = _joined(k), _joined(v), _together(places)
    parts = [
        attention_backward(dout_r, q_r, keys, values, **_between(own, everywhere), **options)
        for dout_r, q_r, own in zip(dout, q, places, strict=True)
    ]
    dk = np.sum([part.dk for part in parts], axis=0)
    dv = np.sum([part.dv for part in parts], axis=0)
    return ShardedGradients(
        rounded([part.dq for part in parts]), rounded(_cut(dk, k)), rounded(_cut(dv, v))
    )


# --- ring: keys and values from rank to rank ---


def ring(
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    **options: Any,
) -> list[Array]:
    """Keys and values go round; every rank attends to the shard that it holds at the moment.

    After P steps every rank has seen every shard once, and merged what it found. No rank needs room
    for more than two shards of keys and values: one at work, one on its way.

    Args:
        q, k, v, positions, segments, options: As in :func:`all_gather`.

    Returns:
        By rank, ``out [B, L_r, H, D]`` in q's dtype.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention`.
        ValueError: As :func:`~.numpy.attention.attention`.

    Source:
        Liu et al., arXiv 2310.01889, algorithm 1.
    """
    (q, k, v), rounded = _wide(q, k, v)
    return rounded(out for out, _ in _ring(_places(positions, segments), options, q, k, v))


def _ring(
    places: Sequence[_Place], options: dict[str, Any], q: Shards, k: Shards, v: Shards
) -> list[tuple[Array, Array]]:
    """``out`` and ``lse`` by rank."""
    visiting = list(zip(k, v, places, strict=True))
    found: list[tuple[Array, Array]] = []
    for step in range(len(q)):
        for r, (k_r, v_r, there) in enumerate(visiting):
            block = attention_block(q[r], k_r, v_r, **_between(places[r], there), **options)
            if step == 0:
                found.append(block)
            else:
                found[r] = merge(*found[r], *block)
        visiting = _passed_on(visiting)
    return found


def ring_backward(
    dout: Shards,
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    **options: Any,
) -> ShardedGradients:
    """The gradients of :func:`ring`, given that of its output.

    Keys and values go round again. With each shard go its gradients, to which every rank on the way
    adds its queries' part; after P steps they are at home. lse and δ belong to queries and stay.

    Args:
        dout: By rank, gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        q, k, v, positions, segments, options: As in :func:`all_gather`.

    Returns:
        ``dq, dk, dv`` by rank.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_backward`.
        ValueError: As :func:`~.numpy.attention.attention_backward`.

    Source:
        Liu et al., arXiv 2310.01889, section 3.
    """
    (q, k, v, dout), rounded = _wide(q, k, v, dout)
    found = _ring_backward(_places(positions, segments), options, dout, q, k, v)
    return ShardedGradients(*map(rounded, found))


def _ring_backward(
    places: Sequence[_Place],
    options: dict[str, Any],
    dout: Shards,
    q: Shards,
    k: Shards,
    v: Shards,
) -> tuple[list[Array], list[Array], list[Array]]:
    """``dq``, ``dk`` and ``dv`` by rank."""
    out, lse = zip(*_ring(places, options, q, k, v), strict=True)
    delta = [attention_delta(*x) for x in zip(dout, out, strict=True)]
    dq, dk, dv = ([np.zeros_like(x_r) for x_r in x] for x in (q, k, v))
    visiting = list(zip(k, v, places, dk, dv, strict=True))
    for _ in range(len(q)):
        for r, (k_r, v_r, there, dk_r, dv_r) in enumerate(visiting):
            told = _between(places[r], there)
            part = attention_block_backward(
                dout[r], q[r], k_r, v_r, lse[r], delta[r], **told, **options
            )
            dq[r] += part.dq
            dk_r += part.dk
            dv_r += part.dv
        visiting = _passed_on(visiting)
    return dq, dk, dv


def _passed_on(held: list[Any]) -> list[Any]:
    """What every rank holds once each has given what it had to the next, and the last to rank 0."""
    return held[-1:] + held[:-1]


# --- Ulysses: all positions of some heads to each rank ---


def ulysses(
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    **options: Any,
) -> list[Array]:
    """Ranks change positions for heads, attend to everything with a few heads, and change back.

    Heads know nothing of each other. With all positions of some heads, a rank needs nobody else.

    Args:
        q, k, v, positions, segments, options: As in :func:`all_gather`.

    Returns:
        By rank, ``out [B, L_r, H, D]`` in q's dtype.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention`.
        ValueError: As :func:`~.numpy.attention.attention`.

    Source:
        Jacobs et al., arXiv 2309.14509, section 3.
    """
    (q, k, v), rounded = _wide(q, k, v)
    heads, sources = head_shards(q[0].shape[2], k[0].shape[2], len(q))
    everywhere = _together(_places(positions, segments))
    told = _between(everywhere, everywhere)
    here = zip(to_heads(q, heads), to_heads(k, sources), to_heads(v, sources), strict=True)
    out = [attention(q_h, k_h, v_h, **told, **options) for q_h, k_h, v_h in here]
    return rounded(to_positions(out, heads, q))


def ulysses_backward(
    dout: Shards,
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    **options: Any,
) -> ShardedGradients:
    """The gradients of :func:`ulysses`, given that of its output.

    Args:
        dout: By rank, gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        q, k, v, positions, segments, options: As in :func:`all_gather`.

    Returns:
        ``dq, dk, dv`` by rank.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_backward`.
        ValueError: As :func:`~.numpy.attention.attention_backward`.
    """
    (q, k, v, dout), rounded = _wide(q, k, v, dout)
    heads, sources = head_shards(q[0].shape[2], k[0].shape[2], len(q))
    everywhere = _together(_places(positions, segments))
    told = _between(everywhere, everywhere)
    here = zip(
        to_heads(dout, heads),
        to_heads(q, heads),
        to_heads(k, sources),
        to_heads(v, sources),
        strict=True,
    )
    parts = [
        attention_backward(dout_h, q_h, k_h, v_h, **told, **options)
        for dout_h, q_h, k_h, v_h in here
    ]
    dq, dk, dv = zip(*parts, strict=True)
    return ShardedGradients(
        rounded(to_positions(dq, heads, q)),
        rounded(to_positions(dk, sources, k)),
        rounded(to_positions(dv, sources, v)),
    )


def head_shards(H: int, G: int, P: int) -> tuple[list[Array], list[Array]]:
    """Which query heads each of P ranks serves, and for each of them its key/value head.

    The query heads are divided as evenly as can be; with P > H some ranks have none. A key/value
    head goes to every rank that serves one of its query heads, once for each of them.
    """
    heads = np.array_split(np.arange(H), P)
    return heads, [of_rank // (H // max(G, 1)) for of_rank in heads]


def to_heads(x: Shards, heads: Shards) -> list[Array]:
    """From some positions of all heads to all positions of some heads (an all-to-all)."""
    return [_joined(x)[:, :, of_rank] for of_rank in heads]


def to_positions(parts: Shards, heads: Shards, like: Shards) -> list[Array]:
    """From all positions of some heads to some positions of all heads, those of ``like``.

    This all-to-all is the way back, and the adjoint: a head that several ranks have, or one rank
    several times, is the sum of what they have.
    """
    whole = np.zeros_like(_joined(like))
    for part, of_rank in zip(parts, heads, strict=True):
        for n, head in enumerate(of_rank):
            whole[:, :, head] += part[:, :, n]
    return _cut(whole, like)


# --- hybrid: Ulysses among near ranks, rings among far ones ---


def hybrid(
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    *,
    near: int,
    **options: Any,
) -> list[Array]:
    """Groups of ``near`` consecutive ranks change positions for heads; then the groups form rings.

    Ulysses sends less, but has work for no more ranks than there are heads. A ring can have any
    length. So: Ulysses where links are fast, and a ring from the n-th rank of each group to the
    n-th of the next. With ``near`` = P this is :func:`ulysses`, with ``near`` = 1 :func:`ring`.

    Args:
        q, k, v, positions, segments, options: As in :func:`all_gather`.
        near: Ranks in a group; divides P.

    Returns:
        By rank, ``out [B, L_r, H, D]`` in q's dtype.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention`.
        ValueError: As :func:`~.numpy.attention.attention`, or ``near`` does not divide P.

    Source:
        Fang and Zhao, arXiv 2405.07719, section 4.
    """
    (q, k, v), rounded = _wide(q, k, v)
    groups = _groups(len(q), near)
    heads, sources = head_shards(q[0].shape[2], k[0].shape[2], near)
    places = _places(positions, segments)

    inside = [
        (to_heads(q[g], heads), to_heads(k[g], sources), to_heads(v[g], sources)) for g in groups
    ]
    around = [_together(places[g]) for g in groups]
    rings = [[out for out, _ in _ring(around, options, *_nth(inside, n))] for n in range(near)]
    outs = zip(*rings, strict=True)  # from rings of groups to groups of rings
    return rounded(
        out
        for g, parts in zip(groups, outs, strict=True)
        for out in to_positions(parts, heads, q[g])
    )


def hybrid_backward(
    dout: Shards,
    q: Shards,
    k: Shards,
    v: Shards,
    positions: Shards,
    segments: Shards | None = None,
    *,
    near: int,
    **options: Any,
) -> ShardedGradients:
    """The gradients of :func:`hybrid`, given that of its output.

    Args:
        dout: By rank, gradient of the loss by ``out``, ``[B, L_r, H, D]``.
        q, k, v, positions, segments, near, options: As in :func:`hybrid`.

    Returns:
        ``dq, dk, dv`` by rank.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_backward`.
        ValueError: As :func:`~.numpy.attention.attention_backward`, or ``near`` does not divide P.
    """
    (q, k, v, dout), rounded = _wide(q, k, v, dout)
    groups = _groups(len(q), near)
    heads, sources = head_shards(q[0].shape[2], k[0].shape[2], near)
    places = _places(positions, segments)
    taken = ((dout, heads), (q, heads), (k, sources), (v, sources))

    inside = [tuple(to_heads(x[g], of) for x, of in taken) for g in groups]
    around = [_together(places[g]) for g in groups]
    rings = [_ring_backward(around, options, *_nth(inside, n)) for n in range(near)]
    gradients = []
    for (x, of), *by_ring in zip(taken[1:], *rings, strict=True):
        by_group = zip(groups, *by_ring, strict=True)
        gradients.append(
            rounded(dx for g, *parts in by_group for dx in to_positions(parts, of, x[g]))
        )
    return ShardedGradients(*gradients)


# --- lists of shards ---


class _Place(NamedTuple):
    """Where the queries or keys of a shard lie, ``[L_r]`` or ``[B, L_r]``."""

    positions: Array
    segments: Array | None


def _places(positions: Shards, segments: Shards | None) -> list[_Place]:
    """The place of every shard."""
    none = [None] * len(positions)
    return [_Place(*x) for x in zip(positions, segments or none, strict=True)]


def _together(places: Sequence[_Place]) -> _Place:
    """The place of several shards, joined."""
    positions, segments = zip(*places, strict=True)
    joined = None if segments[0] is None else np.concatenate(segments, axis=-1)
    return _Place(np.concatenate(positions, axis=-1), joined)


def _between(queries: _Place, keys: _Place) -> dict[str, Any]:
    """What attention has to be told of both."""
    told: dict[str, Any] = {"positions": queries.positions, "key_positions": keys.positions}
    if queries.segments is not None:
        told |= {"segments": queries.segments, "key_segments": keys.segments}
    return told


def _joined(x: Shards) -> Array:
    """All shards ``[B, L_r, H, D]``, one after the other."""
    return np.concatenate(x, axis=1)


def _cut(x: Array, like: Shards) -> list[Array]:
    """Undoes :func:`_joined`: shards of the lengths that those of ``like`` have."""
    return np.split(x, np.cumsum([part.shape[1] for part in like])[:-1], axis=1)


def _groups(P: int, near: int) -> list[slice]:
    """Groups of consecutive ranks."""
    if near < 1 or P % near:
        raise ValueError(f"near must divide the number of ranks, got near={near} and P={P}")
    return [slice(first, first + near) for first in range(0, P, near)]


def _nth(inside: Sequence[Sequence[Shards]], n: int) -> list[Shards]:
    """Each operand's shards along the n-th ring: the n-th of every group."""
    return [[shards[n] for shards in operand] for operand in zip(*inside, strict=True)]


def _wide(*operands: Shards) -> tuple[list[list[Array]], Callable[[Iterable[Array]], list[Array]]]:
    """The operands in the arithmetic of the oracle, and what rounds results to the operands'."""
    q = operands[0][0]
    compute = resolve_compute_dtype(q, None)

    def rounded(shards: Iterable[Array]) -> list[Array]:
        return [x.astype(q.dtype) for x in shards]

    return [[x.astype(compute) for x in shards] for shards in operands], rounded
