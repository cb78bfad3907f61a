"""Rotary embeddings of others: transformers (as in its Llama) and flash-attn.

Both make tables of cosines and sines from angles in float32, in the dtype of what is turned, and
multiply in that dtype. That is what is judged: positions far out, and the rounding of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.torch import wanted
from isoform.reference.contract import Arithmetic, Capabilities
from isoform.reference.rotary_contract import BASIC, PARTIAL, rotary_call

SHORT = frozenset({"float16", "bfloat16", "float32"})


def _checked(
    capabilities: Capabilities, name: str, x: Any, positions: Any, options: dict[str, Any]
) -> None:
    """Check the call, and decline what is not supported."""
    call = rotary_call(
        x,
        positions,
        **options,
        device=getattr(x, "device", torch.device("cpu")).type,
        gradients=wanted({"x": x}),
    )
    capabilities.require(call, name)


TRANSFORMERS_CAPABILITIES = Capabilities(
    "rotary_embedding",
    dtypes=SHORT,
    devices=frozenset({"cpu", "cuda"}),
    head_dims=(2, 256),
    operands=BASIC,
    gradients=frozenset({"x"}),
    lse=False,
    deterministic=True,
    memory="linear",
    arithmetic=Arithmetic(accumulate="operand"),
)


def _transformers(
    x: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Any = None,
) -> Tensor:
    options = {"base": base, "rotary_dim": rotary_dim, "layout": layout, "scaling": scaling}
    _checked(TRANSFORMERS_CAPABILITIES, "transformers-rotary", x, positions, options)
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        head_dim=x.shape[-1], rope_parameters={"rope_type": "default", "rope_theta": float(base)}
    )
    ids = positions if positions.ndim == 2 else positions[None].expand(x.shape[0], -1)
    cos, sin = LlamaRotaryEmbedding(config).to(x.device)(x, ids)
    turned: Tensor = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]
    return turned


TRANSFORMERS = Implementation(
    "transformers-rotary", "torch", TRANSFORMERS_CAPABILITIES, _transformers
)

FLASH_ATTN_CAPABILITIES = Capabilities(
    "rotary_embedding",
    dtypes=SHORT,
    devices=frozenset({"cuda"}),
    head_dims=(2, 256),
    min_length=1,
    operands=frozenset({"layout=half", "layout=interleaved", PARTIAL}),
    gradients=frozenset({"x"}),
    lse=False,
    memory="linear",
    arithmetic=Arithmetic(accumulate="operand"),
)


def _flash_attn(
    x: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Any = None,
) -> Tensor:
    options = {"base": base, "rotary_dim": rotary_dim, "layout": layout, "scaling": scaling}
    _checked(FLASH_ATTN_CAPABILITIES, "flash-attn-rotary", x, positions, options)
    from flash_attn.layers.rotary import apply_rotary_emb

    d = x.shape[-1] if rotary_dim is None else rotary_dim
    channels = torch.arange(0, d, 2, device=x.device, dtype=torch.float32)
    angles = torch.outer(positions.float(), 1.0 / (base ** (channels / d)))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned: Tensor = apply_rotary_emb(x, cos, sin, interleaved=layout == "interleaved")
    return turned


FLASH_ATTN = Implementation("flash-attn-rotary", "torch", FLASH_ATTN_CAPABILITIES, _flash_attn)
