"""The plain kernel's host side: what it declares, which kernels a call launches, and the launch.

The device side, with the algorithm, is ``cuda/evoformer_plain.cu``. What is decided here needs no
GPU, so that whoever runs the same source elsewhere, as the emulator does, decides alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from isoform.kernels.arguments import View, pack
from isoform.kernels.compiler import load
from isoform.reference.contract import Capabilities, Shape

SOURCE = "evoformer_plain"
ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2}
HEAD_DIMS = (16, 32, 64, 128, 256)
"""The head dims that there is a variant for; a D between two takes the larger's."""

CAPABILITIES = Capabilities(
    "evoformer_attention",
    dtypes=frozenset(ELEMENTS),
    devices=frozenset({"cuda"}),
    head_dims=(1, HEAD_DIMS[-1]),
    deterministic=True,  # each sum is made by one block in one order
    memory="linear",
    # The default arithmetic: all of it in float32, and the backward computes O again instead of
    # reading the rounded one.
)


@dataclass(frozen=True)
class Launch:
    """One kernel of the source, and over how many blocks; a block has ``tile × tile`` threads."""

    kernel: str
    blocks: int


def defines(dtype: str, head_dim: int) -> dict[str, int | str]:
    """The variant of the source for one call."""
    room = next(room for room in HEAD_DIMS if room >= head_dim)
    return {"ELEMENT": ELEMENTS[dtype], "HEAD_DIM": room}


def tile(head_dim: int) -> int:
    """Queries, and keys, in a tile: ``TILE`` of the source."""
    return 8 if head_dim > 128 else 16


def forward_launches(shape: Shape) -> list[Launch]:
    """What computes ``out`` and, where it is among the arguments, ``lse``."""
    return _numbered({"forward": ("Q", "H", "S", "B")}, shape)


def backward_launches(shape: Shape, wanted: Collection[str]) -> list[Launch]:
    """What computes the gradients of the operands ``wanted``, in the order to launch it in.

    The first kernel does q and the gate, and leaves what all others need.
    """
    if not wanted:
        return []
    blocks: dict[str, tuple[str, ...]] = {"backward_query": ("Q", "H", "S", "B")}
    if not {"k", "v"}.isdisjoint(wanted):
        blocks["backward_key"] = ("K", "G", "S", "B")
    if "mask_bias" in wanted:
        blocks["backward_mask_bias"] = ("K", "S", "B")
    if "pair_bias" in wanted:
        blocks["backward_pair_bias"] = ("K", "Q", "H", "B")
    return _numbered(blocks, shape)


def _numbered(blocks: Mapping[str, Iterable[str]], shape: Shape) -> list[Launch]:
    """A block for each tile along Q and K and each index along other axes; none is no launch.

    There may be 2³¹ − 1: the queries of so many tiles fit into no GPU's memory.
    """
    size = tile(shape.D)

    def along(axis: str) -> int:
        length: int = getattr(shape, axis)
        return -(-length // size) if axis in "QK" else length

    counted = {kernel: prod(along(axis) for axis in axes) for kernel, axes in blocks.items()}
    return [Launch(f"{SOURCE}_{kernel}", count) for kernel, count in counted.items() if count]


def launch(
    launches: Iterable[Launch], shape: Shape, dtype: str, views: Mapping[str, View], scale: float
) -> None:
    """Launch on CuPy's current device and stream; returns before the GPU has done it."""
    arguments = pack(shape, views, scale)
    size = tile(shape.D)
    for one in launches:
        module = load(SOURCE, defines=defines(dtype, shape.D))
        module.get_function(one.kernel)((one.blocks,), (size, size), (arguments,))
