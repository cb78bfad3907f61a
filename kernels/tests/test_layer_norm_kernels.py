"""The kernels of LayerNorm, run on the processor."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.kernels import emulate, layer_norm_launch
from isoform.kernels.compiler import SOURCES
from isoform.kernels.emulate.calls import launch_told, lying, unwritten
from isoform.kernels.layer_norm_launch import (
    HELD,
    HELD_BACKWARD,
    MOST_CHANNELS,
    MOST_THREADS,
    ROWS,
    LayerNorm,
    chunks_of,
    shared,
    told,
)
from isoform.reference.numpy import fused as oracle

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNITS = {"float32": 2.0**-18, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""An error that a rounding explains, and of float32 what sums of so many terms err by."""

EPSILON = 0.01


def run(norm, arrays, order="forward"):
    """Emulate a call; results among the arrays are written to."""
    launch_told(told(norm, {name: lying(x) for name, x in arrays.items()}), order)


def drawn(shape, dtype="float32", seed=1, apart=0, mean=0.0):
    """Activations whose rows lie ``apart`` elements apart; in the gaps is NaN."""
    wide = np.full((*shape[:-1], shape[-1] + apart), np.nan, DTYPES[dtype])
    wide[..., : shape[-1]] = 2 * np.random.default_rng(seed).standard_normal(shape) + mean
    return wide[..., : shape[-1]]


def both(x, weight, bias, dout, order="forward", epsilon=EPSILON):
    """The output, and the gradients of x, weight and bias."""
    out, dx = (unwritten(x.shape, x.dtype) for _ in range(2))
    dweight, dbias = (unwritten(weight.shape, x.dtype) for _ in range(2))
    statistics = unwritten((len(x), 2), np.float32)
    given = {"x": x, "weight": weight, "statistics": statistics}
    run(LayerNorm(epsilon), {**given, "bias": bias, "out": out}, order)
    results = {"out": dx, "dweight": dweight, "dbias": dbias}
    run(LayerNorm(epsilon, backward=True), {**given, "dout": dout, **results}, order)
    return out, dx, dweight, dbias


def expected(x, weight, bias, dout):
    out = oracle.layer_norm(x, weight, bias, epsilon=EPSILON)
    return out, *oracle.layer_norm_backward(dout, x, weight, epsilon=EPSILON)


def assert_right(found, wanted, dtype):
    rows = len(found[0])
    for each, right, terms in zip(found, wanted, (1, 1, rows, rows), strict=True):
        unit = UNITS[dtype] if terms == 1 or dtype != "float32" else UNITS[dtype] * (1 + terms / 4)
        each, right = (np.asarray(x, np.float64) for x in (each, right))
        np.testing.assert_allclose(each, right, rtol=unit, atol=2 * unit)


def operands(rows, columns, dtype, apart=0, mean=0.0):
    return (
        drawn((rows, columns), dtype, 1, apart, mean),
        drawn((columns,), dtype, 2),
        drawn((columns,), dtype, 3),
        drawn((rows, columns), dtype, 4, apart),
    )


# --- What the host knows --------------------------------------------------------------------------


def test_the_host_knows_the_rows_of_a_block():
    text = (SOURCES / "layer_norm.cuh").read_text("utf-8")
    assert re.search(r"int ROWS = ACROSS > 32 \? 1 : (\d+);", text)[1] == str(ROWS)


FORWARD, BACKWARD = LayerNorm(EPSILON), LayerNorm(0.0, backward=True)


@pytest.mark.parametrize(
    ("columns", "width", "forward", "backward"),
    [
        (1, 1, (32, 1, ROWS), (32, 1, ROWS)),
        (128, 8, (32, 1, ROWS), (32, 1, ROWS)),
        (512, 8, (32, 2, ROWS), (32, 2, ROWS)),
        (520, 8, (32, 4, ROWS), (64, 2, 1)),
        (1024, 8, (32, 4, ROWS), (64, 2, 1)),
        (2560, 8, (96, 4, 1), (160, 2, 1)),
        (8192, 8, (256, 4, 1), (512, 2, 1)),
        (8192, 4, (256, 8, 1), (512, 4, 1)),
        (8191, 1, (512, 16, 1), (512, 16, 1)),
    ],
)
def test_by_how_many_threads_a_row_is_held(columns, width, forward, backward):
    for norm, wanted in ((FORWARD, forward), (BACKWARD, backward)):
        found = shared(norm, columns, width)
        assert (found.threads, found.vectors, found.rows) == wanted


