r"""Attention over a sequence in PyTorch: :mod:`isoform.reference.numpy.attention` once more.

The forward functions are made of operations that autograd differentiates, twice if need be, on any
device and in any float dtype. The backward functions are the hand-derived ones, for who has to put
the gradients of blocks together: an ``autograd.Function`` for ring attention.

float16 and bfloat16 operands are lifted to float32 first, and results rounded once at the end. The
tiled forms take a block of queries at a time, so their memory grows with Q + K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isoform.reference.attention_contract import Mask, attention_call, resolve_window
from isoform.reference.contract import dtype_name
from isoform.reference.torch.evoformer import attended, heads_first, merge, shifted_exp

__all__ = [
    "AttentionGradients",
    "attention",
    "attention_backward",
    "attention_backward_tiled",
    "attention_block",
    "attention_block_backward",
    "attention_block_backward_tiled",
    "attention_block_tiled",
    "attention_delta",
    "attention_tiled",
    "merge",
]

Window = int | tuple[int, int] | None


class AttentionGradients(NamedTuple):
    """The gradients of q, k and v, in their shapes."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over a sequence: causal or full, packed, windowed, in any order.

    Args:
        q: Queries ``[B, Q, H, D]``, any float dtype.
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

    Returns:
        ``out [B, Q, H, D]`` in q's dtype, and with ``return_lse`` also ``lse [B, H, Q]``, natural
        logarithm, at least float32. Both can be differentiated.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: A shape, a device, the scale or the window is wrong; or key_positions or
            key_segments are left out where Q is not K and they matter.

    Source:
        Vaswani et al. 2017, section 3.2.1; rules SEQ-1 to SEQ-7.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    out, lse = _attend(q, k, v, mask, scale)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_q: int = 64,
) -> Any:
    """:func:`attention`, a block of queries at a time.

    Each block is recomputed in the backward pass instead of being stored, so peak memory above the
    operands and results is one block's logits, ``B·H·block_q·K``. Differentiable like the plain
    form.

    Args:
        q, k, v: As in :func:`attention`.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale, return_lse: As in :func:`attention`.
        block_q: Queries in a block, at least 1.

    Returns:
        As :func:`attention`.

    Raises:
        TypeError: As :func:`attention`.
        ValueError: As :func:`attention`, or the block size is not positive.

    Source:
        Rabe and Staats, arXiv 2112.05682 (queries in blocks, recomputed by checkpoints).
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    # All blocks add to the gradients of k and v: lifted here, they add in float32.
    kw, vw = k.to(_wide(q)), v.to(_wide(q))

    def attend(rows: slice) -> Any:
        return checkpoint(
            _attend, q[:, rows].to(_wide(q)), kw, vw, mask.tile(rows), scale, use_reentrant=False
        )

    results = [attend(rows) for rows in _blocks(q.shape[1], block_q)]
    out = torch.cat([out.to(q.dtype) for out, _ in results], dim=1)
    return (out, torch.cat([lse for _, lse in results], dim=-1)) if return_lse else out


def attention_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` to one block of the keys, to be merged with that to others.

    Args:
        q: Queries ``[B, Q, H, D]``.
        k: The block's keys ``[B, K, G, D]``.
        v: The block's values ``[B, K, G, D]``.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`;
            those of the keys are the block's.
        scale: As in :func:`attention`.

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
    return _attend(q, k, v, mask, scale)


def attention_block_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    block_q: int = 64,
) -> tuple[Tensor, Tensor]:
    """:func:`attention_block`, a block of queries at a time.

    Args:
        q, k, v: As in :func:`attention_block`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`attention_block`.
        scale: As in :func:`attention_block`.
        block_q: Queries in a block, at least 1.

    Returns:
        As :func:`attention_block`.

    Raises:
        TypeError: As :func:`attention_block`.
        ValueError: As :func:`attention_block`, or the block size is not positive.

    Source:
        arXiv 2310.01889, section 3.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    results = [
        _attend(q[:, rows], k, v, mask.tile(rows), scale) for rows in _blocks(q.shape[1], block_q)
    ]
    return torch.cat([out for out, _ in results], dim=1), torch.cat([x for _, x in results], dim=-1)


