r"""Evoformer attention in tiles, with an online softmax: what a GPU does.

The plain form (:mod:`.numpy.evoformer`) holds all Q·K logits of a head. This one holds a tile of
``block_q × block_k`` and never more, so its memory grows with Q + K. Two observations make it
possible.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867). Split the keys into blocks. For the keys
seen so far keep, per query, the largest logit m, the sum l = Σ exp(s − m) and the unnormalised
output a = Σ exp(s − m) v. A further block with logits s' raises the maximum to
m' = max(m, max s'); what was summed under the old one is rescaled by α = exp(m − m') ≤ 1::

    l ← α l + Σ_j exp(s'_j − m')            a ← α a + Σ_j exp(s'_j − m') v_j            m ← m'

At the end o = a / l and lse = m + log l. No exponential can overflow, and the order of the blocks
does not matter but for rounding.

Recomputation (Dao et al., arXiv 2205.14135). The backward pass needs p_ij again. It is not stored:
lse is, one number per query, and p_ij = exp(s_ij − lse_i) is recomputed tile by tile. The sum
δ_i = Σ_d ō_id o_id needs no keys. So each tile adds its part to q̅, k̅, v̅ and to the biases, and is
forgotten.

The same split works across devices: :func:`merge` puts together the results over two disjoint sets
of keys, which is all that ring attention needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from isoform.reference.contract import ORACLE_DTYPES, evoformer_call
from isoform.reference.numpy.evoformer import (
    Array,
    Gradients,
    attended,
    check_cotangent,
    heads_first,
    heads_last,
    living,
    lse_dtype,
    no_key_left,
    resolve_compute_dtype,
    resolve_scale,
    sigmoid,
    sum_groups,
)


def evoformer_attention_tiled(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: npt.DTypeLike | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Any:
    """:func:`~.numpy.evoformer.evoformer_attention` in tiles: memory grows with Q + K.

    Args:
        q, k, v, mask, mask_bias, pair_bias, gate, scale: As in
            :func:`~.numpy.evoformer.evoformer_attention`.
        return_lse, compute_dtype: As there.
        block_q: Queries in a tile, at least 1.
        block_k: Keys in a tile, at least 1.

    Returns:
        As :func:`~.numpy.evoformer.evoformer_attention`.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: A shape, the scale or a block size is wrong.

    Source:
        arXiv 1805.02867, algorithm 3; arXiv 2205.14135, algorithm 1.
    """
    biases: dict[str, Any] = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias}
    evoformer_call(q, k, v, **biases, gate=gate, scale=scale, dtypes=ORACLE_DTYPES)
    compute = resolve_compute_dtype(q, compute_dtype)

    out = np.empty(q.shape, q.dtype)
    lse = np.empty((*q.shape[:2], q.shape[3], q.shape[2]), compute)
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in blocks(q.shape[2], block_q):
            o, lse[..., rows] = _attend_block(q, k, v, rows, scale, compute, block_k, **biases)
            if gate is not None:
                none_left = no_key_left(lse[..., rows])[..., None]
                o = o * sigmoid(living(gate[:, :, rows], none_left, compute))
            out[:, :, rows] = heads_last(o, q.dtype)
        lse = lse.astype(lse_dtype(q))
    return (out, lse) if return_lse else out


def evoformer_attention_backward_tiled(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
    compute_dtype: npt.DTypeLike | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Gradients:
    """:func:`~.numpy.evoformer.evoformer_attention_backward` in tiles.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, S, Q, H, D]``.
        q, k, v, mask, mask_bias, pair_bias, gate, scale, compute_dtype: As in
            :func:`~.numpy.evoformer.evoformer_attention`.
        block_q: Queries in a tile, at least 1.
        block_k: Keys in a tile, at least 1.

    Returns:
        As :func:`~.numpy.evoformer.evoformer_attention_backward`. Of size Q·K there is nothing but
        the pair bias's own gradient.

    Raises:
        TypeError: As in the forward, or dout is not in q's dtype.
        ValueError: As in the forward, or dout is not in the shape of the output.

    Source:
        arXiv 2205.14135, algorithm 4.
    """
    biases: dict[str, Any] = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias}
    evoformer_call(q, k, v, **biases, gate=gate, scale=scale, dtypes=ORACLE_DTYPES)
    check_cotangent(dout, q)
    compute = resolve_compute_dtype(q, compute_dtype)
    factor = resolve_scale(scale, q)

    dq = np.zeros(q.shape, compute).swapaxes(2, 3)
    dk = np.zeros((*k.shape[:2], q.shape[3], k.shape[2], k.shape[4]), compute)
    dv = np.zeros_like(dk)
    dmask_bias = None if mask_bias is None else np.zeros(mask_bias.shape, compute)
    dpair_bias = None if pair_bias is None else np.empty(pair_bias.shape, q.dtype)
    dgate = None if gate is None else np.empty(gate.shape, q.dtype)

    with np.errstate(invalid="ignore", over="ignore"):
        for rows in blocks(q.shape[2], block_q):
            o, lse = _attend_block(q, k, v, rows, scale, compute, block_k, **biases)
            none_left = no_key_left(lse)[..., None]
            qh = living(q[:, :, rows], none_left, compute)
            do = living(dout[:, :, rows], none_left, compute)
            if gate is not None and dgate is not None:
                g = living(gate[:, :, rows], none_left, compute)
                dgate[:, :, rows] = heads_last(do * o * sigmoid(g) * sigmoid(-g), q.dtype)
                do = do * sigmoid(g)
            delta = (do * o).sum(-1, keepdims=True)

            for keys in blocks(k.shape[2], block_k):
                s, kh, vh = _tile(q, k, v, rows, keys, factor, compute, **biases)
                p = np.where(none_left, 0, np.exp(s - np.where(none_left, 0, lse[..., None])))
                ds = np.where(none_left, 0, p * (do @ vh.swapaxes(-1, -2) - delta))
                if mask is not None:
                    kept = mask[:, :, None, None, keys]
                    p, ds = np.where(kept, p, 0), np.where(kept, ds, 0)
                dq[..., rows, :] += np.where(none_left, 0, factor * (ds @ kh))
                dk[..., keys, :] += factor * (ds.swapaxes(-1, -2) @ qh)
                dv[..., keys, :] += p.swapaxes(-1, -2) @ do
                if dmask_bias is not None:
                    dmask_bias[..., keys] += ds.sum((2, 3))[:, :, None, None, :]
                if dpair_bias is not None:  # whole in this tile: all rows are in it
                    dpair_bias[..., rows, keys] = ds.sum(1, keepdims=True).astype(q.dtype)

        return Gradients(
            dq=heads_last(dq, q.dtype),
            dk=attended(heads_last(sum_groups(dk, k.shape[3]), q.dtype), mask),
            dv=attended(heads_last(sum_groups(dv, v.shape[3]), q.dtype), mask),
            dmask_bias=None if dmask_bias is None else dmask_bias.astype(q.dtype),
            dpair_bias=dpair_bias,
            dgate=dgate,
        )


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over two disjoint sets of keys, from the results over each.

    With w_a = exp(lse_a − lse) and w_b likewise, where lse = log(exp lse_a + exp lse_b)::

        out = w_a out_a + w_b out_b

    Associative and commutative but for rounding; a side with lse = −inf (no key) adds nothing,
    whatever its ``out`` holds; nothing overflows, since the weights are at most 1.

    Args:
        out_a: ``[..., Q, H, D]``, ungated output over the first set.
        lse_a: ``[..., H, Q]``, its log-sum-exp.
        out_b: Like out_a, over the second set.
        lse_b: Like lse_a.

    Returns:
        ``out [..., Q, H, D]`` in out_a's dtype and ``lse [..., H, Q]`` in lse_a's.

    Raises:
        ValueError: The shapes of the two sides differ, or those of out and lse do not fit.

    Source:
        arXiv 2310.01889, section 3; rule EVO-11.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ValueError(
            f"both sides must have equal shapes, got out {out_a.shape} and {out_b.shape}, "
            f"lse {lse_a.shape} and {lse_b.shape}"
        )
    *batch, Q, H, _ = out_a.shape
    if lse_a.shape != (*batch, H, Q):
        raise ValueError(f"lse must be [..., H, Q] of out {out_a.shape}, got {lse_a.shape}")

    wide = np.promote_types(np.promote_types(lse_a.dtype, np.float32), out_a.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        top = np.maximum(lse_a, lse_b).astype(wide)
        none_left = no_key_left(top)
        shift = np.where(none_left, 0, top)
        weights = [np.exp(lse - shift) for lse in (lse_a, lse_b)]
        total = np.where(none_left, 1, weights[0] + weights[1])
        lse = np.where(none_left, -np.inf, shift + np.log(total))

        out = np.zeros(out_a.shape, wide)
        for side, lse_side, weight in zip((out_a, out_b), (lse_a, lse_b), weights, strict=True):
            share = (weight / total).swapaxes(-1, -2)[..., None]
            # left out by its lse, not by its share: one that underflows is not without keys
            dead = no_key_left(lse_side).swapaxes(-1, -2)[..., None]
            out += np.where(dead, 0, share * side)
        return out.astype(out_a.dtype), lse.astype(lse_a.dtype)


def blocks(length: int, block: int) -> Iterator[slice]:
    """Consecutive slices of at most ``block`` that cover ``range(length)``."""
    if block < 1:
        raise ValueError(f"a block must hold at least 1, got {block}")
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _tile(
    q: Array,
    k: Array,
    v: Array,
    rows: slice,
    keys: slice,
    factor: float,
    compute: np.dtype[Any],
    *,
    mask: Array | None,
    mask_bias: Array | None,
    pair_bias: Array | None,
) -> tuple[Array, Array, Array]:
    """One tile's logits ``[B, S, H, rows, keys]``, and its keys and values, heads first."""
    kept = None if mask is None else mask[:, :, keys]
    qh = heads_first(q[:, :, rows], compute)
    kh = heads_first(attended(k[:, :, keys], kept), compute, q.shape[3])
    vh = heads_first(attended(v[:, :, keys], kept), compute, q.shape[3])
    s = factor * (qh @ kh.swapaxes(-1, -2))
    if mask_bias is not None:
        s = s + mask_bias[..., keys].astype(compute)
    if pair_bias is not None:
        s = s + pair_bias[..., rows, keys].astype(compute)
    if kept is not None:
        s = np.where(kept[:, :, None, None, :], s, -np.inf)
    return s, kh, vh


