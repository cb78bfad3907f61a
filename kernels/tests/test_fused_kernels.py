"""The kernels of bias and GeLU, and of bias, dropout and residual, run on the processor."""

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from isoform.kernels import emulate, fused_launch
from isoform.kernels.compiler import SOURCES
from isoform.kernels.emulate.calls import launch_told, lying, unwritten
from isoform.kernels.fused_launch import (
    ARGUMENTS,
    MATRICES,
    MATRIX,
    chunks_of,
    dropout,
    gelu,
    told,
    width_of,
)
from isoform.kernels.rotary_launch import Lying
from isoform.reference.fused_contract import threshold_of
from isoform.reference.numpy import fused as oracle

HEADER = (SOURCES / "fused_arguments.cuh").read_text(encoding="utf-8")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNITS = {"float32": 2.0**-18, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""An error that a rounding explains, and of float32 what its approximate exponentials err by."""

SEED = 0x0123456789ABCDEF


def run(function, arrays, order="forward"):
    """Emulate a call; arrays are written to."""
    launch_told(told(function, {name: lying(x) for name, x in arrays.items()}), order)


def drawn(shape, dtype="float32", seed=1, apart=0):
    """Activations whose rows lie ``apart`` elements apart; in the gaps is NaN."""
    wide = np.full((*shape[:-1], shape[-1] + apart), np.nan, DTYPES[dtype])
    wide[..., : shape[-1]] = 2 * np.random.default_rng(seed).standard_normal(shape)
    return wide[..., : shape[-1]]


def operands(rows, columns, dtype, apart=0):
    shape = (rows, columns)
    return SimpleNamespace(
        x=drawn(shape, dtype, 1, apart),
        residual=drawn(shape, dtype, 2, apart),
        dout=drawn(shape, dtype, 3, apart),
        bias=drawn((columns,), dtype, 4),
        out=unwritten(shape, DTYPES[dtype]),
        dbias=unwritten((columns,), DTYPES[dtype]),
        seed=np.array([SEED], np.int64),
    )


def of(given, *names):
    return {name: getattr(given, name) for name in names}


def assert_right(found, wanted, dtype, unit=None):
    unit = unit or UNITS[dtype]
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=unit, atol=unit)


# --- What the host knows --------------------------------------------------------------------------


def test_the_header_and_its_mirror_agree():
    body = re.search(r"struct FusedArguments {(.*?)};", re.sub(r"//.*", "", HEADER), re.DOTALL)[1]
    types = {"int64": "i8", "Matrix": MATRIX, "void": "u8", "float": "f4"}
    fields = [
        (name, types[kind])
        for kind, names in re.findall(r"\b(int64|Matrix|void|float) ([^;]+);", body)
        for name in re.findall(r"\w+", names)
    ]
    assert np.dtype(fields) == ARGUMENTS


def test_the_host_knows_the_sizes_of_the_sources():
    text = "".join((SOURCES / f).read_text("utf-8") for f in ("fused.cuh", "column_sums.cu"))
    for name in ("THREADS", "AT_ONCE", "LANES"):
        assert int(re.search(rf"int {name} = (\d+);", text)[1]) == getattr(fused_launch, name)


@pytest.mark.parametrize(
    ("dtype", "columns", "stride", "pointer", "wanted"),
    [
        ("bfloat16", 64, 64, 1 << 20, 8),
        ("float32", 64, 64, 1 << 20, 4),
        ("bfloat16", 64, 68, 1 << 20, 4),  # rows on 8 bytes
        ("bfloat16", 60, 64, 1 << 20, 4),
        ("bfloat16", 63, 64, 1 << 20, 1),
        ("bfloat16", 64, 64, (1 << 20) + 4, 2),
        ("float32", 64, 64, (1 << 20) + 2, 1),  # off even its element
        ("bfloat16", 64, -64, 1 << 20, 8),
        ("bfloat16", 64, 0, 1 << 20, 8),  # one row, for all
    ],
)
def test_width(dtype, columns, stride, pointer, wanted):
    plain = Lying(1 << 30, (9, columns), (columns, 1), dtype)
    odd = Lying(pointer, (9, columns), (stride, 1), dtype)
    assert width_of({"x": plain, "dout": odd}) == wanted
    if stride == columns:
        vector = Lying(pointer, (columns,), (1,), dtype)
        assert width_of({"x": plain, "bias": vector}) == wanted


@pytest.mark.parametrize("columns", [1024, 2560, 8192, 100_000])
def test_sums_stay_little_and_gpus_busy(columns):
    rows, tiles = 131072, -(-columns // 256)
    chunks = chunks_of(gelu(True, backward=True), rows, columns, 8)
    parts = 4 * chunks * columns
    assert parts < 0.02 * (2 * rows * columns)
    assert chunks * tiles > 3500
    assert chunks_of(gelu(True), rows, columns, 8) * tiles >= 4096


def test_nothing_is_launched_where_there_is_nothing():
    def launches(function, rows, columns):
        arrays = vars(operands(rows, columns, "float32"))
        del arrays["seed"]
        return told(function, {name: lying(x) for name, x in arrays.items()}).work.launches

    for rows, columns in ((0, 8), (3, 0)):
        assert launches(gelu(True), rows, columns) == ()
    assert launches(gelu(True, backward=True), 3, 0) == ()
    assert len(launches(gelu(True, backward=True), 0, 8)) == 2  # whose sums are 0


# --- What the kernels compute ---------------------------------------------------------------------

SHAPES = [(70, 64, 0), (5, 264, 8), (33, 20, 4), (9, 7, 1), (1, 512, 0), (0, 16, 0)]
"""Rows, columns, and how far rows lie apart: of vectors of each width, and tiles of every kind."""


@pytest.mark.parametrize(
    ("dtype", "tanh"), [*((name, True) for name in DTYPES), ("float32", False)]
)
@pytest.mark.parametrize(("rows", "columns", "apart"), SHAPES)
def test_gelu(rows, columns, apart, dtype, tanh):
    given = operands(rows, columns, dtype, apart)
    form = "tanh" if tanh else "none"
    run(gelu(tanh), of(given, "x", "bias", "out"))
    assert_right(given.out, oracle.bias_gelu(given.x, given.bias, approximate=form), dtype)
    given.out = unwritten(given.out.shape, given.out.dtype)
    run(gelu(tanh, backward=True), of(given, "dout", "x", "bias", "out", "dbias"))
    wanted = oracle.bias_gelu_backward(given.dout, given.x, given.bias, approximate=form)
    assert_right(given.out, wanted[0], dtype)
    assert_right(given.dbias, wanted[1], dtype, UNITS[dtype] * (1 + rows / 4))


@pytest.mark.parametrize("tanh", [True, False])
def test_gelu_is_right_far_out(tanh):
    """Small results too are right to their own last digits, and nothing large is no number."""
    x = np.concatenate((np.linspace(-13, 13, 2001), [-3e38, 3e38, -1e5, np.inf])).astype("f4")
    x = x[None]
    form = "tanh" if tanh else "none"
    bias, out, dbias = np.zeros_like(x[0]), np.empty_like(x), np.empty_like(x[0])
    run(gelu(tanh), {"x": x, "bias": bias, "out": out})
    near = np.abs(x) < 100
    wanted = oracle.bias_gelu(
        x[near].astype("f8"), bias[:1].repeat(2001).astype("f8"), approximate=form
    )
    np.testing.assert_allclose(out[near], wanted, rtol=1e-4, atol=1e-37)
    np.testing.assert_allclose(out[near & (x > -4)], wanted[x[near] > -4], rtol=4e-6)
    np.testing.assert_array_equal(out[~near], [0, np.float32(3e38), 0, np.inf])
    run(
        gelu(tanh, backward=True),
        {"dout": np.ones_like(x), "x": x, "bias": bias, "out": out, "dbias": dbias},
    )
    np.testing.assert_array_equal(out[~near], [0, 1, 0, 1])
    np.testing.assert_array_equal(dbias, out[0])


def test_no_number_stays_none():
    x = np.full((1, 8), np.nan, "f4")
    bias, out, dbias = np.zeros(8, "f4"), np.empty_like(x), np.empty(8, "f4")
    run(gelu(True), {"x": x, "bias": bias, "out": out})
    assert np.isnan(out).all()
    arrays = {"dout": np.ones_like(x), "x": x, "bias": bias, "out": out, "dbias": dbias}
    run(gelu(True, backward=True), arrays)
    assert np.isnan(out).all() and np.isnan(dbias).all()


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "apart"), SHAPES)
def test_dropout(rows, columns, apart, dtype, p):
    given = operands(rows, columns, dtype, apart)
    run(dropout(threshold_of(p)), of(given, "x", "bias", "residual", "seed", "out"))
    wanted = oracle.bias_dropout_residual(given.x, given.bias, given.residual, p, seed=SEED)
    assert_right(given.out, wanted, dtype)
    given.out = unwritten(given.out.shape, given.out.dtype)
    run(dropout(threshold_of(p), backward=True), of(given, "dout", "seed", "out", "dbias"))
    wanted = oracle.bias_dropout_residual_backward(given.dout, p, seed=SEED)
    assert_right(given.out, wanted[0], dtype)
    np.testing.assert_array_equal(given.out == 0, wanted[0] == 0)  # each draw, bit by bit
    assert_right(given.dbias, wanted[1], dtype, UNITS[dtype] * (1 + rows / 4))


def test_what_is_dropped_is_not_looked_at():
    given = operands(3, 16, "float32")
    given.x[...] = np.nan
    run(dropout(65536), of(given, "x", "bias", "residual", "seed", "out"))
    np.testing.assert_array_equal(given.out, given.residual)


@pytest.mark.parametrize("of_dropout", [True, False])
def test_sums_do_not_depend_on_the_order_of_threads(of_dropout, monkeypatch):
    """Over several chunks of rows, each of which a block goes through twice."""
    monkeypatch.setattr(fused_launch, "BACKWARD_BLOCKS", 4)
    function = dropout(6554, backward=True) if of_dropout else gelu(True, backward=True)
    found = []
    for order in emulate.ORDERS:
        given = operands(2 * 2 * 32 + 5, 300, "bfloat16", 4)
        names = ("dout", "seed") if of_dropout else ("dout", "x", "bias")
        run(function, of(given, *names, "out", "dbias"), order)
        found.append((given.out.tobytes(), given.dbias.tobytes()))
    assert found[0] == found[1] == found[2]
    wanted = (
        oracle.bias_dropout_residual_backward(given.dout, 0.1, seed=SEED)
        if of_dropout
        else oracle.bias_gelu_backward(given.dout, given.x, given.bias)
    )
    assert_right(given.dbias, wanted[1], "bfloat16", 0.05)


def test_matrices_are_told_as_they_lie():
    given = operands(3, 16, "bfloat16", 8)
    packed = told(dropout(7), {n: lying(x) for n, x in vars(given).items()}).arguments
    assert [packed[name]["stride"] for name in MATRICES] == [24, 24, 24, 16]
    assert (packed["rows"], packed["columns"], packed["threshold"]) == (3, 16, 7)
    assert packed["bias"] == given.bias.ctypes.data
