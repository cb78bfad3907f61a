"""The tensor-core kernels' host side: what is launched, what is kept, which variant is taken."""

import re
from dataclasses import replace
from math import prod

import pytest

from isoform.kernels import geometries, tensor, warpgroup
from isoform.kernels.arguments import View
from isoform.kernels.choice import LOW_MEMORY
from isoform.kernels.compiler import SOURCES, sources
from isoform.kernels.emulate import CompilationFailed, HostCompilerUnavailable, check, host_compiler
from isoform.reference.contract import Shape

WITHOUT_GATE = {"MASK_BIAS": 1, "PAIR_BIAS": 1, "GATED": 0, "ALIGNED": 1, "ALIGNED_BIAS": 1}
SHAPE = Shape(B=2, S=3, Q=150, K=200, H=4, G=2, D=24)
ALL = ("q", "k", "v", "mask_bias", "pair_bias", "gate")
BARE = ("q", "k", "v")


def contiguous(shape, pointer=1 << 20):
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return View.of(pointer, shape, tuple(strides))


def lying(shape=SHAPE, names=ALL):
    shapes = {name: shape.of(name) for name in (*names, "out")}
    shapes["dout"] = shapes["out"]
    return {name: contiguous(size) for name, size in shapes.items()}


TRIANGLE = Shape(1, 512, 512, 512, 4, 4, 32)
UNGATED = ("q", "k", "v", "mask_bias", "pair_bias")


def whole(shape, names=UNGATED, wanted=UNGATED, room=tensor.ROOM, multiprocessors=132, **views):
    """The backward on a GPU without warpgroups, whose blocks may have so much shared memory."""
    with geometries.of_device("a GPU", room, multiprocessors, "sm_100"):
        return tensor.backward(shape, "bfloat16", lying(shape, names) | views, wanted)


def on_hopper(shape, names=UNGATED, architecture="sm_90", multiprocessors=132, **views):
    """The forward on a GPU of an architecture."""
    with geometries.of_device("a GPU", tensor.ROOM, multiprocessors, architecture):
        return tensor.forward(shape, "bfloat16", lying(shape, names) | views)


def by_warpgroups(shape, wanted, names=UNGATED, architecture="sm_90", **views):
    """The backward on a GPU of an architecture, of whoever takes its kernels wherever those can."""
    with geometries.of_device("a GPU", tensor.ROOM, 132, architecture), tensor.eagerly():
        return tensor.backward(shape, "bfloat16", lying(shape, names) | views, wanted)


def kernels(work):
    return [launch.kernel.removeprefix("evoformer_tensor_") for launch in work.launches]


MSA = Shape(1, 512, 256, 256, 8, 8, 32)


