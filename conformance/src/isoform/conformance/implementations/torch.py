"""What PyTorch offers, as implementations: the reference, SDPA, FlexAttention.

PyTorch's own functions know one additive mask or a score function, no gate and no rule for rows
without a key; each adapter says what it adds, and declares what is left unsupported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.torch_attention import (
    FLEX_ATTENTION,
    REFERENCE_ATTENTION,
    SDPA_ATTENTION,
    TILED_ATTENTION,
)
from isoform.reference.contract import Arithmetic, Capabilities, evoformer_call
from isoform.reference.rotary_contract import ALL_FEATURES
from isoform.reference.torch import (
    evoformer_attention,
    evoformer_attention_tiled,
    rotary_embedding,
)
from isoform.reference.torch.evoformer import attended

NAME = "evoformer_attention"
DEVICES = frozenset({"cpu", "cuda"})
CONTIGUOUS = torch.contiguous_format

ROTARY = Implementation(
    name="torch-reference",
    framework="torch",
    capabilities=Capabilities(
        "rotary_embedding",
        devices=DEVICES,
        operands=ALL_FEATURES,
        gradients=frozenset({"x"}),
        lse=False,
        deterministic=True,
        memory="linear",
    ),
    forward=rotary_embedding,
)

REFERENCE = Implementation(
    name="torch-reference",
    framework="torch",
    capabilities=Capabilities(NAME, devices=DEVICES, memory="quadratic", deterministic=True),
    forward=evoformer_attention,
    others=(ROTARY, REFERENCE_ATTENTION),
)

TILED = Implementation(
    name="torch-tiled",
    framework="torch",
    capabilities=Capabilities(NAME, devices=DEVICES, memory="linear", deterministic=True),
    forward=evoformer_attention_tiled,
    others=(TILED_ATTENTION,),
)

SDPA_CAPABILITIES = Capabilities(
    NAME,
    devices=DEVICES,
    lse=False,
    min_length=1,
    memory="quadratic",
    # One additive mask in q's dtype: the sum of the biases is rounded to it. And the backward takes
    # δ from the output as it was returned.
    arithmetic=Arithmetic(
        logits="operand", probabilities="operand", output="operand", dlogits="operand"
    ),
)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` under the contract.

    Added around it: rows become batch, all biases and the mask are merged into one additive mask,
    dropped keys and values are replaced by zeros, on a GPU what does not lie as its kernels want it
    is copied, the gate is applied.

    Raises:
        Unsupported: lse is wanted, or an axis is empty.
    """
    operands = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    require(SDPA_CAPABILITIES, "torch-sdpa", q, k, v, scale, return_lse, operands)
    heads_first = [
        on_16_bytes(x.flatten(0, 1)).transpose(1, 2)
        for x in (q, attended(k, mask), attended(v, mask))
    ]
    out = torch.nn.functional.scaled_dot_product_attention(
        heads_first[0],
        heads_first[1],
        heads_first[2],
        attn_mask=merged(q, mask, mask_bias, pair_bias),
        scale=None if scale is None else float(scale),
        enable_gqa=k.shape[3] != q.shape[3],
    )
    return gated(out.transpose(1, 2).reshape(q.shape), gate)


SDPA = Implementation("torch-sdpa", "torch", SDPA_CAPABILITIES, sdpa, others=(SDPA_ATTENTION,))

FLEX_CAPABILITIES = Capabilities(
    NAME,
    min_length=1,
    gradients=frozenset(),
    memory="quadratic",
    arithmetic=Arithmetic(probabilities="operand"),
)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """``torch.nn.attention.flex_attention`` under the contract, not compiled: what a CPU without a
    compiler runs. It has no backward there.

    Added around it: rows become batch, the biases and the mask are a score function, dropped keys
    and values are replaced by zeros, the gate is applied.

    Raises:
        Unsupported: A gradient is wanted, or an axis is empty.
    """
    operands = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    require(FLEX_CAPABILITIES, "torch-flex", q, k, v, scale, return_lse, operands)
    B, S, Q, H, D = q.shape
    K, G = k.shape[2:4]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, aux = flex_attention(
            q.reshape(B * S, Q, H, D).transpose(1, 2),
            attended(k, mask).reshape(B * S, K, G, D).transpose(1, 2),
            attended(v, mask).reshape(B * S, K, G, D).transpose(1, 2),
            score_mod=score_of(k, mask, mask_bias, pair_bias),
            scale=None if scale is None else float(scale),
            enable_gqa=G != H,
            return_aux=AuxRequest(lse=True),
        )
    out = gated(out.transpose(1, 2).reshape(q.shape), gate)
    assert aux.lse is not None  # it was asked for
    return (out, aux.lse.reshape(B, S, H, Q)) if return_lse else out


