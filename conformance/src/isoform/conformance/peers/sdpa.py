"""``torch.nn.functional.scaled_dot_product_attention``, one backend at a time.

Called by itself, SDPA takes whichever backend fits, and the plain one where none does: which kernel
was judged is then not known. Here it is one, and what that does not do is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.torch import merged
from isoform.conformance.peers.adapter import evoformer_peer
from isoform.reference.contract import Arithmetic, Capabilities

SHORT = frozenset({"float16", "bfloat16"})
PLAIN = Capabilities(
    "evoformer_attention",
    devices=frozenset({"cpu", "cuda"}),
    lse=False,
    min_length=1,
    memory="quadratic",
    # one additive mask in q's dtype; the plain backend rounds logits and probabilities to it
    arithmetic=Arithmetic(
        logits="operand", probabilities="operand", output="operand", dlogits="operand"
    ),
)
FUSED = replace(PLAIN, devices=frozenset({"cuda"}), memory="quadratic")


def _backend(name: str, backend: SDPBackend, capabilities: Capabilities) -> Implementation:
    def attend(
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
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                q.reshape(B * S, Q, H, D).transpose(1, 2),
                k.reshape(B * S, K, G, D).transpose(1, 2),
                v.reshape(B * S, K, G, D).transpose(1, 2),
                attn_mask=merged(q, mask, mask_bias, pair_bias),
                scale=scale,
                enable_gqa=G != H,
            )
        return out.transpose(1, 2).reshape(q.shape)

    return evoformer_peer(name, capabilities, attend)


MATH = _backend("sdpa-math", SDPBackend.MATH, PLAIN)
FLASH = _backend(
    "sdpa-flash",
    SDPBackend.FLASH_ATTENTION,
    replace(FUSED, dtypes=SHORT, operands=frozenset({"gate"}), memory="linear"),
)
EFFICIENT = _backend(
    "sdpa-efficient",
    SDPBackend.EFFICIENT_ATTENTION,
    replace(FUSED, dtypes=SHORT | {"float32"}, head_dim_multiple=8, grouped_heads=False),
)
CUDNN = _backend(
    "sdpa-cudnn",
    SDPBackend.CUDNN_ATTENTION,
    replace(
        FUSED,
        dtypes=SHORT,
        head_dims=(8, 128),
        head_dim_multiple=8,
        min_length=2,
        gradients=frozenset({"q", "k", "v", "gate"}),  # it declines a mask that is differentiated
    ),
)
