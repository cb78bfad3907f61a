"""The tensor-core kernels of attention over a sequence, their host side: what they declare, their
tiles, and what a call launches.

The device side is ``cuda/attention_tensor*.cu``, a file for each pass, and, on who attends to whom,
``cuda/attention_mask.cuh``. Sizes of tiles are data, :data:`GEOMETRIES`. What is decided here needs
no GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from isoform.kernels.arguments import View
from isoform.kernels.attention_arguments import Options
from isoform.kernels.attention_plain import delta
from isoform.kernels.compiler import Define
from isoform.kernels.launch import Launch, Work
from isoform.kernels.tensor import ARCHITECTURES, ELEMENTS
from isoform.reference.attention_contract import (
    DIFFERENTIABLE,
    OPTIONS,
    PLACES,
    SequenceShape,
)
from isoform.reference.contract import Arithmetic, Capabilities

HEAD_DIMS = (16, 32, 64, 96, 128)
"""The head dims that there is a variant for; a D between two is padded to the larger, inside."""

CAPABILITIES = Capabilities(
    "attention",
    dtypes=frozenset(ELEMENTS),
    devices=frozenset({"cuda"}),
    architectures=ARCHITECTURES,
    head_dims=(1, HEAD_DIMS[-1]),
    operands=frozenset(OPTIONS),
    gradients=frozenset(DIFFERENTIABLE),
    deterministic=True,  # each sum is made by one block in one order
    memory="linear",
    arithmetic=Arithmetic(
        probabilities="operand", output="operand", dlogits="operand", sums="truncated"
    ),
)


@dataclass(frozen=True)
class Geometry:
    """How a pass cuts its work.

    Attributes:
        m_tiles: A warp's rows, in sixteens: queries, or keys in ``backward_key``.
        warps: Warps of a block.
        block: Rows of a tile that streams by: keys, or queries in ``backward_key``.
        chunk: Of a tile's rows, those whose logits are in registers at a time.
        blocks: Blocks that are to fit on a multiprocessor at once, which bounds the registers.
    """

    m_tiles: int
    warps: int
    block: int
    chunk: int
    blocks: int

    @property
    def own(self) -> int:
        """Rows of a block that stay: queries, or keys in ``backward_key``."""
        return 16 * self.m_tiles * self.warps


PASSES = ("forward", "backward_query", "backward_key")
"""Each is a source, ``attention_tensor_PASS.cu``, and a kernel of the same name."""

GEOMETRIES: Mapping[str, Mapping[int, Geometry]] = {
    "forward": {
        16: Geometry(1, 4, 64, 32, 4),
        32: Geometry(1, 4, 64, 32, 4),
        64: Geometry(2, 4, 64, 32, 2),
        96: Geometry(1, 4, 64, 32, 2),
        128: Geometry(1, 4, 64, 32, 2),
    },
    "backward_query": {
        16: Geometry(1, 4, 64, 32, 4),
        32: Geometry(1, 4, 64, 32, 4),
        64: Geometry(1, 4, 64, 32, 3),
        96: Geometry(1, 4, 64, 16, 2),
        128: Geometry(1, 4, 64, 16, 2),
    },
    "backward_key": {
        16: Geometry(1, 4, 64, 32, 4),
        32: Geometry(1, 4, 64, 32, 3),
        64: Geometry(1, 4, 64, 32, 2),
        96: Geometry(1, 4, 32, 16, 2),
        128: Geometry(1, 4, 32, 16, 2),
    },
}
"""By pass and head dim. A block's shared memory fits into the 99 KiB that the smallest GPUs have,
such as an RTX 4090's."""

SPAN, GROUP = 64, 32
"""Tokens of which the tables have one line, and lines that they have another one for."""


