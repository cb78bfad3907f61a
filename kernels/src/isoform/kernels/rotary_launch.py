"""The rotary kernel's host side: what it declares, and what a call launches.

The device side, with the algorithm, is ``cuda/rotary.cu``. What is decided here needs no GPU, so
that whoever runs the same source elsewhere, as the emulator does, decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np

from isoform.kernels.arguments import View, place_in
from isoform.kernels.launch import Launch, Told, Work, kept
from isoform.kernels.plain import ELEMENTS
from isoform.reference.contract import Capabilities
from isoform.reference.rotary_contract import ALL_FEATURES, DIFFERENTIABLE, NAME
from isoform.reference.rotary_scaling import PI, Scaling, frequencies

SOURCE = "rotary"
MOST_PAIRS = 128
"""``MOST_PAIRS`` of the source."""

CAPABILITIES = Capabilities(
    NAME,
    dtypes=frozenset(ELEMENTS),
    devices=frozenset({"cuda"}),
    head_dims=(1, 2 * MOST_PAIRS),
    operands=ALL_FEATURES,
    gradients=frozenset(DIFFERENTIABLE),
    lse=False,
    deterministic=True,  # there is no sum whose order could change (rule ROT-11)
    memory="linear",
)

ROWS = np.dtype([("data", "u8"), ("stride", "i8", 4)])
ARRAYS = ("x", "out", "other", "out_other", "positions")
ARGUMENTS = np.dtype(
    [
        *((axis, "i8") for axis in "BL"),
        *((name, ROWS) for name in ARRAYS),
        *((name, "i8") for name in ("heads", "other_heads")),
        *((name, "i8") for name in ("position_bytes", "position_signed")),
        *((name, "i8") for name in ("pairs", "passing", "passing_width", "tokens", "backwards")),
        ("amplitude", "f4", 2),
        ("frequency", "u8", (MOST_PAIRS, 2)),
    ]
)
"""Mirrors ``RotaryArguments`` of ``cuda/rotary_arguments.cuh``."""

THREADS = 256
VECTOR_BYTES = 16
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element."""
UNITS = 2048
"""Pairs of vectors that a block turns if it can: eight for each thread, so that its angles and its
barriers are a small part of its work."""
SHARED_BYTES = 16 << 10
"""Shared memory that a block takes at most: five of them fit into 100 KiB, which most GPUs have."""
TOKEN_BYTES = 48
"""``sizeof(Token)`` of the source."""
BLOCKS = 1024
"""Blocks that there should be before any is given a second token: enough for every GPU."""


@dataclass(frozen=True)
class Turn:
    """How a call turns its operands: all of it that is no array.

    Attributes:
        rotary_dim: How many channels, an even number.
        base: Of the frequencies.
        layout: ``"half"`` or ``"interleaved"``.
        scaling: What is done to the frequencies, or None.
        backwards: By the opposite angle.
    """

    rotary_dim: int
    base: float
    layout: str
    scaling: Scaling | None
    backwards: bool


