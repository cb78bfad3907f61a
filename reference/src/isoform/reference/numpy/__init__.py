"""The oracle: every operation in plain NumPy, computed in float64, with hand-derived gradients."""

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

__all__ = [
    "Gradients",
    "evoformer_attention",
    "evoformer_attention_backward",
    "evoformer_attention_backward_tiled",
    "evoformer_attention_tiled",
    "merge",
]
