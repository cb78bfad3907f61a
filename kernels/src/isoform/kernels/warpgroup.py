"""The backward on Hopper: the host side of the kernels where four warps multiply together.

The device side is ``cuda/evoformer_warpgroup_*.cu``, a file for each pass; what they share is in
``cuda/evoformer_warpgroup.cuh``. First of all, a kernel leaves what all passes want to know of each
query (``cuda/evoformer_warpgroup_backward.cuh``); each of the others does one or two gradients, by
logits of its own. Sizes of tiles are data, :data:`BACKWARD`. What is decided here needs no GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from isoform.kernels import plain
from isoform.kernels.compiler import Define
from isoform.kernels.launch import MULTIPROCESSORS, Launch, Work
from isoform.kernels.tiles import Tile
from isoform.reference.contract import Shape

KEYS = 64
"""Rows of a tile that streams by."""

START = 10
"""How many rows s would take as long as it takes a block that streams them to begin and to end."""

TURN = 3
"""How many, as it takes ``backward_pair_bias`` to add up the sums of one block more."""

ROWS = 16
"""The least rows s of a block, where several share a tile: adding up takes some 5 % then."""

PASSES: Mapping[str, frozenset[str]] = {
    "backward_query": frozenset({"q"}),
    "backward_key": frozenset({"k", "v", "mask_bias"}),
    "backward_pair_bias": frozenset({"pair_bias"}),
}
"""Of whose gradients each is. It is a source, ``evoformer_warpgroup_PASS.cu``, and a kernel of the
same name."""

TOGETHER = "backward_query_pair"
"""The pass that does what ``backward_query`` and ``backward_pair_bias`` do, with logits that are
computed once."""

PAIRS = frozenset({"backward_pair_bias", TOGETHER})
"""Those of which a block owns a tile of the pair bias, for all rows s or a part."""

FETCHED: Mapping[str, tuple[str, ...]] = {
    "backward_query": ("q", "dout", "k", "v", "pair_bias"),
    "backward_key": ("k", "v", "q", "dout", "pair_bias"),
    "backward_pair_bias": ("q", "dout", "k", "v"),
    "backward_query_pair": ("q", "dout", "k", "v"),
}
"""Operands of which a pass fetches tiles; their maps are in this order."""

QUERIES_SOURCE = "evoformer_warpgroup_backward_queries"
"""What comes before all of them. Any GPU could run it."""


@dataclass(frozen=True)
class Teams:
    """How a pass cuts its work among teams of four warps, which multiply 64 rows together.

    Attributes:
        groups: Of a block's rows that stay, how many times 64: queries, or keys in
            ``backward_key``.
        across: What a block does besides, at once: rows s, of which each team does one; in
            ``backward_pair_bias`` keys, how many times 64.
        blocks: Blocks that are to fit on a multiprocessor at once, which share its registers.
        fewer: Registers of a thread that copies; those that multiply share the rest.
        chunk: Of a tile's rows, those whose logits are in registers at a time.
        stages: How many tiles there are to be copied ahead.
        turns: In ``backward_query``, how many of the ``groups`` a team does, one after the other.
        least: From how many rows s on it is faster than the kernels of other GPUs, as was
            measured.
        padded: How many more keys than there are :data:`TOGETHER` may compute, and still be faster.
    """

    groups: int
    across: int
    blocks: int
    fewer: int
    chunk: int
    stages: int = 2
    turns: int = 1
    least: int = 32
    padded: float = 9 / 8


BACKWARD: Mapping[int, Mapping[str, Teams]] = {
    16: {
        "backward_query": Teams(2, 3, 1, 40, 32, stages=3, turns=2),
        "backward_key": Teams(1, 3, 1, 40, 32, stages=4),
        "backward_pair_bias": Teams(2, 2, 1, 64, 32, stages=4),
        "backward_query_pair": Teams(1, 4, 1, 64, 16, stages=4),
    },
    32: {
        "backward_query": Teams(2, 3, 1, 24, 32, stages=3, turns=2),
        "backward_key": Teams(1, 3, 1, 40, 32, stages=4),
        "backward_pair_bias": Teams(2, 2, 1, 64, 32, stages=4),
        "backward_query_pair": Teams(1, 4, 1, 64, 16, stages=3),
    },
    48: {
        "backward_query": Teams(2, 2, 1, 40, 32, stages=3, turns=2),
        "backward_key": Teams(3, 1, 1, 40, 16, stages=4),
        "backward_pair_bias": Teams(2, 2, 1, 64, 32, stages=3),
    },
}
"""By head dim and pass, for a GPU of :data:`isoform.kernels.tensor.WARPGROUPS`."""


def backward(
    table: Mapping[int, Mapping[str, Teams]],
    shape: Shape,
    dtype: str,
    chosen: Mapping[str, int],
    wanted: Collection[str],
) -> Work | None:
    """What computes the gradients of the operands ``wanted`` by warpgroups, cut as the ``table``
    says, with the definitions that the operands have ``chosen``; None where the kernels of other
    GPUs are to do it.

    They can where there is a pair bias and no gate, and all rows can be copied 16 bytes at a time.
    """
    room = next((D for D in table if shape.D <= D), 0)
    passes = table.get(room, {})
    able = chosen["PAIR_BIAS"] and chosen["ALIGNED"] and chosen["ALIGNED_BIAS"]
    needed = [name for name, gradients in PASSES.items() if not gradients.isdisjoint(wanted)]
    if together(passes, shape, dtype, wanted):
        needed = [TOGETHER, *(name for name in needed if not PASSES[name] <= {"q", "pair_bias"})]
    if chosen["GATED"] or not able or any(name not in passes for name in needed):
        return None
    if any(passes[name].least > shape.S for name in needed):
        return None
    ready = {
        name: _launch(name, passes[name], shape, variant(name, passes[name], dtype, room, chosen))
        for name in needed
    }
    scratch: dict[str, tuple[int, ...]] = {"delta": (*shape.of("lse"), 2)}
    launches = [_queries(shape, dtype, room, chosen)]
    counts: dict[str, int] = {}
    if query := ready.get("backward_query"):
        launches.append(query)
    if keys := ready.get("backward_key"):
        launches.append(keys)
        if "mask_bias" in wanted:
            last, scratch["mask_bias_parts"] = add_up_mask_bias(keys, shape)
            launches.append(last)
    for name in PAIRS & ready.keys():
        pairs, teams = ready[name], passes[name]
        tiles, warps = pairs.blocks, pairs.blocks * 4 * multiplying(teams)
        parts = parts_of(shape.S, tiles, MULTIPROCESSORS.get() * teams.blocks)
        launches.append(replace(pairs, blocks=tiles * parts))
        counts = {"parts": parts, "pair_bias_tiles": warps}  # each warp takes turns by itself
        if parts > 1:
            scratch["pair_bias_sums"] = (tiles, 64 * teams.groups * 64 * teams.across)
            scratch["turns"] = (warps + 1,)
    return Work(tuple(one for one in launches if one.blocks), scratch, counts)


def together(
    passes: Mapping[str, Teams], shape: Shape, dtype: str, wanted: Collection[str]
) -> bool:
    """Whether one pass is to do the gradients of q and of the pair bias: where both are wanted, and
    a block has all keys, and not many more than there are. (In float16 gradients of logits are
    rounded in units, of which each team would have its own.)
    """
    if TOGETHER not in passes or not {"q", "pair_bias"} <= set(wanted) or dtype != "bfloat16":
        return False
    keys = 64 * passes[TOGETHER].across
    return shape.K <= keys <= passes[TOGETHER].padded * shape.K


def add_up_mask_bias(keys: Launch, shape: Shape) -> tuple[Launch, tuple[int, ...]]:
    """What makes dmask_bias of the parts that the launch ``keys`` of a ``backward_key`` leaves: a
    kernel of the same source; and the shape of those.
    """
    last = replace(
        keys,
        kernel=keys.kernel.replace("backward_key", "backward_mask_bias"),
        blocks=-(-shape.B * shape.S * shape.K // 256),
        threads=(256,),
        shared_bytes=0,
        tiles=(),
    )
    return last, (shape.B, shape.S, shape.G, shape.K)


def parts_of(S: int, tiles: int, at_once: int, turn: int = TURN) -> int:
    """How many blocks share the S rows of each of so many ``tiles``, where so many blocks can be
    ``at_once``: so that all are done soonest.

    What a block takes is reckoned in rows. Those of a tile that end together wait for each other,
    to add up what they have: ``turn`` for each.
    """

    def rows(parts: int) -> int:
        waves = -(-tiles * parts // at_once)
        together = min(parts, -(-at_once // tiles))
        return waves * (-(-S // parts) + START) + turn * (together - 1)

    return min(range(1, max(1, S // ROWS) + 1), key=rows) if tiles else 1


def variant(
    name: str, teams: Teams, dtype: str, room: int, chosen: Mapping[str, int]
) -> dict[str, Define]:
    """The definitions that choose the variant of the pass ``name`` for head dims up to ``room``."""
    return {
        "ELEMENT": plain.ELEMENTS[dtype],
        "HEAD_DIM": room,
        "M_TILES": 1,
        "WARPS": 4 * teams.groups,
        "GROUPS": teams.groups,
        "ACROSS": teams.across,
        "FEWER": teams.fewer,
        "BLOCK": KEYS,
        "CHUNK": teams.chunk,
        "STAGES": teams.stages,
        "TURNS": teams.turns,
        "BLOCKS": teams.blocks,
        "SHARED_BYTES": shared_bytes(name, teams, room, chosen),
        **chosen,
    }


def multiplying(teams: Teams) -> int:
    """Teams of a block that multiply."""
    return teams.groups * teams.across // teams.turns


def shared_bytes(name: str, teams: Teams, room: int, chosen: Mapping[str, int]) -> int:
    """The shared memory of a block; each source asserts that it has the same idea."""
    own = 64 * teams.groups

    def up(size: int, multiple: int) -> int:
        return -(-size // multiple) * multiple

    match name:
        case "backward_query":
            kept = teams.across * (2 * 2 * room * own + 8 * own + 2 * 24) + 128
            stage = 2 * KEYS * own + teams.across * (2 * 2 * room * KEYS + 16 * KEYS)
            signals = 8 * (2 + 3 * teams.stages) + 8 * teams.stages * teams.across
            return up(teams.stages * up(stage, 1024) + kept + signals, 1024)
        case "backward_key":
            kept = 2 * teams.across * 2 * room * own
            queries = 12 * KEYS + 16
            stage = teams.across * (2 * 2 * room * KEYS + queries) + 2 * KEYS * own
            signals = 8 * (3 + 3 * teams.stages)
            return up(teams.stages * up(stage, 1024) + kept + signals, 1024)
        case _ if name in PAIRS:
            keys, masked = 64 * teams.across, chosen["MASK_BIAS"]
            kept = 2 * own * keys + 64 + 128 + 8  # the pair bias, what the block does, halves
            added = not masked and keys <= 128
            told = 8 * own + (16 * keys if added else 1024) + 4 * (keys if masked else 4)
            flags = 12 * teams.across + own // 4
            stage = 2 * 2 * room * (own + keys) + told + flags
            signals = 8 * 3 * teams.stages
            size = up(teams.stages * up(stage, 256) + kept + signals, 256)
            if name == TOGETHER:
                size += 2 * 2 * keys * own + 4 * 8  # gradients of two rows' logits, signals
            return up(size, 256)
        case _:
            raise ValueError(f"there is no pass {name!r}")


def queries_variant(dtype: str, room: int, chosen: Mapping[str, int]) -> dict[str, Define]:
    """The definitions that choose the variant of :data:`QUERIES_SOURCE`."""
    return {
        "ELEMENT": plain.ELEMENTS[dtype],
        "HEAD_DIM": room,
        "M_TILES": 1,
        "WARPS": 8,
        "BLOCK": KEYS,
        "CHUNK": 16,
        **{name: chosen[name] for name in ("GATED", "ALIGNED", "ALIGNED_BIAS")},
        "MASK_BIAS": 0,
        "PAIR_BIAS": 1,
    }


def _queries(shape: Shape, dtype: str, room: int, chosen: Mapping[str, int]) -> Launch:
    """What leaves the facts of each query: a block does 256 of one row s."""
    defines = queries_variant(dtype, room, chosen)
    blocks = shape.B * shape.S * -(-shape.Q * shape.H // 256)
    return Launch(QUERIES_SOURCE, defines, QUERIES_SOURCE, blocks, (256,))


def _launch(name: str, teams: Teams, shape: Shape, defines: Mapping[str, Define]) -> Launch:
    """As many blocks as can be at once, for works that each does some of; but of
    ``backward_pair_bias``, one for each tile.
    """
    own = 64 * teams.groups
    rows = -(-shape.S // teams.across)
    match name:
        case "backward_query":
            works = -(-shape.Q // own) * rows * shape.H * shape.B
        case _ if name in PAIRS:
            works = -(-shape.Q // own) * -(-shape.K // (64 * teams.across)) * shape.H * shape.B
        case _:
            works = -(-shape.K // own) * rows * shape.G * shape.B
    source = f"evoformer_warpgroup_{name}"
    threads = 128 * (multiplying(teams) + 1)
    at_once = MULTIPROCESSORS.get() * teams.blocks
    blocks = works if name in PAIRS else min(works, at_once)
    size = int(defines["SHARED_BYTES"])
    streams = 64 * teams.across if name in PAIRS else KEYS
    stay = {"k", "v"} if name == "backward_key" else {"q", "dout", "pair_bias"}
    tiles = tuple(Tile(one, own if one in stay else streams) for one in FETCHED[name])
    return Launch(source, defines, source, blocks, (threads,), size, tiles)
