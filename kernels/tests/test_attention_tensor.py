"""The kernels' host side: what is launched, how memory grows; and which tiles are looked at."""

import re
from dataclasses import replace
from math import prod

import numpy as np
import pytest

from isoform.kernels import attention_plain, attention_tensor
from isoform.kernels.arguments import View
from isoform.kernels.attention_arguments import ATTENTION, Options
from isoform.kernels.compiler import SOURCES
from isoform.kernels.emulate import (
    ORDERS,
    HostCompilerUnavailable,
    check,
    host_compiler,
)
from isoform.kernels.emulate.calls import launch_all, views_of
from isoform.reference.attention_contract import PLACES, SequenceShape

SHAPE = SequenceShape(B=2, Q=150, K=200, H=4, G=2, D=24)
ALL = ("q", "k", "v")


def contiguous(shape, pointer=1 << 20):
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return View.of(pointer, shape, tuple(strides))


def lying(shape=SHAPE, places=(), out=True):
    names = {name: name for name in (*ALL, *places)} | {"dout": "q"} | ({"out": "q"} if out else {})
    return {name: contiguous(shape.of(as_)) for name, as_ in names.items()}


def kernels(work):
    return [launch.kernel for launch in work.launches]


def tiles(length, size):
    return -(-length // size)


# --- What is launched -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", [attention_tensor, attention_plain])
def test_every_kernel_of_the_sources_is_launched_and_no_other(module):
    name = module.__name__.rpartition(".")[2]
    files = [*SOURCES.glob(f"{name}*.cu"), SOURCES / "attention_delta.cu"]
    if module is attention_tensor:
        files.append(SOURCES / "attention_spans.cu")
    defined = {
        kernel
        for file in files
        for kernel in re.findall(
            r"__global__.*?(attention_\w+)\(const", file.read_text("utf-8"), re.DOTALL
        )
    }
    operands = lying(places=PLACES)
    works = (
        module.forward(SHAPE, "bfloat16", operands, Options()),
        module.backward(SHAPE, "bfloat16", operands, Options(), ALL),
    )
    assert {launch.kernel for work in works for launch in work.launches} == defined


def test_a_block_for_each_tile():
    B, Q, K, H, G, _ = (getattr(SHAPE, axis) for axis in "BQKHGD")
    (forward,) = attention_tensor.forward(SHAPE, "bfloat16", lying(), Options()).launches
    own = attention_tensor.GEOMETRIES["forward"][32].own
    assert forward.blocks == tiles(Q, own) * H * B
    assert forward.shared_bytes == forward.defines["SHARED_BYTES"]
    _, query, key = attention_tensor.backward(SHAPE, "bfloat16", lying(), Options(), ALL).launches
    assert query.blocks == tiles(Q, attention_tensor.GEOMETRIES["backward_query"][32].own) * H * B
    assert key.blocks == tiles(K, attention_tensor.GEOMETRIES["backward_key"][32].own) * G * B
    delta, query, key = attention_plain.backward(SHAPE, "float32", lying(), Options(), ALL).launches
    assert delta.blocks == tiles(B * Q * H, 8)
    assert (query.blocks, key.blocks) == (tiles(Q, 16) * H * B, tiles(K, 16) * G * B)


@pytest.mark.parametrize("module", [attention_tensor, attention_plain])
@pytest.mark.parametrize(
    ("wanted", "passes"),
    [([], []), (["q"], ["query"]), (["k"], ["key"]), (["v"], ["key"]), (ALL, ["query", "key"])],
)
def test_only_what_is_wanted_is_launched(module, wanted, passes):
    name = module.__name__.rpartition(".")[2]
    launched = [f"{name}_backward_{one}" for one in passes]
    given = module.backward(SHAPE, "float16", lying(out=False), Options(), wanted)
    assert kernels(given) == launched
    computed = module.backward(SHAPE, "float16", lying(), Options(), wanted)
    assert kernels(computed) == (["attention_delta", *launched] if launched else [])


@pytest.mark.parametrize("module", [attention_tensor, attention_plain])
@pytest.mark.parametrize("axis", ["B", "Q", "H"])
def test_nothing_is_launched_for_an_empty_result(module, axis):
    empty = replace(SHAPE, **({"H": 0, "G": 0} if axis == "H" else {axis: 0}))
    operands = lying(empty, places=PLACES)
    assert module.forward(empty, "float16", operands, Options()).launches == ()
    left = module.backward(empty, "float16", operands, Options(), ("q",)).launches
    assert left == ()


def test_keys_get_their_zeros_where_there_is_no_query():
    empty = replace(SHAPE, Q=0)
    launched = kernels(attention_tensor.backward(empty, "float16", lying(empty), Options(), ALL))
    assert launched == ["attention_tensor_backward_key"]


# --- What is kept besides operands and results ----------------------------------------------------


def test_nothing_is_kept_where_tokens_lie_in_order():
    for work in (
        attention_tensor.forward(SHAPE, "bfloat16", lying(), Options(right=0)),
        attention_tensor.backward(SHAPE, "bfloat16", lying(), Options(right=0), ALL),
    ):
        assert work.scratch == {}
        assert work.counts["right"] == 0


def test_tables_of_positions_take_a_byte_per_token():
    long = SequenceShape(B=1, Q=1 << 20, K=1 << 19, H=1, G=1, D=64)
    operands = lying(long, places=("positions", "key_positions"))
    work = attention_tensor.forward(long, "bfloat16", operands, Options(right=0))
    assert kernels(work) == ["attention_spans", "attention_tensor_forward"]
    assert 4 * sum(map(prod, work.scratch.values())) < long.Q + long.K


# --- Variants -------------------------------------------------------------------------------------


def test_rows_on_16_bytes_are_copied_at_once():
    shape = replace(SHAPE, D=64)
    operands = lying(shape)

    def copied_at_once(**other):
        work = attention_tensor.forward(shape, "bfloat16", {**operands, **other}, Options())
        return work.launches[0].defines["ALIGNED"] == 1

    q = operands["q"]
    assert copied_at_once()
    assert not copied_at_once(q=View(q.pointer + 2, q.strides))
    assert not copied_at_once(q=View(q.pointer, (*q.strides[:-1], 2)))
    assert not copied_at_once(k=View(q.pointer, (q.strides[0], 68, *q.strides[2:])))


@pytest.mark.parametrize("name", attention_tensor.PASSES)
def test_a_block_fits_on_the_smallest_gpu(name):
    for D in attention_tensor.HEAD_DIMS:
        geometry = attention_tensor.GEOMETRIES[name][D]
        taken = attention_tensor.shared_bytes(name, D, places=True)
        assert taken <= 99 * 1024
        assert geometry.blocks * (taken + 1024) <= 164 * 1024  # an A100's multiprocessor


def compiles_here():
    try:
        host_compiler()
    except HostCompilerUnavailable:
        return False
    return True


needs_a_compiler = pytest.mark.skipif(not compiles_here(), reason="no C++ compiler to emulate with")


@needs_a_compiler
@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("name", attention_tensor.PASSES)
def test_the_source_and_the_host_agree_on_shared_memory(name, places):
    for D in (16, 64, 128):
        defines = attention_tensor.variant(name, "float16", D, places=places, aligned=True)
        check(f"attention_tensor_{name}", defines=defines)


# --- Which tiles are looked at --------------------------------------------------------------------


def attended(Q, K, options, places=None):
    """By query and by key: whether its out, or its dk, is finite, where q and k are 1 and each key,
    or each cotangent, is infinite in its own tile of 64 alone: 0 · ∞ tells who has been there.
    """
    shape = SequenceShape(B=1, Q=Q, K=K, H=1, G=1, D=16)
    seen = []
    for tile in range(tiles(K, 64)):
        arrays = {name: np.ones(shape.of(name), np.float16) for name in "qkv"}
        arrays["v"][:, 64 * tile : 64 * tile + 64] = np.inf
        arrays |= {name: np.asarray(x, np.int64)[None] for name, x in (places or {}).items()}
        arrays |= {"out": np.zeros(shape.of("q"), np.float16)}
        views = views_of(arrays)
        work = attention_tensor.forward(shape, "float16", views, options)
        scratch = {name: np.zeros(size, np.float32) for name, size in work.scratch.items()}
        told = ATTENTION.pack(shape, views | views_of(scratch), 1.0, work.counts)
        launch_all(work.launches, told)
        seen.append(~np.isfinite(arrays["out"][0, :, 0, 0]))
    return np.array(seen).T


@needs_a_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_the_tables_hold_the_ends_of_positions_and_segments(order):
    """Of three groups of 32 spans of 64 tokens, the last of which are not whole."""
    B, Q, K = 2, 64 * 64 + 1, 70
    shape = SequenceShape(B, Q, K, H=1, G=1, D=16)
    rng = np.random.default_rng(1)
    arrays = {name: np.zeros(shape.of(name), np.float16) for name in ("q", "k", "v", "out")}
    arrays["positions"] = rng.integers(-(2**62), 2**62, (B, Q))
    arrays["segments"] = rng.integers(-1, 2**40, (B, Q))
    arrays["segments"][0, 128:192] = -1  # a span of padding
    views = views_of(arrays)
    work = attention_tensor.forward(shape, "float16", views, Options(right=0))
    scratch = {name: np.full(size, np.nan, np.float32) for name, size in work.scratch.items()}
    told = ATTENTION.pack(shape, views | views_of(scratch), 1.0, work.counts)
    launch_all(work.launches[:1], told, order)
    assert [x.size * 4 for x in scratch.values()] == [B * 3 * 33 * 40, B * 1 * 33 * 40]
    table = scratch["query_spans"].reshape(B, -1).view(np.int64).reshape(B, 3 * 33, 5)

    def line(b, tokens):
        real = arrays["segments"][b, tokens] >= 0
        there = [arrays[name][b, tokens][real] for name in ("positions", "segments")]
        return [x for one in there for x in (one.min(), one.max())], bool(real.all())

    for b in range(B):
        for n in range(65):
            tokens = slice(64 * n, 64 * n + 64)
            if (b, n) == (0, 2):
                assert table[b, n, 0] > table[b, n, 1]
                continue
            ends, whole = line(b, tokens)
            assert table[b, n].tolist() == [*ends, int(whole and n < 64)]
        assert all(low > high for low, high, *_ in table[b, 65:96].tolist())
        for group in range(3):
            assert (
                table[b, 96 + group, :4].tolist()
                == line(b, slice(2048 * group, 2048 * group + 2048))[0]
            )


PLACED = {
    "in order": None,
    "told": {"positions": np.arange(640), "key_positions": np.arange(640)},
}


@needs_a_compiler
@pytest.mark.parametrize("places", PLACED.values(), ids=PLACED)
@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        (Options(right=0), 10, 0),
        (Options(left=63, right=0), 1, 0),
        (Options(left=70, right=5), 2, 1),
    ],
    ids=["causal", "window", "both-sides"],
)
def test_tiles_in_which_no_pair_attends_are_passed_over(places, options, before, after):
    """64 queries, a block of the smallest variant, see as many tiles before and after their own."""
    seen = attended(640, 640, options, places).reshape(10, 64, 10).any(1)
    here, there = np.indices(seen.shape)
    assert np.array_equal(seen, (there >= here - before) & (there <= here + after))


@needs_a_compiler
def test_documents_do_not_look_at_each_others_tiles():
    documents = np.repeat([5, 2, -1, 9], 128)
    places = {"segments": documents, "key_segments": documents}
    seen = attended(512, 512, Options(), places).reshape(8, 64, 8).any(1)
    own = np.repeat([0, 1, 2, 3], 2)
    assert np.array_equal(seen, (own[:, None] == own) & (own != 2))


@needs_a_compiler
def test_a_shard_of_two_pieces_looks_into_both_at_their_own_tiles():
    """Rank 1 of 4 under zigzag sharding, with a window; keys beyond the first group of spans."""
    positions = np.r_[128:256, 768:896]
    places = {"positions": positions, "key_positions": np.arange(2560)}
    seen = attended(256, 2560, Options(left=64, right=0), places).reshape(4, 64, 40).any(1)
    first = positions[::64] // 64
    there = np.arange(40)
    assert np.array_equal(seen, (there >= first[:, None] - 1) & (there <= first[:, None]))
