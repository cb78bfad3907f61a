"""NVIDIA's cuEquivariance: ``triangle_attention`` and ``attention_pair_bias``.

``triangle_attention`` takes q, k, v as ``[B, N, H, L, D]``, always a pair bias, and a bool mask.

``attention_pair_bias`` takes no q, k, v but a single representation and the weights of the layer
around the attention. It is given one that its layer norm leaves as it is, up to a factor: token n
is the n-th unit vector and its negative, whose mean is 0 and whose norm is the same for all; the
weights of the projections are then the operands themselves. So its attention is judged with any
operands, and their gradients come through the weights. Every row is a call of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoform.conformance.peers.adapter import evoformer_peer
from isoform.reference.contract import Arithmetic, Capabilities

ARITHMETIC = Arithmetic(probabilities="operand", output="operand", dlogits="operand")


def _triangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from cuequivariance_torch import triangle_attention

    B, _, Q, H, _ = q.shape
    bias = q.new_zeros(B, 1, H, Q, k.shape[2]) if pair_bias is None else pair_bias
    out: Tensor = triangle_attention(
        *(x.transpose(2, 3) for x in (q, k, v)),
        bias,
        mask=None if mask is None else mask[:, :, None, None, :],
        scale=scale,
    )
    return out.transpose(2, 3)


TRIANGLE_ATTENTION = evoformer_peer(
    "cueq-triangle",
    Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        devices=frozenset({"cuda"}),
        head_dims=(8, 128),
        head_dim_multiple=8,
        min_length=1,
        operands=frozenset({"mask", "pair_bias", "gate"}),
        gradients=frozenset({"q", "k", "v", "pair_bias", "gate"}),
        grouped_heads=False,
        lse=False,
        memory="linear",
        arithmetic=ARITHMETIC,
    ),
    _triangle,
)


def unit_tokens(length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The single representation ``[length, 2·length]`` and the layer norm's weight for it.

    After the norm, token n is the n-th unit vector and its negative: a weight ``[N, 2·length]``
    whose first half is ``x.T`` and whose second half is 0 makes of it the n-th row of ``x``.
    """
    unit = torch.eye(length, dtype=like.dtype, device=like.device)
    single = torch.cat([unit, -unit], dim=-1)
    # mean 0 and variance 1 / length for every token; the norm's epsilon of 1e-5 counts
    size = (1 / length + 1e-5) ** 0.5
    return single, torch.full((2 * length,), size, dtype=like.dtype, device=like.device)


def as_weight(x: Tensor) -> Tensor:
    """Operand ``[L, H, D]`` as the weight ``[H·D, 2·L]`` of a projection of :func:`unit_tokens`."""
    rows = x.flatten(1).T
    return torch.cat([rows, torch.zeros_like(rows)], dim=-1)


def _pair_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from cuequivariance_torch import attention_pair_bias

    B, S, L, H, D = q.shape
    bias = q.new_zeros(B, 1, H, L, L) if pair_bias is None else pair_bias
    kept = torch.ones(B, S, L, dtype=torch.bool, device=q.device) if mask is None else mask
    single, norm = unit_tokens(L, q)
    open_gate = q.new_zeros(H * D, 2 * L)  # a sigmoid of 0, made good for by doubling v
    identity = torch.eye(H * D, dtype=q.dtype, device=q.device)
    rows = [
        attention_pair_bias(
            single[None],
            bias[b],
            kept[b, s][None],
            H,
            norm,
            None,
            as_weight(q[b, s]),
            None,
            as_weight(k[b, s]),
            as_weight(2 * v[b, s]),
            open_gate,
            identity,
            attn_scale=scale,
            is_cached_z_proj=True,
        )[0]
        for b in range(B)
        for s in range(S)
    ]
    return torch.cat(rows).reshape(B, S, L, H, D)


ATTENTION_PAIR_BIAS = evoformer_peer(
    "cueq-pair-bias",
    Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        devices=frozenset({"cuda"}),
        min_length=1,
        cross_lengths=False,
        operands=frozenset({"mask", "pair_bias", "gate"}),
        gradients=frozenset({"q", "k", "v", "pair_bias", "gate"}),
        grouped_heads=False,
        lse=False,
        arithmetic=ARITHMETIC,
    ),
    _pair_bias,
)
