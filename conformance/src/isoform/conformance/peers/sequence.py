"""Attention over ranks, of others: each rank has its shard of the sequence.

They have the form in which this project's strategies are judged (:mod:`isoform.conformance.ranks`):
the judge's one call becomes one on each rank. These packages call kernels of a GPU, so each rank is
a process with one, joined by NCCL; packages find the process group that is there. Each wants the
sequence cut into equal shards, which lie in memory as they are made. Their gradients are
autograd's. What a rank computes by itself is PyTorch's attention, its flash kernel where the
package has a say; yunchang documents no gradients with it, and has them with flash-attn alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from isoform.conformance.implementation import Implementation
from isoform.conformance.peers import RANKS
from isoform.conformance.ranks import CAPABILITIES, Ranks, over_ranks
from isoform.reference.contract import Arithmetic, Capabilities

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
FORWARD = replace(FUSED, gradients=frozenset())

LIMIT = 120.0
"""Seconds for a call; the first one imports the package and makes NCCL's communicators."""

Attend = Callable[..., Tensor]
"""``attend(q, k, v, *, causal, scale)`` on one rank's shards ``[B, L/P, H, D]``."""

Within = Callable[[Tensor, bool], AbstractContextManager[None]]
"""``within(q, causal)``: what a rank's forward and backward are both done in."""


def _anywhere(q: Tensor, causal: bool) -> AbstractContextManager[None]:
    return nullcontext()


def _vjp(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    comm: Any,
    sharding: Any,
    within: Within = _anywhere,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """The output's shard, and the gradients by autograd."""
    # NCCL sends what is contiguous
    leaves = [
        x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)
    ]
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with within(q, causal):
        out = attend(*leaves, causal=causal, scale=factor)

    def backward(dout: Tensor) -> Sequence[Tensor]:
        with within(q, causal):
            return torch.autograd.grad(out, leaves, dout.contiguous())

    return out.detach(), backward


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
        deepspeed.comm.init_distributed(verbose=False)  # takes the group that is there
    local = partial(_local, causal=causal, scale=scale)
    layer = DistributedAttention(local, torch.distributed.group.WORLD, scatter_idx=2, gather_idx=1)
    out: Tensor = layer(q, k, v, 0)
    return out


@cache
def _all_ulysses() -> None:
    """Tell yunchang that all ranks exchange heads, and none is in a ring with another."""
    from yunchang import set_seq_parallel_pg

    ranks = torch.distributed.get_world_size()
    set_seq_parallel_pg(ranks, 1, torch.distributed.get_rank(), ranks)


def _yunchang_ulysses(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    # not its UlyssesAttention: that takes PyTorch's attention for a ring over all ranks
    from yunchang import LongContextAttention
    from yunchang.kernels import AttnType

    _all_ulysses()
    layer = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.TORCH_FLASH)
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
def _mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (torch.distributed.get_world_size(),))


@contextmanager
def _context_parallel(q: Tensor, causal: bool) -> Iterator[None]:
    """Where PyTorch's attention is a ring's; its backward is dispatched by this too."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = _mesh(q.device.type)
    # The shards are made already; that they lie zigzag it tells from a buffer that it may cut.
    cut = torch.empty(mesh.size() * q.shape[1], device=q.device)
    balanced = _cp_options.enable_load_balance
    _cp_options.enable_load_balance = causal  # it refuses to balance what is balanced
    try:
        with (
            context_parallel(mesh, buffers=[cut], buffer_seq_dims=[0], no_restore_buffers={cut}),
            sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        ):
            yield
    finally:
        _cp_options.enable_load_balance = balanced


PARTS = {"contiguous": 1, "zigzag": 2}
"""Equal parts of a rank's shard."""


def _over(
    name: str, attend: Attend, kind: str, declared: Capabilities = FUSED, **more: Any
) -> Implementation:
    return over_ranks(
        name,
        partial(_vjp, attend, **more),
        kind,
        capabilities=declared,
        ranks=Ranks(RANKS, "torch-nccl", LIMIT),
        parts=PARTS[kind],
    )


DEEPSPEED_ULYSSES = _over("deepspeed-ulysses", _deepspeed_ulysses, "contiguous")
YUNCHANG_ULYSSES = _over("yunchang-ulysses", _yunchang_ulysses, "contiguous", FORWARD)
YUNCHANG_RING = _over("yunchang-ring", _yunchang_ring, "contiguous", FORWARD)
CONTEXT_PARALLEL = _over("torch-context-parallel", _local, "zigzag", within=_context_parallel)
RING_FLASH_ATTN = _over("ring-flash-attn", _ring_flash_attn, "zigzag")
