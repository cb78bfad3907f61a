"""What a kernel is told: operands as they lie in memory, packed into the struct that it takes.

A :class:`Struct` says what an operation's kernels are told. :data:`EVOFORMER` mirrors
``EvoformerArguments`` of ``cuda/evoformer_arguments.cuh``, field by field;
``test_evoformer_arguments.py`` holds the two together. Nothing here knows an array library: an
array is a pointer and strides (:class:`View`), whosever it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

AXES = ("B", "S", "Q", "K", "H", "G", "D")
OPERANDS = ("q", "k", "v", "mask", "mask_bias", "pair_bias", "gate", "out", "lse")
GRADIENTS = ("dout", "dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate")
SCRATCH = (
    *("top", "total", "total_code", "total_more", "delta"),
    *("mask_bias_parts", "pair_bias_sums", "turns"),
)
"""What one kernel leaves for the next ones: contiguous; of 4 bytes each, the code of total of 3."""
COUNTS = ("parts", "pair_bias_tiles")


@dataclass(frozen=True)
class View:
    """An array as it lies.

    Attributes:
        pointer: Where its first element is.
        strides: From one element to the next along each axis, in elements.
    """

    pointer: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
        """The view of an array, with stride 0 where an axis has one index: nothing is odd there."""
        return cls(
            pointer,
            tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)),
        )


@dataclass(frozen=True)
class Struct:
    """The struct that an operation's kernels take, by value.

    Attributes:
        axes: The letters of the axes, whose sizes come first.
        arrays: Operands, results and gradients: each a pointer and its strides.
        rank: How many strides each has room for.
        scratch: Memory that is contiguous, of which the pointer is enough.
        counts: Further integers.

    The last field is ``scale``, a float; all others are 8 bytes wide.
    """

    axes: tuple[str, ...]
    arrays: tuple[str, ...]
    rank: int
    scratch: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    @cached_property
    def array(self) -> np.dtype[Any]:
        """One array as it lies."""
        return np.dtype([("data", "u8"), ("stride", "i8", self.rank)], align=True)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The whole."""
        return np.dtype(
            [
                *((axis, "i8") for axis in self.axes),
                *((name, self.array) for name in self.arrays),
                *((name, "u8") for name in self.scratch),
                *((name, "i8") for name in self.counts),
                ("scale", "f4"),
            ],
            align=True,
        )

    def pack(
        self,
        shape: Any,
        views: Mapping[str, View],
        scale: float,
        counts: Mapping[str, int] = MappingProxyType({}),
    ) -> np.ndarray[Any, Any]:
        """The struct of one call: what is not among ``views`` is absent, a null pointer."""
        packed = np.zeros((), self.dtype)
        for name, count in counts.items():
            packed[name] = count
        for axis in self.axes:
            packed[axis] = getattr(shape, axis)
        for name in _present(views, self.arrays):
            packed[name]["data"] = views[name].pointer
            packed[name]["stride"][: len(views[name].strides)] = views[name].strides
        for name in _present(views, self.scratch):
            packed[name] = views[name].pointer
        packed["scale"] = scale
        return packed

    def place_of(self, name: str) -> int:
        """Where the pointer of an array or of scratch memory is in the struct, in bytes."""
        return place_in(self.dtype, name)


def place_in(struct: np.dtype[Any], name: str) -> int:
    """Where a field is in a struct, in bytes."""
    assert struct.fields is not None
    return int(struct.fields[name][1])


EVOFORMER = Struct(AXES, (*OPERANDS, *GRADIENTS), 5, SCRATCH, COUNTS)
OPERAND, ARGUMENTS, pack = EVOFORMER.array, EVOFORMER.dtype, EVOFORMER.pack


def _present(views: Mapping[str, View], names: Iterable[str]) -> list[str]:
    return [name for name in names if name in views]