def _attend_block(
    q: Array,
    k: Array,
    v: Array,
    rows: slice,
    scale: float | None,
    compute: np.dtype[Any],
    block_k: int,
    **biases: Array | None,
) -> tuple[Array, Array]:
    """Ungated output ``[B, S, H, rows, D]`` and lse of one block of queries, online over keys."""
    batch = (*q.shape[:2], q.shape[3], rows.stop - rows.start)
    m = np.full(batch, -np.inf, compute)
    l = np.zeros(batch, compute)  # noqa: E741  (the name it has in every paper)
    a = np.zeros((*batch, q.shape[4]), compute)
    for keys in blocks(k.shape[2], block_k):
        s, _, vh = _tile(q, k, v, rows, keys, resolve_scale(scale, q), compute, **biases)
        m_new = np.maximum(m, s.real.max(axis=-1))
        shift = np.where(no_key_left(m_new), 0, m_new)
        alpha = np.exp(m - shift)
        e = np.exp(s - shift[..., None])
        l = alpha * l + e.sum(axis=-1)  # noqa: E741
        a = alpha[..., None] * a + e @ vh
        m = m_new
    none_left = no_key_left(m)
    safe = np.where(none_left, 1, l)
    o = np.where(none_left[..., None], 0, a / safe[..., None])
    return o, np.where(none_left, -np.inf, m + np.log(safe))