@settings(deadline=None)  # the machine may have other things to do
@given(st.integers(1, MOST_CHANNELS), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_every_row_is_held_whole(columns, width, backward):
    columns = min(MOST_CHANNELS, columns * width)
    found = shared(BACKWARD if backward else FORWARD, columns, width)
    assert found.threads % 32 == 0 and found.threads <= MOST_THREADS
    assert found.vectors * width <= (HELD_BACKWARD if backward else HELD)
    assert found.threads * found.vectors * width >= columns


@pytest.mark.parametrize("columns", [128, 1024, 2560, 8192])
def test_sums_stay_little_and_gpus_busy(columns):
    rows = 131072
    chunks = chunks_of(BACKWARD, rows, shared(BACKWARD, columns, 8))
    parts = 4 * 2 * chunks * columns
    assert 2 * parts < 0.03 * (3 * 2 * rows * columns)
    assert chunks >= 1024 and chunks_of(FORWARD, rows, shared(FORWARD, columns, 8)) >= 2048


def test_nothing_is_launched_where_there_is_nothing():
    def launches(rows, columns, backward):
        x, weight, *_ = operands(rows, columns, "float32")
        arrays = {"x": lying(x), "weight": lying(weight), "out": lying(x)}
        return told(LayerNorm(EPSILON, backward), arrays).work.launches

    for rows, columns in ((0, 8), (3, 0)):
        assert launches(rows, columns, backward=False) == ()
    assert launches(3, 0, backward=True) == ()
    assert len(launches(0, 8, backward=True)) == 2  # whose sums are 0


# --- What the kernels compute ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "apart"),
    [
        (19, 64, 0),
        (5, 264, 8),
        (33, 20, 4),
        (9, 7, 1),
        (3, 1, 0),
        (4, 1032, 0),
        (3, 1029, 0),
        (0, 16, 0),
    ],
)
def test_layer_norm_and_its_gradients(rows, columns, apart, dtype):
    given = operands(rows, columns, dtype, apart)
    found = both(*given)
    assert_right(found, expected(*given), dtype)
    assert columns > 1 or not found[1].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_widest_rows(dtype):
    given = operands(2, MOST_CHANNELS, dtype)
    assert_right(both(*given), expected(*given), dtype)


@pytest.mark.parametrize("columns", [64, 1032])
def test_sums_over_several_chunks_do_not_depend_on_the_order_of_threads(columns, monkeypatch):
    """Of rows that a block goes through one after another."""
    monkeypatch.setattr(layer_norm_launch, "BACKWARD_BLOCKS", 3)
    given = operands(61, columns, "bfloat16")
    found = [both(*given, order) for order in emulate.ORDERS]
    for each in found[1:]:
        for one, first in zip(each, found[0], strict=True):
            assert one.tobytes() == first.tobytes()
    assert_right(found[0], expected(*given), "bfloat16")


def test_a_large_mean_costs_no_digits():
    """Its square would leave none of the variance."""
    given = operands(5, 600, "float32", mean=4096.0)
    found, wanted = both(*given), expected(*given)
    for each, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each, right, rtol=1e-3, atol=1e-3)


def test_a_row_of_equal_channels_is_the_bias():
    x, weight, bias, dout = operands(2, 40, "float32")
    x[...] = 3.5
    out, dx, *_ = both(x, weight, bias, dout)
    np.testing.assert_array_equal(out, np.broadcast_to(bias, out.shape))
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_row_that_is_no_number_is_none_and_no_other(odd):
    x, weight, bias, dout = operands(9, 40, "float32")
    x[4, 7] = odd
    out, dx, dweight, dbias = both(x, weight, bias, dout)
    for each in (out, dx):
        np.testing.assert_array_equal(np.isnan(each).all(1), np.arange(9) == 4)
        assert np.isfinite(np.delete(each, 4, 0)).all()
    assert np.isnan(dweight).all() and np.isfinite(dbias).all()
