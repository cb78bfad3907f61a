"""The plain kernel's host side: what it declares, and what a call launches.

The device side, with the algorithm, is ``cuda/evoformer_plain.cu``. What is decided here needs no
GPU, so that whoever runs the same source elsewhere, as the emulator does, decides alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from isoform.kernels.arguments import View
from isoform.kernels.launch import Launch, Work
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


def defines(dtype: str, head_dim: int) -> dict[str, int | str]:
    """The variant of the source for one call."""
    room = next(room for room in HEAD_DIMS if room >= head_dim)
    return {"ELEMENT": ELEMENTS[dtype], "HEAD_DIM": room}


def tile(head_dim: int) -> int:
    """Queries, and keys, in a tile: ``TILE`` of the source."""
    return 8 if head_dim > 128 else 16


def forward(shape: Shape, dtype: str, operands: Mapping[str, View]) -> Work:
    """What computes ``out`` and, where it is among the arguments, ``lse``."""
    return Work(_launches({"forward": "Q H S B"}, shape, dtype))


def backward(
    shape: Shape, dtype: str, operands: Mapping[str, View], wanted: Collection[str]
) -> Work:
    """What computes the gradients of the operands ``wanted``.

    The first kernel does q and the gate, and leaves what all others need.
    """
    if not wanted:
        return Work(())
    blocks = {"backward_query": "Q H S B"}
    if not {"k", "v"}.isdisjoint(wanted):
        blocks["backward_key"] = "K G S B"
    if "mask_bias" in wanted:
        blocks["backward_mask_bias"] = "K S B"
    if "pair_bias" in wanted:
        blocks["backward_pair_bias"] = "K Q H B"
    per_query = {name: shape.of("lse") for name in ("top", "total", "delta")}
    return Work(_launches(blocks, shape, dtype), per_query)


def _launches(blocks: Mapping[str, str], shape: Shape, dtype: str) -> tuple[Launch, ...]:
    """A block for each tile along Q and K and each index along other axes; none is no launch.

    There may be 2³¹ − 1: the queries of so many tiles fit into no GPU's memory.
    """
    size = tile(shape.D)

    def along(axis: str) -> int:
        length: int = getattr(shape, axis)
        return -(-length // size) if axis in "QK" else length

    counted = {kernel: prod(map(along, axes.split())) for kernel, axes in blocks.items()}
    variant = defines(dtype, shape.D)
    return tuple(
        Launch(SOURCE, variant, f"{SOURCE}_{kernel}", count, (size, size))
        for kernel, count in counted.items()
        if count
    )
