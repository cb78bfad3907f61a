"""OpenFold 3's attention in PyTorch: in chunks of rows, and with little memory.

Both add biases to scaled logits; a dropped key gets a bias of −10⁹, as in the model, where float16
makes −inf of it. The low-memory form is for inference: in it, as in the model, no gradient is asked
for.
"""

from __future__ import annotations

from torch import Tensor

from isoform.conformance.peers.adapter import evoformer_peer, mask_as_bias
from isoform.reference.contract import Arithmetic, Capabilities

DROPPED = -1e9
CHUNK = 4
QUERY_CHUNK, KEY_CHUNK = 1024, 4096
"""Its own defaults."""

CHUNKED_CAPABILITIES = Capabilities(
    "evoformer_attention",
    dtypes=frozenset({"float32", "bfloat16"}),
    devices=frozenset({"cpu", "cuda"}),
    min_length=1,
    grouped_heads=False,
    lse=False,
    # plain PyTorch in the operands' dtype: every step is rounded to it, the softmax included
    arithmetic=Arithmetic(
        logits="operand",
        probabilities="operand",
        output="operand",
        cotangent="operand",
        dlogits="operand",
    ),
)
LOW_MEMORY_CAPABILITIES = Capabilities(
    "evoformer_attention",
    dtypes=frozenset({"float32", "bfloat16"}),
    devices=frozenset({"cpu", "cuda"}),
    min_length=1,
    gradients=frozenset(),
    grouped_heads=False,
    lse=False,
    arithmetic=Arithmetic(logits="operand", probabilities="operand", output="operand"),
)


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """The scaled q, k and v heads first, and the biases, as its own layer hands them over."""
    heads_first = [x.transpose(2, 3) for x in (q * scale, k, v)]
    biases = (mask_as_bias(mask, mask_bias, q.dtype, DROPPED), pair_bias)
    return heads_first, [bias for bias in biases if bias is not None]


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from openfold3.core.model.primitives.attention import attention_chunked_trainable

    operands, biases = _prepared(q, k, v, mask, mask_bias, pair_bias, scale)
    out: Tensor = attention_chunked_trainable(
        *operands, biases, chunk_size=CHUNK, chunk_dim=1, checkpoint=False
    )
    return out


def _low_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from openfold3.core.model.primitives.attention import _lma

    (qh, kh, vh), biases = _prepared(q, k, v, mask, mask_bias, pair_bias, scale)
    B, S, H, Q, _ = qh.shape
    # it slices biases by queries: they are expanded, as its layer does it
    wide = [bias.expand(B, S, H, Q, kh.shape[-2]) for bias in biases]
    out: Tensor = _lma(qh, kh, vh, wide, QUERY_CHUNK, KEY_CHUNK)
    return out.transpose(2, 3)


CHUNKED = evoformer_peer("openfold3-chunked", CHUNKED_CAPABILITIES, _chunked)
LOW_MEMORY = evoformer_peer("openfold3-lma", LOW_MEMORY_CAPABILITIES, _low_memory)