def attention_delta(dout: Tensor, out: Tensor) -> Tensor:
    """δ, which the backward of every block needs: ``delta_i = Σ_d dout_id out_id``.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``.
        out: The whole's output, ``[B, Q, H, D]``, over all blocks; it may be wider than dout.

    Returns:
        ``delta [B, H, Q]``; float32, or the dtype of dout where that is wider.

    Raises:
        ValueError: The shapes of dout and out differ.

    Source:
        arXiv 2205.14135, section 3.1; rule SEQ-8.
    """
    if dout.shape != out.shape:
        raise ValueError(
            f"dout must have the shape of out {tuple(out.shape)}, got {tuple(dout.shape)}"
        )
    wide = torch.promote_types(_wide(dout), out.dtype)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).to(_wide(dout))


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
) -> AttentionGradients:
    """The gradients of :func:`attention`, given that of its output; derived by hand.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, Q, H, D]``.
        q, k, v: As in :func:`attention`.
        causal, positions, key_positions, segments, key_segments, window: As in :func:`attention`.
        scale: As in :func:`attention`.

    Returns:
        ``dq, dk, dv``, each in the shape and dtype of its operand.

    Raises:
        TypeError: As :func:`attention`, or dout is not in q's dtype.
        ValueError: As :func:`attention`, or dout is not in the shape of the output.

    Source:
        :mod:`isoform.reference.numpy.attention`; rule SEQ-8.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    _check_cotangent(dout, q)
    out, lse = _attend(q, k, v, mask, scale)
    found = _differentiate(dout, q, k, v, lse, attention_delta(dout, out), mask, scale)
    return AttentionGradients(*(gradient.to(q.dtype) for gradient in found))


def attention_backward_tiled(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    block_q: int = 64,
) -> AttentionGradients:
    """:func:`attention_backward`, a block of queries at a time.

    Args:
        dout, q, k, v: As in :func:`attention_backward`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`attention_backward`.
        scale: As in :func:`attention_backward`.
        block_q: Queries in a block, at least 1.

    Returns:
        As :func:`attention_backward`.

    Raises:
        TypeError: As :func:`attention_backward`.
        ValueError: As :func:`attention_backward`, or the block size is not positive.

    Source:
        arXiv 2205.14135, algorithm 4.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    _check_cotangent(dout, q)

    def block(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = _attend(q[:, rows], k, v, mask.tile(rows), scale)
        delta = attention_delta(dout[:, rows], out)
        return _differentiate(dout[:, rows], q[:, rows], k, v, lse, delta, mask.tile(rows), scale)

    found = _summed(block(rows) for rows in _blocks(q.shape[1], block_q))
    return AttentionGradients(*(gradient.to(q.dtype) for gradient in found))


def attention_block_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
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
        scale: As in :func:`attention`.

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
    _check_cotangent(dout, q)
    _check_statistics(q, lse=lse, delta=delta)
    return AttentionGradients(*_differentiate(dout, q, k, v, lse, delta, mask, scale))


def attention_block_backward_tiled(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    block_q: int = 64,
) -> AttentionGradients:
    """:func:`attention_block_backward`, a block of queries at a time.

    Args:
        dout, q, k, v, lse, delta: As in :func:`attention_block_backward`.
        causal, positions, key_positions, segments, key_segments, window: As in
            :func:`attention_block_backward`.
        scale: As in :func:`attention_block_backward`.
        block_q: Queries in a block, at least 1.

    Returns:
        As :func:`attention_block_backward`.

    Raises:
        TypeError: As :func:`attention_block_backward`.
        ValueError: As :func:`attention_block_backward`, or the block size is not positive.

    Source:
        arXiv 2310.01889, section 3; arXiv 2205.14135, algorithm 4.
    """
    mask = mask_of(q, k, v, causal, positions, key_positions, segments, key_segments, window, scale)
    _check_cotangent(dout, q)
    _check_statistics(q, lse=lse, delta=delta)
    return AttentionGradients(
        *_summed(
            _differentiate(
                dout[:, rows],
                q[:, rows],
                k,
                v,
                lse[..., rows],
                delta[..., rows],
                mask.tile(rows),
                scale,
            )
            for rows in _blocks(q.shape[1], block_q)
        )
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``, wide."""
    vh = heads_first(attended(v, mask.real_keys()), _wide(q), q.shape[2])
    s, _ = _logits(q, k, mask, scale)
    e, shift, none_left = shifted_exp(s)
    total = e.sum(-1).masked_fill(none_left, 1.0)
    o = ((e / total[..., None]) @ vh).masked_fill(none_left[..., None], 0.0)
    lse = (shift + total.log()).masked_fill(none_left, -torch.inf)
    return o.transpose(1, 2), lse


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Mask,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` in the shapes of q, k and v, wide."""
    wide, real = _wide(q), mask.real_keys()
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lse, delta = lse.to(wide), delta.to(wide)
    none_left = (lse == -torch.inf)[..., None]
    qh = heads_first(q, wide).masked_fill(none_left, 0.0)
    do = heads_first(dout, wide).masked_fill(none_left, 0.0)
    kh = heads_first(attended(k, real), wide, q.shape[2])
    vh = heads_first(attended(v, real), wide, q.shape[2])

    s, unseen = _logits(q, k, mask, scale)
    unseen = unseen | none_left
    p = torch.exp(s - lse[..., None].masked_fill(none_left, 0.0)).masked_fill(unseen, 0.0)
    dp = do @ vh.transpose(-1, -2)
    ds = (p * (dp - delta[..., None])).masked_fill(unseen, 0.0)

    dq = (factor * (ds @ kh)).masked_fill(none_left, 0.0)
    dk = _sum_groups(factor * (ds.transpose(-1, -2) @ qh), k.shape[2])
    dv = _sum_groups(p.transpose(-1, -2) @ do, k.shape[2])
    return (
        dq.transpose(1, 2).to(wide),
        attended(dk.transpose(1, 2), real).to(wide),
        attended(dv.transpose(1, 2), real).to(wide),
    )


def _logits(q: Tensor, k: Tensor, mask: Mask, scale: float | None) -> tuple[Tensor, Tensor]:
    """``s [B, H, Q, K]``, −inf where the query does not attend to the key; and where that is."""
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    unseen = ~mask.pairs()
    # a query that sees nothing is no factor of any gradient either, be it NaN (SEQ-5)
    qh = heads_first(q, _wide(q)).masked_fill(unseen.all(-1, keepdim=True), 0.0)
    kh = heads_first(attended(k, mask.real_keys()), _wide(q), q.shape[2])
    return (factor * (qh @ kh.transpose(-1, -2))).masked_fill(unseen, -torch.inf), unseen


def mask_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    positions: Tensor | None,
    key_positions: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
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
    )

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x if x.ndim == 2 else x[None]).to(torch.int64)

    def counted(x: Tensor) -> Tensor:
        """0, 1, 2 … along the sequence of ``x``."""
        return torch.arange(x.shape[1], device=x.device)[None]

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


