"""The NumPy reference, plain and tiled, as implementations: the definition judged by itself.

Against its own oracle the plain form can only fail by being called wrongly; the tiled form shows
how far another order of summation leads.
"""

from __future__ import annotations

from isoform.conformance.implementation import Implementation
from isoform.reference.contract import Arithmetic, Capabilities
from isoform.reference.numpy import (
    evoformer_attention,
    evoformer_attention_backward,
    evoformer_attention_backward_tiled,
    evoformer_attention_tiled,
)

DOUBLE = Arithmetic(
    accumulate="float64",
    logits="float64",
    probabilities="float64",
    output="float64",
    cotangent="float64",
    dlogits="float64",
)

NUMPY = Implementation(
    name="numpy",
    framework="numpy",
    capabilities=Capabilities(
        "evoformer_attention", deterministic=True, memory="quadratic", arithmetic=DOUBLE
    ),
    forward=evoformer_attention,
    backward=evoformer_attention_backward,
)

NUMPY_TILED = Implementation(
    name="numpy-tiled",
    framework="numpy",
    capabilities=Capabilities(
        "evoformer_attention", deterministic=True, memory="linear", arithmetic=DOUBLE
    ),
    forward=evoformer_attention_tiled,
    backward=evoformer_attention_backward_tiled,
)
