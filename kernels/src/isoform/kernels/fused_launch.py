"""The host side of bias and GeLU, and of bias, dropout and residual: what a call launches.

The device side is ``cuda/bias_gelu.cu``, ``cuda/bias_dropout_residual.cu`` and
``cuda/column_sums.cu``. What is decided here needs no GPU, so that whoever runs the same source
elsewhere, as the emulator does, decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoform.kernels.arguments import place_in
from isoform.kernels.compiler import Define
from isoform.kernels.launch import Launch, Told, Work, kept
from isoform.kernels.plain import ELEMENTS
from isoform.kernels.rotary_launch import VECTOR_BYTES, Lying

MATRIX = np.dtype([("data", "u8"), ("stride", "i8")])
MATRICES = ("x", "residual", "dout", "out")
VECTORS = ("bias", "dbias", "weight", "dweight", "seed", "statistics", "parts")
ARGUMENTS = np.dtype(
    [
        *((name, "i8") for name in ("rows", "columns")),
        *((name, MATRIX) for name in MATRICES),
        *((name, "u8") for name in VECTORS),
        *((name, "i8") for name in ("chunks", "tiles", "threshold")),
        *((name, "f4") for name in ("epsilon", "unused")),
    ]
)
"""Mirrors ``FusedArguments`` of ``cuda/fused_arguments.cuh``."""

THREADS, AT_ONCE, LANES = 256, 4, 32
"""As in the sources: of a block, rows that a thread reads at once, columns of ``column_sums``."""

ACROSS = 32
"""Threads of a block beside one another: of 16-bit numbers, they read 512 bytes of a row."""

FORWARD_TURNS = 4
"""How often a block of a forward reads: it waits for the bias once, and yet all end together."""

BACKWARD_BLOCKS = 4096
"""Of a backward at most. Each leaves a float for each of its columns, which has to stay little
beside the activations; and there should be several for every place of a GPU, to end together."""


@dataclass(frozen=True)
class Function:
    """What is computed of each element: all of it that is no array.

    Attributes:
        source: The source: ``NAME.cu``, whose kernels are ``NAME`` and ``NAME_backward``.
        backward: Whether it is the backward, which leaves sums over the rows too.
        defines: Definitions of the source's own.
        threshold: Of 65536 draws, how many are dropped.
    """

    source: str
    backward: bool
    defines: tuple[tuple[str, Define], ...] = ()
    threshold: int = 0


def gelu(tanh: bool, *, backward: bool = False) -> Function:
    """GeLU of ``x + bias``."""
    return Function("bias_gelu", backward, (("TANH", int(tanh)),))


def dropout(threshold: int, *, backward: bool = False) -> Function:
    """Dropout of ``x + bias``, and the residual added."""
    return Function("bias_dropout_residual", backward, (), threshold)


def chunks_of(function: Function, rows: int, columns: int, width: int) -> int:
    """Into how many chunks the rows are dealt."""
    across, down = _threads(columns, width)
    tiles = -(-columns // (across * width))
    reads = -(-rows // (down * AT_ONCE))
    if function.backward:
        return max(1, min(reads, BACKWARD_BLOCKS // tiles))
    return max(1, -(-reads // FORWARD_TURNS))


def launch(function: Function, arrays: Mapping[str, Lying], scratch: Any, where: Any) -> None:
    """Launch on the current device; returns before the GPU has done it.

    Args:
        function: What is computed.
        arrays: By the names of :data:`MATRICES` and :data:`VECTORS`; matrices are ``[rows,
            columns]`` with adjacent columns. Those that the function has no use for are missing,
            as are the ``parts``.
        scratch: Gives the address of scratch memory, of so many floats.
        where: The current device, and the stream's address.
    """
    start(function, lambda: told(function, arrays), arrays, scratch, where)


def start(
    what: Hashable,
    told: Callable[[], Told],
    arrays: Mapping[str, Lying],
    scratch: Any,
    where: tuple[int, int],
) -> None:
    """Launch what has been told of such a call, which is asked only if the call is new.

    Args:
        what: What is computed: all of it that is no array.
        told: Says what the call launches, with places of the arrays, then of scratch memory.
        arrays: Those of the call, by name.
        scratch: Gives the address of scratch memory, of so many floats; not called where none is
            wanted.
        where: The current device, and the stream's address.
    """
    device, stream = where
    ready = kept((what, device, *((name, x.placed) for name, x in arrays.items())), told)
    parts = [scratch(math.prod(shape)) for shape in ready.scratch.values()]
    ready.launch([*(x.pointer for x in arrays.values()), *parts], stream)


def told(function: Function, arrays: Mapping[str, Lying]) -> Told:
    """What a call launches, which is nothing where there is no element, and what is told."""
    one = arrays["dout" if function.backward else "x"]
    rows, columns = one.shape
    width = width_of(arrays)
    chunks = chunks_of(function, rows, columns, width) if columns else 0
    across, down = _threads(columns, width)

    tiles = -(-columns // (across * width))
    numbers = {"rows": rows, "columns": columns, "chunks": chunks, "tiles": tiles}
    packed = pack(arrays, {**numbers, "threshold": function.threshold})

    defines = {"ELEMENT": ELEMENTS[one.dtype], "WIDTH": width, **dict(function.defines)}
    kernel = f"{function.source}{'_backward' if function.backward else ''}"
    launches = [Launch(function.source, defines, kernel, chunks * tiles, (across, down))]
    scratch = {}
    if function.backward:
        scratch = {"parts": (chunks, columns)}
        launches.append(column_sums(one.dtype, columns))
    nothing = not columns or not (rows or function.backward)
    places = tuple(place_in(ARGUMENTS, name) for name in (*arrays, *scratch))
    return Told(Work(() if nothing else tuple(launches), scratch), packed, places)


def pack(arrays: Mapping[str, Lying], numbers: Mapping[str, float]) -> np.ndarray[Any, Any]:
    """What kernels are told: arrays as they lie, and the numbers; all else is 0."""
    packed = np.zeros((), ARGUMENTS)
    for name, number in numbers.items():
        packed[name] = number
    for name, array in arrays.items():
        if name in MATRICES:
            packed[name]["data"], packed[name]["stride"] = array.pointer, array.strides[0]
        else:
            packed[name] = array.pointer
    return packed


def column_sums(dtype: str, columns: int) -> Launch:
    """What adds the parts of so many columns of sums, after those that leave them."""
    element = {"ELEMENT": ELEMENTS[dtype]}
    return Launch("column_sums", element, "column_sums", -(-columns // LANES), (LANES, LANES))


def width_of(arrays: Mapping[str, Lying], named: Collection[str] = MATRICES) -> int:
    """How many elements are read at a time: as many as divide every row and where it starts.

    Args:
        arrays: By name; besides the matrices only ``bias`` and ``weight`` are looked at.
        named: The names of the matrices.
    """
    matrices = [array for name, array in arrays.items() if name in named]
    (size,) = {4 if x.dtype == "float32" else 2 for x in matrices}
    starts = [*matrices, *(arrays[name] for name in ("bias", "weight") if name in arrays)]
    if any(x.pointer % size for x in starts):
        return 1
    steps = [x.strides[0] for x in matrices if x.shape[0] > 1]
    return math.gcd(
        VECTOR_BYTES // size,
        matrices[0].shape[1],
        *steps,
        *(x.pointer // size for x in starts),
    )


def _threads(columns: int, width: int) -> tuple[int, int]:
    """Of a block: across columns, a power of two, and down the rows."""
    vectors = max(1, columns // width)
    across = min(ACROSS, 1 << (vectors - 1).bit_length())
    return across, THREADS // across
