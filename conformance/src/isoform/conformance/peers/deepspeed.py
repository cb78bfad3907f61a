"""DeepSpeed's ``DS4Sci_EvoformerAttention``: compiled with nvcc and CUTLASS at the first call.

Its documentation asks for ``CUTLASS_PATH``; its code for more than 16 queries, as many keys, and
head dims up to 64 where there is a backward. It takes no bool mask: as in OpenFold, whose kernel it
was written for, a dropped key gets a bias of −10⁹ (float16 makes −inf of it).
"""

from __future__ import annotations

from torch import Tensor

from isoform.conformance.peers.adapter import evoformer_peer, mask_as_bias
from isoform.reference.contract import Arithmetic, Capabilities

DROPPED = -1e9


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

    # its scale is D**-0.5: any other is multiplied into the queries
    own = q.shape[-1] ** -0.5
    scaled = q if scale == own else q * (scale / own)
    bias = mask_as_bias(mask, mask_bias, q.dtype, DROPPED)
    out: Tensor = DS4Sci_EvoformerAttention(scaled, k, v, [bias, pair_bias])
    return out


DS4SCI = evoformer_peer(
    "ds4sci",
    Capabilities(
        "evoformer_attention",
        dtypes=frozenset({"float16", "bfloat16"}),
        devices=frozenset({"cuda"}),
        head_dims=(8, 64),
        head_dim_multiple=8,
        min_length=17,
        cross_lengths=False,
        grouped_heads=False,
        lse=False,
        memory="linear",
        arithmetic=Arithmetic(probabilities="operand", output="operand", dlogits="operand"),
    ),
    _attend,
)
