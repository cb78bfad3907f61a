"""The definition of rotary embedding: against 50 digits, as a rotation, and at its edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from isoform.reference.numpy import rotary_embedding, rotary_embedding_backward, rotary_tables
from isoform.reference.numpy.rotary import pairs
from isoform.reference.rotary_contract import LAYOUTS, POSITION_DTYPES
from isoform.reference.rotary_scaling import DynamicNTK, Linear, Llama3, LongRoPE, YaRN

Array = Any

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
POSITIONS = np.array([0, 1, 2**16, 2**19, 2**20, 2**21 - 1, 2**21, -1, -(2**21)])
SCALINGS = {
    "none": None,
    "linear": Linear(8.0),
    "dynamic": DynamicNTK(4.0, 2048, 16384),
    "yarn": YaRN(4.0, 4096),
    "longrope": LongRoPE((1.0, 1.1, 1.5, 2.0), (1.0, 2.0, 4.0, 8.0), 4096, 131072, factor=32.0),
    "llama3": Llama3(),
}


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# The angle (ROT-4)


def exact_angle(p: int, i: int, d: int, base: float) -> Any:
    """p·ω_i to 50 digits."""
    return p * mpf(base) ** (mpf(-2 * i) / d)


def units_off(table: Array, function: Any, positions: Array, d: int, base: float) -> float:
    """The largest error of a table, in units of float32's last place at the exact number."""
    worst = 0.0
    with mpmath.workdps(50):
        for row, p in zip(table, positions, strict=True):
            for i, found in enumerate(row):
                exact = function(exact_angle(int(p), i, d, base))
                unit = float(np.spacing(np.float32(abs(float(exact)))))
                worst = max(worst, float(abs(mpf(float(found)) - exact)) / unit)
    return worst


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_tables_are_right_to_the_last_bit_of_float32(d: int, base: float) -> None:
    cos, sin = rotary_tables(POSITIONS, d, base=base)
    assert cos.dtype == sin.dtype == np.float32
    # rounded once: half a unit
    assert units_off(cos, mpmath.cos, POSITIONS, d, base) <= 0.501
    assert units_off(sin, mpmath.sin, POSITIONS, d, base) <= 0.501


NEAR_ZERO = np.array([1567239])
"""A position below 2²¹ where the cosine of the fourth of 64 angles is 1.4e-7."""


def test_tables_are_right_to_the_last_bit_next_to_a_zero() -> None:
    cos, _ = rotary_tables(NEAR_ZERO, 128)
    assert abs(cos[0, 3]) < 2e-7
    assert units_off(cos, mpmath.cos, NEAR_ZERO, 128, 1e4) <= 0.501


@pytest.mark.parametrize(("dtype", "least"), [(np.float32, 1e6), (np.float64, 1e3)])
def test_the_measure_sees_angles_of_one_part(dtype: Any, least: float) -> None:
    """Why ω has two parts: float64 angles alone are not enough."""
    frequencies = (1e4 ** (-np.arange(0, 128, 2) / 128)).astype(dtype)
    cos = np.cos(NEAR_ZERO.astype(dtype)[:, None] * frequencies).astype(np.float32)
    assert units_off(cos, mpmath.cos, NEAR_ZERO, 128, 1e4) > least


def test_what_float32_angles_cost_at_512k() -> None:
    """The figure that the design and the specification give."""
    positions = np.arange(2**19, 2**19 + 64)
    frequencies = (1e4 ** (-np.arange(0, 128, 2) / 128)).astype(np.float32)
    angles = positions.astype(np.float32)[:, None] * frequencies
    exact, _ = rotary_tables(positions, 128, dtype=np.float64)
    assert 1e-2 < np.abs(np.cos(angles) - exact).max() < 5e-2


def test_far_beyond_two_million_the_error_grows_with_the_position() -> None:
    with mpmath.workdps(50):
        for p in (2**24 + 1, 2**31 + 1, -(2**31) - 1):
            cos, _ = rotary_tables(np.array([p]), 64, dtype=np.float64)
            exact = [float(mpmath.cos(exact_angle(p, i, 64, 1e4))) for i in range(32)]
            assert np.abs(cos[0] - exact).max() < abs(p) * 2.0**-52


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_tables_hold_the_amplitude(scaling: Any) -> None:
    cos, sin = rotary_tables(POSITIONS, 8, scaling=scaling, dtype=np.float64)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    np.testing.assert_allclose(cos**2 + sin**2, amplitude**2, rtol=1e-14)


# The definition (ROT-2, ROT-3)


