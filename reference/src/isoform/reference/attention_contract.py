"""The contract of attention over a sequence: its operands, and which calls are right.

:mod:`isoform.reference.contract` holds what all operations share. The rules SEQ-1, SEQ-2 … are in
``docs/spec/attention.md``.

Axes: B batch, Q queries, K keys, H query heads, G key/value heads (G divides H), D head dim. Where
queries and keys are one sequence, Q = K = L.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, NamedTuple

from isoform.reference.contract import (
    FLOAT_DTYPES,
    Call,
    check_arrays,
    check_devices,
    check_dtypes,
    check_heads,
    check_ranks,
    check_scale,
    check_sizes,
    dtype_name,
)

NAME = "attention"

AXES: Mapping[str, str] = {
    "q": "B Q H D",
    "k": "B K G D",
    "v": "B K G D",
    "positions": "B Q",
    "key_positions": "B K",
    "segments": "B Q",
    "key_segments": "B K",
    "out": "B Q H D",
    "lse": "B H Q",
    "delta": "B H Q",
}
"""The axes of every operand and result, by name (rule SEQ-1). Positions and segments may lack B."""

PLACES = ("positions", "key_positions", "segments", "key_segments")
"""The operands that say where queries and keys lie: integers, without gradient."""

OPTIONS = ("causal", "window", *PLACES)
"""What a call may ask for besides q, k and v: the names that capabilities decline."""

PLACE_DTYPES = ("int32", "int64")

DIFFERENTIABLE = ("q", "k", "v")

UNLIMITED = -1
"""The side of a window that has no end."""


@dataclass(frozen=True)
class SequenceShape:
    """The axis sizes of one call of attention over a sequence."""

    axes: ClassVar[Mapping[str, str]] = AXES

    B: int
    Q: int
    K: int
    H: int
    G: int
    D: int

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of the operand or result ``name``."""
        return tuple(getattr(self, axis) for axis in AXES[name].split())

    @property
    def logits(self) -> int:
        """How many logits the call has if every pair attends: B·H·Q·K, the measure of its work."""
        return self.B * self.H * self.Q * self.K

    @property
    def largest(self) -> int:
        """How many numbers the largest array has: the logits, or q or k."""
        return max(self.logits, math.prod(self.of("q")), math.prod(self.of("k")))

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in vars(self).items())


def attention_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    positions: Any = None,
    key_positions: Any = None,
    segments: Any = None,
    key_segments: Any = None,
    window: Any = None,
    scale: float | None = None,
    dtypes: Iterable[str] = FLOAT_DTYPES,
    gradients: Iterable[str] = (),
    lse: bool = False,
    device: str = "cpu",
    architecture: str = "",
) -> Call:
    """Check the operands of attention over a sequence and say what the call asks for (rule SEQ-1).

    Args:
        q: Queries ``[B, Q, H, D]``, one of ``dtypes``.
        k: Keys ``[B, K, G, D]``.
        v: Values ``[B, K, G, D]``.
        causal: A query attends to no key after its own position.
        positions: int32 or int64 ``[Q]`` or ``[B, Q]``, where the queries are.
        key_positions: The same for the keys, ``[K]`` or ``[B, K]``.
        segments: int32 or int64 ``[Q]`` or ``[B, Q]``, which document each query belongs to;
            negative for padding.
        key_segments: The same for the keys, ``[K]`` or ``[B, K]``.
        window: How far a query looks: ``(left, right)``, a number for both sides, or None.
        scale: A finite real number, or None for ``D**-0.5``.
        dtypes: Names of the dtypes to accept for q, k and v, which must share one.
        gradients: Operands that a gradient is wanted for (copied into the call).
        lse: Whether lse is wanted (copied into the call).
        device: Kind of device (copied into the call).
        architecture: GPU architecture (copied into the call).

    Returns:
        The call; its ``operands`` are the names in :data:`OPTIONS` that it uses.

    Raises:
        TypeError: An operand is no array or has the wrong dtype, ``causal`` is no bool, or the
            window is not made of integers.
        ValueError: An operand's rank or an axis size is wrong, G does not divide H, operands lie
            on different devices, the scale is not finite, a side of the window is below −1, or it
            is left open where the keys are.
    """
    given = {
        "positions": positions,
        "key_positions": key_positions,
        "segments": segments,
        "key_segments": key_segments,
    }
    places = {name: operand for name, operand in given.items() if operand is not None}
    operands = {"q": q, "k": k, "v": v, **places}

    check_arrays(operands)
    check_dtypes(operands, tuple(dtypes), dict.fromkeys(PLACES, PLACE_DTYPES))
    # positions and segments that all examples share have no axis B
    axes = dict(AXES) | {name: AXES[name][-1] for name, x in places.items() if len(x.shape) == 1}
    check_ranks(operands, axes)
    B, Q, H, D = (int(size) for size in q.shape)
    K, G = (int(size) for size in k.shape[1:3])
    shape = SequenceShape(B, Q, K, H, G, D)
    check_sizes(operands, axes, vars(shape))
    check_heads(q, G)
    check_devices(operands)
    check_scale(scale)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    left, right = resolve_window(window)
    limited = (left, right) != (UNLIMITED, UNLIMITED)
    _check_places(set(places), Q, K, ordered=causal or limited)
    return Call(
        operation=NAME,
        shape=shape,
        dtype=dtype_name(q),
        operands=frozenset(places)
        | ({"causal"} if causal else set())
        | ({"window"} if limited else set()),
        gradients=frozenset(gradients),
        lse=lse,
        device=device,
        architecture=architecture,
    )


