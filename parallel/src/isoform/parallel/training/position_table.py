"""A learned position table of which each rank has some rows, and of their gradient as many.

Rows are divided as tokens are. So where a sequence is as long as the table, each rank has the rows
of its own tokens and nothing is sent. Else rows travel from their owners, and gradients back.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoform.parallel.communicator import Communicator
from isoform.parallel.sharding import Sharding
from isoform.parallel.training.recompute import wide


class PartitionedTable(nn.Module):
    """This rank's rows of a table of vectors.

    Args:
        rows: Which rows each rank has.
        channels: Of a row.
        comm: The ranks.

    Attributes:
        weight: ``[rows of this rank, channels]``.
    """

    def __init__(self, rows: Sharding, channels: int, comm: Communicator) -> None:
        super().__init__()
        if rows.ranks != comm.size:
            raise ValueError(f"the rows are for {rows.ranks} ranks, but there are {comm.size}")
        self.rows, self.comm = rows, comm
        self.weight = nn.Parameter(torch.empty(rows.lengths[comm.rank], channels))

    def forward(self, positions: Tensor, sharding: Sharding | None) -> Tensor:
        """The vectors of ``positions``, in their shape and one more axis. Collective.

        Args:
            positions: int64, each of a row that there is.
            sharding: That whose positions they are, None for any.
        """
        if sharding == self.rows:
            return self.weight  # row for row, in order
        asked, places = torch.unique(positions, return_inverse=True)
        found = _Rows.apply(self.weight, asked, self.rows, self.comm)  # type: ignore[no-untyped-call]
        return F.embedding(places, found)


class _Rows(torch.autograd.Function):
    """Rows by their numbers, rising, from whichever ranks have them."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, asked: Tensor, rows: Sharding, comm: Communicator
    ) -> Tensor:
        numbers = asked.cpu().numpy()
        owners = rows.owners(numbers)
        lie = [np.flatnonzero(owners == rank) for rank in range(comm.size)]
        own = rows.indices(numbers)
        wanted = [own[at] for at in lie]
        counts = comm.all_to_all(
            [np.array([len(one)]) for one in wanted], [(1,)] * comm.size, operation="rows"
        )
        served = comm.all_to_all(wanted, [(int(n[0]),) for n in counts], operation="rows")
        given = [torch.from_numpy(one).to(weight.device) for one in served]
        channels = weight.shape[1]
        received = comm.all_to_all(
            [weight.detach()[one] for one in given],
            [(len(one), channels) for one in wanted],
            operation="rows",
        )
        ctx.comm, ctx.given, ctx.shape = comm, given, weight.shape
        ctx.lie = [torch.from_numpy(at).to(weight.device) for at in lie]
        found = weight.new_empty(len(numbers), channels)
        for at, part in zip(ctx.lie, received, strict=True):
            found[at] = part
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor | None, ...]:
        received = ctx.comm.all_to_all(
            [dfound[at] for at in ctx.lie],
            [(len(one), ctx.shape[1]) for one in ctx.given],
            operation="rows",
        )
        total = wide(dfound.new_zeros(ctx.shape))
        for at, part in zip(ctx.given, received, strict=True):
            total.index_add_(0, at, wide(part))
        return total.to(dfound.dtype), None, None, None


def slice_of(table: Tensor, rows: Sharding, rank: int) -> Tensor:
    """A rank's rows of a whole table."""
    return cast(Tensor, rows.shard(table, rank, axis=0))
