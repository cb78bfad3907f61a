"""The kernels of the masked softmax, run on the processor."""

import re
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.kernels import emulate, softmax_launch
from isoform.kernels.compiler import SOURCES
from isoform.kernels.emulate.calls import launch_told, lying, unwritten
from isoform.kernels.fused_launch import MATRIX
from isoform.kernels.rotary_launch import Lying
from isoform.kernels.softmax_launch import (
    ARGUMENTS,
    COUNTS,
    HELD,
    LONG_SOURCE,
    MATRICES,
    MOST_THREADS,
    SOURCE,
    Softmax,
    shared,
    told,
)
from isoform.reference.numpy import fused as oracle

HEADER = (SOURCES / "softmax_arguments.cuh").read_text(encoding="utf-8")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNITS = {"float32": 2.0**-16, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""An error that a rounding explains, and of float32 what its approximate exponentials err by."""

LEAST = {"float32": 2.0**-40, "float16": 2.0**-24, "bfloat16": 2.0**-40}
"""The same of small numbers, which float16 has few of."""


def as_rows(x):
    """``[B·H·Q, K]``, which has to be a view."""
    rows = (
        x.reshape(-1, x.shape[-1])
        if x.size
        else np.empty((prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    )
    assert not x.size or np.shares_memory(rows, x)
    return rows


def run(softmax, arrays, order="forward"):
    """Emulate a call; ``out`` is written to."""
    launch_told(told(softmax, {name: lying(x) for name, x in arrays.items()}), order)


def unwritten_like(x, apart=0):
    """An array like it, of NaN, whose rows lie apart."""
    return unwritten((*x.shape[:-1], x.shape[-1] + apart), x.dtype)[..., : x.shape[-1]]


def drawn(shape, dtype="float32", seed=1, apart=0, spread=2):
    """Scores whose rows lie ``apart`` elements apart; in the gaps is NaN."""
    wide = np.full((*shape[:-1], shape[-1] + apart), np.nan, DTYPES[dtype])
    wide[..., : shape[-1]] = spread * np.random.default_rng(seed).standard_normal(shape)
    return wide[..., : shape[-1]]


def forward(scores, *, mask=None, causal=False, scale=1.0, order="forward", apart=0):
    out = unwritten_like(scores, apart)
    arrays = {"scores": as_rows(scores), "out": as_rows(out)}
    if mask is not None:
        arrays["mask"] = np.broadcast_to(mask, scores.shape)
    _, H, Q, _ = scores.shape
    run(Softmax(H, Q, causal, scale), arrays, order)
    return out


def backward(dout, probabilities, *, causal=False, scale=1.0, order="forward"):
    out = unwritten_like(probabilities)
    arrays = {"probabilities": as_rows(probabilities), "dout": as_rows(dout), "out": as_rows(out)}
    _, H, Q, _ = dout.shape
    run(Softmax(H, Q, causal, scale, backward=True), arrays, order)
    return out


def assert_right(found, wanted, dtype):
    """Also 0 in the same places, but where a small probability is none in 16 bits."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=UNITS[dtype], atol=LEAST[dtype])
    assert not found[wanted == 0].any()


def assert_gradient(found, dout, probabilities, scale, dtype):
    """Of dout − D, what float32 errs by is as large as its terms, which may cancel."""
    wanted = oracle.masked_softmax_backward(dout, probabilities, scale=scale)
    p, dp = (np.asarray(x, np.float64) for x in (probabilities, dout))
    dp = np.where(p, np.abs(dp), 0)
    terms = abs(scale) * p * (dp + (p * dp).sum(-1, keepdims=True))
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    allowed = UNITS[dtype] * np.abs(wanted) + 2.0**-21 * terms + LEAST[dtype]
    assert (np.abs(found - wanted) <= allowed).all()
    assert not found[p == 0].any()


def mask_of(shape, seed=5):
    return np.random.default_rng(seed).random(shape) < 0.6


# --- What the host knows --------------------------------------------------------------------------


def test_the_header_and_its_mirror_agree():
    body = re.search(r"struct SoftmaxArguments {(.*?)};", re.sub(r"//.*", "", HEADER), re.DOTALL)[1]
    types = {"int64": "i8", "Matrix": MATRIX, "void": "u8", "float": "f4"}
    fields = [
        (name, types[kind], *([int(many)] if many else []))
        for kind, names in re.findall(r"\b(int64|Matrix|void|float) ([^;]+);", body)
        for name, many in re.findall(r"([a-z_]+)(?:\[(\d)\])?", names)
    ]
    assert np.dtype(fields) == ARGUMENTS
    assert [name for name, (kind, _) in ARGUMENTS.fields.items() if kind == MATRIX] == [*MATRICES]


@pytest.mark.parametrize(
    ("keys", "width", "wanted"),
    [
        (1, 1, (SOURCE, 1, 1)),
        (64, 8, (SOURCE, 8, 1)),
        (256, 8, (SOURCE, 8, 4)),
        (264, 8, (SOURCE, 16, 3)),
        (1024, 8, (SOURCE, 32, 4)),  # a warp a row
        (2560, 8, (SOURCE, 128, 3)),
        (4096, 8, (SOURCE, 128, 4)),
        (4096, 4, (SOURCE, 128, 8)),
        (4096, 1, (SOURCE, 512, 8)),
        (4097, 1, (LONG_SOURCE, 512, 8)),
        (1029, 1, (SOURCE, 256, 6)),
        (16384, 8, (SOURCE, 512, 4)),
        (16392, 8, (LONG_SOURCE, 512, 4)),
        (8192, 2, (SOURCE, 512, 8)),
        (16384, 4, (SOURCE, 512, 8)),
        (1_000_001, 1, (LONG_SOURCE, 512, 8)),
    ],
)
def test_by_how_many_threads_a_row_is_held(keys, width, wanted):
    found = shared(keys, width)
    assert (found.source, found.threads, found.vectors) == wanted


@given(st.integers(1, 40_000), st.sampled_from([1, 2, 4, 8]))
def test_every_row_is_held_whole_or_read_twice(keys, width):
    keys *= width
    found = shared(keys, width)
    assert found.threads & (found.threads - 1) == 0 and found.threads <= MOST_THREADS
    assert found.vectors * width <= HELD and found.vectors in COUNTS
    held = found.threads * found.vectors * width
    assert (held >= keys) == (found.source == SOURCE)
    if found.source == SOURCE and keys > 8 * width:
        assert held < 4 * keys


@pytest.mark.parametrize(
    ("offset", "strides", "width"),
    [
        (0, (0, 0, 0), 8),  # one mask for all
        (0, (64, 0, 0), 8),
        (0, (0, 0, 68), 4),
        (2, (0, 0, 64), 2),
        (0, (0, 0, 63), 1),
        (0, (63, 0, 64), 8),  # of the one item there is, nothing depends on the stride
    ],
)
def test_the_mask_is_read_in_vectors_too(offset, strides, width):
    rows = Lying(1 << 20, (6, 64), (64, 1), "bfloat16")
    mask = Lying(
        (1 << 20) + offset, (1 if strides[0] == 63 else 2, 1, 3, 64), (*strides, 1), "bool"
    )
    done = told(Softmax(1, 3, False, 1.0), {"scores": rows, "out": rows, "mask": mask})
    (one,) = done.work.launches
    assert (one.defines["WIDTH"], one.defines["MASKED"]) == (width, 1)
    assert [*done.arguments["mask_strides"]] == [*strides]


def test_nothing_is_launched_where_there_is_nothing():
    for rows, keys in ((0, 8), (3, 0)):
        empty = Lying(1 << 20, (rows, keys), (keys, 1), "float32")
        for backwards in (False, True):
            softmax = Softmax(1, rows, False, 1.0, backwards)
            assert told(softmax, {"out": empty}).work.launches == ()


# --- What the kernels compute ---------------------------------------------------------------------

SHAPES = [
    (2, 3, 5, 64, 0),
    (1, 2, 9, 264, 8),
    (3, 1, 4, 20, 4),
    (1, 2, 37, 7, 1),
    (2, 1, 3, 1, 0),
    (1, 1, 2, 1000, 0),
    (1, 2, 1, 2056, 8),  # by several warps
    (1, 1, 2, 1029, 0),  # by several warps, a number at a time
    (0, 2, 3, 8, 0),
]
"""B, H, Q, K, and how far rows lie apart."""

SMALLER = [(1, 2, 40, 40, 0), (1, 1, 67, 67, 1), (1, 1, 1, 1, 0)]
"""Of as many queries as keys, so that a causal mask fits."""


@pytest.mark.parametrize("masked", [(), "B11K", "1H1K", "11QK", "BHQK"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "Q", "K", "apart"), SHAPES)
def test_softmax(B, H, Q, K, apart, dtype, masked):
    if masked and dtype != "bfloat16":
        masked = "BHQK"
    sizes = {"B": B, "H": H, "Q": Q, "K": K, "1": 1}
    mask = mask_of([sizes[axis] for axis in masked]) if masked else None
    scores = drawn((B, H, Q, K), dtype, 1, apart)
    out = forward(scores, mask=mask, scale=0.7, apart=apart)
    assert_right(out, oracle.masked_softmax(scores, mask=mask, scale=0.7), dtype)
    dout = drawn(scores.shape, dtype, 3, apart)
    assert_gradient(backward(dout, out, scale=0.7), dout, out, 0.7, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "Q", "K", "apart"), SMALLER)
