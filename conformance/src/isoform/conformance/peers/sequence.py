"""Attention over ranks, of others: each rank has its shard of the sequence.

They have the form in which this project's strategies are judged (:mod:`isoform.conformance.ranks`):
the judge's one call becomes one on each rank. Those ranks are processors, joined by gloo; these
packages call kernels of a GPU, so they are *not run here* until the suite has ranks of GPUs. Each
wants the sequence cut into equal shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from isoform.conformance.implementation import Implementation
from isoform.conformance.ranks import CAPABILITIES, Ranks, over_ranks
from isoform.reference.contract import Arithmetic

RANKS = Ranks(2, "torch")

FUSED = replace(
    CAPABILITIES,
    dtypes=frozenset({"float16", "bfloat16"}),
    devices=frozenset({"cuda"}),
    head_dims=(8, 256),
    head_dim_multiple=8,
    operands=frozenset({"causal"}),
    min_length=1,
    grouped_heads=False,
    deterministic=False,
    arithmetic=Arithmetic(probabilities="operand", output="operand", dlogits="operand"),
)

Attend = Callable[..., Tensor]
"""``attend(q, k, v, *, causal, scale)`` on one rank's shards ``[B, L/P, H, D]``."""


def _vjp(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    comm: Any,
    sharding: Any,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """The output's shard, and the gradients by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out = attend(*leaves, causal=causal, scale=factor)
    return out.detach(), lambda dout: torch.autograd.grad(out, leaves, dout)


def _local(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """What each rank computes on all of the sequence, for a part of the heads."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


def _deepspeed_ulysses(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(verbose=False)
    local = partial(_local, causal=causal, scale=scale)
    layer = DistributedAttention(local, torch.distributed.group.WORLD, scatter_idx=2, gather_idx=1)
    out: Tensor = layer(q, k, v, 0)
    return out


def _yunchang_ulysses(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    layer = UlyssesAttention(torch.distributed.group.WORLD, attn_type=AttnType.TORCH_FLASH)
    out: Tensor = layer(q, k, v, causal=causal, softmax_scale=scale)
    return out


def _yunchang_ring(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    from yunchang import ring_pytorch_attn_func

    out: Tensor = ring_pytorch_attn_func(
        q, k, v, softmax_scale=scale, causal=causal, group=torch.distributed.group.WORLD
    )
    return out


def _ring_flash_attn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    from ring_flash_attn import zigzag_ring_flash_attn_func

    out: Tensor = zigzag_ring_flash_attn_func(
        q, k, v, softmax_scale=scale, causal=causal, group=torch.distributed.group.WORLD
    )
    return out


@cache
def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda", (torch.distributed.get_world_size(),))


def _context_parallel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    from torch.distributed.tensor.experimental import context_parallel

    mesh = _mesh()
    # The shards are made already; that they lie zigzag it tells from a buffer that it may cut.
    cut = torch.empty(mesh.size() * q.shape[1], device=q.device)
    with context_parallel(mesh, buffers=[cut], buffer_seq_dims=[0], no_restore_buffers={cut}):
        return _local(q, k, v, causal=causal, scale=scale)


def _over(name: str, attend: Attend, kind: str) -> Implementation:
    return over_ranks(name, partial(_vjp, attend), kind, capabilities=FUSED, ranks=RANKS)


DEEPSPEED_ULYSSES = _over("deepspeed-ulysses", _deepspeed_ulysses, "contiguous")
YUNCHANG_ULYSSES = _over("yunchang-ulysses", _yunchang_ulysses, "contiguous")
YUNCHANG_RING = _over("yunchang-ring", _yunchang_ring, "contiguous")
CONTEXT_PARALLEL = _over("torch-context-parallel", _context_parallel, "zigzag")
RING_FLASH_ATTN = _over("ring-flash-attn", _ring_flash_attn, "zigzag")
