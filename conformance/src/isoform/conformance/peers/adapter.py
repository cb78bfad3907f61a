"""What is added around every peer's call, so that all are asked the same.

The call is checked, and what the peer does not declare is refused. Keys and values that the bool
mask drops are replaced by zeros, since 0·NaN is NaN in any matrix product. What has no contiguous
last axis is copied. The gate is applied in float32. All else, rows without a key and what does not
lie on 16 bytes included, is the peer's own doing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.torch import gated, require
from isoform.reference.contract import Capabilities
from isoform.reference.torch.evoformer import attended

Attend = Callable[..., Tensor]
"""``attend(q, k, v, *, mask, mask_bias, pair_bias, scale)``: the output ``[B, S, Q, H, D]`` without
the gate."""


def evoformer_peer(name: str, capabilities: Capabilities, attend: Attend) -> Implementation:
    """Evoformer attention made of a peer's function."""

    def forward(
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
        operands = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
        require(capabilities, name, q, k, v, scale, return_lse, operands)
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        out = attend(
            rows(q),
            rows(attended(k, mask)),
            rows(attended(v, mask)),
            mask=mask,
            mask_bias=None if mask_bias is None else rows(mask_bias),
            pair_bias=None if pair_bias is None else rows(pair_bias),
            scale=factor,
        )
        return gated(out, gate)

    return Implementation(name, "torch", capabilities, forward)


def rows(x: Tensor) -> Tensor:
    """``x``, or a copy where its last axis is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def mask_as_bias(
    mask: Tensor | None, mask_bias: Tensor | None, dtype: torch.dtype, dropped: float
) -> Tensor | None:
    """Mask and mask bias as one bias ``[B, S, 1, 1, K]``: ``dropped`` for the keys that the mask
    drops; None for none.
    """
    if mask is None:
        return mask_bias
    # rounded as a product would be, to −inf where ``dropped`` is past the dtype: filling refuses it
    bias = torch.where(mask, 0.0, dropped).to(dtype)[:, :, None, None, :]
    return bias if mask_bias is None else bias + mask_bias
