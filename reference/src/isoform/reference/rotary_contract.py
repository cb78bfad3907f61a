"""The contract of rotary embedding: its operands, and which calls are right.

:mod:`isoform.reference.contract` holds what all operations share. The rules ROT-1, ROT-2 … are in
``docs/spec/rotary.md``.

Axes: B batch, L positions of a sequence, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import Any, ClassVar

from isoform.reference.contract import FLOAT_DTYPES, Call, check_arrays, dtype_name
from isoform.reference.rotary_scaling import SCALINGS

NAME = "rotary_embedding"

AXES: Mapping[str, str] = {
    "x": "B L H D",
    "positions": "B L",
    "out": "B L H D",
}
"""The axes of every operand and result, by name (rule ROT-1). Positions may lack B."""

LAYOUTS = ("half", "interleaved")
"""Which channels are a pair: ``(i, i + d/2)``, or ``(2i, 2i + 1)`` (rule ROT-3)."""

DIFFERENTIABLE = ("x",)

POSITION_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

EXACT_POSITION = 2**21
"""Positions up to this, of either sign, have angles exact to the last bit (rule ROT-4)."""

BY_EXAMPLE = "positions=[B,L]"
PARTIAL = "rotary_dim<D"
BASIC = frozenset({"layout=half", BY_EXAMPLE})
FEATURES: Mapping[str, frozenset[str]] = {
    "base": frozenset(),
    "rotary_dim": frozenset({PARTIAL}),
    "layout": frozenset({"layout=interleaved"}),
    "scaling": frozenset(f"scaling={name}" for name in SCALINGS),
}
"""What a call can ask for beyond :data:`BASIC`, by argument; capabilities decline it by name (rule
ROT-10)."""

ALL_FEATURES = BASIC.union(*FEATURES.values())


@dataclass(frozen=True)
class RotaryShape:
    """The axis sizes of one call of rotary embedding."""

    axes: ClassVar[Mapping[str, str]] = AXES

    B: int
    L: int
    H: int
    D: int

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of the operand or result ``name``."""
        return tuple(getattr(self, axis) for axis in AXES[name].split())

    @property
    def largest(self) -> int:
        """How many numbers the largest array has: x."""
        return self.B * self.L * self.H * self.D

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in vars(self).items())


def rotary_call(
    x: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    layout: str = "half",
    scaling: Any = None,
    dtypes: Iterable[str] = FLOAT_DTYPES,
    gradients: Iterable[str] = (),
    device: str = "cpu",
    architecture: str = "",
    called: str = "x",
) -> Call:
    """Check the operands of rotary embedding and say what the call asks for (rule ROT-1).

    Args:
        x: ``[B, L, H, D]``, one of ``dtypes``.
        positions: Integers, ``[L]`` or ``[B, L]``.
        base: A finite real number above 1.
        rotary_dim: How many channels are turned: an even number from 2 to D, or None for D.
        layout: ``"half"`` or ``"interleaved"``.
        scaling: One of :mod:`isoform.reference.rotary_scaling`, or None.
        dtypes: Names of the dtypes to accept for x.
        gradients: Operands that a gradient is wanted for (copied into the call).
        device: Kind of device (copied into the call).
        architecture: GPU architecture (copied into the call).
        called: What messages call x: the backward's is ``dout``.

    Returns:
        The call; its ``operands`` are those of :data:`ALL_FEATURES` that it asks for.

    Raises:
        TypeError: An operand is no array or has the wrong dtype, ``base`` or ``rotary_dim`` is no
            number, or ``scaling`` is none.
        ValueError: An operand's rank or an axis size is wrong, the two lie on different devices,
            ``base``, ``rotary_dim`` or ``layout`` is out of range, or the scaling does not fit
            ``rotary_dim``.
    """
    check_arrays({called: x, "positions": positions})
    if dtype_name(x) not in (dtypes := tuple(dtypes)):
        raise TypeError(f"{called} must be one of {', '.join(dtypes)}, got {dtype_name(x)}")
    if dtype_name(positions) not in POSITION_DTYPES:
        raise TypeError(f"positions must be integers, got {dtype_name(positions)}")
    if len(x.shape) != 4:
        raise ValueError(f"{called} must have 4 axes [B, L, H, D], got shape {tuple(x.shape)}")
    shape = RotaryShape(*(int(size) for size in x.shape))
    if tuple(positions.shape) not in ((shape.L,), (shape.B, shape.L)):
        raise ValueError(
            f"positions must be [L] or [B, L] with L={shape.L}, B={shape.B} of {called}, "
            f"got shape {tuple(positions.shape)}"
        )
    where, there = (str(getattr(array, "device", "cpu")) for array in (x, positions))
    if where != there:
        raise ValueError(f"positions is on {there}, but {called} is on {where}")
    _check_base(base)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    d = resolve_rotary_dim(rotary_dim, shape.D)
    _check_scaling(scaling, d)
    asked = {
        f"layout={layout}": True,
        BY_EXAMPLE: len(positions.shape) == 2,
        PARTIAL: d < shape.D,
        f"scaling={getattr(scaling, 'name', None)}": scaling is not None,
    }
    return Call(
        operation=NAME,
        shape=shape,
        dtype=dtype_name(x),
        operands=frozenset(name for name, holds in asked.items() if holds),
        gradients=frozenset(gradients),
        device=device,
        architecture=architecture,
    )


def resolve_rotary_dim(rotary_dim: int | None, D: int) -> int:
    """How many channels are turned: ``rotary_dim``, or all D of them (rule ROT-2).

    Raises:
        TypeError: It is no integer.
        ValueError: It is odd, below 2 or above D.
    """
    if isinstance(rotary_dim, bool) or not (rotary_dim is None or hasattr(rotary_dim, "__index__")):
        raise TypeError(f"rotary_dim must be an int or None, got {type(rotary_dim).__name__}")
    d = D if rotary_dim is None else index(rotary_dim)
    if d % 2 or not 2 <= d <= D:
        given = f"rotary_dim={d}" if rotary_dim is not None else "rotary_dim=None"
        raise ValueError(f"rotary_dim must be even and from 2 to D={D}, got {given}")
    return d


def _check_base(base: float) -> None:
    if isinstance(base, bool) or not isinstance(base, Real):
        raise TypeError(f"base must be a real number, got {type(base).__name__}")
    if not 1 < base < math.inf:
        raise ValueError(f"base must be finite and above 1, got {base}")


def _check_scaling(scaling: Any, d: int) -> None:
    if scaling is None:
        return
    known: Any = tuple(SCALINGS.values())
    if not isinstance(scaling, known):
        names = ", ".join(each.__name__ for each in SCALINGS.values())
        raise TypeError(f"scaling must be None or one of {names}, got {type(scaling).__name__}")
    if (fault := scaling.fault(d)) is not None:
        raise ValueError(f"scaling: {fault}")
