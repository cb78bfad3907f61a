r"""Attention over a sequence in tiles: what a GPU does, and one rank of a ring.

Nothing here has the size Q·K. A tile of ``block_q × block_k`` logits is computed, its mask with it
from the positions and segments of its rows and columns, used, and forgotten. Tiles in which no
query attends to any key are not computed at all, which saves half of a causal call and almost all
of one with a narrow window.

The two observations that make it possible are :mod:`.evoformer_tiled`'s: the online softmax, whose
running maximum m and sum l are corrected with each further tile of keys, and the backward pass that
recomputes p_ij = exp(s_ij − lse_i) from the lse that the forward pass kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from isoform.reference.attention_contract import Mask
from isoform.reference.numpy.attention import (
    AttentionGradients,
    Window,
    check_statistics,
    delta_of,
    logits,
    mask_of,
)
from isoform.reference.numpy.evoformer import (
    Array,
    attended,
    check_cotangent,
    heads_first,
    heads_last,
    living,
    lse_dtype,
    no_key_left,
    resolve_compute_dtype,
    resolve_scale,
    sum_groups,
)
from isoform.reference.numpy.evoformer_tiled import blocks


def attention_tiled(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: npt.DTypeLike | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Any:
    """:func:`~.numpy.attention.attention` in tiles: memory grows with Q + K.

    Args:
        q, k, v: As in :func:`~.numpy.attention.attention`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`~.numpy.attention.attention`.
        scale, return_lse, compute_dtype: As in :func:`~.numpy.attention.attention`.
        block_q: Queries in a tile, at least 1.
        block_k: Keys in a tile, at least 1.

    Returns:
        As :func:`~.numpy.attention.attention`.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention`.
        ValueError: As :func:`~.numpy.attention.attention`, or a block size is below 1.

    Source:
        arXiv 1805.02867, algorithm 3; arXiv 2205.14135, algorithm 1.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    compute = resolve_compute_dtype(q, compute_dtype)
    out, lse = _attend(q, k, v, mask, scale, compute, (block_q, block_k))
    out, lse = out.astype(q.dtype), lse.astype(lse_dtype(q))
    return (out, lse) if return_lse else out


def attention_backward_tiled(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    window: Window = None,
    scale: float | None = None,
    compute_dtype: npt.DTypeLike | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> AttentionGradients:
    """:func:`~.numpy.attention.attention_backward` in tiles.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``.
        q, k, v: As in :func:`~.numpy.attention.attention`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`~.numpy.attention.attention`.
        scale, compute_dtype: As in :func:`~.numpy.attention.attention`.
        block_q: Queries in a tile, at least 1.
        block_k: Keys in a tile, at least 1.

    Returns:
        As :func:`~.numpy.attention.attention_backward`.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_backward`.
        ValueError: As :func:`~.numpy.attention.attention_backward`, or a block size is below 1.

    Source:
        arXiv 2205.14135, algorithm 4.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    check_cotangent(dout, q)
    compute, tiles = resolve_compute_dtype(q, compute_dtype), (block_q, block_k)
    out, lse = _attend(q, k, v, mask, scale, compute, tiles)
    delta = delta_of(dout, out, compute)
    found = _differentiate(dout, q, k, v, lse, delta, mask, scale, compute, tiles)
    return AttentionGradients(*(gradient.astype(q.dtype) for gradient in found))


