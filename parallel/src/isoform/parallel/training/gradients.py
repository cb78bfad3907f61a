"""Gradients of parameters that all ranks have, summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from isoform.parallel.communicator import Communicator
from isoform.parallel.training.model import TrainingLM

BUCKET = 1 << 25
"""Numbers that are summed at once."""


def sum_gradients(model: TrainingLM, comm: Communicator) -> None:
    """Replace gradients by their sums over ranks, bit for bit the same on all. Collective.

    Losses of ranks add up to one loss, so gradients do too. Rows of a partitioned table are left
    alone: their owner has been sent all that belongs to them. A parameter without a gradient on
    this rank, as one that holds no token, counts as 0.

    Args:
        model: The rank's model, after its backward.
        comm: The ranks that share a sequence; and of what other ranks share, have the same part.
    """
    for parameter in model.replicated():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_tensors((local(p.grad) for p in model.replicated() if p.grad is not None), comm)


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor that PyTorch's engines share; others as they are."""
    return x.to_local() if isinstance(x, DTensor) else x


def sum_tensors(gradients: Iterable[Tensor], comm: Communicator) -> None:
    """Replace tensors by their sums over ranks, bit for bit the same on all. Collective.

    Args:
        gradients: Of the same shapes and dtypes on all ranks, in the same order.
        comm: The ranks.
    """
    if comm.size == 1:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        held = sum(one.numel() for one in bucket)
        if bucket and (held + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
            _sum(bucket, comm)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum(bucket, comm)


def _sum(gradients: list[Tensor], comm: Communicator) -> None:
    """A reduce-scatter, of parts that may be uneven, and an all-gather: each rank adds up one part,
    in the order of ranks.
    """
    flat = torch.cat([one.reshape(-1) for one in gradients])
    parts = [*flat.tensor_split(comm.size)]
    own = comm.all_to_all(parts, [tuple(parts[comm.rank].shape)] * comm.size, operation="gradients")
    total = own[0].to(torch.promote_types(flat.dtype, torch.float32), copy=True)
    for part in own[1:]:
        total += part
    found = comm.all_gather(
        total.to(flat.dtype), [tuple(part.shape) for part in parts], operation="gradients"
    )
    summed = torch.cat(found)
    for one, part in zip(
        gradients, torch.split(summed, [g.numel() for g in gradients]), strict=True
    ):
        one.copy_(part.view_as(one))
