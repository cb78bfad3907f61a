r"""Attention over a sequence, defined.

A language model of genomes reads one long sequence, or several documents packed into one. Which
keys a query attends to follows from where both lie, and is never stored: every query i and key j
has a *position* t and a *segment* (the document it belongs to), and with a window of *left*
positions before the query and *right* after it ::

    j ∈ A(i)   where   segment_j = segment_i,   −left ≤ t_j − t_i ≤ right

Causal attention is right = 0; a side without an end sets no bound. A negative segment is padding:
such a query has no key, and such a key is nobody's. (Vaswani et al. 2017, section 3.2; sliding
windows: Beltagy et al., arXiv 2004.05150.)

Forward
-------
For one example and one head h, with g = h // (H / G) its key/value head::

    s_ij = scale · Σ_d q_id k_jd                                for j ∈ A(i)
    p_ij = exp(s_ij − lse_i),   lse_i = log Σ_j exp(s_ij)       softmax over A(i); elsewhere p = 0
    o_i  = Σ_j p_ij v_j

A query with no key left, A(i) empty, has o = 0 and lse = −inf (rule SEQ-5).

Backward
--------
A bar denotes the gradient of the loss; ō is given. As in :mod:`.evoformer`::

    δ_i  = Σ_d ō_id o_id
    s̅_ij = p_ij (ō_i · v_j − δ_i)
    v̅_j  = Σ_i p_ij ō_i            q̅_i = scale · Σ_j s̅_ij k_j            k̅_j = scale · Σ_i s̅_ij q_i

and where several query heads share a key/value head, k̅ and v̅ are summed over them.

In blocks
---------
Nothing above asks that all keys be at one place. Let them lie in blocks, on as many devices. Each
block by itself gives an o and an lse, and :func:`merge` makes one result of two. In the backward
pass, lse and δ of the *whole* are all that a block must know of the others: with them p_ij and s̅_ij
are what they would be in one piece, so each block adds its part to q̅ and has its own k̅ and v̅. That
is ring attention (Liu et al., arXiv 2310.01889), and why attention has a form for a block here,
forward and backward, whose results are not yet rounded to the operands' dtype.

Everything here holds all B·H·Q·K logits at once, in float64: the plainest form, to be compared
against. :mod:`.attention_tiled` holds a tile of them. Rules are numbered in the specification,
``docs/spec/attention.md``. No array is made here but from the operands, so CuPy's arrays do as well
as NumPy's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from isoform.reference.attention_contract import Mask, attention_call, resolve_window
from isoform.reference.contract import ORACLE_DTYPES
from isoform.reference.numpy.evoformer import (
    Array,
    attended,
    check_cotangent,
    heads_first,
    heads_last,
    largest,
    living,
    lse_dtype,
    no_key_left,
    resolve_compute_dtype,
    resolve_scale,
    sum_groups,
)
from isoform.reference.numpy.evoformer_tiled import merge

__all__ = [
    "AttentionGradients",
    "attention",
    "attention_backward",
    "attention_block",
    "attention_block_backward",
    "attention_delta",
    "merge",
]

Window = int | tuple[int, int] | None


class AttentionGradients(NamedTuple):
    """The gradients of q, k and v, in their shapes."""

    dq: Array
    dk: Array
    dv: Array


def attention(
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
) -> Any:
    """Attention over a sequence: causal or full, packed, windowed, in any order.

    Args:
        q: Queries ``[B, Q, H, D]``, any float dtype (complex128 too, to differentiate by complex
            steps).
        k: Keys ``[B, K, G, D]``; G divides H.
        v: Values ``[B, K, G, D]``.
        causal: A query attends to no key after its own position.
        positions: int32 or int64 ``[Q]`` or ``[B, Q]``, in any order; 0 … Q−1 by default.
        key_positions: ``[K]`` or ``[B, K]``; by default those of the queries.
        segments: int32 or int64 ``[Q]`` or ``[B, Q]``: attention stays within a segment, and a
            negative one is padding. One for all by default.
        key_segments: ``[K]`` or ``[B, K]``; by default those of the queries.
        window: ``(left, right)``: how many positions before and after its own a query looks, −1
            for no end; a number stands for both sides.
        scale: Factor of the logits; ``D**-0.5`` by default.
        return_lse: Return the log-sum-exp of the logits too.
        compute_dtype: Arithmetic to use; float64 by default, or q's dtype where that is wider.

    Returns:
        ``out [B, Q, H, D]`` in q's dtype, and with ``return_lse`` also ``lse [B, H, Q]``, natural
        logarithm; float32, or q's dtype where that is wider.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: A shape, the scale or the window is wrong; or key_positions or key_segments are
            left out where Q is not K and they matter.

    Source:
        Vaswani et al. 2017, section 3.2.1; rules SEQ-1 to SEQ-7.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    out, lse = _attend(q, k, v, mask, scale, resolve_compute_dtype(q, compute_dtype))
    out, lse = out.astype(q.dtype), lse.astype(lse_dtype(q))
    return (out, lse) if return_lse else out


