"""The NumPy reference, plain and tiled, as implementations: the definition judged by itself.

Against its own oracle the plain form can only fail by being called wrongly; the tiled form shows
how far another order of summation leads.
"""

from __future__ import annotations

from dataclasses import replace

from isoform.conformance.implementation import Implementation
from isoform.reference import attention_contract
from isoform.reference.contract import Arithmetic, Capabilities
from isoform.reference.numpy import (
    attention,
    attention_backward,
    attention_backward_tiled,
    attention_tiled,
    evoformer_attention,
    evoformer_attention_backward,
    evoformer_attention_backward_tiled,
    evoformer_attention_tiled,
    rotary_embedding,
    rotary_embedding_backward,
)
from isoform.reference.rotary_contract import ALL_FEATURES

DOUBLE = Arithmetic(
    accumulate="float64",
    logits="float64",
    probabilities="float64",
    output="float64",
    cotangent="float64",
    dlogits="float64",
)

NUMPY_ROTARY = Implementation(
    name="numpy",
    framework="numpy",
    capabilities=Capabilities(
        "rotary_embedding",
        operands=ALL_FEATURES,
        gradients=frozenset({"x"}),
        lse=False,
        deterministic=True,
        memory="linear",
        arithmetic=DOUBLE,
    ),
    forward=rotary_embedding,
    backward=rotary_embedding_backward,
)

ATTENTION_CAPABILITIES = Capabilities(
    "attention",
    operands=frozenset(attention_contract.OPTIONS),
    gradients=frozenset(attention_contract.DIFFERENTIABLE),
    deterministic=True,
    arithmetic=DOUBLE,
)

NUMPY_ATTENTION = Implementation(
    name="numpy",
    framework="numpy",
    capabilities=ATTENTION_CAPABILITIES,
    forward=attention,
    backward=attention_backward,
)

NUMPY_ATTENTION_TILED = Implementation(
    name="numpy-tiled",
    framework="numpy",
    capabilities=replace(ATTENTION_CAPABILITIES, memory="linear"),
    forward=attention_tiled,
    backward=attention_backward_tiled,
)

NUMPY = Implementation(
    name="numpy",
    framework="numpy",
    capabilities=Capabilities(
        "evoformer_attention", deterministic=True, memory="quadratic", arithmetic=DOUBLE
    ),
    forward=evoformer_attention,
    backward=evoformer_attention_backward,
    others=(NUMPY_ROTARY, NUMPY_ATTENTION),
)

NUMPY_TILED = Implementation(
    name="numpy-tiled",
    framework="numpy",
    capabilities=Capabilities(
        "evoformer_attention", deterministic=True, memory="linear", arithmetic=DOUBLE
    ),
    forward=evoformer_attention_tiled,
    backward=evoformer_attention_backward_tiled,
    others=(NUMPY_ATTENTION_TILED,),
)
