r"""Evoformer attention in PyTorch: :mod:`isoform.reference.numpy.evoformer` once more, in
operations that autograd differentiates, twice if need be, on any device and in any float dtype.

float16 and bfloat16 operands are lifted to float32 first, and results rounded once at the end, so
this is as exact as operands and results of that dtype allow.

Two things that autograd would get wrong by itself are handled where they arise. A dropped key must
have exactly zero gradient even beside NaN: its key and value are replaced by zeros with ``where``,
whose gradient is zero there. And the maximum that is subtracted before ``exp`` must not be
differentiated through: it cancels, so it is detached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isoform.reference.contract import evoformer_call


def evoformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Evoformer attention: softmax attention with a mask bias, a shared pair bias and a gate.

    Args:
        q: Queries ``[B, S, Q, H, D]``, any float dtype.
        k: Keys ``[B, S, K, G, D]``; G divides H.
        v: Values ``[B, S, K, G, D]``.
        mask: Bool ``[B, S, K]``; True where the key may be attended to.
        mask_bias: ``[B, S, 1, 1, K]``, added to the logits; −inf allowed.
        pair_bias: ``[B, 1, H, Q, K]``, added to the logits of every row; −inf allowed.
        gate: ``[B, S, Q, H, D]``; the output is multiplied by its sigmoid.
        scale: Factor of the logits; ``D**-0.5`` by default.
        return_lse: Return the log-sum-exp of the logits too.

    Returns:
        ``out [B, S, Q, H, D]`` in q's dtype, and with ``return_lse`` also ``lse [B, S, H, Q]``,
        natural logarithm, before the gate, at least float32.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape, its device or the scale is wrong.

    Source:
        AlphaFold 2 supplementary, algorithm 7 lines 4 to 6; arXiv 2310.04610, section 3.1.
    """
    evoformer_call(
        q, k, v, mask=mask, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate, scale=scale
    )
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    qh = heads_first(q, wide)
    kh = heads_first(attended(k, mask), wide, q.shape[3])
    vh = heads_first(attended(v, mask), wide, q.shape[3])

    s = scale * (qh @ kh.transpose(-1, -2))
    if mask_bias is not None:
        s = s + mask_bias.to(wide)
    if pair_bias is not None:
        s = s + pair_bias.to(wide)
    if mask is not None:
        s = s.masked_fill(~mask[:, :, None, None, :], -torch.inf)

    e, shift, none_left = shifted_exp(s)
    total = e.sum(-1).masked_fill(none_left, 1.0)
    o = ((e / total[..., None]) @ vh).masked_fill(none_left[..., None], 0.0)
    if gate is not None:
        gate = heads_first(gate, wide).masked_fill(none_left[..., None], 0.0)  # be it NaN (EVO-5)
        o = o * torch.sigmoid(gate)
    out = o.transpose(2, 3).to(q.dtype)
    if not return_lse:
        return out
    return out, (shift + total.log()).masked_fill(none_left, -torch.inf)