def attention_backward(
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
) -> AttentionGradients:
    """The gradients of :func:`attention`, given that of its output.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``.
        q, k, v: As in :func:`attention`.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale, compute_dtype: As in :func:`attention`.

    Returns:
        ``dq, dk, dv``, each in the shape and dtype of its operand.

    Raises:
        TypeError: As :func:`attention`, or dout is not in q's dtype.
        ValueError: As :func:`attention`, or dout is not in the shape of the output.

    Source:
        The derivation is in this module's docstring; rule SEQ-8.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    check_cotangent(dout, q)
    compute = resolve_compute_dtype(q, compute_dtype)
    out, lse = _attend(q, k, v, mask, scale, compute)
    delta = delta_of(dout, out, compute)
    found = _differentiate(dout, q, k, v, lse, delta, mask, scale, compute)
    return AttentionGradients(*(gradient.astype(q.dtype) for gradient in found))


def attention_block(
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
) -> tuple[Array, Array]:
    """:func:`attention` to one block of the keys, to be merged with that to others.

    Args:
        q: Queries ``[B, Q, H, D]``.
        k: The block's keys ``[B, K, G, D]``.
        v: The block's values ``[B, K, G, D]``.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`;
            those of the keys are the block's.
        scale, compute_dtype: As in :func:`attention`.

    Returns:
        ``out [B, Q, H, D]`` and ``lse [B, H, Q]``, both float32, or in q's dtype where that is
        wider: rounded to q's dtype only once all blocks are merged.

    Raises:
        TypeError: As :func:`attention`.
        ValueError: As :func:`attention`.

    Source:
        arXiv 2310.01889, section 3; rule SEQ-11.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    out, lse = _attend(q, k, v, mask, scale, resolve_compute_dtype(q, compute_dtype))
    return out.astype(lse_dtype(q)), lse.astype(lse_dtype(q))


def attention_delta(
    dout: Array, out: Array, *, compute_dtype: npt.DTypeLike | None = None
) -> Array:
    """δ, which the backward of every block needs: ``delta_i = Σ_d dout_id out_id``.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``.
        out: The whole's output, ``[B, Q, H, D]``, over all blocks; it may be wider than dout.
        compute_dtype: Arithmetic to use; float64 by default, or out's dtype where that is wider.

    Returns:
        ``delta [B, H, Q]``; float32, or the dtype of dout where that is wider.

    Raises:
        ValueError: The shapes of dout and out differ.

    Source:
        arXiv 2205.14135, section 3.1; rule SEQ-8.
    """
    if dout.shape != out.shape:
        raise ValueError(f"dout must have the shape of out {out.shape}, got {dout.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        return delta_of(dout, out, resolve_compute_dtype(out, compute_dtype)).astype(
            lse_dtype(dout)
        )


