"""Launching kernels: a source, its definitions, and over how many blocks.

What is to be launched is data, made by :mod:`~isoform.kernels.plain` and
:mod:`~isoform.kernels.tensor` without a GPU, so that whoever runs the same source elsewhere, as the
emulator does, runs the same. Making it costs more than many a kernel takes, so it is kept, ready
but for the addresses, and found again by how the operands lie (:func:`prepared`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np

from isoform.kernels.arguments import EVOFORMER, Struct, View, place_in
from isoform.kernels.compiler import Define, load, toolkit
from isoform.kernels.tiles import Tile, driver_map, place_of_map, with_maps


@dataclass(frozen=True)
class Launch:
    """One kernel, and over how many blocks.

    Attributes:
        source: The source: ``NAME.cu``.
        defines: The preprocessor definitions that choose the variant.
        kernel: The kernel's name in it.
        blocks: Blocks, along the one axis that may have more than 65535 of them.
        threads: Threads of a block, along x and y.
        shared_bytes: The dynamic shared memory of a block.
        tiles: Those that it fetches, whose maps follow the arguments.
    """

    source: str
    defines: Mapping[str, Define] = field(hash=False)
    kernel: str
    blocks: int
    threads: tuple[int, ...]
    shared_bytes: int = 0
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True)
class Work:
    """All that one pass of one call takes.

    Attributes:
        launches: The kernels, in the order to launch them in.
        scratch: Memory that they need besides operands and results: shapes by name, of 4-byte
            elements. None of it is read before it is written.
        counts: Further fields of the argument structure.
    """

    launches: tuple[Launch, ...]
    scratch: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    counts: Mapping[str, int] = field(default_factory=dict, hash=False)


Value = TypeVar("Value")


@contextmanager
def setting(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """While this lasts, the variable has the value."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


MULTIPROCESSORS: ContextVar[int] = ContextVar("MULTIPROCESSORS", default=132)
"""Of the GPU that work is made for."""

Pass = Callable[[Any, str, Mapping[str, View]], Work]
"""Makes the work of a forward or a backward, by the shape (of the operation's own class), the dtype
and how the arrays lie."""

Description = tuple[Any, str, Mapping[str, View]]
"""What a pass is given."""


@dataclass(frozen=True)
class Told:
    """The work of one pass of any operation, and what its kernels are told.

    Attributes:
        work: The work.
        arguments: The struct that all its kernels take, a NumPy record.
        places: Where pointers are in it, in bytes: those of the arrays, then of the scratch memory.
    """

    work: Work
    arguments: np.ndarray[Any, Any] = field(hash=False)
    places: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """A pass that lacks nothing but the addresses of its arrays.

    Attributes:
        scratch: As in :class:`Work`.
    """

    scratch: Mapping[str, tuple[int, ...]]
    _functions: Sequence[tuple[Any, tuple[int], tuple[int, ...], int, _Template]]

    def launch(self, pointers: Sequence[int], stream: int) -> None:
        """Launch on the current device; returns before the GPU has done it.

        Args:
            pointers: Where the arrays are, in the order of the views that were prepared, and then
                the scratch memory.
            stream: The stream's address.
        """
        external, addresses = _stream(stream), np.array(pointers, np.uint64)
        given: _Template | None = None
        arguments: tuple[Any, ...] = ()
        for function, blocks, threads, shared_bytes, template in self._functions:
            if template is not given:  # most kernels of a pass are given the same
                given, arguments = template, (template.filled(addresses),)
            function(blocks, threads, arguments, shared_bytes, external)


@dataclass(frozen=True)
class _Template:
    """What a kernel is given, but for addresses.

    Attributes:
        words: All of it, in eights of bytes.
        places: Where addresses are in it, and
        order: which of those of the pass.
        opaque: Its type for CuPy, which describes a struct field by field, slowly.
    """

    words: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any]
    order: np.ndarray[Any, Any]
    opaque: np.dtype[Any]

    def filled(self, addresses: np.ndarray[Any, Any]) -> Any:
        """It, with the addresses of one call."""
        words = self.words.copy()
        words[self.places] = addresses[self.order]
        return words.view(self.opaque)[0]


_PREPARED: dict[Hashable, Prepared] = {}
_MOST = 1024


def prepared(
    key: Hashable,
    one: Pass,
    described: Callable[[], Description],
    scale: float,
    struct: Struct = EVOFORMER,
) -> Prepared:
    """The pass known by ``key``, made if it is new.

    Args:
        key: All that the pass depends on but the addresses, the device included.
        one: The pass.
        described: Says what it is given; asked only if the pass is new.
        scale: The factor of the logits.
        struct: What the operation's kernels are told.
    """

    def told() -> Told:
        from isoform.kernels.geometries import of_device  # it knows what passes launch

        shape, dtype, views = described()
        with of_device(_device_name(), *_device_traits()):
            work = one(shape, dtype, views)
        places = tuple(map(struct.place_of, (*views, *work.scratch)))
        return Told(work, struct.pack(shape, views, scale, work.counts), places)

    return kept(key, told)


def kept(key: Hashable, told: Callable[[], Told]) -> Prepared:
    """What is known by ``key``, ready to be launched, made if it is new.

    Args:
        key: All that it depends on but the addresses, the device included.
        told: Makes it; asked only if it is new.
    """
    if key not in _PREPARED:
        if len(_PREPARED) >= _MOST:
            _PREPARED.clear()
        toolkit()  # says what to install where CuPy is missing
        _PREPARED[key] = _prepare(told())
    return _PREPARED[key]


def _prepare(told: Told) -> Prepared:
    functions = []
    templates: dict[tuple[Tile, ...], _Template] = {}
    for each in told.work.launches:
        function = load(each.source, defines=each.defines).get_function(each.kernel)
        if each.shared_bytes > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = each.shared_bytes
        if each.tiles not in templates:
            templates[each.tiles] = _template(told, each.tiles)
        size = (each.blocks,), each.threads, each.shared_bytes
        functions.append((function.kernel, *size, templates[each.tiles]))
    return Prepared(told.work.scratch, tuple(functions))


def _template(told: Told, tiles: tuple[Tile, ...]) -> _Template:
    """What kernels are given that fetch ``tiles``."""
    given = np.frombuffer(with_maps(told.arguments, tiles, driver_map), np.uint64)
    places, order = list(told.places), list(range(len(told.places)))
    for number, tile in enumerate(tiles):  # a map begins with the address, as driver_map made sure
        places.append(place_of_map(number, told.arguments.dtype.itemsize))
        order.append(told.places.index(place_in(told.arguments.dtype, tile.operand)))
    opaque = np.dtype((np.void, given.nbytes))
    return _Template(given, np.array(places, np.intp) // 8, np.array(order, np.intp), opaque)


def _device_name() -> str:
    """The name of the current device."""
    import cupy

    runtime = cupy.cuda.runtime
    name: bytes = runtime.getDeviceProperties(runtime.getDevice())["name"]
    return name.decode()


def _device_traits() -> tuple[int, int, str]:
    """Bytes of shared memory that a block may have on the current device; its multiprocessors; its
    architecture.
    """
    import cupy

    device = cupy.cuda.Device()
    room, several = "MaxSharedMemoryPerBlockOptin", "MultiProcessorCount"
    numbers = device.attributes
    return numbers[room], numbers[several], f"sm_{device.compute_capability}"


@cache
def _stream(pointer: int) -> Any:
    """A stream that is not CuPy's own."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(pointer))


@dataclass(frozen=True)
class _Stream:
    """A stream under the CUDA stream protocol, which not every PyTorch speaks that we support."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the version of the protocol, and the stream
