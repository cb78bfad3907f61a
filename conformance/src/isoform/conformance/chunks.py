"""A call in chunks: what is too large to be held at once is computed a few rows at a time.

Full-size cases have up to 6·10⁹ logits: as float64 that is 48 GB for each intermediate result. But
nothing depends on more than one row s but the gradient of the pair bias, and that is a sum over the
rows; and within a row, queries meet only in the gradients of the keys, the values and the mask
bias, which are sums over the queries. So one rule puts the chunks together: what a chunk gives is
*added* to the whole, at the place that the chunk has on the axes that the result has. On the axes
that it lacks, this sums.

It is the same code that computes a chunk on the CPU and, where there is one, on a GPU: NumPy's
functions, given CuPy's arrays, are CuPy's. A GPU is used for what is too large for one chunk of the
CPU, so the small cases' numbers are the same bits everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.dtypes import FORMATS, Array
from isoform.reference.contract import Sizes
from isoform.reference.numpy.evoformer_tiled import blocks

Chunk = Mapping[str, slice]
"""Where a chunk lies: a slice of each of the axes B, S and Q (L, where there are no queries)."""

Step = Callable[[Operands], Mapping[str, tuple[Array, ...]]]
"""What is done to the operands of one chunk: one array or more for each result."""


@dataclass(frozen=True)
class Processor:
    """Where chunks are computed.

    Attributes:
        limit: Numbers that the largest array of a chunk may have. Some twenty such arrays, of
            float64, are alive at once.
        put: Makes an array of the processor's of one of NumPy's.
        get: And back.
    """

    limit: int
    put: Callable[[Array], Any]
    get: Callable[[Any], Array]


CPU = Processor(4_000_000, put=lambda x: x, get=lambda x: x)


def _to_gpu(x: Array) -> Any:
    """The numbers of ``x``, exactly: in float32 where CuPy may not know the dtype."""
    import cupy

    return cupy.asarray(x.astype(np.float32) if x.dtype == FORMATS["bfloat16"].dtype else x)


GPU = Processor(50_000_000, put=_to_gpu, get=lambda x: np.asarray(x.get()))


def gpu_present() -> bool:
    """Whether there is a GPU that NumPy's functions can be run on: CuPy, and a device."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


@contextmanager
def gpu_memory() -> Iterator[None]:
    """Make room on the GPU, and give back what was taken.

    PyTorch and CuPy both keep what they have freed, each for itself: one may be refused memory that
    the other only hoards.
    """
    import cupy

    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        cupy.get_default_memory_pool().free_all_blocks()


def in_chunks(
    step: Step, operands: Operands, shape: Sizes, processor: Processor | None = None
) -> dict[str, tuple[Array, ...]]:
    """Do ``step`` a chunk at a time, and put the results together.

    Args:
        step: Gives the results of a call that has only a chunk's operands, rounded nowhere. It must
            be written in NumPy's functions, and make no array but from its operands.
        operands: By name; ``lse`` and ``dout`` may be among them.
        shape: The sizes of the call.
        processor: Where; by default the CPU for what is one chunk there, else a GPU if there is
            one.

    Returns:
        NumPy arrays by name, each in the shape of its result.
    """
    if processor is None:
        processor = GPU if _largest(shape) > CPU.limit and gpu_present() else CPU
    if processor is GPU:
        with gpu_memory():
            return _summed(step, operands, shape, processor)
    return _summed(step, operands, shape, processor)


def _summed(
    step: Step, operands: Operands, shape: Sizes, processor: Processor
) -> dict[str, tuple[Array, ...]]:
    whole: dict[str, tuple[Array, ...]] = {}
    for chunk in chunks(shape, processor.limit):
        given = {name: processor.put(x[_place(name, shape, chunk)]) for name, x in operands.items()}
        for name, parts in step(given).items():
            found = tuple(processor.get(part) for part in parts)
            if all(length == slice(None) for length in chunk.values()):
                whole[name] = found
                continue
            if name not in whole:
                whole[name] = tuple(
                    np.zeros(shape.of(_like(name, shape)), part.dtype) for part in found
                )
            for total, part in zip(whole[name], found, strict=True):
                total[_place(name, shape, chunk)] += part
    return whole


def chunks(shape: Sizes, limit: int) -> Iterator[Chunk]:
    """Split a call so that no array of a chunk has more than ``limit`` numbers, if possible.

    Examples are split before rows (where there are any), rows before queries or tokens, and keys
    never. A call that fits is one chunk, and so is one without logits.
    """
    B, S, Q, K, H, D = _sizes(shape)
    axes = "BSQ" if hasattr(shape, "Q") else "BSL"
    if _largest(shape) <= limit or B * S * Q * K * H == 0:
        yield dict.fromkeys(axes, slice(None))
        return
    row = H * max(Q * K, Q * D, K * D)
    examples = max(1, limit // (S * row))
    rows = max(1, limit // row)
    queries = max(1, limit // (H * max(K, D))) if row > limit else Q
    for place in product(blocks(B, examples), blocks(S, rows), blocks(Q, queries)):
        yield dict(zip(axes, place, strict=True))


def _sizes(shape: Sizes) -> tuple[int, ...]:
    """B, S, Q, K, H and D of a call. One without rows has one; one without keys, whose tokens each
    meet none but themselves, has one key.
    """
    sizes: dict[str, int] = {"S": 1, "K": 1, "Q": getattr(shape, "L", 0), **vars(shape)}
    return tuple(sizes[axis] for axis in "BSQKHD")


def _largest(shape: Sizes) -> int:
    """Numbers in the largest array of a call: the logits, or q or k with all H heads; or x."""
    B, S, Q, K, H, D = _sizes(shape)
    return B * S * H * max(Q * K, Q * D, K * D)


def _like(name: str, shape: Sizes) -> str:
    """The operand or result that ``name`` has the axes of: its own, or x's where it is dx."""
    return name if name in shape.axes else name.removeprefix("d")


def _place(name: str, shape: Sizes, chunk: Chunk) -> tuple[slice, ...]:
    """Where in operand or result ``name`` a chunk lies."""
    axes = shape.axes[_like(name, shape)].split()
    return tuple(chunk.get(axis, slice(None)) for axis in axes)