def tiles(length, size):
    return -(-length // size)


# --- What is launched -----------------------------------------------------------------------------


def test_every_kernel_of_the_sources_is_launched_and_no_other():
    defined = {
        kernel
        for file in SOURCES.glob("evoformer_[tw]*.cu")
        for kernel in re.findall(
            r"__global__.*?(evoformer_(?:tensor|warpgroup)_\w+)\(",
            file.read_text("utf-8"),
            re.DOTALL,
        )
    }
    works = (
        tensor.forward(SHAPE, "bfloat16", lying()),
        on_hopper(TRIANGLE),
        tensor.backward(SHAPE, "bfloat16", lying(), ALL),
        whole(TRIANGLE),
        by_warpgroups(TRIANGLE, {"q"}),
        by_warpgroups(TRIANGLE, {"k", "v", "mask_bias"}),
        by_warpgroups(TRIANGLE, {"pair_bias"}),
        by_warpgroups(MSA, {"q", "pair_bias"}),
    )
    assert {launch.kernel for work in works for launch in work.launches} == defined


def test_a_block_for_each_tile():
    (forward,) = tensor.forward(SHAPE, "bfloat16", lying()).launches
    geometry = tensor.geometry_of("forward", SHAPE.D, gated=True)
    B, S, Q, K, H, G, _ = (getattr(SHAPE, axis) for axis in "BSQKHGD")
    assert forward.blocks == tiles(Q, geometry.own) * H * tiles(S, geometry.rows) * B
    assert forward.threads == (geometry.threads,)
    assert forward.shared_bytes == forward.defines["SHARED_BYTES"]

    query, key, mask_bias, pair_bias = tensor.backward(SHAPE, "bfloat16", lying(), ALL).launches
    geometry = tensor.geometry_of("backward_query", SHAPE.D, gated=True)
    assert query.blocks == tiles(Q, geometry.own) * H * tiles(S, geometry.rows) * B
    geometry = tensor.geometry_of("backward_key", SHAPE.D, gated=True)
    assert key.blocks == tiles(K, geometry.own) * G * tiles(S, geometry.rows) * B
    assert (mask_bias.blocks, mask_bias.threads) == (tiles(B * S * K, 256), (256,))
    assert mask_bias.defines == key.defines  # one program, two kernels
    geometry = tensor.geometry_of("backward_pair_bias", SHAPE.D, gated=True)
    whole = tiles(K, geometry.block) * tiles(Q, geometry.own) * H * B
    assert pair_bias.blocks % whole == 0


@pytest.mark.parametrize(
    ("wanted", "launches", "scratch"),
    [
        ([], [], []),
        (["q"], ["backward_query"], ["delta"]),
        (["gate"], ["backward_query"], ["delta"]),
        (["k"], ["backward_query", "backward_key"], ["delta"]),
        (["v"], ["backward_query", "backward_key"], ["delta"]),
        (
            ["mask_bias"],
            ["backward_query", "backward_key", "backward_mask_bias"],
            ["delta", "mask_bias_parts"],
        ),
        (["pair_bias"], ["backward_query", "backward_pair_bias"], ["delta"]),
    ],
)
def test_only_what_is_wanted_is_launched(wanted, launches, scratch):
    work = tensor.backward(SHAPE, "float16", lying(), wanted)
    assert kernels(work) == launches
    sized = {name for name in work.scratch if name not in ("pair_bias_sums", "turns")}
    assert sized == set(scratch)


# --- The forward where four warps multiply together -----------------------------------------------

GROUPED = {
    "triangle 512": (TRIANGLE, 2),
    "triangle 256: in as few turns, which are longer": (Shape(1, 256, 256, 256, 4, 4, 32), 4),
    "diffusion": (Shape(1, 48, 768, 768, 16, 16, 48), 4),
    "diffusion, small": (Shape(1, 48, 256, 256, 16, 16, 48), 4),
    "extra MSA": (Shape(1, 5120, 384, 384, 8, 8, 8), 2),
    "grouped heads": (Shape(2, 33, 250, 400, 4, 2, 16), 2),
}
UNGROUPED = {
    "few rows": ({"S": 15}, {}),
    "no keys": ({"K": 0}, {}),
    "a larger head dim": ({"D": 64}, {}),
    "channels that cannot be copied 16 bytes at a time": ({"D": 20}, {}),
    "a pair bias that cannot": ({"K": 500}, {}),
    "a gate": ({}, {"names": ALL}),
    "no pair bias": ({}, {"names": BARE}),
    "an older architecture": ({}, {"architecture": "sm_89"}),
    "a newer one": ({}, {"architecture": "sm_100"}),
}


@pytest.mark.parametrize(("shape", "groups"), GROUPED.values(), ids=GROUPED)
def test_warpgroups_do_the_forward(shape, groups):
    (forward,) = on_hopper(shape).launches
    assert forward.source == forward.kernel == tensor.GROUPED_SOURCE
    assert forward.defines["GROUPS"] == groups
    rows = forward.defines["ROWS"]
    assert forward.threads == (128 * (groups * rows // forward.defines["TURNS"] + 1),)
    works = tiles(shape.Q, 64 * groups) * tiles(shape.S, rows)
    works *= shape.H * shape.B
    assert forward.blocks == min(works, 132 * forward.defines["BLOCKS"])


@pytest.mark.parametrize(("sizes", "how"), UNGROUPED.values(), ids=UNGROUPED)
def test_elsewhere_warps_do_it_by_themselves(sizes, how):
    shape = Shape(**{axis: getattr(TRIANGLE, axis) for axis in "BSQKHGD"} | sizes)
    (forward,) = on_hopper(shape, **how).launches
    assert forward.kernel == "evoformer_tensor_forward"


def test_no_block_has_more_to_do_than_it_can_remember():
    (forward,) = on_hopper(Shape(16, 2048, 512, 512, 64, 64, 32), multiprocessors=1).launches
    own, rows = 64 * forward.defines["GROUPS"], forward.defines["ROWS"]
    works = tiles(512, own) * tiles(2048, rows) * 64 * 16
    assert works > tensor.MOST_WORKS * forward.defines["BLOCKS"]
    assert forward.blocks == tiles(works, tensor.MOST_WORKS)


@pytest.mark.parametrize(("name", "axis"), [("q", 1), ("pair_bias", 3)])
def test_tiles_are_fetched_forwards(name, axis):
    """A stride below 0 is nothing that a tile's map can say."""
    backwards = {**lying(TRIANGLE, UNGATED)}
    strides = [*backwards[name].strides]
    strides[axis] *= -1
    backwards[name] = replace(backwards[name], strides=tuple(strides))
    with geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"):
        (forward,) = tensor.forward(TRIANGLE, "bfloat16", backwards).launches
        backward = tensor.backward(TRIANGLE, "bfloat16", backwards, UNGATED)
    assert forward.kernel == "evoformer_tensor_forward"
    assert not any("warpgroup" in launch.kernel for launch in backward.launches)


@pytest.mark.parametrize("axis", "QK")
def test_where_there_is_nothing_to_fetch_others_do_it(axis):
    """Gradients of keys without queries, and of queries without keys, are zeros."""
    empty = replace(TRIANGLE, **{axis: 0})
    works = [on_hopper(empty), by_warpgroups(empty, UNGATED)]
    assert not any("warpgroup" in one.kernel for work in works for one in work.launches)


def test_what_is_fetched_is_said_in_the_order_of_the_source():
    """Of each kernel that fetches: the maps after the arguments, as ``struct Given`` has them."""
    launches = [*on_hopper(TRIANGLE).launches]
    for wanted in ({"q"}, {"k"}, {"pair_bias"}):
        launches += by_warpgroups(TRIANGLE, wanted).launches[1:]
    launches += by_warpgroups(MSA, {"q", "pair_bias"}).launches[1:]
    assert len(launches) == 5
    for launch in launches:
        text = "\n".join(sources(launch.source).values())
        given = re.search(r"struct Given \{.*?TileMap (.*?);", text, re.DOTALL)[1]
        names = given.replace("cotangent", "dout").split(", ")
        assert [tile.operand for tile in launch.tiles] == names


def test_who_is_eager_takes_what_can_do_the_call():
    small = Shape(1, 2, 5, 64, 2, 2, 16)
    views = lying(small, UNGATED)
    with geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"), tensor.eagerly():
        (forward,) = tensor.forward(small, "bfloat16", views).launches
        backward = tensor.backward(small, "bfloat16", views, UNGATED)
    assert forward.kernel == tensor.GROUPED_SOURCE
    assert all("evoformer_warpgroup" in launch.kernel for launch in backward.launches)
    with geometries.of_device("a GPU", tensor.ROOM, 148, "sm_100"), tensor.eagerly():
        backward = tensor.backward(small, "bfloat16", views, UNGATED)
    assert "backward_query_pair" in kernels(backward)
    with geometries.of_device("a GPU", 99 << 10, 128, "sm_89"), tensor.eagerly():
        (forward,) = tensor.forward(small, "bfloat16", views).launches
    assert forward.kernel == "evoformer_tensor_forward"


@pytest.mark.parametrize("D", tensor.GROUPED)
def test_its_blocks_fit_on_a_multiprocessor(D):
    """Which has 228 KiB, of which each block takes one for itself."""
    for grouped in tensor.GROUPED[D]:
        size = tensor.grouped_variant(grouped, "bfloat16", D, WITHOUT_GATE)["SHARED_BYTES"]
        assert grouped.blocks * (size + 1024) <= 228 << 10


# --- The gradient of q where four warps multiply together -----------------------------------------

QUERIES = {
    "triangle": (TRIANGLE, (128, 3), 384),
    "diffusion": (Shape(1, 48, 768, 768, 16, 16, 48), (128, 2), 256),
    "extra MSA": (Shape(1, 5120, 384, 384, 8, 8, 8), (128, 3), 384),
    "grouped heads": (Shape(2, 33, 250, 400, 4, 2, 24), (128, 3), 384),
}
NOT_QUERIES = {
    "a larger head dim": ({"D": 64}, {}),
    "channels that cannot be copied 16 bytes at a time": ({"D": 20}, {}),
    "a pair bias that cannot": ({"K": 500}, {}),
    "a gate": ({}, {"names": ALL}),
    "no pair bias": ({}, {"names": BARE}),
    "a newer architecture": ({}, {"architecture": "sm_100"}),
}


@pytest.mark.parametrize(("shape", "own", "multiplying"), QUERIES.values(), ids=QUERIES)
def test_warpgroups_do_the_gradient_of_q(shape, own, multiplying):
    work = by_warpgroups(shape, {"q"})
    queries, query = work.launches
    assert queries.kernel == "evoformer_warpgroup_backward_queries"
    assert query.source == query.kernel == "evoformer_warpgroup_backward_query"
    assert query.threads == (multiplying + 128,)
    works = tiles(shape.Q, own[0]) * tiles(shape.S, own[1]) * shape.H * shape.B
    assert query.blocks == min(works, 132)
    assert work.scratch == {"delta": (*shape.of("lse"), 2)}


@pytest.mark.parametrize(("sizes", "how"), NOT_QUERIES.values(), ids=NOT_QUERIES)
def test_elsewhere_warps_do_that_by_themselves(sizes, how):
    shape = Shape(**{axis: getattr(TRIANGLE, axis) for axis in "BSQKHGD"} | sizes)
    assert kernels(by_warpgroups(shape, {"q"}, **how)) == ["backward_query"]


@pytest.mark.parametrize(("rows", "by"), [(32, "warpgroup"), (31, "tensor")])
def test_they_do_it_from_as_many_rows_on_as_was_measured(rows, by):
    shape = Shape(1, rows, 512, 512, 4, 4, 32)
    with geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"):
        work = tensor.backward(shape, "bfloat16", lying(shape, UNGATED), UNGATED)
    assert all(f"evoformer_{by}_backward" in launch.kernel for launch in work.launches)


def test_they_do_not_where_memory_is_short():
    """δ is then all that there is for each query."""
    with geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"):
        work = LOW_MEMORY.backward(TRIANGLE, "bfloat16", lying(TRIANGLE, UNGATED), UNGATED)
    assert not any("warpgroup" in launch.kernel for launch in work.launches)
    assert work.scratch["delta"] == TRIANGLE.of("lse")


# --- The gradient of the pair bias where they do --------------------------------------------------

PAIRS = {
    "triangle 512": (TRIANGLE, 2),
    "triangle 1024": (Shape(1, 1024, 1024, 1024, 4, 4, 32), 1),
    "triangle 256": (Shape(1, 256, 256, 256, 4, 4, 32), 8),
    "diffusion": (Shape(1, 48, 768, 768, 16, 16, 48), 1),
    "grouped heads": (Shape(2, 33, 250, 400, 4, 2, 24), 2),
    "few rows": (Shape(1, 20, 64, 64, 1, 1, 8), 1),
}


@pytest.mark.parametrize(("shape", "parts"), PAIRS.values(), ids=PAIRS)
def test_warpgroups_do_the_gradient_of_the_pair_bias(shape, parts):
    work = by_warpgroups(shape, {"pair_bias"})
    queries, pairs = work.launches
    assert queries.kernel == "evoformer_warpgroup_backward_queries"
    assert pairs.source == pairs.kernel == "evoformer_warpgroup_backward_pair_bias"
    assert pairs.threads == (640,)
    assert pairs.shared_bytes == pairs.defines["SHARED_BYTES"]
    whole = tiles(shape.Q, 128) * tiles(shape.K, 128) * shape.H * shape.B
    assert pairs.blocks == whole * parts
    assert work.counts == {"parts": parts, "pair_bias_tiles": 16 * whole}
    shared = {"pair_bias_sums": (whole, 128 * 128), "turns": (16 * whole + 1,)}
    assert work.scratch == {"delta": (*shape.of("lse"), 2)} | (shared if parts > 1 else {})


TOGETHER = {
    "MSA row": (MSA, 4),
    "triangle 256": (Shape(1, 256, 256, 256, 4, 4, 32), 8),
    "template": (Shape(4, 256, 256, 256, 4, 4, 16), 2),
    "not as many keys": (Shape(2, 33, 250, 232, 4, 2, 24), 2),
}


@pytest.mark.parametrize(("shape", "parts"), TOGETHER.values(), ids=TOGETHER)
def test_one_pass_of_warpgroups_does_q_and_the_pair_bias_where_a_block_has_all_keys(shape, parts):
    with geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"):
        work = tensor.backward(shape, "bfloat16", lying(shape, UNGATED), UNGATED)
    queries, keys, mask_bias, pairs = work.launches
    assert queries.kernel == "evoformer_warpgroup_backward_queries"
    assert keys.kernel == "evoformer_warpgroup_backward_key"
    assert mask_bias.kernel == "evoformer_warpgroup_backward_mask_bias"
    assert pairs.source == pairs.kernel == "evoformer_warpgroup_backward_query_pair"
    assert pairs.threads == (640,)
    assert pairs.shared_bytes == pairs.defines["SHARED_BYTES"]
    whole = tiles(shape.Q, 64) * shape.H * shape.B
    assert pairs.blocks == whole * parts
    assert work.counts == {"parts": parts, "pair_bias_tiles": 16 * whole}


APART = {
    "more keys": ({"K": 264}, "bfloat16", UNGATED),
    "too few keys": ({"K": 224}, "bfloat16", UNGATED),
    "a larger head dim": ({"D": 48}, "bfloat16", UNGATED),
    "float16": ({}, "float16", UNGATED),
    "only q": ({}, "bfloat16", {"q", "k", "v", "mask_bias"}),
}


@pytest.mark.parametrize(("sizes", "dtype", "wanted"), APART.values(), ids=APART)
def test_elsewhere_two_passes_do(sizes, dtype, wanted):
    shape = Shape(**{axis: getattr(MSA, axis) for axis in "BSQKHGD"} | sizes)
    with geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"):
        work = tensor.backward(shape, dtype, lying(shape, UNGATED), wanted)
    names = {launch.kernel.removeprefix("evoformer_warpgroup_") for launch in work.launches}
    assert "backward_query" in names and "backward_query_pair" not in names
    assert ("backward_pair_bias" in names) == ("pair_bias" in wanted)


@pytest.mark.parametrize(("sizes", "how"), NOT_QUERIES.values(), ids=NOT_QUERIES)
def test_elsewhere_other_kernels_do_that(sizes, how):
    shape = Shape(**{axis: getattr(TRIANGLE, axis) for axis in "BSQKHGD"} | sizes)
    names = how.get("names", UNGATED)
    work = by_warpgroups(shape, {"pair_bias"} & set(names) or {"q"}, **how)
    assert not any("warpgroup" in launch.kernel for launch in work.launches)


@pytest.mark.parametrize("at_once", [1, 78, 132, 264])
@pytest.mark.parametrize("tiles_", [1, 9, 36, 64, 132, 133, 576])
@pytest.mark.parametrize("S", [0, 1, 31, 48, 512, 5120])
def test_as_many_blocks_share_a_tile_as_are_done_soonest(S, tiles_, at_once):
    def rows(parts):
        waves = tiles(tiles_ * parts, at_once)
        together = min(parts, tiles(at_once, tiles_))
        return waves * (tiles(S, parts) + warpgroup.START) + warpgroup.TURN * (together - 1)

    parts = warpgroup.parts_of(S, tiles_, at_once)
    assert 1 <= parts <= max(1, S // warpgroup.ROWS)
    for other in range(1, max(1, S // warpgroup.ROWS) + 1):
        assert rows(parts) < rows(other) or (rows(parts) == rows(other) and parts <= other)


@pytest.mark.parametrize("D", warpgroup.BACKWARD)
def test_blocks_of_the_backward_fit_on_a_multiprocessor(D):
    """Which has 228 KiB, of which each block takes one for itself."""
    for name, teams in warpgroup.BACKWARD[D].items():
        size = warpgroup.shared_bytes(name, teams, D, WITHOUT_GATE)
        assert teams.blocks * (size + 1024) <= 228 << 10


# --- One pass for q and the pair bias -------------------------------------------------------------


@pytest.fixture
def builtin(monkeypatch):
    monkeypatch.setenv("ISOFORM_GEOMETRIES", "builtin")  # whatever the user of this machine has


FASTER = {
    "triangle 512": TRIANGLE,
    "MSA row": Shape(1, 512, 256, 256, 8, 8, 32),
    "template": Shape(4, 256, 256, 256, 4, 4, 16),
    "odd": Shape(2, 700, 150, 301, 4, 2, 24),
}
NOT = {
    "few rows": ({"S": 127}, {}),
    "more keys than fit": ({"K": 513}, {}),
    "a larger head dim": ({"D": 48}, {}),
    "rows that cannot be copied 16 bytes at a time": ({"D": 20}, {}),
    "rows far apart": ({}, {"k": View(1 << 20, (0, 1 << 40, 1 << 31, 32, 1))}),
    "a gate": ({}, {"names": ALL}),
    "no gradient of q": ({}, {"wanted": ("k", "pair_bias")}),
    "no gradient of the pair bias": ({}, {"wanted": ("q", "k", "v")}),
    "less shared memory": ({}, {"room": tensor.ROOM - 1}),
}


@pytest.mark.parametrize("shape", FASTER.values(), ids=FASTER)
def test_one_pass_does_q_and_the_pair_bias(builtin, shape):
    work = whole(shape)
    assert kernels(work) == [
        *("backward_query_pair_turns", "backward_query_pair"),
        *("backward_key", "backward_mask_bias"),
    ]
    turns, both, *_ = work.launches
    assert turns.defines == both.defines  # one program, two kernels
    geometry = tensor.WHOLE[tensor.head_dim(shape.D)]
    blocks, parts = work.counts["pair_bias_tiles"], work.counts["parts"]
    assert blocks == tiles(shape.Q, geometry.own) * shape.H * shape.B
    assert both.blocks == blocks * parts
    assert both.threads == (32 * both.defines["WARPS"],)
    keys = both.defines["WARPS"] * both.defines["BLOCK"]
    assert shape.K <= keys < shape.K + both.defines["BLOCK"]
    assert work.scratch["pair_bias_sums"] == (blocks, geometry.own * keys)
    assert work.scratch["turns"] == (blocks + 1,)


@pytest.mark.parametrize(("sizes", "how"), NOT.values(), ids=NOT)
def test_elsewhere_there_are_two(builtin, sizes, how):
    shape = Shape(**{axis: getattr(TRIANGLE, axis) for axis in "BSQKHGD"} | sizes)
    assert not any("query_pair" in name for name in kernels(whole(shape, **how)))


def test_a_geometry_that_is_tried_is_used(builtin):
    """Where other kernels would do what its pass does, too."""
    tried = tensor.GEOMETRIES["forward"][32]
    with (
        geometries.of_device("a GPU", tensor.ROOM, 132, "sm_90"),
        geometries.instead("forward", 32, tried),
    ):
        (forward,) = tensor.forward(TRIANGLE, "bfloat16", lying(TRIANGLE, UNGATED)).launches
        backward = tensor.backward(TRIANGLE, "bfloat16", lying(TRIANGLE, UNGATED), UNGATED)
    assert forward.kernel == "evoformer_tensor_forward"
    assert "backward_query" in kernels(backward)


def test_no_gpu_has_room_for_it_unless_it_says_so(builtin):
    work = tensor.backward(TRIANGLE, "bfloat16", lying(TRIANGLE, UNGATED), UNGATED)
    assert not any("query_pair" in name for name in kernels(work))


@pytest.mark.parametrize("D", tensor.WHOLE)
def test_one_block_of_it_fits_however_many_keys(D):
    """A kernel declares a few bytes itself."""
    whole = tensor.WHOLE[D]
    for K in range(1, whole.keys[1] * whole.warps + 1):
        defines = tensor.whole_variant(whole, "bfloat16", D, K, WITHOUT_GATE)
        assert defines["SHARED_BYTES"] + 16 <= tensor.ROOM
        assert defines["WARPS"] * defines["BLOCK"] >= K
        assert 64 <= 32 * defines["WARPS"] <= 256  # a thread for each query, at least


@pytest.mark.parametrize("multiprocessors", [1, 78, 114, 132, 148])
@pytest.mark.parametrize("shape", FASTER.values(), ids=FASTER)
def test_blocks_of_it_are_done_at_the_same_time(builtin, shape, multiprocessors):
    """As far as rows can be shared out: no wave of blocks is nearly empty."""
    counts = whole(shape, multiprocessors=multiprocessors).counts
    tiles, parts = counts["pair_bias_tiles"], counts["parts"]
    assert 1 <= parts <= shape.S // warpgroup.ROWS

    def rows(parts):
        return -(-tiles * parts // multiprocessors) * (-(-shape.S // parts) + warpgroup.START)

    assert rows(parts) == min(rows(other) for other in (1, 2, 3, 4, 8, parts))


@pytest.mark.parametrize("axis", ["B", "S", "Q", "H"])
def test_nothing_is_launched_for_an_empty_result(axis):
    empty = Shape(**dict.fromkeys("BSQKHGD", 2) | {axis: 0})
    assert tensor.forward(empty, "float16", lying(empty)).launches == ()


def test_no_keys_still_give_a_result_and_gradients_of_the_queries():
    empty = Shape(1, 1, 3, 0, 2, 2, 4)
    assert len(tensor.forward(empty, "float16", lying(empty)).launches) == 1
    assert kernels(tensor.backward(empty, "float16", lying(empty), ALL)) == ["backward_query"]


# --- What is kept besides operands and results ----------------------------------------------------


def test_scratch_memory_is_a_few_numbers_per_query_and_key():
    scratch = tensor.backward(SHAPE, "bfloat16", lying(), ALL).scratch
    assert scratch["delta"] == (SHAPE.B, SHAPE.S, SHAPE.H, SHAPE.Q)
    assert scratch["mask_bias_parts"] == (SHAPE.B, SHAPE.S, SHAPE.G, SHAPE.K)


MANY_ROWS = Shape(1, 512, 64, 64, 4, 4, 32)  # one tile or a few, many rows to share among blocks
FEW = {
    "one row": Shape(1, 1, 64, 64, 4, 4, 32),
    "as many tiles as fill a GPU": Shape(1, 64, 1024, 1024, 8, 8, 32),
}


def pair_bias(shape):
    work = tensor.backward(shape, "bfloat16", lying(shape), ["pair_bias"])
    return work, work.launches[-1].blocks


def test_blocks_share_the_rows_of_a_tile_where_tiles_are_few():
    work, blocks = pair_bias(MANY_ROWS)
    parts, whole = work.counts["parts"], work.counts["pair_bias_tiles"]
    geometry = tensor.geometry_of("backward_pair_bias", MANY_ROWS.D, gated=True)
    assert 1 < parts <= MANY_ROWS.S
    assert blocks == parts * whole
    assert whole == tiles(64, geometry.own) * tiles(64, geometry.block) * 4
    assert work.scratch["pair_bias_sums"] == (whole, geometry.own * geometry.block)
    assert work.scratch["turns"] == (whole + 1,)


@pytest.mark.parametrize("shape", FEW.values(), ids=FEW)
def test_elsewhere_a_tile_is_one_blocks(shape):
    work, blocks = pair_bias(shape)
    assert work.counts == {"parts": 1, "pair_bias_tiles": blocks}
    assert work.scratch.keys() == {"delta"}


@pytest.mark.parametrize(
    "shape",
    [MANY_ROWS, *FEW.values(), SHAPE, Shape(1, 128, 256, 256, 8, 8, 32)],
    ids=str,
)
def test_what_blocks_share_stays_within_the_memory_promised(shape):
    """Within 5 % of out, gradients, lse, delta and one float32 dpair_bias."""
    work, _ = pair_bias(shape)
    B, S, Q, K, H, _, D = (getattr(shape, axis) for axis in "BSQKHGD")
    out_and_gradients = 2 * (4 * B * S * max(Q, K) * H * D + B * H * Q * K)
    queries = B * S * H * Q
    sums = 4 * prod(work.scratch.get("pair_bias_sums", (0,)))
    kept = sum(tensor.SAVED.values()) * queries + 4 * queries  # δ is the backward's
    lse_and_delta = 8 * queries
    assert out_and_gradients + kept + sums <= 1.05 * (
        out_and_gradients + lse_and_delta + 4 * B * H * Q * K
    )


# --- Which variant --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("D", "room"), [(1, 16), (16, 16), (17, 32), (33, 48), (49, 64), (65, 96), (97, 128)]
)
def test_a_head_dim_between_two_variants_takes_the_larger(D, room):
    assert tensor.head_dim(D) == room


def test_which_operands_there_are_chooses():
    absent = {"MASK_BIAS": 0, "PAIR_BIAS": 0, "GATED": 0, "ALIGNED": 1, "ALIGNED_BIAS": 1}
    assert tensor.choices(SHAPE, lying(names=BARE)) == absent
    assert tensor.choices(SHAPE, lying()) == dict.fromkeys(absent, 1)


ROWS = ("q", "k", "v", "gate", "dout", "out")


@pytest.mark.parametrize("name", [*ROWS, "pair_bias"])
@pytest.mark.parametrize("how", ["pointer", "stride", "last", "broadcast"])
def test_rows_that_do_not_lie_on_16_bytes_choose(name, how):
    operands = lying()
    one = operands[name]
    odd = (*one.strides[:3], one.strides[3] + 1, 1)
    operands[name] = {
        "pointer": View(one.pointer + 2, one.strides),
        "stride": View(one.pointer, odd),
        "last": View(one.pointer, (*(8 * step for step in one.strides[:-1]), 8)),
        "broadcast": View(one.pointer, (*one.strides[:-1], 0)),
    }[how]
    found = tensor.choices(SHAPE, operands)
    which = "ALIGNED_BIAS" if name == "pair_bias" else "ALIGNED"
    other = {"ALIGNED", "ALIGNED_BIAS"} - {which}
    assert found[which] == 0
    assert all(found[one] == 1 for one in other)


LONGER = (2, 3, 150, 208, 4, 2, 24)


@pytest.mark.parametrize(
    ("sizes", "which"), [({"D": 20}, "ALIGNED"), ({"K": 201}, "ALIGNED_BIAS")], ids=str
)
def test_sizes_that_are_not_of_eights_choose(sizes, which):
    """However its rows lie: here on 16 bytes, in room for more."""
    shape = Shape(**{axis: getattr(SHAPE, axis) for axis in "BSQKHGD"} | sizes)
    found = tensor.choices(shape, lying(SHAPE if "D" in sizes else Shape(*LONGER)))
    assert [name for name in ("ALIGNED", "ALIGNED_BIAS") if not found[name]] == [which]


def test_strides_of_an_axis_with_one_index_do_not_matter():
    operands = lying(Shape(1, 1, 8, 8, 1, 1, 8))
    odd = View.of(1 << 20, (1, 1, 8, 1, 8), (3, 5, 8, 7, 1))
    assert tensor.choices(Shape(1, 1, 8, 8, 1, 1, 8), operands | {"q": odd})["ALIGNED"] == 1


# --- The host and the source have one idea of the shared memory -----------------------------------


try:
    COMPILER = host_compiler()
except HostCompilerUnavailable as missing:
    COMPILER = ""
    WITHOUT = f"not run: {missing}"
needs_a_compiler = pytest.mark.skipif(not COMPILER, reason="" if COMPILER else WITHOUT)


def variant(name, D, gated):
    chosen = {"MASK_BIAS": 1, "PAIR_BIAS": 1, "GATED": gated, "ALIGNED": 1, "ALIGNED_BIAS": 1}
    return tensor.variant(name, "bfloat16", D, chosen)


@needs_a_compiler
@pytest.mark.parametrize("D", tensor.HEAD_DIMS)
@pytest.mark.parametrize("name", tensor.PASSES)
def test_the_source_asserts_the_shared_memory_that_the_host_asks_for(name, D):
    for gated in (0, 1):
        check(f"evoformer_tensor_{name}", defines=variant(name, D, gated))


@needs_a_compiler
@pytest.mark.parametrize("D", tensor.WHOLE)
def test_so_does_that_of_the_one_pass_for_two(D):
    for count in range(2, tensor.WHOLE[D].warps + 1):
        check(
            tensor.WHOLE_SOURCE,
            defines=tensor.whole_variant(tensor.WHOLE[D], "bfloat16", D, count, WITHOUT_GATE),
        )


@needs_a_compiler
@pytest.mark.parametrize("D", tensor.GROUPED)
def test_so_does_that_of_the_forward_by_warpgroups(D):
    for grouped in tensor.GROUPED[D]:
        for mask_bias in (0, 1):
            chosen = WITHOUT_GATE | {"MASK_BIAS": mask_bias}
            check(
                tensor.GROUPED_SOURCE,
                defines=tensor.grouped_variant(grouped, "bfloat16", D, chosen),
            )


@needs_a_compiler
@pytest.mark.parametrize("D", warpgroup.BACKWARD)
def test_so_do_those_of_the_backward_by_warpgroups(D):
    for name, teams in warpgroup.BACKWARD[D].items():
        for mask_bias in (0, 1):
            chosen = WITHOUT_GATE | {"MASK_BIAS": mask_bias}
            check(
                f"evoformer_warpgroup_{name}",
                defines=warpgroup.variant(name, teams, "bfloat16", D, chosen),
            )


@needs_a_compiler
@pytest.mark.parametrize("name", tensor.PASSES)
def test_another_idea_is_an_error(name):
    defines = variant(name, 32, 1)
    wrong = defines | {"SHARED_BYTES": int(defines["SHARED_BYTES"]) + 16}
    with pytest.raises(CompilationFailed, match="another idea of the shared memory"):
        check(f"evoformer_tensor_{name}", defines=wrong)


@pytest.mark.parametrize("D", tensor.HEAD_DIMS)
@pytest.mark.parametrize("name", tensor.PASSES)
def test_a_block_fits_into_the_shared_memory_of_the_smallest_gpus(name, D):
    """sm_86, sm_89 and sm_120 have 99 KiB for a block; a kernel declares a few bytes itself."""
    for gated in (False, True):
        assert tensor.shared_bytes(name, D, gated=gated) + 16 <= 99 * 1024
