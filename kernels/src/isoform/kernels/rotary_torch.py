"""The rotary kernel as operations of PyTorch's: autograd, ``torch.compile``, fake tensors, export.

One operation turns, and its derivative is itself by the opposite angle, so that it can be
differentiated as often as need be. The other turns in place, and has no derivative. Both run on
PyTorch's current stream of the operands' device.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from isoform.kernels.rotary_launch import Lying, Turn, launch
from isoform.kernels.torch_library import LIBRARY, operation
from isoform.reference.contract import Unsupported, dtype_name
from isoform.reference.rotary_scaling import FIELDS, SCALINGS, Scaling


def turned(turn: Turn, x: Tensor, other: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``other``, if there is one, turned."""
    found: tuple[Tensor, Tensor] = rotation(x, other, positions, *_plain(turn))
    return found


def turn_in_place(turn: Turn, x: Tensor, other: Tensor | None, positions: Tensor) -> None:
    """Turn ``x`` and ``other``, if there is one, where they lie.

    Raises:
        Unsupported: A gradient of one of them would be wanted.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, other)):
        raise Unsupported(
            ["a gradient of what is turned in place: turn it out of place, or under no_grad()"],
            "isoform.kernels",
        )
    rotation_in_place(x, other, positions, *_plain(turn))


def strides(x: Tensor) -> tuple[int, ...]:
    """From one element to the next along each axis, in elements."""
    return x.stride()


def _plain(turn: Turn) -> tuple[int, float, str, str, bool]:
    """``turn`` as arguments that an operation of PyTorch's can have."""
    scaling = "" if turn.scaling is None else _written(turn.scaling.name, _arguments(turn.scaling))
    return turn.rotary_dim, turn.base, turn.layout, scaling, turn.backwards


def _arguments(scaling: Scaling) -> tuple[Any, ...]:
    return tuple([getattr(scaling, field) for field in FIELDS[scaling.name]])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _written(name: str, arguments: tuple[Any, ...]) -> str:
    """A scaling as text, which a graph that is exported can carry: every digit of its numbers."""
    return json.dumps([name, *arguments], default=float)


@lru_cache(maxsize=256)
def _read(rotary_dim: int, base: float, layout: str, scaling: str, backwards: bool) -> Turn:
    """What :func:`_plain` has made plain."""
    name, *arguments = json.loads(scaling) if scaling else (None,)
    return Turn(rotary_dim, base, layout, SCALINGS[name](*arguments) if name else None, backwards)


def _turn(
    x: Tensor,
    other: Tensor | None,
    positions: Tensor,
    rotary_dim: int,
    base: float,
    layout: str,
    scaling: str,
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    """Both turned; an empty tensor where there is no other."""
    out, out_other = _fake(x, other)
    turn = _read(rotary_dim, base, layout, scaling, backwards)
    _launch(turn, positions, x=x, out=out, other=other, out_other=out_other)
    return out, out_other


def _turn_in_place(
    x: Tensor,
    other: Tensor | None,
    positions: Tensor,
    rotary_dim: int,
    base: float,
    layout: str,
    scaling: str,
    backwards: bool,
) -> None:
    turn = _read(rotary_dim, base, layout, scaling, backwards)
    _launch(turn, positions, x=x, out=x, other=other, out_other=other)


def _fake(x: Tensor, other: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0)
        if other is None
        else torch.empty_like(other, memory_format=torch.contiguous_format),
    )


def _launch(turn: Turn, positions: Tensor, **tensors: Tensor | None) -> None:
    if tensors["other"] is None:
        del tensors["other"], tensors["out_other"]
    arrays = {
        name: Lying(t.data_ptr(), tuple(t.shape), t.stride(), dtype_name(t))
        for name, t in {**tensors, "positions": positions}.items()
        if t is not None
    }
    device = positions.device.index
    with torch.cuda.device(device):
        launch(turn, arrays, device, torch.cuda.current_stream(device).cuda_stream)


rotation = operation("rotary_embedding", _turn, _fake)
rotation_in_place = operation(
    "rotary_embedding_", _turn_in_place, lambda *arguments: None, mutates=("x", "other")
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, other, positions, *ctx.arguments, ctx.backwards = inputs
    ctx.save_for_backward(positions)
    ctx.set_materialize_grads(False)  # no zeros are made, and turned, for what is passed over
    if other is None:
        ctx.mark_non_differentiable(output[1])


def _differentiate(
    ctx: Any, dout: Tensor | None, dother: Tensor | None
) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    none = (None,) * (len(ctx.arguments) + 2)
    more = (positions, *ctx.arguments, not ctx.backwards)
    dout, dother = (
        dy if needed else None
        for dy, needed in zip((dout, dother), ctx.needs_input_grad, strict=False)
    )
    if dout is not None:
        dx, turned_other = rotation(dout, dother, *more)
        return dx, None if dother is None else turned_other, *none
    dx, _ = (None, None) if dother is None else rotation(dother, None, *more)
    return None, dx, *none


torch.library.register_autograd(
    "isoform::rotary_embedding", _differentiate, setup_context=_setup_context, lib=LIBRARY
)
