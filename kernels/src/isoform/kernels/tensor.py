"""The tensor-core kernels' host side: what they declare, their tiles, and what a call launches.

The device side is ``cuda/evoformer_tensor*.cu``, a file for each pass; what they share is in
``cuda/evoformer_tensor.cuh``, and how a warp's numbers lie, in ``cuda/tensor_tiles.cuh``. Sizes of
tiles are data, :data:`GEOMETRIES`. What is decided here needs no GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod

from isoform.kernels import warpgroup
from isoform.kernels.arguments import View
from isoform.kernels.compiler import Define
from isoform.kernels.launch import MULTIPROCESSORS, Launch, Work, setting
from isoform.kernels.tiles import Tile, fetchable
from isoform.kernels.warpgroup import ROWS, Teams
from isoform.reference.contract import Arithmetic, Capabilities, Shape

ELEMENTS = {"float16": 1, "bfloat16": 2}
HEAD_DIMS = (16, 32, 48, 64, 96, 128)
"""The head dims that there is a variant for; a D between two is padded to the larger, inside."""

ARCHITECTURES = frozenset(
    f"sm_{number}" for number in (80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
)
"""Ampere and newer, which have the instructions."""

CAPABILITIES = Capabilities(
    "evoformer_attention",
    dtypes=frozenset(ELEMENTS),
    devices=frozenset({"cuda"}),
    architectures=ARCHITECTURES,
    head_dims=(1, HEAD_DIMS[-1]),
    deterministic=True,  # sums over blocks are made in order, without atomic additions
    memory="linear",
    arithmetic=Arithmetic(
        probabilities="operand",
        output="operand",
        cotangent="operand",
        dlogits="operand",
        sums="truncated",
    ),
)

SAVED = {"top": 4, "total_code": 2, "total_more": 1}
"""What the forward leaves for the backward besides the output, ``[B, S, H, Q]``: bytes of each."""


@dataclass(frozen=True)
class Geometry:
    """How a pass cuts its work.

    Attributes:
        m_tiles: A warp's rows, in sixteens: queries, or keys in ``backward_key``.
        warps: Warps that share a head.
        rows: Rows s that a block does at once: they share a tile of the pair bias.
        block: Rows of a tile that streams by: keys, or queries in ``backward_key``.
        blocks: Blocks that are to fit on a multiprocessor at once, which bounds the registers.
        chunk: Of a tile's rows, those whose logits are in registers at a time.
        unroll: How many chunks the compiler may interleave.
    """

    m_tiles: int
    warps: int
    rows: int
    block: int
    blocks: int
    chunk: int = 16
    unroll: int = 1

    @property
    def own(self) -> int:
        """Rows of a block that stay: queries, or keys in ``backward_key``."""
        return 16 * self.m_tiles * self.warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.rows


PASSES = ("forward", "backward_query", "backward_key", "backward_pair_bias")
"""Each is a source, ``evoformer_tensor_PASS.cu``, and a kernel of the same name."""

GEOMETRIES: Mapping[str, Mapping[int, Geometry]] = {
    "forward": {
        16: Geometry(2, 4, 1, 64, 4, 32),
        32: Geometry(2, 4, 1, 64, 3, 32),
        48: Geometry(2, 4, 1, 64, 2, 32),
        64: Geometry(1, 4, 1, 64, 3, 32),
        96: Geometry(1, 4, 1, 64, 2, 32),
        128: Geometry(1, 4, 1, 32, 2, 32),
    },
    "forward, gated": {
        16: Geometry(1, 4, 1, 64, 4, 64),
        32: Geometry(1, 4, 1, 64, 4, 32),
        48: Geometry(1, 4, 1, 64, 3, 64),
        64: Geometry(1, 4, 1, 64, 3, 32),
        96: Geometry(1, 4, 1, 64, 2, 32),
        128: Geometry(1, 4, 1, 32, 2, 32),
    },
    "backward_query": {
        16: Geometry(2, 4, 1, 64, 3),
        32: Geometry(2, 4, 1, 64, 2, 32, 2),
        48: Geometry(2, 4, 1, 64, 2),
        64: Geometry(1, 4, 1, 64, 3),
        96: Geometry(1, 4, 1, 64, 2),
        128: Geometry(1, 4, 1, 32, 1),
    },
    "backward_query, gated": {
        16: Geometry(1, 8, 1, 64, 2),
        32: Geometry(1, 8, 1, 64, 2),
        48: Geometry(1, 4, 1, 64, 2),
        64: Geometry(1, 4, 1, 64, 3),
        96: Geometry(1, 4, 1, 64, 2),
        128: Geometry(1, 4, 1, 32, 1),
    },
    "backward_key": {
        16: Geometry(2, 4, 1, 64, 2),
        32: Geometry(2, 4, 1, 64, 2, 32),
        48: Geometry(2, 4, 1, 64, 2),
        64: Geometry(1, 4, 1, 64, 2),
        96: Geometry(1, 4, 1, 32, 2),
        128: Geometry(1, 4, 1, 32, 1),
    },
    "backward_key, gated": {
        16: Geometry(2, 4, 1, 64, 2),
        32: Geometry(2, 4, 1, 64, 2),
        48: Geometry(1, 4, 1, 64, 2),
        64: Geometry(1, 4, 1, 64, 2),
        96: Geometry(1, 4, 1, 32, 2),
        128: Geometry(1, 4, 1, 32, 1),
    },
    "backward_pair_bias": {
        16: Geometry(1, 8, 1, 64, 2),
        32: Geometry(1, 8, 1, 64, 2),
        48: Geometry(1, 4, 1, 64, 3),
        64: Geometry(1, 4, 1, 64, 2),
        96: Geometry(1, 4, 1, 32, 2),
        128: Geometry(1, 2, 1, 32, 2),
    },
    "backward_pair_bias, gated": {
        16: Geometry(1, 8, 1, 64, 1),
        32: Geometry(1, 8, 1, 32, 1),
        48: Geometry(1, 4, 1, 64, 2),
        64: Geometry(1, 4, 1, 32, 2),
        96: Geometry(1, 2, 1, 32, 2),
        128: Geometry(1, 2, 1, 32, 2),
    },
}
"""By pass, with a gate or without, and head dim. A block's shared memory fits into the 99 KiB that
the smallest GPUs have, such as an RTX 4090's."""


