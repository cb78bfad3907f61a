"""Autograd for sequence-parallel attention: PyTorch calls the strategies' own backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vjp: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, ctx.take_back = vjp(q.detach(), k.detach(), v.detach())
        ctx.save_for_backward(q, k, v)
        # Another tensor than the one that the backward keeps: that one would keep itself alive.
        return cast(Tensor, out.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        _ = ctx.saved_tensors  # raises where q, k or v were changed in the meantime
        dq, dk, dv = ctx.take_back(dout.contiguous())
        return None, dq, dk, dv


def apply(vjp: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output of ``vjp(q, k, v)``, differentiable once.

    Its backward is collective, as all that autograd does on one rank only is not.
    """
    return cast(Tensor, _Attention.apply(vjp, q, k, v))  # type: ignore[no-untyped-call]
