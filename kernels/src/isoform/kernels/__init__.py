"""Fast forms of the operations, in CUDA C++ compiled at run time: no nvcc, no build step.

The host side is here, the device side in ``isoform/kernels/cuda``. CuPy is imported where a kernel
is launched, PyTorch where its tensors come in, so this package can be imported on any machine.
"""

from isoform.kernels.attention import (
    attention,
    attention_backward,
    attention_block,
    attention_block_backward,
    attention_saved_backward,
    attention_vjp,
    explain_attention,
)
from isoform.kernels.evoformer import evoformer_attention, evoformer_attention_backward, explain
from isoform.kernels.fused import bias_dropout_residual, bias_gelu, layer_norm, masked_softmax
from isoform.kernels.rotary import (
    rotary_embedding,
    rotary_embedding_,
    rotary_embedding_backward,
    rotary_embedding_qk,
    rotary_embedding_qk_,
)

__all__ = [
    "attention",
    "attention_backward",
    "attention_block",
    "attention_block_backward",
    "attention_saved_backward",
    "attention_vjp",
    "bias_dropout_residual",
    "bias_gelu",
    "evoformer_attention",
    "evoformer_attention_backward",
    "explain",
    "explain_attention",
    "layer_norm",
    "masked_softmax",
    "rotary_embedding",
    "rotary_embedding_",
    "rotary_embedding_backward",
    "rotary_embedding_qk",
    "rotary_embedding_qk_",
]
