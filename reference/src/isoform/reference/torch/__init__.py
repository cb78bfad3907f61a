"""Every operation in plain PyTorch, under autograd, and the published layers that use them."""

from isoform.reference.torch.attention import (
    AttentionGradients,
    attention,
    attention_backward,
    attention_backward_tiled,
    attention_block,
    attention_block_backward,
    attention_block_backward_tiled,
    attention_block_tiled,
    attention_delta,
    attention_tiled,
)
from isoform.reference.torch.evoformer import (
    evoformer_attention,
    evoformer_attention_tiled,
    merge,
)
from isoform.reference.torch.rotary import (
    rotary_embedding,
    rotary_embedding_backward,
    rotary_tables,
)

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
    "evoformer_attention",
    "evoformer_attention_tiled",
    "merge",
    "rotary_embedding",
    "rotary_embedding_backward",
    "rotary_tables",
]
