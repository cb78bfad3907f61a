"""This project's CUDA kernels, as implementations."""

from __future__ import annotations

from isoform.conformance.implementation import Implementation
from isoform.kernels import evoformer_attention, plain

CUDA_PLAIN = Implementation(
    name="cuda-plain",
    framework="torch",
    capabilities=plain.CAPABILITIES,
    forward=evoformer_attention,
)
