"""trifast's ``triangle_attention``: Triton, for squares of n rows of n queries and n keys.

Its mask is True where a key is *dropped*. Other numbers of rows are brought to squares: rows are
added until they are a multiple of n, and every n of them are an example. What a call needs grows
with n² then, however few rows were asked for. A block of its kernel's holds a whole head dim, which
Triton takes as a power of two alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoform.conformance.peers.adapter import evoformer_peer
from isoform.reference.contract import Arithmetic, Capabilities


def squares(x: Tensor, n: int) -> Tensor:
    """``[B, S, …]`` as ``[B·C, n, …]``, rows of zeros added: C squares for each example."""
    rows = x.shape[1]
    padding = [0, 0] * (x.ndim - 2) + [0, -rows % n]
    return torch.nn.functional.pad(x, padding).reshape(-1, n, *x.shape[2:])


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
    from trifast import triangle_attention

    B, S, n, H, D = q.shape
    own = D**-0.5
    scaled = q if scale == own else q * (scale / own)
    dropped = q.new_zeros(B, S, n, dtype=torch.bool) if mask is None else ~mask
    bias = q.new_zeros(B, 1, H, n, n) if pair_bias is None else pair_bias
    per_example = -(-S // n)
    out: Tensor = triangle_attention(
        *(squares(x, n).permute(0, 3, 1, 2, 4) for x in (scaled, k, v)),  # [B·C, H, n, n, D]
        bias[:, 0].repeat_interleave(per_example, 0),
        squares(dropped, n),
    )
    return out.permute(0, 2, 3, 1, 4).reshape(B, per_example * n, n, H, D)[:, :S]


TRIFAST = evoformer_peer(
    "trifast",
    Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        devices=frozenset({"cuda"}),
        head_dims=(16, 128),
        head_dim_power_of_two=True,
        min_length=1,
        cross_lengths=False,
        operands=frozenset({"mask", "pair_bias", "gate"}),
        gradients=frozenset({"q", "k", "v", "pair_bias", "gate"}),
        grouped_heads=False,
        lse=False,
        memory="quadratic",
        arithmetic=Arithmetic(probabilities="operand", output="operand", dlogits="operand"),
    ),
    _attend,
)