@dataclass(frozen=True)
class Whole:
    """How ``backward_query_pair`` cuts its work: a block does some queries and all keys.

    Attributes:
        groups: Of a block's queries, how many times 32.
        keys: The fewest and the most keys of a warp, which has them to itself: a multiple of 16.
        warps: The most of a block.
        rows: From how many rows s on it is faster than the two passes, as was measured.
    """

    groups: int
    keys: tuple[int, int]
    warps: int
    rows: int

    @property
    def own(self) -> int:
        """Queries of a block."""
        return 32 * self.groups

    def cut(self, K: int) -> tuple[int, int]:
        """The keys of a warp, and the warps, for K keys: as many warps as can have some."""
        fewest, most = self.keys
        keys = min(max(fewest, -(-K // (16 * self.warps)) * 16), most)
        return keys, max(2, -(-K // keys))  # two at least: a thread for each query


WHOLE_SOURCE = "evoformer_tensor_backward_query_pair"
WHOLE: Mapping[int, Whole] = {
    16: Whole(2, (32, 64), 8, 128),
    32: Whole(2, (32, 64), 8, 128),
}
"""By head dim, for ``backward_query_pair``, which does the work of ``backward_query`` and
``backward_pair_bias`` where a block holds all keys of its queries: half as many logits are computed
anew."""


@dataclass(frozen=True)
class Grouped:
    """How ``evoformer_warpgroup_forward`` cuts its work: four warps multiply together.

    Attributes:
        groups: Of a block's queries, how many times 64.
        rows: Rows s of a block, which share a tile of the pair bias.
        blocks: Blocks that are to fit on a multiprocessor at once, which share its registers.
        fewer: Registers of a thread that copies; those that multiply share the rest.
        stages: How many tiles of keys there is room for, which are copied ahead.
        turns: Rows s that a warp does one after the other.
        pace: How long a logit takes, the fastest geometry's is 1.
        least: From how many rows s on it is faster than the other forward.
    """

    groups: int
    rows: int
    blocks: int
    fewer: int
    stages: int = 2
    turns: int = 1
    pace: float = 1.0
    least: int = 16

    @property
    def own(self) -> int:
        """Queries of a block."""
        return 64 * self.groups

    def works(self, shape: Shape) -> int:
        """What there is to do, each a block's at a time."""
        return -(-shape.Q // self.own) * -(-shape.S // self.rows) * shape.H * shape.B

    def takes(self, shape: Shape) -> float:
        """How long, in logits of one key: blocks do as many works as the busiest."""
        waves = -(-self.works(shape) // (MULTIPROCESSORS.get() * self.blocks))
        return waves * self.own * self.rows * self.pace

    @property
    def threads(self) -> int:
        """Threads of a block: of those that multiply, and of a warpgroup that copies."""
        return 128 * (self.groups * self.rows // self.turns + 1)


GROUPED_SOURCE = "evoformer_warpgroup_forward"
GROUPED: Mapping[int, tuple[Grouped, ...]] = {
    16: (Grouped(2, 3, 1, 40, stages=4),),
    32: (Grouped(2, 3, 1, 24, stages=4), Grouped(4, 2, 1, 40, stages=3, turns=2, pace=1.025)),
    48: (Grouped(4, 1, 1, 56, stages=3), Grouped(2, 2, 1, 40, stages=3, pace=1.035)),
}
"""By head dim, for a GPU of :data:`WARPGROUPS`."""

WARPGROUPS = "sm_90"
"""The architecture that has ``wgmma``. Its successors have other instructions instead."""

KEYS = 64
"""Of a tile of ``evoformer_warpgroup_forward``."""

FETCHED = ("q", "k", "v", "pair_bias")
"""Operands of which it fetches tiles; their maps are in this order."""

MOST_WORKS = 1024
"""Tiles of queries that a block of it may do, one after the other: it keeps a byte for each."""

ROWS_OF_CHANNELS = frozenset({"q", "k", "v", "gate", "dout", "out"})
"""The operands whose last axis is of channels."""

ROOM = 227 << 10
"""Bytes of shared memory that a block of it may need: what an H100 has, and a B200."""


@dataclass(frozen=True)
class Special:
    """The kernels in use that only some GPUs have: how they cut their work, by head dim.

    Attributes:
        wholes: :data:`WHOLE` on a GPU that has the :data:`ROOM`, and none elsewhere.
        groups: :data:`GROUPED` on a GPU of :data:`WARPGROUPS`, and none elsewhere.
        teams: :data:`isoform.kernels.warpgroup.BACKWARD` there.
    """

    wholes: Mapping[int, Whole] = field(default_factory=dict)
    groups: Mapping[int, tuple[Grouped, ...]] = field(default_factory=dict)
    teams: Mapping[int, Mapping[str, Teams]] = field(default_factory=dict)


NOTHING_SPECIAL = Special()

SPECIAL: ContextVar[Special] = ContextVar("SPECIAL", default=NOTHING_SPECIAL)
"""Those of the GPU that work is made for."""

TABLE: ContextVar[Mapping[str, Mapping[int, Geometry]]] = ContextVar("TABLE", default=GEOMETRIES)
"""The geometries in use: on a GPU, those that :mod:`isoform.kernels.geometries` has for it."""

FILL = 1024
"""Blocks that keep a GPU busy to the end: where ``backward_pair_bias`` has fewer tiles, several
blocks share one, each a range of rows."""


@contextmanager
def eagerly() -> Iterator[None]:
    """While this lasts, kernels that only some GPUs have do whatever they can, however small. (What
    one pass of warpgroups can do as well as two, the two do where keys are few.)
    """
    now = SPECIAL.get()
    eager = Special(
        {D: replace(one, rows=1) for D, one in now.wholes.items()},
        {D: tuple(replace(one, least=1) for one in options) for D, options in now.groups.items()},
        {
            D: {name: replace(one, least=1, padded=8.0) for name, one in passes.items()}
            for D, passes in now.teams.items()
        },
    )
    with setting(SPECIAL, eager):
        yield


@contextmanager
def sparingly() -> Iterator[None]:
    """While this lasts, no kernels are used that take more memory than others would."""
    with setting(SPECIAL, replace(SPECIAL.get(), teams={})):
        yield


def forward(shape: Shape, dtype: str, operands: Mapping[str, View]) -> Work:
    """What computes ``out``, and ``lse``, ``top``, ``total`` where they are among the arguments."""
    chosen = choices(shape, operands)
    grouped = grouped_of(shape, chosen, operands)
    if grouped is None:
        one = _pass("forward", shape, dtype, "Q H S B", chosen)
    else:
        one = _grouped(grouped, shape, dtype, chosen)
    return Work((one,) if one.blocks else ())


def backward(
    shape: Shape, dtype: str, operands: Mapping[str, View], wanted: Collection[str]
) -> Work:
    """What computes the gradients of the operands ``wanted``.

    The first kernel does q and the gate, and leaves what all others need; where it can, it does the
    pair bias too.
    """
    if not wanted:
        return Work(())
    chosen = choices(shape, operands)
    fetched = operands.keys() & {name for names in warpgroup.FETCHED.values() for name in names}
    if shape.Q and shape.K and fetchable(operands, fetched):
        together = warpgroup.backward(SPECIAL.get().teams, shape, dtype, chosen, wanted)
        if together is not None:
            return together
    scratch = {"delta": shape.of("lse")}
    counts: dict[str, int] = {}
    whole = whole_of(shape, chosen, wanted, operands)
    if whole is not None:
        launches, more, counts = _whole(whole, shape, dtype, chosen)
        scratch |= more
    else:
        launches = [_pass("backward_query", shape, dtype, "Q H S B", chosen)]
    if not {"k", "v", "mask_bias"}.isdisjoint(wanted):
        keys = _pass("backward_key", shape, dtype, "K G S B", chosen)
        launches.append(keys)
        if "mask_bias" in wanted:
            last, scratch["mask_bias_parts"] = warpgroup.add_up_mask_bias(keys, shape)
            launches.append(last)
    if "pair_bias" in wanted and whole is None:
        pairs = _pass("backward_pair_bias", shape, dtype, "K Q H B", chosen)
        geometry = geometry_of("backward_pair_bias", shape.D, gated="gate" in operands)
        parts = _parts(shape, pairs.blocks, FILL)
        launches.append(replace(pairs, blocks=pairs.blocks * parts))
        counts = {"parts": parts, "pair_bias_tiles": pairs.blocks}
        if parts > 1:
            scratch["pair_bias_sums"] = (pairs.blocks, geometry.own * geometry.block)
            scratch["turns"] = (pairs.blocks + 1,)
    return Work(tuple(one for one in launches if one.blocks), scratch, counts)


def whole_of(
    shape: Shape, chosen: Mapping[str, int], wanted: Collection[str], operands: Mapping[str, View]
) -> Whole | None:
    """How ``backward_query_pair`` does q and the pair bias; None where two passes do.

    It does where both are wanted, there is no gate, rows can be copied 16 bytes at a time and are
    less than 2^31 elements apart, and a block has room for the pair bias of all keys; and where it
    was measured to be faster: of many rows s.
    """
    whole = SPECIAL.get().wholes.get(head_dim(shape.D))
    if whole is None or chosen["GATED"] or not chosen["ALIGNED"]:
        return None
    fits = whole.keys[1] * whole.warps >= shape.K and whole.rows <= shape.S
    both = {"q", "pair_bias"} <= set(wanted)
    return whole if fits and both and _near(operands) else None


def grouped_of(
    shape: Shape, chosen: Mapping[str, int], operands: Mapping[str, View]
) -> Grouped | None:
    """How ``evoformer_warpgroup_forward`` does the call; None where the other forward does.

    It does where there is a pair bias and no gate, and tiles of all operands can be fetched; and
    where it was measured to be faster: of many rows s.
    """
    options = SPECIAL.get().groups.get(head_dim(shape.D), ())
    able = chosen["PAIR_BIAS"] and chosen["ALIGNED"] and chosen["ALIGNED_BIAS"] and shape.K
    if not options or chosen["GATED"] or not able or not fetchable(operands, FETCHED):
        return None

    best = min(options, key=lambda one: one.takes(shape))
    return best if best.least <= shape.S else None


def grouped_variant(
    grouped: Grouped, dtype: str, D: int, chosen: Mapping[str, int]
) -> dict[str, Define]:
    """The definitions that choose the variant of ``evoformer_warpgroup_forward``."""
    room = head_dim(D)
    return {
        "ELEMENT": ELEMENTS[dtype],
        "HEAD_DIM": room,
        "M_TILES": 1,
        "WARPS": 4 * grouped.groups,
        "GROUPS": grouped.groups,
        "ROWS": grouped.rows,
        "TURNS": grouped.turns,
        "FEWER": grouped.fewer,
        "STAGES": grouped.stages,
        "BLOCK": KEYS,
        "BLOCKS": grouped.blocks,
        "SHARED_BYTES": _grouped_bytes(grouped, room),
        **chosen,
    }


def _grouped_bytes(grouped: Grouped, room: int) -> int:
    """The shared memory of a block of it; the source asserts that it has the same idea."""
    stage = 2 * grouped.own * KEYS + grouped.rows * (2 * 2 * room * KEYS + 16 * KEYS)
    works = 2 * grouped.rows * (2 * room * grouped.own + 32)  # this one's and the next
    kept = grouped.stages * grouped.rows * 8
    signals = 8 * (5 + 3 * grouped.stages)
    size = grouped.stages * stage + works + 128 + kept + signals + MOST_WORKS
    return -(-size // 1024) * 1024  # tiles of the pair bias lie so


def _grouped(grouped: Grouped, shape: Shape, dtype: str, chosen: Mapping[str, int]) -> Launch:
    """The launch of ``evoformer_warpgroup_forward``."""
    defines = grouped_variant(grouped, dtype, shape.D, chosen)
    works = grouped.works(shape)
    at_once = MULTIPROCESSORS.get() * grouped.blocks
    blocks = min(works, max(at_once, -(-works // MOST_WORKS)))
    size = int(defines["SHARED_BYTES"])
    rows = {"q": grouped.own, "k": KEYS, "v": KEYS, "pair_bias": grouped.own}
    tiles = tuple(Tile(name, rows[name]) for name in FETCHED)
    return Launch(GROUPED_SOURCE, defines, GROUPED_SOURCE, blocks, (grouped.threads,), size, tiles)


def _near(operands: Mapping[str, View]) -> bool:
    """Whether all steps from row to row of channels are less than 2^31 elements."""
    return all(
        abs(step) < 2**31
        for name in ROWS_OF_CHANNELS & operands.keys()
        for step in operands[name].strides
    )


def whole_variant(
    whole: Whole, dtype: str, D: int, K: int, chosen: Mapping[str, int]
) -> dict[str, Define]:
    """The definitions that choose the variant of ``backward_query_pair`` for K keys."""
    keys, warps = whole.cut(K)
    return {
        "ELEMENT": ELEMENTS[dtype],
        "HEAD_DIM": head_dim(D),
        "M_TILES": 2,
        "WARPS": warps,
        "GROUPS": whole.groups,
        "BLOCK": keys,
        "CHUNK": 16,
        "SHARED_BYTES": _whole_bytes(whole.own, keys, warps, head_dim(D)),
        **chosen,
    }


def _whole_bytes(own: int, keys: int, warps: int, room: int) -> int:
    """The shared memory of a block of ``backward_query_pair``; the source asserts that it has the
    same idea.
    """
    every = warps * keys
    biases, streams, starts = 2 * own * every, 2 * 2 * room * every, 8 * every
    rows = own * (5 * 2 * (room + 8) + 4 * 16 + 2 * 12)  # what is kept of queries
    parts = 4 * warps * own * room
    places = 8 * (5 * 9 + 1) + 16
    return biases + streams + starts + rows + parts + places


def _whole(
    whole: Whole, shape: Shape, dtype: str, chosen: Mapping[str, int]
) -> tuple[list[Launch], dict[str, tuple[int, ...]], dict[str, int]]:
    """The launches of ``backward_query_pair``, their scratch memory and their counts."""
    tiles = -(-shape.Q // whole.own) * shape.H * shape.B
    # One block for each multiprocessor at a time; to take turns is little beside what each does.
    parts = warpgroup.parts_of(shape.S, tiles, MULTIPROCESSORS.get(), turn=0)
    keys, warps = whole.cut(shape.K)
    defines = whole_variant(whole, dtype, shape.D, shape.K, chosen)
    source, size = WHOLE_SOURCE, int(defines["SHARED_BYTES"])
    every = Launch(source, defines, source, tiles * parts, (32 * warps,), size)
    counts = {"parts": parts, "pair_bias_tiles": tiles}
    if parts == 1:
        return [every], {}, counts
    first = replace(every, kernel=f"{source}_turns", blocks=1, threads=(256,), shared_bytes=0)
    sums = whole.own * keys * warps
    return [first, every], {"pair_bias_sums": (tiles, sums), "turns": (tiles + 1,)}, counts


def head_dim(D: int) -> int:
    """The head dim of the variant for D."""
    return next(room for room in HEAD_DIMS if room >= D)


def geometry_of(name: str, D: int, *, gated: bool) -> Geometry:
    """How the pass ``name`` cuts its work where the head dim is D, with a gate or without."""
    return TABLE.get()[f"{name}, gated" if gated else name][head_dim(D)]


def shared_bytes(name: str, D: int, *, gated: bool) -> int:
    """The shared memory of a block; each source asserts that it has the same idea."""
    geometry = geometry_of(name, D, gated=gated)
    own, block, rows = geometry.own, geometry.block, geometry.rows
    row = 2 * (head_dim(D) + 8)
    columns = own if name == "backward_key" else block
    bias = 2 * (columns + 8)
    key, query = 6, 16  # bytes that are kept of each
    match name:
        case "forward" | "backward_query":
            kept = 1 if name == "forward" else 2  # q; with the cotangent
            streams = 2 * rows * block * row + own * bias
            return kept * rows * own * row + 2 * streams + 4 * rows * block * key
        case "backward_key":
            streams = (2 + gated) * rows * block * row + block * bias
            return 2 * rows * own * row + 2 * streams + 4 * rows * (block * (query + 12) + 16)
        case _:
            streams = (2 + gated) * own * row + 2 * block * row
            return 2 * streams + own * bias + 4 * own * query + 4 * block * key


def variant(name: str, dtype: str, D: int, chosen: Mapping[str, int]) -> dict[str, Define]:
    """The definitions that choose the variant of the pass ``name``, with those ``chosen`` by the
    operands, see :func:`choices`.
    """
    gated = bool(chosen["GATED"])
    geometry = geometry_of(name, D, gated=gated)
    return {
        "ELEMENT": ELEMENTS[dtype],
        "HEAD_DIM": head_dim(D),
        "M_TILES": geometry.m_tiles,
        "WARPS": geometry.warps,
        "ROWS": geometry.rows,
        "BLOCK": geometry.block,
        "CHUNK": geometry.chunk,
        "UNROLL": geometry.unroll,
        "BLOCKS": geometry.blocks,
        "SHARED_BYTES": shared_bytes(name, D, gated=gated),
        **chosen,
    }


def _pass(name: str, shape: Shape, dtype: str, axes: str, chosen: Mapping[str, int]) -> Launch:
    """A block for each tile along ``axes``; there may be none."""
    geometry = geometry_of(name, shape.D, gated=bool(chosen["GATED"]))
    keys = geometry.block if name == "backward_pair_bias" else geometry.own
    sizes = {"Q": geometry.own, "K": keys, "S": geometry.rows}
    blocks = prod(-(-getattr(shape, axis) // sizes.get(axis, 1)) for axis in axes.split())
    defines = variant(name, dtype, shape.D, chosen)
    source = f"evoformer_tensor_{name}"
    return Launch(
        source, defines, source, blocks, (geometry.threads,), int(defines["SHARED_BYTES"])
    )


def choices(shape: Shape, operands: Mapping[str, View]) -> dict[str, int]:
    """The definitions that depend on the operands: which there are, and whether their rows can be
    copied 16 bytes, eight elements, at a time.
    """

    def aligned(view: View) -> bool:
        *strides, last = view.strides
        return view.pointer % 16 == 0 and last == 1 and all(step % 8 == 0 for step in strides)

    rows = (operands[name] for name in ROWS_OF_CHANNELS & operands.keys())
    bias = operands.get("pair_bias")
    return {
        "MASK_BIAS": int("mask_bias" in operands),
        "PAIR_BIAS": int("pair_bias" in operands),
        "GATED": int("gate" in operands),
        "ALIGNED": int(shape.D % 8 == 0 and all(map(aligned, rows))),
        "ALIGNED_BIAS": int(bias is None or (shape.K % 8 == 0 and aligned(bias))),
    }


def _parts(shape: Shape, tiles: int, fill: int) -> int:
    """How many blocks share the rows s of a tile of the pair bias."""
    return max(1, min(-(-fill // tiles), shape.S // ROWS)) if tiles else 1