def exactly(x: Array, positions: Array, d: int, layout: str, base: float) -> Array:
    """Rotary embedding number by number, in 50 digits."""
    out = x.astype(np.float64).copy()
    B, L, H, _ = x.shape
    with mpmath.workdps(50):
        for b, place, h, i in np.ndindex(B, L, H, d // 2):
            first, second = (i, i + d // 2) if layout == "half" else (2 * i, 2 * i + 1)
            angle = exact_angle(int(positions[b, place]), i, d, base)
            c, s = mpmath.cos(angle), mpmath.sin(angle)
            x1, x2 = (mpf(float(x[b, place, h, j])) for j in (first, second))
            out[b, place, h, first] = float(x1 * c - x2 * s)
            out[b, place, h, second] = float(x2 * c + x1 * s)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("D", "d"), [(8, 8), (8, 6), (7, 4), (2, 2)])
def test_against_the_definition_in_50_digits(layout: str, D: int, d: int) -> None:
    x = normal(2, 3, 2, D)
    positions = np.array([[0, 5, 2**21 - 1], [-7, 2**20, 3]])
    out = rotary_embedding(x, positions, rotary_dim=d, layout=layout, base=5e5)
    np.testing.assert_allclose(out, exactly(x, positions, d, layout, 5e5), rtol=0, atol=1e-15)


def test_all_channels_are_turned_unless_told_otherwise() -> None:
    x, positions = normal(1, 4, 2, 6), np.arange(4)
    np.testing.assert_array_equal(
        rotary_embedding(x, positions), rotary_embedding(x, positions, rotary_dim=6)
    )


def test_one_layout_is_the_other_with_channels_in_another_order() -> None:
    x, positions = normal(2, 5, 3, 8), np.arange(5)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # where half's channels lie in interleaved
    half = rotary_embedding(x, positions)
    interleaved = rotary_embedding(x[..., order], positions, layout="interleaved")
    np.testing.assert_array_equal(interleaved, half[..., order])


def test_pairs_are_views() -> None:
    x = np.arange(6)
    assert [part.tolist() for part in pairs(x, "half")] == [[0, 1, 2], [3, 4, 5]]
    assert [part.tolist() for part in pairs(x, "interleaved")] == [[0, 2, 4], [1, 3, 5]]
    assert all(np.shares_memory(part, x) for part in pairs(x, "interleaved"))


# Precision (ROT-5)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_result_is_that_of_float64_rounded_once(dtype: str, scaling: Any) -> None:
    x, positions = normal(2, 9, 2, 8, dtype=DTYPES[dtype]), POSITIONS
    wide = rotary_embedding(x.astype(np.float64), positions, scaling=scaling)
    out = rotary_embedding(x, positions, scaling=scaling)
    assert out.dtype == x.dtype
    assert out.tobytes() == wide.astype(x.dtype).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_in_float32_it_is_off_by_float32s_last_place(dtype: str) -> None:
    x, positions = normal(2, 9, 2, 64, dtype=DTYPES[dtype]), POSITIONS
    exact = rotary_embedding(x.astype(np.float64), positions)
    out = rotary_embedding(x, positions, compute_dtype="float32").astype(np.float64)
    unit = np.finfo(np.float32).eps / 2
    own = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": unit}[dtype]
    size = np.abs(x.astype(np.float64)).max()
    assert (np.abs(out - exact) <= own * np.abs(exact) + 6 * unit * size + 2.0**-25).all()
    assert (out != exact).any()


def test_extended_precision_and_complex_numbers_are_kept() -> None:
    positions = np.arange(5)
    x = normal(1, 5, 2, 4)
    out = rotary_embedding(x, positions)
    assert rotary_embedding(x.astype(np.longdouble), positions).dtype == np.longdouble
    found = rotary_embedding(x + 2j * x, positions)
    np.testing.assert_allclose(found, out + 2j * out, rtol=1e-15)


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="compute_dtype must be one of float32"):
        rotary_embedding(normal(1, 2, 1, 4), np.arange(2), compute_dtype="float16")


# Positions (ROT-1, ROT-4)


@pytest.mark.parametrize("dtype", POSITION_DTYPES)
def test_positions_of_every_integer_dtype_give_the_same(dtype: str) -> None:
    x, positions = normal(1, 100, 2, 8), np.arange(100)
    np.testing.assert_array_equal(
        rotary_embedding(x, positions.astype(dtype)), rotary_embedding(x, positions)
    )