def attention_block_tiled(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    window: Window = None,
    scale: float | None = None,
    compute_dtype: npt.DTypeLike | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Array, Array]:
    """:func:`~.numpy.attention.attention_block` in tiles.

    Args:
        q, k, v: As in :func:`~.numpy.attention.attention_block`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`~.numpy.attention.attention_block`.
        scale, compute_dtype: As in :func:`~.numpy.attention.attention_block`.
        block_q: Queries in a tile, at least 1.
        block_k: Keys in a tile, at least 1.

    Returns:
        As :func:`~.numpy.attention.attention_block`.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_block`.
        ValueError: As :func:`~.numpy.attention.attention_block`, or a block size is below 1.

    Source:
        arXiv 2310.01889, section 3.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    compute = resolve_compute_dtype(q, compute_dtype)
    out, lse = _attend(q, k, v, mask, scale, compute, (block_q, block_k))
    return out.astype(lse_dtype(q)), lse.astype(lse_dtype(q))


def attention_block_backward_tiled(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    *,
    causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    segments: Array | None = None,
    key_segments: Array | None = None,
    window: Window = None,
    scale: float | None = None,
    compute_dtype: npt.DTypeLike | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> AttentionGradients:
    """:func:`~.numpy.attention.attention_block_backward` in tiles.

    Args:
        dout, q, k, v, lse, delta: As in :func:`~.numpy.attention.attention_block_backward`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`~.numpy.attention.attention_block_backward`.
        scale, compute_dtype: As in :func:`~.numpy.attention.attention_block_backward`.
        block_q: Queries in a tile, at least 1.
        block_k: Keys in a tile, at least 1.

    Returns:
        As :func:`~.numpy.attention.attention_block_backward`.

    Raises:
        TypeError: As :func:`~.numpy.attention.attention_block_backward`.
        ValueError: As :func:`~.numpy.attention.attention_block_backward`, or a block size is below
            1.

    Source:
        arXiv 2310.01889, section 3; arXiv 2205.14135, algorithm 4.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    check_cotangent(dout, q)
    check_statistics(q, lse=lse, delta=delta)
    compute, tiles = resolve_compute_dtype(q, compute_dtype), (block_q, block_k)
    found = _differentiate(dout, q, k, v, lse, delta, mask, scale, compute, tiles)
    return AttentionGradients(*(gradient.astype(lse_dtype(q)) for gradient in found))


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None,
    compute: np.dtype[Any],
    tiles: tuple[int, int],
) -> tuple[Array, Array]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``, as they were computed."""
    B, Q, H, D = q.shape
    row_tiles, key_tiles = blocks(Q, tiles[0]), list(blocks(k.shape[1], tiles[1]))
    out = np.empty(q.shape, compute)
    lse = np.empty((B, H, Q), compute)
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in row_tiles:
            m = np.full_like(lse[..., rows], -np.inf)
            l = np.zeros_like(m)  # noqa: E741  (the name it has in every paper)
            a = np.zeros((*m.shape, D), compute)
            for keys in key_tiles:
                tile = mask.tile(rows, keys)
                if not tile.pairs().any():
                    continue
                s = logits(q[:, rows], k[:, keys], tile, scale, compute)
                vh = heads_first(attended(v[:, keys], tile.real_keys()), compute, H)
                m_new = np.maximum(m, s.real.max(axis=-1))
                shift = np.where(no_key_left(m_new), 0, m_new)
                alpha = np.exp(m - shift)
                e = np.exp(s - shift[..., None])
                l = alpha * l + e.sum(axis=-1)  # noqa: E741
                a = alpha[..., None] * a + e @ vh
                m = m_new
            none_left = no_key_left(m)
            total = np.where(none_left, 1, l)
            o = np.where(none_left[..., None], 0, a / total[..., None])
            out[:, rows] = heads_last(o, compute)
            lse[..., rows] = np.where(none_left, -np.inf, m + np.log(total))
    return out, lse


def _differentiate(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    mask: Mask,
    scale: float | None,
    compute: np.dtype[Any],
    tiles: tuple[int, int],
) -> tuple[Array, Array, Array]:
    """``dq, dk, dv`` in the shapes of q, k and v, as they were computed."""
    H, factor = q.shape[2], resolve_scale(scale, q)
    row_tiles, key_tiles = blocks(q.shape[1], tiles[0]), list(blocks(k.shape[1], tiles[1]))
    dq, dk, dv = (np.zeros(x.shape, compute) for x in (q, k, v))
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in row_tiles:
            none_left = no_key_left(lse[..., rows])[..., None]
            row_lse = np.where(none_left, 0, lse[..., rows, None])
            qh = living(q[:, rows], none_left, compute)
            do = living(dout[:, rows], none_left, compute)
            for keys in key_tiles:
                tile = mask.tile(rows, keys)
                if not (sees := tile.pairs() & ~none_left).any():
                    continue
                real = tile.real_keys()
                kh = heads_first(attended(k[:, keys], real), compute, H)
                vh = heads_first(attended(v[:, keys], real), compute, H)
                s = logits(q[:, rows], k[:, keys], tile, scale, compute)
                p = np.where(sees, np.exp(s - row_lse), 0)
                dp = do @ vh.swapaxes(-1, -2)
                ds = np.where(sees, p * (dp - delta[..., rows, None]), 0)

                dq[:, rows] += heads_last(np.where(none_left, 0, factor * (ds @ kh)), compute)
                dk_tile = sum_groups(factor * (ds.swapaxes(-1, -2) @ qh), k.shape[2])
                dv_tile = sum_groups(p.swapaxes(-1, -2) @ do, k.shape[2])
                dk[:, keys] += attended(heads_last(dk_tile, compute), real)
                dv[:, keys] += attended(heads_last(dv_tile, compute), real)
    return dq, dk, dv
