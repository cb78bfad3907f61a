"""This project's CUDA kernels, as implementations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from isoform.conformance.implementation import Implementation
from isoform.kernels import (
    attention,
    attention_plain,
    attention_tensor,
    evoformer_attention,
    plain,
    rotary_embedding,
    rotary_launch,
    tensor,
)
from isoform.kernels.attention_choice import CUDNN_CAPABILITIES, FLASH_CAPABILITIES

CAPABILITIES = replace(plain.CAPABILITIES, arithmetic=tensor.CAPABILITIES.arithmetic)
"""Of whichever kernel is chosen: the plain one does what the tensor-core one does not, and the
arithmetic of the latter is the less exact."""

CUDA_ROTARY = Implementation(
    name="cuda",
    framework="torch",
    capabilities=rotary_launch.CAPABILITIES,
    forward=rotary_embedding,
)

CUDA_ATTENTION = Implementation(
    name="cuda",
    framework="torch",
    capabilities=replace(
        attention_plain.CAPABILITIES,
        arithmetic=attention_tensor.CAPABILITIES.arithmetic,
        deterministic=False,  # where a library's kernel comes first
    ),
    forward=attention,
)
CUDA_PLAIN_ATTENTION = Implementation(
    name="cuda-plain",
    framework="torch",
    capabilities=attention_plain.CAPABILITIES,
    forward=partial(attention, kernel="cuda-plain"),
)

CUDA = Implementation(
    name="cuda",
    framework="torch",
    capabilities=CAPABILITIES,
    forward=evoformer_attention,
    others=(CUDA_ROTARY, CUDA_ATTENTION),
)
CUDA_PLAIN = Implementation(
    name="cuda-plain",
    framework="torch",
    capabilities=plain.CAPABILITIES,
    forward=partial(evoformer_attention, kernel="cuda-plain"),
    others=(CUDA_PLAIN_ATTENTION,),
)

CUDA_EAGER = Implementation(
    name="cuda-tensor-eager",
    framework="torch",
    capabilities=tensor.CAPABILITIES,
    forward=partial(evoformer_attention, kernel="cuda-tensor-eager"),
)

CUDA_FLASH, CUDA_CUDNN = (
    Implementation(name, "torch", capabilities, partial(attention, kernel=name))
    for name, capabilities in (
        ("cuda-flash", FLASH_CAPABILITIES),
        ("cuda-cudnn", CUDNN_CAPABILITIES),
    )
)