def test_positions_for_all_examples_or_for_each() -> None:
    x = normal(3, 5, 2, 8)
    positions = np.array([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5], [3, 3, 3, 3, 3]])
    together = rotary_embedding(x, positions)
    for b in range(3):
        np.testing.assert_array_equal(together[b], rotary_embedding(x[b : b + 1], positions[b])[0])


def test_a_token_is_turned_by_its_position_wherever_it_lies() -> None:
    x, positions = normal(2, 64, 2, 8), np.arange(64) + 2**19
    whole = rotary_embedding(x, positions)
    for shard in (slice(0, 16), slice(48, 64), slice(3, None, 8), [5, 40, 1]):
        np.testing.assert_array_equal(
            rotary_embedding(x[:, shard], positions[shard]), whole[:, shard]
        )


def test_negative_positions_turn_the_other_way() -> None:
    x, positions = normal(1, 5, 2, 8), np.arange(5) + 2**20
    back = rotary_embedding(rotary_embedding(x, positions), -positions)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-14)


# The edges (ROT-6, ROT-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_position_zero_nothing_is_turned(dtype: str) -> None:
    x = normal(2, 3, 2, 8, dtype=DTYPES[dtype])
    assert rotary_embedding(x, np.zeros(3, np.int64)).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_passes_through_keeps_its_bits(dtype: str) -> None:
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[DTYPES[dtype].itemsize]
    drawn = np.random.default_rng(0).integers(0, 2**16, size=(2, 5, 3, 9)).astype(bits)
    patterns = drawn << bits(8 * DTYPES[dtype].itemsize - 16)  # any: signalling NaN among them
    x = normal(2, 5, 3, 9, dtype=DTYPES[dtype])
    x[..., 4:] = patterns.view(DTYPES[dtype])[..., 4:]
    assert np.isnan(x[..., 4:]).any()
    for out in (
        rotary_embedding(x, np.arange(5), rotary_dim=4),
        rotary_embedding_backward(x, np.arange(5), rotary_dim=4),
    ):
        assert out[..., 4:].tobytes() == x[..., 4:].tobytes()
        assert np.isfinite(out[..., :4].astype(np.float64)).all()


def test_nan_reaches_its_pair_and_no_other() -> None:
    x = normal(2, 5, 2, 8)
    x[1, 2, 0, 1] = np.nan
    for layout, pair in (("half", [1, 5]), ("interleaved", [0, 1])):
        reached = np.isnan(rotary_embedding(x, np.arange(5), layout=layout))
        assert reached[1, 2, 0, pair].all()
        assert reached.sum() == 2


def test_infinity_is_turned_as_ieee_arithmetic_says() -> None:
    x = np.zeros((1, 2, 1, 2))
    x[..., 0] = np.inf
    out = rotary_embedding(x, np.array([0, 2]))
    assert out[0, 0, 0, 0] == np.inf
    assert np.isnan(out[0, 0, 0, 1])  # ∞ · sin 0
    assert out[0, 1, 0].tolist() == [-np.inf, np.inf]  # cos 2 < 0 < sin 2


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_empty_axes_give_empty_results(shape: tuple[int, ...]) -> None:
    x, positions = np.zeros(shape, np.float32), np.arange(shape[1])
    assert rotary_embedding(x, positions).shape == shape
    assert rotary_embedding_backward(x, positions).shape == shape


def test_strides_of_every_kind() -> None:
    wide = normal(2, 10, 3, 4, 9)
    positions = np.arange(30)[5:25:2]
    for x in (
        wide[:, :, 1, :, :8],
        wide[:, :, 1, ::-1, 1:],
        wide[..., 0, :, ::2][..., :4],
        np.broadcast_to(wide[:, :1, 1, :, :8], (2, 10, 4, 8)),
    ):
        x.flags.writeable = False
        before = x.copy()
        out = rotary_embedding(x, positions)
        np.testing.assert_array_equal(out, rotary_embedding(before, positions.copy()))
        np.testing.assert_array_equal(x, before)
        assert not np.shares_memory(out, x)


# The backward (ROT-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_the_backward_is_the_transpose(layout: str, scaling: Any) -> None:
    """As matrices: every column of the forward is a row of the backward."""
    options: dict[str, Any] = {"rotary_dim": 8, "layout": layout, "scaling": scaling}
    units = np.eye(9)[:, None, None, :]
    for p in (0, 3, 2**20):
        positions = np.array([p])
        forward = rotary_embedding(units, positions, **options)[:, 0, 0]
        backward = rotary_embedding_backward(units, positions, **options)[:, 0, 0]
        np.testing.assert_array_equal(forward, backward.T)