def attention_block_backward(
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
) -> AttentionGradients:
    """The gradients that one block of the keys gives and gets, when the whole's lse is known.

    Summed over the blocks, ``dq`` is that of the whole; ``dk`` and ``dv`` are the block's own.

    Args:
        dout: Gradient of the loss by the whole's ``out``, ``[B, Q, H, D]``.
        q: Queries ``[B, Q, H, D]``.
        k: The block's keys ``[B, K, G, D]``.
        v: The block's values ``[B, K, G, D]``.
        lse: ``[B, H, Q]``, log-sum-exp over *all* keys; −inf for queries without any.
        delta: ``[B, H, Q]``, :func:`attention_delta` of the whole's output.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`;
            those of the keys are the block's.
        scale, compute_dtype: As in :func:`attention`.

    Returns:
        ``dq, dk, dv`` in the shapes of q, k and v; float32, or in q's dtype where that is wider:
        rounded to q's dtype only once all blocks are summed.

    Raises:
        TypeError: As :func:`attention_backward`, or lse or delta is narrower than float32 or q.
        ValueError: As :func:`attention_backward`, or lse or delta is not ``[B, H, Q]``.

    Source:
        arXiv 2310.01889, section 3; rules SEQ-8 and SEQ-11.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    check_cotangent(dout, q)
    check_statistics(q, lse=lse, delta=delta)
    compute = resolve_compute_dtype(q, compute_dtype)
    found = _differentiate(dout, q, k, v, lse, delta, mask, scale, compute)
    return AttentionGradients(*(gradient.astype(lse_dtype(q)) for gradient in found))


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float | None,
    compute: np.dtype[Any],
) -> tuple[Array, Array]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``, as they were computed."""
    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN propagate as IEEE says
        s = logits(q, k, mask, scale, compute)
        vh = heads_first(attended(v, mask.real_keys()), compute, q.shape[2])

        # exp(s − max) cannot overflow. The maximum is a constant to the derivative, so its real
        # part serves for complex steps; where no key is left it is −inf, and 0 stands in for it.
        top = largest(s)
        none_left = no_key_left(top)
        shift = np.where(none_left, 0, top)
        e = np.exp(s - shift[..., None])
        total = np.where(none_left, 1, e.sum(axis=-1))
        p = e / total[..., None]
        o = np.where(none_left[..., None], 0, p @ vh)
        lse = np.where(none_left, -np.inf, shift + np.log(total))
        return heads_last(o, compute), lse


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
) -> tuple[Array, Array, Array]:
    """``dq, dk, dv`` in the shapes of q, k and v, as they were computed."""
    sees, real = mask.pairs(), mask.real_keys()
    factor = resolve_scale(scale, q)
    with np.errstate(invalid="ignore", over="ignore"):
        none_left = no_key_left(lse)[..., None]
        qh = living(q, none_left, compute)
        do = living(dout, none_left, compute)
        kh = heads_first(attended(k, real), compute, q.shape[2])
        vh = heads_first(attended(v, real), compute, q.shape[2])

        sees = sees & ~none_left
        s = logits(q, k, mask, scale, compute)
        p = np.where(sees, np.exp(s - np.where(none_left, 0, lse[..., None])), 0)
        dp = do @ vh.swapaxes(-1, -2)
        ds = np.where(sees, p * (dp - delta[..., None]), 0)

        dq = np.where(none_left, 0, factor * (ds @ kh))
        dk = sum_groups(factor * (ds.swapaxes(-1, -2) @ qh), k.shape[2])
        dv = sum_groups(p.swapaxes(-1, -2) @ do, k.shape[2])
        return (
            heads_last(dq, compute),
            attended(heads_last(dk, compute), real),
            attended(heads_last(dv, compute), real),
        )


# The steps that the plain and the tiled form share.


def mask_of(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    positions: Array | None,
    key_positions: Array | None,
    segments: Array | None,
    key_segments: Array | None,
    window: Window,
    scale: float | None,
) -> Mask:
    """The mask of a call, once the call is found right; defaults filled in (SEQ-1 and SEQ-2)."""
    attention_call(
        q,
        k,
        v,
        causal=causal,
        positions=positions,
        key_positions=key_positions,
        segments=segments,
        key_segments=key_segments,
        window=window,
        scale=scale,
        dtypes=ORACLE_DTYPES,
    )

    def wide(x: Array | None) -> Array | None:
        return None if x is None else np.atleast_2d(x).astype(np.int64)

    def counted(x: Array) -> Array:
        """0, 1, 2 … along the sequence of ``x``."""
        return np.ones_like(x, dtype=np.int64, shape=(1, x.shape[1])).cumsum(axis=1) - 1

    of_queries, of_keys = wide(positions), wide(key_positions)
    if of_queries is None:
        of_queries, of_keys = counted(q), counted(k)
    segments = wide(segments)
    left, right = resolve_window(window, causal)
    return Mask(
        of_queries,
        of_queries if of_keys is None else of_keys,
        segments,
        segments if key_segments is None else wide(key_segments),
        left,
        right,
    )


def logits(q: Array, k: Array, mask: Mask, scale: float | None, compute: np.dtype[Any]) -> Array:
    """``s [B, H, Q, K]``, −inf where the query does not attend to the key."""
    qh = heads_first(q, compute)
    kh = heads_first(attended(k, mask.real_keys()), compute, q.shape[2])
    s = resolve_scale(scale, q) * (qh @ kh.swapaxes(-1, -2))
    return np.where(mask.pairs(), s, -np.inf)


def check_statistics(q: Array, **statistics: Array) -> None:
    """Raise unless lse and delta are ``[B, H, Q]``, as wide as :func:`attention` returns them."""
    B, Q, H, _ = q.shape
    for name, x in statistics.items():
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if x.dtype.kind not in "fc" or np.promote_types(x.dtype, lse_dtype(q)) != x.dtype:
            raise TypeError(f"{name} must be {lse_dtype(q)} or wider, got {x.dtype}")
        if x.shape != (B, H, Q):
            raise ValueError(f"{name} must be [B, H, Q] of q {q.shape}, got {x.shape}")


def delta_of(dout: Array, out: Array, compute: np.dtype[Any]) -> Array:
    """δ ``[B, H, Q]``, as it was computed."""
    with np.errstate(invalid="ignore", over="ignore"):
        delta: Array = (dout.astype(compute) * out.astype(compute)).sum(axis=-1)
        return delta.swapaxes(1, 2)