def _wide(q: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or q's where that is wider (rule SEQ-7)."""
    return torch.promote_types(q.dtype, torch.float32)


def _blocks(length: int, block_q: int) -> list[slice]:
    """Slices of at most ``block_q`` that cover ``range(length)``; an empty one where it is 0."""
    if block_q < 1:
        raise ValueError(f"block_q must be at least 1, got {block_q}")
    return [slice(start, start + block_q) for start in range(0, max(length, 1), block_q)]


def _summed(blocks: Iterator[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of all queries: dq one after the other, dk and dv the sums over the blocks."""
    dq, dk, dv = next(blocks)
    parts = [dq]
    for dq, more_dk, more_dv in blocks:
        parts.append(dq)
        dk, dv = dk + more_dk, dv + more_dv
    return torch.cat(parts, dim=1), dk, dv


def _sum_groups(dx: Tensor, groups: int) -> Tensor:
    """``[B, H, L, D]`` summed over the heads that share one of the ``groups``."""
    B, H, L, D = dx.shape
    return dx.reshape(B, groups, H // max(groups, 1), L, D).sum(2)


def _check_cotangent(dout: Tensor, q: Tensor) -> None:
    """Raise unless ``dout`` has the shape and the dtype of the output."""
    if not isinstance(dout, Tensor):
        raise TypeError(f"dout must be an array, got {type(dout).__name__}")
    if dout.dtype != q.dtype:
        raise TypeError(f"dout must be {dtype_name(q)}, the dtype of q, got {dtype_name(dout)}")
    if dout.shape != q.shape:
        raise ValueError(f"dout must have the shape of q {tuple(q.shape)}, got {tuple(dout.shape)}")


def _check_statistics(q: Tensor, **statistics: Tensor) -> None:
    """Raise unless lse and delta are ``[B, H, Q]``, as wide as :func:`attention` returns them."""
    B, Q, H, _ = q.shape
    for name, x in statistics.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if not x.dtype.is_floating_point or torch.promote_types(x.dtype, _wide(q)) != x.dtype:
            wide = str(_wide(q)).removeprefix("torch.")
            raise TypeError(f"{name} must be {wide} or wider, got {dtype_name(x)}")
        if x.shape != (B, H, Q):
            raise ValueError(
                f"{name} must be [B, H, Q] of q {tuple(q.shape)}, got {tuple(x.shape)}"
            )
