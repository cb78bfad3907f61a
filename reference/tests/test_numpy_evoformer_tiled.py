"""Tiles against the plain form, merging against attention over all keys, and memory."""

from __future__ import annotations

import tracemalloc
from itertools import permutations
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.reference.contract import Shape
from isoform.reference.numpy import (
    evoformer_attention,
    evoformer_attention_backward,
    evoformer_attention_backward_tiled,
    evoformer_attention_tiled,
    merge,
)

SMALL = Shape(B=1, S=2, Q=5, K=7, H=4, G=2, D=3)
same_examples = settings(deadline=None, derandomize=True, max_examples=250)
block_sizes = st.integers(1, 9)


# --- tiles ---


@same_examples
@given(data=st.data())
def test_tiles_of_any_size_equal_the_plain_form(problems, relative_error, data):
    """Forward, lse and every gradient; dead queries, −inf biases and garbage in dropped keys."""
    _, operands, dout = data.draw(problems(spreads=(1.0, 5.0)))
    blocks = {name: data.draw(block_sizes, label=name) for name in ("block_q", "block_k")}

    expected = evoformer_attention(**operands, return_lse=True)
    actual = evoformer_attention_tiled(**operands, return_lse=True, **blocks)
    for tiled, plain in zip(actual, expected, strict=True):
        assert relative_error(tiled, plain) <= 1e-14

    expected = evoformer_attention_backward(dout, **operands)
    actual = evoformer_attention_backward_tiled(dout, **operands, **blocks)
    # Where p is near 1, ds is the difference of two numbers of the size of dp: that sets the scale.
    size = float(np.abs(dout).sum() * np.nan_to_num(np.abs(operands["q"])).max(initial=1))
    for tiled, plain in zip(actual, expected, strict=True):
        if plain is None:
            assert tiled is None
        else:
            error = relative_error(tiled, plain)
            assert error <= 1e-13 or error * np.abs(plain).max() <= 1e-14 * size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask_bias", "pair_bias", "gate", "dout"])
def test_what_is_not_finite_goes_the_same_way_in_tiles(draw, relative_error, name, bad):
    """EVO-9: in the first tile, in the last, and between."""
    for place in (0, 8, -1):
        _, operands, dout = draw(Shape(1, 2, 5, 9, 2, 1, 2), seed=2)
        operands["mask"][:] = True
        everything = operands | {"dout": dout}
        everything[name].flat[place] = bad
        expected = evoformer_attention(**operands, return_lse=True)
        gradients = evoformer_attention_backward(dout, **operands)
        for block in (1, 2, 4, 16):
            blocks = {"block_q": block, "block_k": block}
            actual = evoformer_attention_tiled(**operands, return_lse=True, **blocks)
            assert relative_error(actual[0], expected[0]) <= 1e-14
            assert relative_error(actual[1], expected[1]) <= 1e-14
            tiled = evoformer_attention_backward_tiled(dout, **operands, **blocks)
            for one, other in zip(tiled, gradients, strict=True):
                assert relative_error(one, other) <= 1e-13


def test_rising_and_falling_logits_of_any_size(draw, relative_error):
    """The running maximum is replaced in every block, in none, and by hundreds at a time."""
    shape = Shape(1, 1, 3, 12, 1, 1, 2)
    slopes = np.array([1e4, -1e4, 300.0])[:, None] * np.arange(12)
    _, operands, dout = draw(shape, ["pair_bias"], seed=3)
    operands["pair_bias"] = slopes[None, None, None]
    expected = evoformer_attention(**operands, return_lse=True)
    for block_k in (1, 2, 5, 12):
        actual = evoformer_attention_tiled(**operands, return_lse=True, block_k=block_k)
        for tiled, plain in zip(actual, expected, strict=True):
            assert relative_error(tiled, plain) <= 1e-14
    np.testing.assert_allclose(expected[0][0, 0, 0, 0], operands["v"][0, 0, 11, 0], rtol=1e-14)
    np.testing.assert_allclose(expected[0][0, 0, 1, 0], operands["v"][0, 0, 0, 0], rtol=1e-14)


@pytest.mark.parametrize("name", ["block_q", "block_k"])
@pytest.mark.parametrize("size", [0, -3])
def test_a_block_holds_something(draw, name, size):
    """EVO-12."""
    _, operands, dout = draw(SMALL)
    with pytest.raises(ValueError, match=f"a block must hold at least 1, got {size}"):
        evoformer_attention_tiled(**operands, **{name: size})
    with pytest.raises(ValueError, match=f"a block must hold at least 1, got {size}"):
        evoformer_attention_backward_tiled(dout, **operands, **{name: size})


# --- memory ---


def peak(function: Any, *args: Any, **operands: Any) -> int:
    """The most that ``function`` had allocated at a time, above its operands and its results."""
    tracemalloc.start()
    try:
        results = function(*args, **operands)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return most - sum(x.nbytes for x in results if x is not None)