def evoformer_attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_q: int = 64,
) -> Any:
    """:func:`evoformer_attention`, a block of queries at a time.

    Each block is recomputed in the backward pass instead of being stored, so peak memory above the
    operands and results is one block's logits, ``B·S·H·block_q·K``. Differentiable like the plain
    form.

    Args:
        q, k, v, mask, mask_bias, pair_bias, gate, scale, return_lse: As in
            :func:`evoformer_attention`.
        block_q: Queries in a block, at least 1.

    Returns:
        As :func:`evoformer_attention`.

    Raises:
        TypeError: As :func:`evoformer_attention`.
        ValueError: As :func:`evoformer_attention`, or the block size is not positive.

    Source:
        Rabe and Staats, arXiv 2112.05682 (queries in blocks, recomputed by checkpoints).
    """
    evoformer_call(
        q, k, v, mask=mask, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate, scale=scale
    )
    if block_q < 1:
        raise ValueError(f"block_q must be at least 1, got {block_q}")

    # All blocks add to the gradients of k, v and the mask bias: lifted here, they add in float32.
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    mask_bias = None if mask_bias is None else mask_bias.to(wide)

    def attend(q: Tensor, pair_bias: Tensor | None, gate: Tensor | None) -> Any:
        return evoformer_attention(
            q.to(wide),
            k,
            v,
            mask=mask,
            mask_bias=mask_bias,
            pair_bias=None if pair_bias is None else pair_bias.to(wide),
            gate=None if gate is None else gate.to(wide),
            scale=scale,
            return_lse=True,
        )

    results = [
        checkpoint(
            attend,
            q[:, :, rows],
            None if pair_bias is None else pair_bias[..., rows, :],
            None if gate is None else gate[:, :, rows],
            use_reentrant=False,
        )
        for start in range(0, max(q.shape[2], 1), block_q)
        for rows in [slice(start, start + block_q)]
    ]
    out = torch.cat([out.to(q.dtype) for out, _ in results], dim=2)
    return (out, torch.cat([lse for _, lse in results], dim=-1)) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the results over each.

    Args:
        out_a: ``[..., Q, H, D]``, ungated output over the first set.
        lse_a: ``[..., H, Q]``, its log-sum-exp.
        out_b: Like out_a, over the second set.
        lse_b: Like lse_a.

    Returns:
        ``out [..., Q, H, D]`` in out_a's dtype and ``lse [..., H, Q]`` in lse_a's. A side with
        lse = −inf adds nothing; nothing overflows.

    Raises:
        ValueError: The shapes of the two sides differ, or those of out and lse do not fit.

    Source:
        :func:`isoform.reference.numpy.evoformer_tiled.merge`, rule EVO-11.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ValueError(
            f"both sides must have equal shapes, got out {tuple(out_a.shape)} and "
            f"{tuple(out_b.shape)}, lse {tuple(lse_a.shape)} and {tuple(lse_b.shape)}"
        )
    *batch, Q, H, _ = out_a.shape
    if lse_a.shape != (*batch, H, Q):
        raise ValueError(
            f"lse must be [..., H, Q] of out {tuple(out_a.shape)}, got {tuple(lse_a.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(lse_a.dtype, torch.float32), out_a.dtype)
    weights, shift, none_left = shifted_exp(torch.stack((lse_a, lse_b), dim=-1).to(wide))
    total = weights.sum(-1).masked_fill(none_left, 1.0)
    shares = (weights / total[..., None]).transpose(-2, -3)[..., None, :]
    # A side is left out by its lse, not by its share (one that underflows is not without keys), and
    # before it is multiplied: a gradient would come back as 0 · NaN.
    dead = torch.stack((lse_a, lse_b), dim=-1).transpose(-2, -3)[..., None, :] == -torch.inf
    outs = torch.stack((out_a, out_b), dim=-1).to(wide).masked_fill(dead, 0.0)
    out = (shares * outs).sum(-1)
    lse = (shift + total.log()).masked_fill(none_left, -torch.inf)
    return out.to(out_a.dtype), lse.to(lse_a.dtype)


def shifted_exp(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(s − shift)`` with the largest s of the last axis as shift, and where there is none.

    Where every s is −inf (or there is none), 0 is the shift and all exponentials are 0.
    """
    if s.shape[-1] == 0:
        shift = s.new_zeros(s.shape[:-1])
        return s, shift, torch.ones_like(shift, dtype=torch.bool)
    top = s.detach().amax(-1)
    none_left = top == -torch.inf
    shift = top.masked_fill(none_left, 0.0)
    e = torch.exp(s - shift[..., None])
    return e.masked_fill(none_left[..., None], 0.0), shift, none_left  # no gradient either (EVO-5)


def attended(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x [..., K, G, D]`` with zeros for the keys that ``mask [..., K]`` drops (rule EVO-4)."""
    return x if mask is None else torch.where(mask[..., None, None], x, torch.zeros_like(x))


def heads_first(x: Tensor, dtype: torch.dtype, heads: int | None = None) -> Tensor:
    """``[..., L, G, D]`` to ``[..., H, L, D]``; each head repeated for those that share it."""
    x = x.to(dtype).transpose(-3, -2)
    groups = x.shape[-3]
    if heads is None or heads == groups:
        return x
    return x.repeat_interleave(heads // max(groups, 1), dim=-3)
