"""Products with a factor of which each rank has a part: gathered piece by piece, never whole.

The outer product mean and the triangle multiplications of the Evoformer need one factor whole. It
is as large as what all ranks hold together, so to gather it at once would undo what sharding has
saved. But these products go channel by channel. So the factor comes in pieces of its channels:
while one is used the next is on its way, and the one before is let go. Nothing of it is kept for
the backward, which gathers it again and sends gradients home piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isoform.parallel.movements import Finish, Movement, total


def gathered_product(
    equation: str, a: Tensor, b: Tensor, gather: Movement, *, pieces: int
) -> Tensor:
    """``einsum(equation, a, whole b)``, differentiable once; collective, and so is its backward.

    Args:
        equation: Of einsum, its operands a and b. The last axis of ``b`` is the last of the result,
            and may be the last of ``a``; it is what pieces are made of.
        a: This rank's, in the shape that the equation says.
        b: This rank's part of the other factor, ``[..., C]``.
        gather: What makes it whole.
        pieces: How many; 1 to as many as there are channels. Room is needed for two of them.

    Returns:
        This rank's product, in the dtype of ``a``.
    """
    pieces = max(1, min(pieces, b.shape[-1]))
    product = _Product.apply(equation, a, b, gather, pieces)  # type: ignore[no-untyped-call]
    return cast(Tensor, product)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, equation: str, a: Tensor, b: Tensor, gather: Movement, pieces: int
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.asked = equation, gather, pieces
        products = []
        for own, whole in _visits(equation, a, b, gather, pieces):
            products.append(torch.einsum(equation, own, whole))
        return torch.cat(products, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        equation, gather, pieces = ctx.asked
        operands, _, result = equation.partition("->")
        first, _, second = operands.partition(",")
        das: list[Tensor] = []
        dbs: list[Tensor] = []
        going: Finish | None = None
        visits = zip(
            dout.tensor_split(pieces, -1), _visits(equation, a, b, gather, pieces), strict=True
        )
        for dpiece, (own, whole) in visits:
            dwhole = torch.einsum(f"{result},{first}->{second}", dpiece, own)
            if going is not None:
                dbs.append(going())
            going = gather.begin_adjoint(dwhole)
            das.append(torch.einsum(f"{result},{second}->{first}", dpiece, whole))
        assert going is not None
        dbs.append(going())
        da = torch.cat(das, -1) if _in_step(equation) else total(das).to(a.dtype)
        return None, da, torch.cat(dbs, -1), None, None


def _visits(
    equation: str, a: Tensor, b: Tensor, gather: Movement, pieces: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a and of the whole b, what is multiplied; the next piece is on its way already."""
    parts = b.tensor_split(pieces, -1)
    owns = a.tensor_split(pieces, -1) if _in_step(equation) else [a] * pieces
    coming = gather.begin(parts[0])
    for n, own in enumerate(owns):
        whole = coming()
        if n + 1 < pieces:
            coming = gather.begin(parts[n + 1])
        yield own, whole


def _in_step(equation: str) -> bool:
    """Whether a has the channels that pieces are made of."""
    operands, _, result = equation.partition("->")
    return result[-1] in operands.partition(",")[0]
