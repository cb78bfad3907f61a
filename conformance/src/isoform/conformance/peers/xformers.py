"""``xformers.ops.memory_efficient_attention``: one additive bias in q's dtype, rows as batch."""

from __future__ import annotations

import torch
from torch import Tensor

from isoform.conformance.implementations.torch import merged
from isoform.conformance.peers.adapter import evoformer_peer
from isoform.reference.contract import Arithmetic, Capabilities

ALIGNMENT = 8
"""Elements that the rows of a bias must be a multiple of in memory, and head dims, as its error
messages say (head dims of 4 in float32)."""


def aligned(bias: Tensor | None) -> Tensor | None:
    """``bias`` as a part of a wider one whose rows begin at multiples of :data:`ALIGNMENT`."""
    if bias is None:
        return None
    length = bias.shape[-1]
    wide = torch.nn.functional.pad(bias, (0, -length % ALIGNMENT))
    return wide[..., :length]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    B, S, Q, H, D = q.shape
    K = k.shape[2]
    out: Tensor = memory_efficient_attention(
        q.reshape(B * S, Q, H, D),
        k.reshape(B * S, K, H, D),
        v.reshape(B * S, K, H, D),
        attn_bias=aligned(merged(q, mask, mask_bias, pair_bias)),
        scale=scale,
    )
    return out.reshape(q.shape)


XFORMERS = evoformer_peer(
    "xformers",
    Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        devices=frozenset({"cuda"}),
        head_dim_multiple=ALIGNMENT,
        min_length=1,
        grouped_heads=False,
        lse=False,
        # one additive mask in q's dtype; δ is taken from the output as it was returned
        arithmetic=Arithmetic(
            logits="operand", probabilities="operand", output="operand", dlogits="operand"
        ),
    ),
    _attend,
)
