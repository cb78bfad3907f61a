"""This project's CUDA kernels, as implementations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from isoform.conformance.implementation import Implementation
from isoform.kernels import evoformer_attention, plain, tensor

CAPABILITIES = replace(plain.CAPABILITIES, arithmetic=tensor.CAPABILITIES.arithmetic)
"""Of whichever kernel is chosen: the plain one does what the tensor-core one does not, and the
arithmetic of the latter is the less exact."""

CUDA = Implementation(
    name="cuda",
    framework="torch",
    capabilities=CAPABILITIES,
    forward=evoformer_attention,
)
CUDA_PLAIN = Implementation(
    name="cuda-plain",
    framework="torch",
    capabilities=plain.CAPABILITIES,
    forward=partial(evoformer_attention, kernel="cuda-plain"),
)
