"""The kernels of attention that PyTorch brings along: flash attention, and cuDNN's.

They attend from all queries to all keys, or causally where both are the same tokens, and take
[B, H, L, D]. What is added here is what the contract asks for besides: rows that lie as they can be
read, and lse where a row has no sum (rules SEQ-5 and SEQ-9).
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten

MISSING: dict[str, tuple[str, ...]] = {
    "cuda-flash": ()
    if torch.backends.cuda.is_flash_attention_available()
    else ("this PyTorch is built without flash attention",),
    "cuda-cudnn": ()
    if torch.version.cuda and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    else ("this PyTorch is built without cuDNN",),
}
"""Why a kernel is not to be had on this machine, by its name."""


def forward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]``, contiguous, and ``lse [B, H, Q]``.

    Args:
        kernel: ``"cuda-flash"`` or ``"cuda-cudnn"``.
        q: ``[B, Q, H, D]``.
        k: ``[B, K, H, D]``.
        v: ``[B, K, H, D]``.
        causal: Query i attends to keys 0 … i.
        scale: Factor of the logits, positive.
    """
    rows = [_readable(x).transpose(1, 2) for x in (q, k, v)]
    if kernel == "cuda-flash":
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(
            *rows, 0.0, causal, False, scale=scale
        )
    else:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            *rows, None, True, 0.0, causal, False, scale=scale
        )
    out = out.transpose(1, 2).contiguous()
    return out, _regular(lse.reshape(out.shape[0], out.shape[2], -1)[..., : out.shape[1]], out)


def backward(
    kernel: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` in the shapes of q, k and v.

    Args:
        kernel, q, k, v, causal, scale: As in :func:`forward`.
        dout: Gradient of the loss by ``out``.
        out: What the forward gave.
        lse: What the forward gave.
    """
    rows = [_readable(x).transpose(1, 2) for x in (dout, q, k, v, out)]
    lengths = q.shape[1], k.shape[1]
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    lse = lse.contiguous()
    if kernel == "cuda-flash":
        found = _aten._scaled_dot_product_flash_attention_backward(
            *rows, lse, None, None, *lengths, 0.0, causal, unused, unused, scale=scale
        )
    else:
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            *rows,
            lse[..., None],
            *(unused, unused),
            *(None, None, None),
            *lengths,
            *(0.0, causal),
            scale=scale,
        )
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    """``x``, or a copy where its rows do not begin on 16 bytes or are not contiguous."""
    *steps, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _regular(lse: Tensor, out: Tensor) -> Tensor:
    """``lse``, −inf of a query whose logits are all −inf and NaN of one that has NaN.

    The libraries give +inf for both. Of the former, out is 0.
    """
    lost = torch.isposinf(lse)
    without_sum = torch.where((out[..., 0] == 0).transpose(1, 2), -torch.inf, torch.nan)
    return torch.where(lost, without_sum, lse)