def resolve_window(window: Any, causal: bool = False) -> tuple[int, int]:
    """How many positions before and after its own a query looks; −1: no end (rule SEQ-3).

    Args:
        window: ``(left, right)``, one number for both, or None for no window.
        causal: Nothing after the query's own position: causal attention is a window, too.

    Raises:
        TypeError: The window is not made of integers.
        ValueError: It has another number of sides than two, or one of them is below −1.
    """
    if window is None:
        sides = (UNLIMITED, UNLIMITED)
    else:
        pair = window if isinstance(window, (tuple, list)) else (window, window)
        if len(pair) != 2:
            raise ValueError(f"window must be one number or (left, right), got {window!r}")
        if any(isinstance(side, bool) or not hasattr(side, "__index__") for side in pair):
            raise TypeError(f"window must be made of integers, got {window!r}")
        sides = (index(pair[0]), index(pair[1]))
        if min(sides) < UNLIMITED:
            raise ValueError(f"window must not be below {UNLIMITED} (no end), got {window!r}")
    return (sides[0], 0) if causal else sides


class Mask(NamedTuple):
    """Who attends to whom: a rule that is computed where it is needed, never stored as Q·K numbers.

    It is written in operators alone, so the arrays may be those of any library.

    Attributes:
        positions: Of the queries, int64 ``[B or 1, Q]``.
        key_positions: Of the keys, int64 ``[B or 1, K]``.
        segments: Of the queries, int64 ``[B or 1, Q]``; None where all are one.
        key_segments: Of the keys, int64 ``[B or 1, K]``; None where ``segments`` is.
        left: How many positions before its own a query looks; −1 for no end.
        right: How many after it.
    """

    positions: Any
    key_positions: Any
    segments: Any
    key_segments: Any
    left: int
    right: int

    def pairs(self) -> Any:
        """Whether query i attends to key j: bool ``[B or 1, 1, Q, K]`` (rule SEQ-3)."""
        ahead = self.key_positions[:, None, None, :] - self.positions[:, None, :, None]
        seen = ahead == ahead  # all True, in the library of the positions
        if self.left != UNLIMITED:
            seen = seen & (ahead >= -self.left)
        if self.right != UNLIMITED:
            seen = seen & (ahead <= self.right)
        if self.segments is not None:
            keys = self.key_segments[:, None, None, :]
            same = (self.segments[:, None, :, None] == keys) & (keys >= 0)
            seen = seen & same
        return seen

    def real_keys(self) -> Any:
        """Which keys are no padding, bool ``[B or 1, K]``; None where all are (rule SEQ-4)."""
        return None if self.key_segments is None else self.key_segments >= 0

    def tile(self, rows: slice, keys: slice = slice(None)) -> Mask:
        """The mask of some queries and some keys."""
        return self._replace(
            positions=self.positions[:, rows],
            key_positions=self.key_positions[:, keys],
            segments=None if self.segments is None else self.segments[:, rows],
            key_segments=None if self.key_segments is None else self.key_segments[:, keys],
        )


def _check_places(given: set[str], Q: int, K: int, *, ordered: bool) -> None:
    """Raise ``ValueError`` where it is left open which places the keys, or the queries, have."""
    for queries, keys in (("positions", "key_positions"), ("segments", "key_segments")):
        if keys in given and queries not in given:
            raise ValueError(f"{queries} must be given where {keys} are")
        if queries in given and keys not in given and Q != K:
            raise ValueError(f"{keys} must be given where {queries} are and Q={Q} is not K={K}")
    if ordered and Q != K and "positions" not in given:
        raise ValueError(
            f"positions and key_positions must be given with causal or window where Q={Q} is not "
            f"K={K}: aligning the first or the last of both are two different answers"
        )
