"""The oracle: every operation in plain NumPy, computed in float64, with hand-derived gradients."""

from isoform.reference.numpy.attention import (
    AttentionGradients,
    attention,
    attention_backward,
    attention_block,
    attention_block_backward,
    attention_delta,
)
from isoform.reference.numpy.attention_tiled import (
    attention_backward_tiled,
    attention_block_backward_tiled,
    attention_block_tiled,
    attention_tiled,
)
from isoform.reference.numpy.evoformer import (
    Gradients,
    evoformer_attention,
    evoformer_attention_backward,
)
from isoform.reference.numpy.evoformer_tiled import (
    evoformer_attention_backward_tiled,
    evoformer_attention_tiled,
    merge,
)
from isoform.reference.numpy.rotary import (
    rotary_embedding,
    rotary_embedding_backward,
    rotary_tables,
)

__all__ = [
    "AttentionGradients",
    "Gradients",
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
    "evoformer_attention_backward",
    "evoformer_attention_backward_tiled",
    "evoformer_attention_tiled",
    "merge",
    "rotary_embedding",
    "rotary_embedding_backward",
    "rotary_tables",
]
