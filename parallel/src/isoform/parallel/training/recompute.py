"""Sums over pieces that the backward computes again, a piece at a time.

A branch of a block is added to what runs past it, ``y = base + Σ_pieces f(x)``. Of all that a
piece computes nothing is kept but x, which the pieces share; so a block keeps one tensor, and while
it is differentiated there is one piece at a time. A piece is a tile of tokens (an MLP does not look
beyond it) or a group of heads (whose outputs add up). Each is computed again once: no piece is part
of a larger one that is recomputed too, unless inputs of some blocks only are kept (:func:`again`).

A piece mostly ends in a linear layer, whose value the backward does not want: :class:`Piece` may
say how to come to the gradient without (:func:`pull`), which saves a product and its memory.

Gradients of parameters add up over pieces in at least float32, and are rounded once.

Source: Chen et al., arXiv 1604.06174; the tiles are those of Rabe and Staats, arXiv 2112.05682, and
of ALST, arXiv 2506.13996.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

EVERY = slice(None)


class Piece(NamedTuple):
    """A function of some tokens, ``x[:, rows]``, in whose shape it gives its part of the sum.

    Attributes:
        rows: Which tokens.
        function: Of x.
        pulled: Of x and dy: a number whose gradient is that of ``(function(x) * dy).sum()``, by
            :func:`pull`. None where there is no short way.
    """

    rows: slice
    function: Callable[[Tensor], Tensor]
    pulled: Callable[[Tensor, Tensor], Tensor] | None = None


def tiles(length: int, tile: int) -> list[slice]:
    """``length`` tokens, ``tile`` at a time; at least one slice."""
    return [slice(i, min(i + tile, length)) for i in range(0, max(length, 1), tile)]


def add(base: Tensor, x: Tensor, pieces: Sequence[Piece], modules: Sequence[nn.Module]) -> Tensor:
    """``base + Σ f(x)``, of which the backward keeps x alone.

    Args:
        base: ``[B, L, hidden]``.
        x: ``[B, L, hidden]``.
        pieces: What to add.
        modules: Those whose parameters the pieces use.
    """
    if not torch.is_grad_enabled():
        return _summed(base, x, pieces)
    parameters = _parameters(modules)
    found = _Recomputed.apply(base, x, pieces, modules, *parameters)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def _summed(base: Tensor, x: Tensor, pieces: Sequence[Piece]) -> Tensor:
    y = base.clone()
    for rows, function, _ in pieces:
        y[:, rows] += function(x[:, rows])
    return y


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Asked for again in the backward: an engine that shards them may have put others in place."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        pieces: Sequence[Piece],
        modules: Sequence[nn.Module],
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.pieces, ctx.modules = pieces, modules
        ctx.save_for_backward(x)
        return _summed(base, x, pieces)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        sums = _Sums(_parameters(ctx.modules), len(ctx.pieces))
        dx = None if len(ctx.pieces) == 1 else torch.zeros_like(x)
        for rows, function, pulled in ctx.pieces:
            part, dpart = x[:, rows].detach().requires_grad_(), dy[:, rows]
            with torch.enable_grad():
                out = function(part) if pulled is None else pulled(part, dpart)
            given = dpart if pulled is None else None
            own, *found = torch.autograd.grad(
                out, [part, *sums.parameters], given, allow_unused=True
            )
            del out, part
            sums.add(found)
            if dx is None:
                dx = own
            else:
                dx[:, rows] += own
            del own, found
        return dy, dx, None, None, *sums.rounded()


def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which the backward keeps x, and calls it again.

    Gradients of what the function uses besides are added to those parameters at once, as the
    backward goes: of several blocks in a row no sum is wanted.

    Args:
        function: Of x; in the backward it may keep what it wants.
        x: Must be differentiated, or nothing is.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return cast(Tensor, _Again.apply(function, x))  # type: ignore[no-untyped-call]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:
        part = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(part)
        torch.autograd.backward(y, dy)
        return None, part.grad


def pull(z: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A number whose gradient is that of ``(linear(z, weight, bias) * dy).sum()``.

    Its value is 0: neither the product nor the number is computed.
    """
    return cast(Tensor, _Pulled.apply(z, dy, weight, bias))  # type: ignore[no-untyped-call]


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, dy, weight)
        return z.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor | None, ...]:
        z, dy, weight = ctx.saved_tensors
        flat = dy.flatten(0, -2)
        dbias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return dy @ weight, None, flat.T @ z.flatten(0, -2), dbias


class _Sums:
    """Gradients of parameters, summed over pieces in at least float32."""

    def __init__(self, parameters: Sequence[nn.Parameter], pieces: int) -> None:
        self.parameters, self._alone = parameters, pieces == 1
        self.totals: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(gradients):
            if g is None:
                continue
            if (total := self.totals[i]) is None:
                self.totals[i] = g if self._alone else wide(g)
            else:
                total += g

    def rounded(self, factor: Tensor | None = None) -> list[Tensor | None]:
        pairs = zip(self.totals, self.parameters, strict=True)
        return [
            None if total is None else (total if factor is None else total * factor).to(p.dtype)
            for total, p in pairs
        ]


def wide(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total_loss(
    x: Tensor,
    labels: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
    modules: Sequence[nn.Module],
    tile: int,
) -> Tensor:
    """``Σ function(x, labels)`` over tiles of tokens, each differentiated before the next.

    A loss is one number, so that the gradient of a tile is known but for a factor when its loss is:
    it is computed at once, and nothing twice.

    Args:
        x: ``[B, L, hidden]``.
        labels: ``[B, L]``.
        function: The sum of losses of some tokens, in at least float32.
        modules: Those whose parameters it uses.
        tile: Tokens at a time.
    """
    cut = tiles(x.shape[1], tile)
    if not torch.is_grad_enabled():
        return torch.stack([function(x[:, rows], labels[:, rows]) for rows in cut]).sum()
    parameters = _parameters(modules)
    return cast(Tensor, _Loss.apply(x, labels, function, cut, *parameters))  # type: ignore[no-untyped-call]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        labels: Tensor,
        function: Callable[[Tensor, Tensor], Tensor],
        cut: Sequence[slice],
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.sums = _Sums(parameters, len(cut))
        dx, losses = torch.empty_like(x), []
        for rows in cut:
            part = x[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = function(part, labels[:, rows])
            own, *found = torch.autograd.grad(loss, [part, *parameters], allow_unused=True)
            ctx.sums.add(found)
            dx[:, rows] = own
            losses.append(loss.detach())
        ctx.save_for_backward(dx)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), None, None, None, *ctx.sums.rounded(dloss)
