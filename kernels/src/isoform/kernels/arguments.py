"""What a kernel is told: operands as they lie in memory, packed into the struct that it takes.

:data:`ARGUMENTS` mirrors ``EvoformerArguments`` of ``cuda/evoformer_arguments.cuh``, field by
field; ``test_evoformer_arguments.py`` holds the two together. Nothing here knows an array library:
an array is a pointer and strides (:class:`View`), whosever it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from isoform.reference.contract import Shape

AXES = ("B", "S", "Q", "K", "H", "G", "D")
OPERANDS = ("q", "k", "v", "mask", "mask_bias", "pair_bias", "gate", "out", "lse")
GRADIENTS = ("dout", "dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate")
SCRATCH = (
    *("top", "total", "total_code", "total_more", "delta"),
    *("mask_bias_parts", "pair_bias_parts", "arrived"),
)
"""What one kernel leaves for the next ones: contiguous; of 4 bytes each, the code of total of 3."""
COUNTS = ("parts", "pair_bias_tiles")

OPERAND = np.dtype([("data", "u8"), ("stride", "i8", 5)], align=True)
ARGUMENTS = np.dtype(
    [
        *((axis, "i8") for axis in AXES),
        *((name, OPERAND) for name in (*OPERANDS, *GRADIENTS)),
        *((name, "u8") for name in SCRATCH),
        *((name, "i8") for name in COUNTS),
        ("scale", "f4"),
    ],
    align=True,
)


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


def pack(
    shape: Shape,
    views: Mapping[str, View],
    scale: float,
    counts: Mapping[str, int] = MappingProxyType({}),
) -> np.ndarray[Any, Any]:
    """The struct of one call, by value: what is not among ``views`` is absent, a null pointer."""
    packed = np.zeros((), ARGUMENTS)
    for name, count in counts.items():
        packed[name] = count
    for axis in AXES:
        packed[axis] = getattr(shape, axis)
    for name in _present(views, (*OPERANDS, *GRADIENTS)):
        packed[name]["data"] = views[name].pointer
        packed[name]["stride"][: len(views[name].strides)] = views[name].strides
    for name in _present(views, SCRATCH):
        packed[name] = views[name].pointer
    packed["scale"] = scale
    return packed


def place_of(name: str) -> int:
    """Where the pointer of an operand, a result or scratch memory is in the struct, in bytes."""
    fields = ARGUMENTS.fields
    assert fields is not None
    return int(fields[name][1])


def _present(views: Mapping[str, View], names: Iterable[str]) -> list[str]:
    return [name for name in names if name in views]
