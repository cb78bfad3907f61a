"""What PyTorch offers for attention over a sequence: the reference, SDPA, FlexAttention.

SDPA knows a causal flag and a mask of size Q × K, FlexAttention any rule about two indices; neither
knows positions, segments or a query without a key. Each adapter says what it adds.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from isoform.conformance.implementation import Implementation
from isoform.reference.attention_contract import DIFFERENTIABLE, OPTIONS, Mask, attention_call
from isoform.reference.contract import Arithmetic, Call, Capabilities
from isoform.reference.torch import attention, attention_tiled
from isoform.reference.torch.attention import mask_of
from isoform.reference.torch.evoformer import attended

CAPABILITIES = Capabilities(
    "attention",
    devices=frozenset({"cpu", "cuda"}),
    operands=frozenset(OPTIONS),
    gradients=frozenset(DIFFERENTIABLE),
    deterministic=True,
)

REFERENCE_ATTENTION = Implementation("torch-reference", "torch", CAPABILITIES, attention)

TILED_ATTENTION = Implementation(
    "torch-tiled", "torch", replace(CAPABILITIES, memory="linear"), attention_tiled
)

SDPA_CAPABILITIES = replace(
    CAPABILITIES,
    lse=False,
    min_length=1,
    deterministic=False,
    # The backward takes δ from the output as it was returned.
    arithmetic=Arithmetic(
        logits="operand", probabilities="operand", output="operand", dlogits="operand"
    ),
)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` under the contract.

    Added around it: where causal alone is asked for, its flag does; else a mask of size Q × K is
    made of positions, segments and window. Padding, and queries without a key, are replaced by
    zeros before and after.

    Raises:
        Unsupported: lse is wanted, or an axis is empty.
    """
    options = {
        "causal": causal,
        "positions": positions,
        "key_positions": key_positions,
        "segments": segments,
        "key_segments": key_segments,
        "window": window,
        "scale": scale,
    }
    call, mask = _checked(SDPA_CAPABILITIES, "torch-sdpa", q, k, v, options, return_lse)
    # masked by its flag, logits are −inf before they are scaled: a scale of 0 makes them NaN, and a
    # negative one +inf
    flag = call.operands == {"causal"} and (scale is None or scale > 0)
    pairs = alive = None
    if call.operands and not flag:
        pairs = mask.pairs().expand(q.shape[0], -1, -1, -1)
        none_left = ~pairs.any(-1, keepdim=True)
        alive = ~none_left.transpose(1, 2)  # [B, Q, 1, 1]
        pairs = (
            pairs | none_left
        )  # these attend to all keys alike, and what they get is thrown away
    real = mask.real_keys()
    out = torch.nn.functional.scaled_dot_product_attention(
        (q if alive is None else torch.where(alive, q, 0.0)).transpose(1, 2),
        attended(k, real).transpose(1, 2),
        attended(v, real).transpose(1, 2),
        attn_mask=pairs,
        is_causal=flag,
        scale=None if scale is None else float(scale),
        enable_gqa=k.shape[2] != q.shape[2],
    ).transpose(1, 2)
    return out if alive is None else torch.where(alive, out, 0.0)


SDPA_ATTENTION = Implementation("torch-sdpa", "torch", SDPA_CAPABILITIES, sdpa)

FLEX_CAPABILITIES = replace(
    CAPABILITIES,
    devices=frozenset({"cpu"}),
    min_length=1,
    gradients=frozenset(),
    deterministic=False,
    arithmetic=Arithmetic(probabilities="operand"),
)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    window: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """``torch.nn.attention.flex_attention`` under the contract, not compiled: what a CPU without a
    compiler runs. It has no backward there.

    Added around it: positions, segments and window are a score function; padding, and queries
    without a key, are replaced by zeros.

    Raises:
        Unsupported: A gradient is wanted, or an axis is empty.
    """
    options = {
        "causal": causal,
        "positions": positions,
        "key_positions": key_positions,
        "segments": segments,
        "key_segments": key_segments,
        "window": window,
        "scale": scale,
    }
    _, mask = _checked(FLEX_CAPABILITIES, "torch-flex", q, k, v, options, return_lse)
    pairs = mask.pairs()
    alive = pairs.any(-1).transpose(1, 2)[..., None]
    examples = torch.arange(pairs.shape[0]).expand(q.shape[0])  # places may be one for all

    def score(s: Tensor, example: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(pairs[examples[example], 0, query, key], s, -torch.inf)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, aux = flex_attention(
            torch.where(alive, q, 0.0).transpose(1, 2),
            attended(k, mask.real_keys()).transpose(1, 2),
            attended(v, mask.real_keys()).transpose(1, 2),
            score_mod=score,
            scale=None if scale is None else float(scale),
            enable_gqa=k.shape[2] != q.shape[2],
            return_aux=AuxRequest(lse=True),
        )
    assert aux.lse is not None  # it was asked for
    return (out.transpose(1, 2), aux.lse) if return_lse else out.transpose(1, 2)


FLEX_ATTENTION = Implementation("torch-flex", "torch", FLEX_CAPABILITIES, flex)


def _checked(
    capabilities: Capabilities,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    return_lse: bool,
) -> tuple[Call, Mask]:
    """Check the call, decline what is not supported, and give the call and its mask."""
    call = attention_call(
        q,
        k,
        v,
        **options,
        lse=return_lse,
        device=getattr(q, "device", torch.device("cpu")).type,
        gradients=[
            key
            for key, x in (("q", q), ("k", k), ("v", v))
            if isinstance(x, Tensor) and x.requires_grad
        ],
    )
    capabilities.require(call, name)
    return call, mask_of(q, k, v, **options)