def test_a_wrong_gradient_is_called_by_its_name() -> None:
    with pytest.raises(ValueError, match="dout must have 4 axes"):
        rotary_embedding_backward(normal(3, 2, 4), np.arange(3))
    with pytest.raises(ValueError, match="with L=3, B=2 of dout"):
        rotary_embedding_backward(normal(2, 3, 2, 4), np.arange(4))


# What holds of any call


@st.composite
def calls(draw: Any, scaled: bool = True) -> tuple[Array, Array, dict[str, Any]]:
    """Operands and options."""
    B, L, H, half = (draw(st.integers(1, top)) for top in (3, 5, 3, 5))
    passing = draw(st.integers(0, 3))
    options: dict[str, Any] = {
        "base": draw(st.sampled_from([1.5, 1e4, 5e5])),
        "rotary_dim": 2 * half,
        "layout": draw(st.sampled_from(LAYOUTS)),
    }
    if scaled:
        chosen = draw(st.sampled_from([None, Linear(3.0), YaRN(8.0, 64), Llama3()]))
        options["scaling"] = chosen
    shape = draw(st.sampled_from([(L,), (B, L)]))
    place = st.integers(-(2**21), 2**21)
    count = int(np.prod(shape))
    positions = np.array(draw(st.lists(place, min_size=count, max_size=count))).reshape(shape)
    x = normal(B, L, H, 2 * half + passing, seed=draw(st.integers(0, 10**6)))
    return x, positions, options


@settings(deadline=None)  # the machine may have other things to do
@given(calls())
def test_adjoint(call: tuple[Array, Array, dict[str, Any]]) -> None:
    """⟨y̅, R x⟩ = ⟨Rᵀ y̅, x⟩."""
    x, positions, options = call
    dout = normal(*x.shape, seed=1)
    there = (dout * rotary_embedding(x, positions, **options)).sum()
    back = (rotary_embedding_backward(dout, positions, **options) * x).sum()
    assert there == pytest.approx(back, rel=1e-12, abs=1e-11)


@settings(deadline=None)  # the machine may have other things to do
@given(calls())
def test_norms_of_pairs_are_multiplied_by_the_amplitude(call: Any) -> None:
    x, positions, options = call
    scaling = options["scaling"]
    amplitude = 1.0 if scaling is None else scaling.amplitude
    d, layout = options["rotary_dim"], options["layout"]

    def norms(x: Array) -> Array:
        return np.hypot(*pairs(x[..., :d], layout))

    out = rotary_embedding(x, positions, **options)
    np.testing.assert_allclose(norms(out), amplitude * norms(x), rtol=1e-14)


@settings(deadline=None)  # the machine may have other things to do
@given(calls(), st.integers(-1000, 1000))
def test_products_depend_on_the_distance_alone(call: Any, shift: int) -> None:
    q, positions, options = call
    k, others = normal(*q.shape, seed=2), positions[..., ::-1]

    def products(shift: int) -> Array:
        turned = rotary_embedding(q, positions + shift, **options)
        return (turned * rotary_embedding(k, others + shift, **options)).sum(-1)

    np.testing.assert_allclose(products(shift), products(0), rtol=1e-12, atol=1e-12)


@settings(deadline=None)  # the machine may have other things to do
@given(calls(scaled=False), st.integers(-(2**20), 2**20))
def test_turning_twice_is_turning_by_the_sum(call: Any, further: int) -> None:
    x, positions, options = call
    positions //= 2  # the sum is exact up to 2²¹ too
    twice = rotary_embedding(
        rotary_embedding(x, positions, **options), np.full_like(positions, further), **options
    )
    once = rotary_embedding(x, positions + further, **options)
    np.testing.assert_allclose(twice, once, rtol=0, atol=1e-13)


@settings(deadline=None)  # the machine may have other things to do
@given(calls(scaled=False))
def test_the_backward_turns_back(call: Any) -> None:
    x, positions, options = call
    back = rotary_embedding_backward(
        rotary_embedding(x, positions, **options), positions, **options
    )
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-14)


def test_a_scaling_that_differs_gives_other_results() -> None:
    """The cache of frequencies tells scalings apart."""
    x, positions = normal(1, 4, 1, 8), np.arange(4) + 1000
    one = YaRN(4.0, 4096)
    found = {
        rotary_embedding(x, positions, scaling=scaling).tobytes()
        for scaling in (None, one, replace(one, factor=5.0), replace(one, original_length=64))
    }
    assert len(found) == 4
