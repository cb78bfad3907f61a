"""Every operation in plain PyTorch, under autograd, and the published layers that use them."""

from isoform.reference.torch.evoformer import (
    evoformer_attention,
    evoformer_attention_tiled,
    merge,
)

__all__ = ["evoformer_attention", "evoformer_attention_tiled", "merge"]
