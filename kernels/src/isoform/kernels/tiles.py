"""Tiles that a GPU fetches by itself, a box of an array at a time: the host side.

Since Hopper, one thread can ask for a box of an array of up to five axes, which arrives in shared
memory without further instructions, zeros where the box reaches beyond the array. The kernel has to
be given a map of the array: 128 bytes, made by the driver, which say how the array lies and what a
box of it is. A :class:`Tile` says it in words; :func:`driver_map` has the driver say it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from isoform.kernels.arguments import View

AXES = {
    "q": "BSQHD",
    "k": "BSKGD",
    "v": "BSKGD",
    "dout": "BSQHD",
    "pair_bias": "B.HQK",
}
"""Of the operands of which there are tiles; of a point there is one index."""

ELEMENT_BYTES = 2
MAP_BYTES = 128
ALIGNMENT = 64
"""Of a map, in what the kernel is given."""

STRIDES = range(0, 2**40, 16)
"""What may be from one index to the next, in bytes."""


@dataclass(frozen=True)
class Tile:
    """Boxes of an operand that a kernel fetches.

    Attributes:
        operand: Its name.
        rows: Of a box: queries or keys.
    """

    operand: str
    rows: int

    @property
    def columns(self) -> int:
        """Of a box, adjacent in memory: sixteen channels, as they are multiplied, or 64 keys of the
        pair bias. Pieces of 16 bytes are swizzled: piece p of row r is where, with channels,
        p ^ r // 4 % 2 would be, and with keys, p ^ r % 8.
        """
        return 64 if self.operand == "pair_bias" else 16


@dataclass(frozen=True)
class Lying:
    """How an array lies of which there are tiles; the adjacent axis first, then that of the rows.

    Attributes:
        address: Of its first element.
        sizes: Of five axes.
        steps: From one index to the next, in bytes; of all axes but the first.
        box: The size of a box, along the first two.
    """

    address: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    box: tuple[int, int]


def fetchable(operands: Mapping[str, View], names: Iterable[str]) -> bool:
    """Whether tiles can be fetched of all that are named, whose last axis is adjacent in memory."""
    return all(
        ELEMENT_BYTES * step in STRIDES for name in names for step in operands[name].strides[:-1]
    )


def lying(tile: Tile, arguments: np.ndarray[Any, Any]) -> Lying:
    """How the operand of a tile lies, by what kernels are told.

    Raises:
        ValueError: It has no elements: there is no map of it.
    """
    axes = AXES[tile.operand]
    operand = arguments[tile.operand]
    rows = 3 if tile.operand == "pair_bias" else 2
    order = (4, rows, *(axis for axis in (3, 2, 1, 0) if axis != rows))
    sizes = tuple(1 if axes[axis] == "." else int(arguments[axes[axis]]) for axis in order)
    if 0 in sizes:
        raise ValueError(f"{tile.operand} has no elements, so there are no tiles to be fetched")
    steps = (ELEMENT_BYTES * int(operand["stride"][axis]) for axis in order[1:])
    return Lying(
        int(operand["data"]),
        sizes,
        tuple(step if size > 1 else 16 for size, step in zip(sizes[1:], steps, strict=True)),
        (tile.columns, tile.rows),
    )


def with_maps(
    arguments: np.ndarray[Any, Any],
    tiles: Sequence[Tile],
    map_of: Callable[[Lying], bytes],
) -> bytes:
    """What a kernel is given that fetches ``tiles``: the arguments of all kernels, then maps."""
    told = arguments.tobytes()
    if not tiles:
        return told
    maps = (map_of(lying(tile, arguments)) for tile in tiles)
    return told.ljust(place_of_map(0, arguments.dtype.itemsize), b"\0") + b"".join(maps)


def place_of_map(number: int, told: int) -> int:
    """Where a map is in what a kernel is given, behind ``told`` bytes of arguments."""
    return -(-told // ALIGNMENT) * ALIGNMENT + MAP_BYTES * number


class TileMapRefused(RuntimeError):
    """The driver makes no map; the message has its error and what it was asked for."""


_UINT16, _NO_INTERLEAVING, _L2_256, _ZEROS_BEYOND = 1, 0, 3, 0  # as CUtensorMap… has them
_SWIZZLE = {32: 1, 128: 3}  # by the bytes of a box's row


def driver_map(it: Lying) -> bytes:
    """The map of an array of the GPU.

    Raises:
        TileMapRefused: The driver makes none.
    """
    held = (ctypes.c_uint64 * (MAP_BYTES // 8 + ALIGNMENT // 8))()
    start = -ctypes.addressof(held) % ALIGNMENT
    place = ctypes.addressof(held) + start
    error = _encode()(
        place,
        _UINT16,
        len(it.sizes),
        it.address,
        (ctypes.c_uint64 * 5)(*it.sizes),
        (ctypes.c_uint64 * 4)(*it.steps),
        (ctypes.c_uint32 * 5)(*it.box, 1, 1, 1),
        (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1),
        _NO_INTERLEAVING,
        _SWIZZLE[ELEMENT_BYTES * it.box[0]],
        _L2_256,
        _ZEROS_BEYOND,
    )
    if error:
        raise TileMapRefused(f"cuTensorMapEncodeTiled returned {error} for {it}")
    made = bytes(held)[start : start + MAP_BYTES]
    if int.from_bytes(made[:8], "little") != it.address:
        raise TileMapRefused(f"a map is to begin with the address: that of {it} is {made.hex()}")
    return made


@cache
def _encode() -> Any:
    """The driver's function."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    function = getattr(library, "cuTensorMapEncodeTiled", None)
    if function is None:
        raise TileMapRefused("the driver makes no maps of tiles: update it, to CUDA 12 or newer")
    function.argtypes = [
        ctypes.c_void_p,
        *(ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
        *(ctypes.c_void_p,) * 4,
        *(ctypes.c_int,) * 4,
    ]
    function.restype = ctypes.c_int
    return function