@dataclass(frozen=True)
class Lying:
    """An array as it lies, whosever it is.

    Attributes:
        pointer: Where its first element is.
        shape: Its shape.
        strides: From one element to the next along each axis, in elements.
        dtype: Name of the dtype.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def placed(self) -> tuple[Any, ...]:
        """All but the address, of which only the alignment counts."""
        return self.shape, self.strides, self.dtype, self.pointer % VECTOR_BYTES


def launch(turn: Turn, arrays: Mapping[str, Lying], device: int, stream: int) -> None:
    """Turn arrays, on the current device; returns before the GPU has done it.

    Args:
        turn: How.
        arrays: By the names of :data:`ARRAYS`; ``other`` and ``out_other`` may be missing. Where
            ``out`` lies where ``x`` does, it is turned in place.
        device: The current device.
        stream: The stream's address.

    Raises:
        ValueError: Two arrays are one, and would be turned twice in place.
    """
    x, other = arrays["x"], arrays.get("other")
    in_place = x.pointer == arrays["out"].pointer
    if in_place and other and x.pointer == other.pointer and math.prod(x.shape):
        raise ValueError("q and k are at one place in memory: they cannot be turned in place")
    key = (NAME, turn, device, in_place, *((name, x.placed) for name, x in arrays.items()))
    kept(key, lambda: told(turn, arrays)).launch([x.pointer for x in arrays.values()], stream)


def told(turn: Turn, arrays: Mapping[str, Lying]) -> Told:
    """What a call launches, which is nothing where there is none to turn, and what is told."""
    x, other, positions = arrays["x"], arrays.get("other"), arrays["positions"]
    B, L, H, D = x.shape
    other_heads = other.shape[2] if other else 0
    views = {name: View.of(each.pointer, each.shape, each.strides) for name, each in arrays.items()}
    if len(positions.shape) == 1:
        views["positions"] = View(positions.pointer, (0, *views["positions"].strides))

    pairs = turn.rotary_dim // 2
    in_place = x.pointer == arrays["out"].pointer
    through = 0 if in_place else D - turn.rotary_dim
    rows = [view for name, view in views.items() if name != "positions"]
    vector = width(x.dtype, rows, pairs)
    passing = width(x.dtype, rows, turn.rotary_dim, through)
    if passing < VECTOR_BYTES // SIZES[x.dtype]:
        vector = passing = min(vector, passing)
    columns = pairs // vector + (through // passing + 1) // 2
    tokens = tokens_of_a_block(B * L, (H + other_heads) * columns, pairs)

    packed = np.zeros((), ARGUMENTS)
    packed["B"], packed["L"] = B, L
    packed["heads"], packed["other_heads"] = H, other_heads
    integer = np.dtype(positions.dtype)
    packed["position_bytes"], packed["position_signed"] = integer.itemsize, integer.kind == "i"
    packed["pairs"], packed["passing"] = pairs, through // passing
    packed["passing_width"] = passing
    packed["tokens"], packed["backwards"] = tokens, turn.backwards
    for name, view in views.items():
        packed[name]["data"] = view.pointer
        packed[name]["stride"][: len(view.strides)] = view.strides
    turns, packed["amplitude"] = told_frequencies(turn.rotary_dim, turn.base, turn.scaling)
    packed["frequency"][:pairs] = turns

    across = min(columns, THREADS)
    launched = Launch(
        SOURCE,
        {
            "ELEMENT": ELEMENTS[x.dtype],
            "WIDTH": vector,
            "INTERLEAVED": int(turn.layout == "interleaved"),
        },
        "rotary_turn",
        -(-B * L // tokens),
        (across, THREADS // across),
        tokens * (2 * pairs * 4 + TOKEN_BYTES),
    )
    places = tuple(place_in(ARGUMENTS, name) for name in arrays)
    return Told(Work((launched,) if B * L * (H + other_heads) else ()), packed, places)


def width(dtype: str, rows: list[View], *steps: int) -> int:
    """Elements of a vector: 16 bytes, or as many as start on a multiple of their size everywhere.

    Args:
        dtype: Of the elements.
        rows: How the arrays lie, ``[B, L, H, D]``.
        steps: Channels between the vectors' starts: d/2 of those of the layout ``half``; of those
            that are copied, d and how many channels they are.
    """
    size = SIZES[dtype]
    most = VECTOR_BYTES // size
    if any(view.strides[3] != 1 for view in rows):
        return 1
    every = [*steps, *(step for view in rows for step in view.strides[:3])]
    together = math.gcd(most, *every, *(view.pointer // size for view in rows))
    return together if all(view.pointer % size == 0 for view in rows) else 1


def tokens_of_a_block(tokens: int, units: int, pairs: int) -> int:
    """How many tokens a block turns.

    Args:
        tokens: B · L, of the whole call.
        units: Pairs of vectors to turn or to copy, of all heads of one token.
        pairs: d/2, whose cosines and sines are kept in shared memory.
    """
    room = SHARED_BYTES // (2 * pairs * 4 + TOKEN_BYTES)
    return max(1, min(-(-UNITS // max(1, units)), room, tokens // BLOCKS))


@lru_cache(maxsize=256)
def told_frequencies(
    rotary_dim: int, base: float, scaling: Scaling | None
) -> tuple[np.ndarray[Any, Any], tuple[float, float]]:
    """What the kernel is told of the frequencies.

    Returns:
        Of every pair, ω / 2π modulo 1 in units of 2⁻¹²⁸, as two unsigned integers of 64 bits, high
        and low; and the amplitude as the sum of two float32.

    The product of that integer and a position, modulo 2¹²⁸, is the part of a turn that is left of
    the angle: what ω lost when it was rounded, 2⁻⁸⁵ of it, is all that it errs by.
    """
    high, low, amplitude = frequencies(rotary_dim, base, scaling)
    with localcontext() as context:
        context.prec = 100
        turns = [
            int((Decimal(h) + Decimal(w)) / (2 * PI) % 1 * 2**128)
            for h, w in zip(high.tolist(), low.tolist(), strict=True)
        ]
    words = np.array([[turn >> 64, turn & (2**64 - 1)] for turn in turns], np.uint64)
    with np.errstate(over="ignore"):
        rounded = float(np.float32(amplitude))
    return words, (rounded, amplitude - rounded if math.isfinite(rounded) else 0.0)