FLEX = Implementation("torch-flex", "torch", FLEX_CAPABILITIES, flex, others=(FLEX_ATTENTION,))


def require(
    capabilities: Capabilities,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    return_lse: bool,
    operands: dict[str, Tensor | None],
) -> None:
    """Check the call of Evoformer attention, and decline what is not supported."""
    named: dict[str, Any] = {"q": q, "k": k, "v": v, **operands}
    call = evoformer_call(
        **named,
        scale=scale,
        lse=return_lse,
        device=getattr(q, "device", torch.device("cpu")).type,
        gradients=wanted(named),
    )
    capabilities.require(call, name)


def wanted(operands: Mapping[str, Any]) -> list[str]:
    """The operands that a gradient is wanted for."""
    return [name for name, x in operands.items() if isinstance(x, Tensor) and x.requires_grad]


def on_16_bytes(x: Tensor) -> Tensor:
    """``x``, or on a GPU a copy where it, or one of its rows, does not begin on 16 bytes: of such,
    PyTorch 2.11 hands cuDNN what it misreads, and finds no kernel in float32.
    """
    return x if x.device.type == "cpu" or aligned(x) else x.clone(memory_format=CONTIGUOUS)


def aligned(x: Tensor) -> bool:
    """Whether ``x`` and all its rows begin on 16 bytes, and rows are contiguous."""
    steps = [x.stride(axis) for axis in range(x.ndim - 1) if x.shape[axis] > 1]
    starts = [x.data_ptr(), *(step * x.element_size() for step in steps)]
    return x.stride(-1) == 1 and all(start % 16 == 0 for start in starts)


def merged(
    q: Tensor, mask: Tensor | None, mask_bias: Tensor | None, pair_bias: Tensor | None
) -> Tensor | None:
    """One additive mask ``[B·S, H, Q, K]`` in q's dtype, −inf for dropped keys whatever their bias;
    None for none.
    """
    B, S, Q, H, _ = q.shape
    given = [x for x in (mask_bias, pair_bias) if x is not None]
    if mask is not None:
        kept = mask[:, :, None, None, :]
        bias = sum(given[1:], start=given[0]) if given else q.new_zeros(())
        total = torch.where(kept, bias, -torch.inf)
    elif given:
        total = sum(given[1:], start=given[0])
    else:
        return None
    return total.expand(B, S, H, Q, total.shape[-1]).reshape(B * S, H, Q, -1)


def score_of(
    k: Tensor, mask: Tensor | None, mask_bias: Tensor | None, pair_bias: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The biases and the mask as a score function of FlexAttention's, whose batch is B·S rows.

    It indexes its tensors as they are: their shapes are changed before. What a compiled score
    function did to a bias before it indexed it would come between the scattered gradient and the
    end of its backward, which FlexAttention takes for a tensor that is indexed twice, and refuses.
    """
    B, S, K = k.shape[:3]
    row_mask = None if mask is None else mask.reshape(B * S, K)
    row_bias = None if mask_bias is None else mask_bias.reshape(B * S, K)

    def score(s: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if row_bias is not None:
            s = s + row_bias[row, key]
        if pair_bias is not None:
            s = s + pair_bias[row // S, 0, head, query, key]
        if row_mask is not None:
            s = torch.where(row_mask[row, key], s, -torch.inf)
        return s

    return score


def gated(out: Tensor, gate: Tensor | None) -> Tensor:
    """The output times the gate's sigmoid, computed in float32 at least."""
    if gate is None:
        return out
    wide = torch.promote_types(out.dtype, torch.float32)
    return (out.to(wide) * torch.sigmoid(gate.to(wide))).to(out.dtype)