@pytest.mark.parametrize("pair_bias", [False, True], ids=["no-pair-bias", "pair-bias"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tiles_need_memory_in_proportion_to_the_length(draw, backward, pair_bias):
    """Four times the length, four times the memory; sixteen times that of the plain form."""
    names = ["mask", "mask_bias", "gate", *(["pair_bias"] if pair_bias else [])]

    def grown(plain: Any, tiled: Any) -> list[float]:
        peaks = []
        for L in (512, 2048):
            _, operands, dout = draw(Shape(1, 1, L, L, 1, 1, 4), names, dtype=np.float32)
            args = (dout,) if backward else ()
            options = operands | ({} if backward else {"return_lse": True})
            peaks.append([peak(form, *args, **options) for form in (plain, tiled)])
        return [more / less for less, more in zip(*peaks, strict=True)]

    if backward:
        of_plain, of_tiled = grown(evoformer_attention_backward, evoformer_attention_backward_tiled)
    else:
        of_plain, of_tiled = grown(evoformer_attention, evoformer_attention_tiled)
    assert of_tiled < 4.5
    assert of_plain > 12


# --- merge ---


def parts(operands: Any, cuts: Any) -> list[Any]:
    """out and lse over each set of keys between the cuts."""
    K = operands["k"].shape[2]
    found = []
    for start, stop in zip((0, *cuts), (*cuts, K), strict=True):
        some = {}
        for name, x in operands.items():
            if name in ("k", "v", "mask"):
                some[name] = x[:, :, start:stop]
            else:
                some[name] = x[..., start:stop] if "bias" in name else x
        found.append(evoformer_attention(**some, return_lse=True))
    return found


@same_examples
@given(data=st.data())
def test_merged_parts_are_the_whole(problems, relative_error, data):
    """EVO-11: cut anywhere, and merged in any order and any grouping."""
    _, operands, _ = data.draw(problems(optional=["mask", "mask_bias", "pair_bias"]))
    K = operands["k"].shape[2]
    cuts = sorted(data.draw(st.integers(0, K), label=name) for name in ("cut", "another"))
    expected = evoformer_attention(**operands, return_lse=True)
    for a, b, c in permutations(parts(operands, cuts)):
        for merged in (merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))):
            assert relative_error(merged[0], expected[0]) <= 1e-14
            assert relative_error(merged[1], expected[1]) <= 1e-14


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.0])
def test_a_side_without_keys_is_the_identity(draw, bad):
    """EVO-11: exactly, on either side, whatever its out holds."""
    _, operands, _ = draw(SMALL, ["pair_bias"], seed=4)
    out, lse = evoformer_attention(**operands, return_lse=True)
    nothing = np.full_like(out, bad), np.full_like(lse, -np.inf)
    for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    neither = merge(*nothing, *nothing)
    assert (neither[0] == 0).all() and (neither[1] == -np.inf).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merging_never_overflows(dtype):
    """EVO-11: with lse as far apart as ±1e4, and as large as the dtype holds."""
    huge = float(np.finfo(dtype).max)
    levels = [-huge, -1e4, -800.0, 0.0, 800.0, 1e4, huge]
    for a in levels:
        for b in levels:
            out, lse = merge(
                np.full((1, 1, 1), 2.0, dtype),
                np.full((1, 1), a, dtype),
                np.full((1, 1, 1), 6.0, dtype),
                np.full((1, 1), b, dtype),
            )
            assert out.item() == (4.0 if a == b else 2.0 if a > b else 6.0)
            np.testing.assert_allclose(lse.item(), max(a, b) + np.log(2) * (a == b), rtol=1e-6)


def test_a_share_that_underflows_is_not_without_keys():
    """EVO-11 and EVO-9: as in attention over all keys, 0 times NaN is NaN."""
    one, far = np.zeros((1, 1)), np.full((1, 1), -2000.0)
    out, lse = merge(np.ones((1, 1, 1)), one, np.full((1, 1, 1), np.nan), far)
    assert np.isnan(out.item()) and lse.item() == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_merged_dtypes_are_those_of_the_sides(draw, dtype):
    """EVO-7 and EVO-11: out and lse as attention returns them; a half's weights are float32."""
    _, operands, _ = draw(SMALL, ["mask"], seed=5, dtype=dtype)
    whole, whole_lse = evoformer_attention(**operands, return_lse=True)
    a, b = parts(operands, [3])
    out, lse = merge(*a, *b)
    assert out.dtype == whole.dtype and lse.dtype == whole_lse.dtype
    roundoff = float(ml_dtypes.finfo(dtype).eps)
    size = float(np.abs(whole.astype(np.float64)).max())
    assert np.abs(out.astype(np.float64) - whole.astype(np.float64)).max() <= 2 * roundoff * size
    assert np.abs(lse - whole_lse).max() <= 4 * np.finfo(lse.dtype).eps * np.abs(whole_lse).max()


def test_merging_float64_with_a_float32_lse_keeps_the_precision_of_out():
    """EVO-11: weights 1/2 are exact, so the mean must be too."""
    lse = np.zeros((1, 1), np.float32)
    a, b = np.full((1, 1, 1), 1 + 2.0**-40), np.full((1, 1, 1), 1 + 2.0**-39)
    out, merged = merge(a, lse, b, lse)
    assert out.dtype == np.float64 and merged.dtype == np.float32
    assert out.item() == pytest.approx(1 + 1.5 * 2.0**-40, rel=1e-15)


@pytest.mark.parametrize(
    ("out_b", "lse_a", "lse_b", "message"),
    [
        ((2, 5, 4, 2), (2, 4, 5), (2, 4, 5), "both sides must have equal shapes"),
        ((2, 5, 4, 3), (2, 4, 5), (2, 4, 1), "both sides must have equal shapes"),
        ((2, 5, 4, 3), (2, 5, 4), (2, 5, 4), r"lse must be \[..., H, Q\] of out \(2, 5, 4, 3\)"),
    ],
)
def test_sides_that_do_not_fit_are_refused(out_b, lse_a, lse_b, message):
    """EVO-12."""
    with pytest.raises(ValueError, match=message):
        merge(np.zeros((2, 5, 4, 3)), np.zeros(lse_a), np.zeros(out_b), np.zeros(lse_b))
