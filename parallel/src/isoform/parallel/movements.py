"""Tensors that move between ranks under autograd: begun here, waited for there.

A *movement* sends numbers between ranks and computes nothing but sums. Its gradient is the adjoint
movement (as one program for all ranks: :mod:`isoform.reference.numpy.axial`)::

    movement     does                                adjoint
    recut        shards of one axis to another's     recut, as before
    gather       every rank gets the whole           reduce-scatter
    replicated   nothing: all ranks have equal ones  all-reduce

A movement takes time in which a rank can compute. So it is begun by :func:`start`, and what has
come is asked for by :meth:`Flight.wait`, after all that does not depend on it. Autograd goes the
same way back: where the forward waits, the backward begins, and where the forward began, the
backward waits, after the gradients of all that was computed in between. (Cheng et al., arXiv
2203.00854, section 4.3, who call it duality.)

The backward is collective, as the forward is: all ranks must differentiate the same calls. Autograd
then reaches movements in the same order on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from isoform.parallel.communicator import Communicator
from isoform.parallel.sharding import Sharding

Finish = Callable[[], Tensor]
"""Waits, and returns what has come."""

RECUT, GATHER, REDUCE_SCATTER, ALL_REDUCE = "recut", "gather", "reduce_scatter", "all_reduce"
"""Names in the counts of what is sent."""


class Movement(NamedTuple):
    """What begins the movement of a tensor, and what begins that of its gradient."""

    begin: Callable[[Tensor], Finish]
    begin_adjoint: Callable[[Tensor], Finish]


def recut(
    comm: Communicator, *, joined: int, lengths: Sequence[int], cut: int, into: Sequence[int]
) -> Movement:
    """From shards of the axis ``joined`` to shards of the axis ``cut``: an all-to-all.

    Args:
        comm: The ranks.
        joined: The axis along which the tensor is cut, and the result is whole.
        lengths: By rank, the tensor's length on that axis.
        cut: The axis along which the tensor is whole, and the result is cut.
        into: By rank, the result's length on that axis.
    """

    def one_way(
        joined: int, lengths: Sequence[int], cut: int, into: Sequence[int]
    ) -> Callable[[Tensor], Finish]:
        def begin(x: Tensor) -> Finish:
            shapes = [_with(x.shape, {joined: n, cut: into[comm.rank]}) for n in lengths]
            parts = torch.split(x, list(into), cut)
            under_way = comm.start_all_to_all(parts, shapes, operation=RECUT)
            return lambda: torch.cat(tuple(under_way.wait()), joined)

        return begin

    there, back = (joined, lengths, cut, into), (cut, into, joined, lengths)
    return Movement(one_way(*there), one_way(*back))


def gather(comm: Communicator, *, axis: int, lengths: Sequence[int]) -> Movement:
    """From shards of an axis to the whole on every rank.

    What ranks find of the whole's gradient is summed in the order of ranks, in at least float32,
    and rounded once.

    Args:
        comm: The ranks.
        axis: The axis along which the tensor is cut.
        lengths: By rank, its length on that axis.
    """

    def begin(x: Tensor) -> Finish:
        shapes = [_with(x.shape, {axis: n}) for n in lengths]
        parts = [x.contiguous()] * comm.size
        under_way = comm.start_all_to_all(parts, shapes, operation=GATHER)
        return lambda: torch.cat(tuple(under_way.wait()), axis)

    def begin_adjoint(dwhole: Tensor) -> Finish:
        own = _with(dwhole.shape, {axis: lengths[comm.rank]})
        parts = torch.split(dwhole, list(lengths), axis)
        under_way = comm.start_all_to_all(parts, [own] * comm.size, operation=REDUCE_SCATTER)
        return lambda: total(under_way.wait()).to(dwhole.dtype)

    return Movement(begin, begin_adjoint)


class Flight:
    """A tensor under way. Until :meth:`wait`, what it was made from must not be changed."""

    def __init__(self, movement: Movement) -> None:
        self.movement = movement
        self.arrival: Finish | None = None  # of the tensor, then of its gradient
        self.ticket: Tensor  # holds no numbers: the thread by which autograd finds its way

    def wait(self) -> Tensor:
        """What has come.

        Raises:
            ValueError: It has been waited for before.
        """
        return cast(Tensor, _Wait.apply(self.ticket, self))  # type: ignore[no-untyped-call]

    def land(self) -> Tensor:
        """Wait for what is under way, and keep nothing of it."""
        if self.arrival is None:
            raise ValueError("this tensor has been waited for already")
        arrival, self.arrival = self.arrival, None
        return arrival()


def start(movement: Movement, x: Tensor) -> Flight:
    """Begin to move ``x``; collective.

    Args:
        movement: What is to be done.
        x: This rank's, of any shape that ``movement`` takes.

    Returns:
        What is under way, to be waited for.
    """
    flight = Flight(movement)
    flight.ticket = cast(Tensor, _Start.apply(x, flight))  # type: ignore[no-untyped-call]
    return flight


def move(movement: Movement, x: Tensor) -> Tensor:
    """``x``, moved: where there is nothing to compute meanwhile; collective.

    Args:
        movement: What is to be done.
        x: This rank's, of any shape that ``movement`` takes.

    Returns:
        What the movement makes of it.
    """
    return start(movement, x).wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.arrival = flight.movement.begin(x.detach())
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.flight.arrival = ctx.flight.movement.begin_adjoint(dx)
        return dx.new_empty(0), None


def joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; the backward goes through all of them, be the loss made of one alone.

    Else a rank whose loss leaves one out would leave out its movements, which others wait for.
    """
    return cast(tuple[Tensor, ...], _Joined.apply(*tensors))  # type: ignore[no-untyped-call]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients  # zeros, where there were none