def test_causal_softmax_reads_nothing_that_is_masked(B, H, Q, K, apart, dtype, masked):
    """Behind the edge there is NaN, in scores, in dout, and even in probabilities."""
    mask = mask_of((B, 1, 1, K)) if masked else None
    scores = drawn((B, H, Q, K), dtype, 1, apart)
    dout = drawn(scores.shape, dtype, 3, apart)
    behind = np.broadcast_to(~np.tri(Q, dtype=bool), scores.shape)
    scores[behind], dout[behind] = np.nan, np.nan
    out = forward(scores, mask=mask, causal=True, scale=-0.7)
    assert_right(out, oracle.masked_softmax(scores, mask=mask, causal=True, scale=-0.7), dtype)
    kept = out.copy()
    width = 1 if K % 2 else 8
    out[behind & (np.arange(K) >= (np.arange(Q)[:, None] // width + 1) * width)] = np.nan
    assert_gradient(backward(dout, out, causal=True, scale=-0.7), dout, kept, -0.7, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [300, 296])
def test_long_rows(keys, dtype, masked, causal, monkeypatch):
    """The same by rows that are read twice, here those of more than 128 keys."""
    monkeypatch.setattr(softmax_launch, "MOST_THREADS", 4)
    scores = drawn((1, 2, keys if causal else 3, keys), dtype)
    mask = mask_of((1, 2, 1, keys)) if masked else None
    if mask is not None:
        mask[..., :2] = False
        mask[:, 1] &= np.arange(keys) > 100  # so that threads begin with nothing
    out = forward(scores, mask=mask, causal=causal, scale=3.0)
    wanted = oracle.masked_softmax(scores, mask=mask, causal=causal, scale=3.0)
    assert_right(out, wanted, dtype)
    dout = drawn(scores.shape, dtype, 3)
    found = backward(dout, out, causal=causal, scale=3.0)
    assert_gradient(found, dout, out, 3.0, dtype)


@pytest.mark.parametrize("keys", [16384, 16392 + 4096 * 4 * 8])
def test_rows_of_the_most_threads(keys):
    scores = drawn((1, 1, 1, keys), "bfloat16")
    out = forward(scores)
    assert_right(out, oracle.masked_softmax(scores), "bfloat16")
    dout = drawn(scores.shape, "bfloat16", 3)
    assert_gradient(backward(dout, out), dout, out, 1.0, "bfloat16")


@pytest.fixture(params=[SOURCE, LONG_SOURCE])
def either(request, monkeypatch):
    """Rows of more than 32 keys by one source or the other."""
    if request.param == LONG_SOURCE:
        monkeypatch.setattr(softmax_launch, "MOST_THREADS", 1)
        monkeypatch.setattr(softmax_launch, "TOGETHER", 1)


def alike(scores, dout, mask):
    """Probabilities and gradients, by the kernels and by the oracle."""
    out = forward(scores, mask=mask)
    wanted = oracle.masked_softmax(scores, mask=mask)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[wanted == 0], 0)
    found = backward(dout, out)
    gradient = oracle.masked_softmax_backward(dout, wanted)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[wanted == 0], 0)
    return out, found


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_what_is_not_attended_to_is_not_looked_at(either, garbage):
    scores, dout = drawn((2, 3, 2, 56)), drawn((2, 3, 2, 56), seed=3)
    mask = mask_of((2, 1, 2, 56))
    dropped = np.broadcast_to(~mask, scores.shape)
    clean = alike(scores, dout, mask)
    scores[dropped] = dout[dropped] = garbage
    for found, wanted in zip(alike(scores, dout, mask), clean, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_queries_without_a_key_are_zero(either):
    scores, dout = drawn((1, 1, 4, 40)), np.full((1, 1, 4, 40), np.nan, "f4")
    mask = np.ones((1, 1, 4, 40), bool)
    mask[0, 0, 0] = False
    scores[0, 0, 1] = -np.inf
    scores[0, 0, 2, 3:], mask[0, 0, 2, :3] = -np.inf, False
    dout[0, 0, 3] = 1
    out, found = alike(scores, dout, mask)
    assert not out[0, 0, :3].any() and not found[0, 0, :3].any()


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_an_attended_score_that_is_no_number_makes_its_query_none(either, odd, place):
    scores = drawn((1, 1, 2, 40))
    scores[0, 0, 1, place], scores[0, 0, 1, 5] = odd, -np.inf
    mask = np.ones((1, 1, 1, 40), bool)
    mask[..., 20:25] = False
    for each in alike(scores, np.ones_like(scores), mask):
        np.testing.assert_array_equal(np.isnan(each[0, 0]), [[False] * 40, [*mask[0, 0, 0]]])


def test_a_large_negative_score_is_a_number(either):
    """On every key it cancels; on some it leaves them nothing."""
    lowest = np.finfo("f4").min
    scores = np.full((1, 1, 2, 40), lowest, "f4")
    scores[0, 0, 1, 7] = 0
    out, _ = alike(scores, np.ones_like(scores), None)
    np.testing.assert_allclose(out[0, 0, 0], 1 / 40, rtol=1e-6)
    np.testing.assert_array_equal(out[0, 0, 1], np.arange(40) == 7)


def test_small_probabilities_are_right_to_their_last_digits():
    scores = np.linspace(-85, 0, 1001, dtype="f4").reshape(1, 1, 1, -1)
    wanted = oracle.masked_softmax(scores.astype("f8"))
    np.testing.assert_allclose(forward(scores), wanted, rtol=2e-5)
    near = wanted > 1e-3
    np.testing.assert_allclose(forward(scores)[near], wanted[near], rtol=3e-6)


@pytest.mark.parametrize("keys", [40, 2056])
def test_bits_do_not_depend_on_the_order_of_threads(keys):
    for most in (MOST_THREADS, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(softmax_launch, "MOST_THREADS", most)
            scores, dout = drawn((1, 2, 3, keys)), drawn((1, 2, 3, keys), seed=3)
            mask = mask_of((1, 1, 3, keys))
            found = []
            for order in emulate.ORDERS:
                out = forward(scores, mask=mask, order=order)
                found.append((out.tobytes(), backward(dout, out, order=order).tobytes()))
        assert found[0] == found[1] == found[2]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([8, 24, 48]),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_any_mask_is_the_oracles(B, H, Q, K, causal, seed):
    """Of any extent along each axis, and of any share of the keys."""
    generator = np.random.default_rng(seed)
    Q = K if causal else Q
    kept = [n if generator.random() < 0.5 else 1 for n in (B, H, Q)]
    mask = generator.random((*kept, K)) < generator.choice([0.02, 0.5, 0.98])
    scores = drawn((B, H, Q, K), "float32", seed)
    out = forward(scores, mask=mask, causal=causal)
    assert_right(out, oracle.masked_softmax(scores, mask=mask, causal=causal), "float32")
