"""The host side of the masked softmax: what a call launches.

The device side is ``cuda/masked_softmax.cu`` and, for long rows, ``cuda/masked_softmax_long.cu``.
What is decided here needs no GPU, so that whoever runs the same source elsewhere, as the emulator
does, decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoform.kernels.arguments import place_in
from isoform.kernels.fused_launch import MATRIX, start, width_of
from isoform.kernels.launch import Launch, Told, Work
from isoform.kernels.plain import ELEMENTS
from isoform.kernels.rotary_launch import Lying

MATRICES = ("scores", "probabilities", "dout", "out")
ARGUMENTS = np.dtype(
    [
        *((name, "i8") for name in ("rows", "keys", "heads", "queries", "causal")),
        *((name, MATRIX) for name in MATRICES),
        ("mask", "u8"),
        ("mask_strides", "i8", 3),
        *((name, "f4") for name in ("scale", "unused")),
    ]
)
"""Mirrors ``SoftmaxArguments`` of ``cuda/softmax_arguments.cuh``."""

SOURCE, LONG_SOURCE = "masked_softmax", "masked_softmax_long"

MOST_THREADS = 512
"""Of a row: those of a block that holds 64 registers of a thread's numbers and more."""

BLOCK = 256
"""Threads of a block of several rows."""

HELD = 32
"""Keys that a thread holds at most: of the backward's two arrays in float32 a register each."""

TOGETHER = 8
"""Threads that a row has at least, if it has so many vectors: 128 bytes that they read at once."""

COUNTS = (1, 2, 3, 4, 6, 8)
"""Of vectors that a thread may hold: few enough to be compiled, near enough to any number."""


@dataclass(frozen=True)
class Softmax:
    """What is computed: all of it that is no array.

    Attributes:
        heads: Of scores ``[B, H, Q, K]``, H.
        queries: Q.
        causal: Whether query i attends to keys j ≤ i only.
        scale: The factor of the scores.
        backward: Whether it is the backward.
    """

    heads: int
    queries: int
    causal: bool
    scale: float
    backward: bool = False


@dataclass(frozen=True)
class Shared:
    """How a row is shared.

    Attributes:
        source: The source that does it.
        threads: The row's threads, a power of two.
        vectors: How many vectors each reads at once, which are all it has unless the row is long.
    """

    source: str
    threads: int
    vectors: int


def shared(keys: int, width: int) -> Shared:
    """By how many threads a row of so many keys is held, or read twice if it is long."""
    vectors, most = -(-keys // width), min(HELD // width, COUNTS[-1])
    threads = max(_power(-(-vectors // most)), min(TOGETHER, _power(vectors)))
    if threads > MOST_THREADS:
        return Shared(LONG_SOURCE, MOST_THREADS, most)
    each = -(-vectors // threads)
    return Shared(SOURCE, threads, next(count for count in COUNTS if count >= each))


def launch(softmax: Softmax, arrays: Mapping[str, Lying], where: Any) -> None:
    """Launch on the current device; returns before the GPU has done it.

    Args:
        softmax: What is computed.
        arrays: By the names of :data:`MATRICES`, each ``[B·H·Q, K]`` with adjacent keys, those
            that there is no use for missing; and ``mask``, ``[B, H, Q, K]`` of bytes with adjacent
            keys, if there is one.
        where: The current device, and the stream's address.
    """
    start(softmax, lambda: told(softmax, arrays), arrays, None, where)


def told(softmax: Softmax, arrays: Mapping[str, Lying]) -> Told:
    """What a call launches, which is nothing where there is no element, and what is told."""
    one, mask = arrays["out"], arrays.get("mask")
    rows, keys = one.shape
    width = width_of(arrays, MATRICES)
    if mask:
        steps = [step for size, step in zip(mask.shape[:3], mask.strides, strict=False) if size > 1]
        width = math.gcd(width, mask.pointer, *steps)

    packed = np.zeros((), ARGUMENTS)
    packed["rows"], packed["keys"] = rows, keys
    packed["heads"], packed["queries"] = softmax.heads, softmax.queries
    packed["causal"], packed["scale"] = softmax.causal, softmax.scale
    for name in arrays.keys() - {"mask"}:
        packed[name]["data"] = arrays[name].pointer
        packed[name]["stride"] = arrays[name].strides[0]
    if mask:
        packed["mask"], packed["mask_strides"] = mask.pointer, mask.strides[:3]

    how = shared(max(keys, 1), width)
    down = max(1, BLOCK // how.threads) if how.threads <= 32 else 1
    launched = Launch(
        how.source,
        defines(one.dtype, width, how, mask is not None),
        f"{how.source}{'_backward' if softmax.backward else ''}",
        -(-rows // down),
        (how.threads, down),
    )
    places = tuple(place_in(ARGUMENTS, name) for name in arrays)
    return Told(Work((launched,) if rows and keys else ()), packed, places)


def defines(dtype: str, width: int, how: Shared, masked: bool) -> dict[str, int]:
    """The definitions of a variant of either source."""
    return {
        "ELEMENT": ELEMENTS[dtype],
        "WIDTH": width,
        "ACROSS": how.threads,
        "VECTORS": how.vectors,
        "MASKED": int(masked),
    }


def _power(n: int) -> int:
    """The power of two that is n or the next above it."""
    return 1 << (n - 1).bit_length()
