"""The host side of LayerNorm: what a call launches.

The device side is ``cuda/layer_norm.cu``, ``cuda/layer_norm_backward.cu`` and
``cuda/column_sums.cu``. What is decided here needs no GPU, so that whoever runs the same source
elsewhere, as the emulator does, decides alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isoform.kernels.arguments import place_in
from isoform.kernels.fused_launch import ARGUMENTS, column_sums, pack, start, width_of
from isoform.kernels.launch import Launch, Told, Work
from isoform.kernels.plain import ELEMENTS
from isoform.kernels.rotary_launch import Lying

MOST_THREADS = 512
"""Of a row."""

HELD, HELD_BACKWARD = 32, 16
"""Channels that a thread has at most: of each the backward keeps two sums besides."""

MOST_VECTORS = 16
"""That a thread has at most, where they are narrow."""

MOST_CHANNELS = MOST_THREADS * HELD_BACKWARD
"""What a block holds, of a row and of the sums over all."""

ROWS = 8
"""Of a block whose rows have a warp each, as in the source."""

FORWARD_TURNS = 8
"""How many rows a warp or block of a forward does: it waits for weight and bias once."""

BACKWARD_BLOCKS = 1024
"""Of a backward at most, each of which leaves two floats for each channel."""


@dataclass(frozen=True)
class LayerNorm:
    """What is computed: all of it that is no array.

    Attributes:
        epsilon: What is added to the variance.
        backward: Whether it is the backward.
    """

    epsilon: float
    backward: bool = False

    @property
    def source(self) -> str:
        """The source, and the kernel in it."""
        return "layer_norm_backward" if self.backward else "layer_norm"


@dataclass(frozen=True)
class Shared:
    """How a row is shared.

    Attributes:
        threads: The row's threads, whole warps.
        vectors: How many vectors each has.
        rows: Rows of a block.
    """

    threads: int
    vectors: int
    rows: int


def shared(norm: LayerNorm, columns: int, width: int) -> Shared:
    """By how many threads a row of so many channels is held."""
    most = min(MOST_VECTORS, (HELD_BACKWARD if norm.backward else HELD) // width)
    vectors = -(-columns // width)
    each = 1
    while each < most and vectors > 32 * each:  # as many as a thread can have, of a warp at least
        each *= 2
    warps = -(-vectors // (32 * each))
    return Shared(32 * warps, each, 1 if warps > 1 else ROWS)


def chunks_of(norm: LayerNorm, rows: int, how: Shared) -> int:
    """Into how many chunks the rows are dealt."""
    groups = -(-rows // how.rows)
    if norm.backward:
        return max(1, min(groups, BACKWARD_BLOCKS))
    return max(1, -(-groups // FORWARD_TURNS))


def launch(norm: LayerNorm, arrays: Mapping[str, Lying], scratch: Any, where: Any) -> None:
    """Launch on the current device; returns before the GPU has done it.

    Args:
        norm: What is computed.
        arrays: By name: ``x``, ``out`` and ``dout``, ``[rows, columns]`` with adjacent columns;
            ``weight``, ``bias``, ``dweight``, ``dbias``, ``[columns]``; and ``statistics``,
            ``[rows, 2]`` of float32. Those that there is no use for are missing.
        scratch: Gives the address of scratch memory, of so many floats.
        where: The current device, and the stream's address.
    """
    start(norm, lambda: told(norm, arrays), arrays, scratch, where)


def told(norm: LayerNorm, arrays: Mapping[str, Lying]) -> Told:
    """What a call launches, which is nothing where there is no element, and what is told."""
    one = arrays["x"]
    rows, columns = one.shape
    width = width_of(arrays)
    how = shared(norm, max(columns, 1), width)
    chunks = chunks_of(norm, rows, how)

    numbers = {"rows": rows, "columns": columns, "chunks": chunks, "epsilon": norm.epsilon}
    packed = pack(arrays, numbers)

    variant = defines(one.dtype, width, how)
    launches = [Launch(norm.source, variant, norm.source, chunks, (how.threads, how.rows))]
    scratch = {}
    if norm.backward:
        scratch = {"parts": (chunks, 2, columns)}
        launches.append(column_sums(one.dtype, 2 * columns))
    nothing = not columns or not (rows or norm.backward)
    places = tuple(place_in(ARGUMENTS, name) for name in (*arrays, *scratch))
    return Told(Work(() if nothing else tuple(launches), scratch), packed, places)


def defines(dtype: str, width: int, how: Shared) -> dict[str, int]:
    """The definitions of a variant of either source."""
    return {
        "ELEMENT": ELEMENTS[dtype],
        "WIDTH": width,
        "ACROSS": how.threads,
        "VECTORS": how.vectors,
    }
