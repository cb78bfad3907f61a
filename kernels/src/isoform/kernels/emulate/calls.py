"""Emulating what hosts launch: their launches are data, which run here as they do on a GPU.

NumPy's arrays are the memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from isoform.kernels import tiles
from isoform.kernels.arguments import View
from isoform.kernels.emulate.program import Order, build
from isoform.kernels.launch import Launch, Told
from isoform.kernels.rotary_launch import Lying

Array = npt.NDArray[Any]


def launch_all(launches: Iterable[Launch], arguments: Array, order: Order = "forward") -> None:
    """Run kernels, one after the other.

    Args:
        launches: What is launched.
        arguments: The structure that all of them take, a NumPy record.
        order: As in :meth:`isoform.kernels.emulate.Program.launch`, which says what is raised too.
    """
    for launch in launches:
        build(launch.source, defines=launch.defines).launch(
            launch.kernel,
            grid=(launch.blocks,),
            block=launch.threads,
            arguments=tiles.with_maps(arguments, launch.tiles, tile_map),
            shared_bytes=launch.shared_bytes,
            order=order,
        )


def launch_told(told: Told, order: Order = "forward") -> None:
    """Run a pass that is told where its arrays are, with scratch memory that is unwritten.

    Args:
        told: The pass. Fields of its arguments are called as the scratch memory is.
        order: As in :func:`launch_all`.
    """
    scratch = {name: unwritten(shape, np.float32) for name, shape in told.work.scratch.items()}
    arguments = told.arguments.copy()
    for name, x in scratch.items():
        arguments[name] = x.ctypes.data
    launch_all(told.work.launches, arguments, order)


def tile_map(it: tiles.Lying) -> bytes:
    """How an array lies of which tiles are fetched, as the emulator's ``TileMap`` has it."""
    numbers = (it.address, *it.sizes, *it.steps, *it.box)
    return struct.pack("=Q5q4qII", *numbers).ljust(tiles.MAP_BYTES, b"\0")


def unwritten(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory for a result, all bits set: what is not written to it is seen as NaN."""
    bits = np.full((*shape, np.dtype(dtype).itemsize), 0xFF, np.uint8)
    memory: Array = bits.view(dtype)[..., 0]
    return memory


def strides(x: Array) -> tuple[int, ...]:
    """From one element to the next along each axis, in elements."""
    return tuple(step // x.itemsize for step in x.strides)


def lying(x: Array) -> Lying:
    """An array as it lies."""
    return Lying(x.ctypes.data, x.shape, strides(x), str(x.dtype))


def views_of(arrays: Mapping[str, Array]) -> dict[str, View]:
    """Arrays as they lie, by name: what :meth:`isoform.kernels.arguments.Struct.pack` takes."""
    return {name: View.of(x.ctypes.data, x.shape, strides(x)) for name, x in arrays.items()}
