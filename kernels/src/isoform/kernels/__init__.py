"""Fast forms of the operations, in CUDA C++ compiled at run time: no nvcc, no build step.

The host side is here, the device side in ``isoform/kernels/cuda``. CuPy is imported where a kernel
is launched, PyTorch where its tensors come in, so this package can be imported on any machine.
"""

from isoform.kernels.evoformer import evoformer_attention, evoformer_attention_backward, explain

__all__ = ["evoformer_attention", "evoformer_attention_backward", "explain"]
