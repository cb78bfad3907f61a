"""The plain kernel of attention over a sequence, its host side: what it declares and launches.

The device side, with the algorithm, is ``cuda/attention_plain.cu``. As everything that decides what
is launched, this needs no GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from isoform.kernels.arguments import View
from isoform.kernels.attention_arguments import Options
from isoform.kernels.launch import Launch, Work
from isoform.kernels.plain import ELEMENTS, HEAD_DIMS, defines, tile
from isoform.reference.attention_contract import DIFFERENTIABLE, OPTIONS, SequenceShape
from isoform.reference.contract import Arithmetic, Capabilities

SOURCE = "attention_plain"

CAPABILITIES = Capabilities(
    "attention",
    dtypes=frozenset(ELEMENTS),
    devices=frozenset({"cuda"}),
    head_dims=(1, HEAD_DIMS[-1]),
    operands=frozenset(OPTIONS),
    gradients=frozenset(DIFFERENTIABLE),
    deterministic=True,  # each sum is made by one block in one order
    memory="linear",
    arithmetic=Arithmetic(output="operand"),  # δ comes from the output as it was returned
)


def forward(
    shape: SequenceShape, dtype: str, operands: Mapping[str, View], options: Options
) -> Work:
    """What computes ``out`` and, where it is among the arguments, ``lse``."""
    return Work(_launches({"forward": "Q H B"}, shape, dtype), counts=options.counts)


def backward(
    shape: SequenceShape,
    dtype: str,
    operands: Mapping[str, View],
    options: Options,
    wanted: Collection[str],
) -> Work:
    """What computes the gradients of the operands ``wanted``, by ``lse`` and ``delta``; the latter
    is computed where ``out`` is among the arguments.
    """
    blocks = {}
    if "q" in wanted:
        blocks["backward_query"] = "Q H B"
    if not {"k", "v"}.isdisjoint(wanted):
        blocks["backward_key"] = "K G B"
    launches = _launches(blocks, shape, dtype)
    if launches and "out" in operands:
        launches = (*delta(shape, dtype), *launches)
    return Work(launches, counts=options.counts)


def delta(shape: SequenceShape, dtype: str) -> tuple[Launch, ...]:
    """What computes δ: a warp for each query of each head, eight of them a block."""
    blocks = -(-prod(shape.of("lse")) // 8)
    one = Launch("attention_delta", {"ELEMENT": ELEMENTS[dtype]}, "attention_delta", blocks, (256,))
    return (one,) if blocks else ()


def _launches(blocks: Mapping[str, str], shape: SequenceShape, dtype: str) -> tuple[Launch, ...]:
    """A block for each tile along Q and K and each index along other axes; none is no launch."""
    size = tile(shape.D)
    counted = {
        kernel: prod(
            -(-getattr(shape, axis) // size) if axis in "QK" else getattr(shape, axis)
            for axis in axes.split()
        )
        for kernel, axes in blocks.items()
    }
    variant = defines(dtype, shape.D)
    return tuple(
        Launch(SOURCE, variant, f"{SOURCE}_{kernel}", count, (size, size))
        for kernel, count in counted.items()
        if count
    )