# --- parameters: equal on all ranks, their gradients summed over ranks ---


def replicated(module: nn.Module, comm: Communicator) -> nn.Module:
    """The module, with parameters whose gradients come out summed over ranks.

    Every rank's copy of a parameter is used for that rank's part of the work alone, so each finds
    only a part of its gradient. The sums are the same, bit for bit, on all ranks.

    Args:
        module: Equal on all ranks. It is not changed: what is returned has modules of its own, and
            passes gradients on to the parameters of this one.
        comm: The ranks.
    """
    named = module.named_parameters(remove_duplicate=False)  # one shared by two has two names
    trained = {name: p for name, p in named if p.requires_grad}
    if not trained:
        return module
    apply = _Replicated.apply
    copies = apply(comm, *trained.values())  # type: ignore[no-untyped-call]
    return _with_parameters(module, dict(zip(trained, copies, strict=True)))


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, comm: Communicator, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.comm = comm
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *all_reduce(ctx.comm, gradients)


def all_reduce(comm: Communicator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over ranks of each of some tensors, on every rank: two messages to each other rank.

    Summed in the order of ranks, in at least float32, and rounded once.

    Args:
        comm: The ranks.
        tensors: In the same shapes and dtypes on all ranks.
    """
    if comm.size == 1:
        return list(tensors)
    sums: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        mine = [n for n, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[n].reshape(-1) for n in mine])
        lengths = Sharding.contiguous(len(flat), comm.size).lengths
        part = comm.reduce_scatter(torch.split(flat, list(lengths)), operation=ALL_REDUCE).to(dtype)
        flat = torch.cat(comm.all_gather(part, [(n,) for n in lengths], operation=ALL_REDUCE))
        sizes = [tensors[n].numel() for n in mine]
        for n, found in zip(mine, torch.split(flat, sizes), strict=True):
            sums[n] = found.reshape(tensors[n].shape)
    return [sums[n] for n in range(len(tensors))]


def _with_parameters(module: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """A copy of the tree of modules that shares everything but the parameters named."""
    copy = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters), "_modules": {}}
    for name, tensor in parameters.items():
        if name in copy._parameters:
            copy._parameters[name] = cast(nn.Parameter, tensor)  # all that a forward needs of one
    for name, child in module.named_children():
        inside = {
            rest: tensor
            for full, tensor in parameters.items()
            for first, _, rest in [full.partition(".")]
            if first == name and rest
        }
        copy._modules[name] = _with_parameters(child, inside)
    return copy


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors, in their order, in at least float32."""
    first, *others = parts
    found = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for part in others:
        found += part
    return found


def _with(shape: Sequence[int], lengths: dict[int, int]) -> tuple[int, ...]:
    """``shape`` with other lengths on some axes."""
    return tuple(lengths.get(axis, n) for axis, n in enumerate(shape))