def forward(
    shape: SequenceShape, dtype: str, operands: Mapping[str, View], options: Options
) -> Work:
    """What computes ``out`` and, where it is among the arguments, ``lse``."""
    return _work(shape, operands, options, [_pass("forward", shape, dtype, "Q H B", operands)])


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
    passes = []
    if "q" in wanted:
        passes.append(_pass("backward_query", shape, dtype, "Q H B", operands))
    if not {"k", "v"}.isdisjoint(wanted):
        passes.append(_pass("backward_key", shape, dtype, "K G B", operands))
    if "out" in operands and any(one.blocks for one in passes):
        passes = [*delta(shape, dtype), *passes]
    return _work(shape, operands, options, passes)


def head_dim(D: int) -> int:
    """The head dim of the variant for D."""
    return next(room for room in HEAD_DIMS if room >= D)


def shared_bytes(name: str, D: int, *, places: bool) -> int:
    """The shared memory of a block; each source asserts that it has the same idea."""
    geometry = GEOMETRIES[name][head_dim(D)]
    own, block = geometry.own, geometry.block
    row = 2 * (head_dim(D) + 8)
    token, span, query = 16, 48, 8  # bytes that are kept of each
    kept = token * (own + 4 * block) + span if places else 16
    if name == "backward_key":
        kept += 2 * own * row + 4 * block * query
    return kept + 4 * block * row


def variant(name: str, dtype: str, D: int, *, places: bool, aligned: bool) -> dict[str, Define]:
    """The definitions that choose the variant of the pass ``name``.

    Args:
        name: The pass.
        dtype: That of the operands.
        D: The head dim.
        places: Whether positions or segments are given.
        aligned: Whether rows of all operands can be copied 16 bytes, eight elements, at a time.
    """
    geometry = GEOMETRIES[name][head_dim(D)]
    return {
        "ELEMENT": ELEMENTS[dtype],
        "HEAD_DIM": head_dim(D),
        "M_TILES": geometry.m_tiles,
        "WARPS": geometry.warps,
        "BLOCK": geometry.block,
        "CHUNK": geometry.chunk,
        "BLOCKS": geometry.blocks,
        "SHARED_BYTES": shared_bytes(name, D, places=places),
        "PLACES": int(places),
        "ALIGNED": int(aligned),
    }


def _pass(
    name: str, shape: SequenceShape, dtype: str, axes: str, operands: Mapping[str, View]
) -> Launch:
    """A block for each tile along Q or K and each index along other axes; there may be none."""

    def aligned(view: View) -> bool:
        *strides, last = view.strides
        return view.pointer % 16 == 0 and last == 1 and all(step % 8 == 0 for step in strides)

    rows = [operands[key] for key in ("q", "k", "v", "dout") if key in operands]
    defines = variant(
        name,
        dtype,
        shape.D,
        places=_has_places(operands),
        aligned=shape.D % 8 == 0 and all(map(aligned, rows)),
    )
    geometry = GEOMETRIES[name][head_dim(shape.D)]
    sizes = {"Q": geometry.own, "K": geometry.own}
    blocks = prod(-(-getattr(shape, axis) // sizes.get(axis, 1)) for axis in axes.split())
    source, shared = f"attention_tensor_{name}", int(defines["SHARED_BYTES"])
    return Launch(source, defines, source, blocks, (32 * geometry.warps,), shared)


def _work(
    shape: SequenceShape, operands: Mapping[str, View], options: Options, passes: list[Launch]
) -> Work:
    """The passes that have any block, after that which makes the tables that they need."""
    launches = [one for one in passes if one.blocks]
    scratch: dict[str, tuple[int, ...]] = {}
    if launches and _has_places(operands):
        groups = {name: -(-length // (SPAN * GROUP)) for name, length in _lengths(shape).items()}
        scratch = {  # of 4-byte elements
            name: (shape.B, count * (GROUP + 1), 10) for name, count in groups.items()
        }
        blocks = shape.B * sum(groups.values())
        launches.insert(0, Launch("attention_spans", {}, "attention_spans", blocks, (256,)))
    return Work(tuple(launches), scratch, options.counts)


def _lengths(shape: SequenceShape) -> dict[str, int]:
    return {"query_spans": shape.Q, "key_spans": shape.K}


def _has_places(operands: Mapping[str, View]) -> bool:
    return any(name in operands for name in PLACES)
