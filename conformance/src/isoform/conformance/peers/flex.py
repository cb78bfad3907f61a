"""``torch.nn.attention.flex_attention`` compiled: what its authors recommend on a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from isoform.conformance.implementations.torch import score_of
from isoform.conformance.peers.adapter import evoformer_peer
from isoform.reference.contract import Arithmetic, Capabilities


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


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
    B, S, Q, H, D = q.shape
    K, G = k.shape[2:4]

    import torch._dynamo.config as compiler

    # every call is of other sizes: past the limit PyTorch would run it uncompiled, and not say so
    limits: dict[str, Any] = dict.fromkeys(
        ("recompile_limit", "accumulated_recompile_limit"), 100_000
    )
    with compiler.patch(limits | {"fail_on_recompile_limit_hit": True}):
        out: Tensor = _compiled()(
            q.reshape(B * S, Q, H, D).transpose(1, 2),
            k.reshape(B * S, K, G, D).transpose(1, 2),
            v.reshape(B * S, K, G, D).transpose(1, 2),
            score_mod=score_of(k, mask, mask_bias, pair_bias),
            scale=scale,
            enable_gqa=G != H,
        )
    return out.transpose(1, 2).reshape(q.shape)


FLEX_COMPILED = evoformer_peer(
    "flex-compiled",
    Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        devices=frozenset({"cuda"}),
        head_dims=(16, 256),
        lse=False,
        min_length=1,
        memory="linear",
        arithmetic=Arithmetic(probabilities="operand", output="operand", dlogits="operand"),
    ),
    _attend,
)
