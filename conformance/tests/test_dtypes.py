"""The formats against ml_dtypes and NumPy: every 16-bit number, and the edges of the others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from isoform.conformance.dtypes import FORMATS, SHORT_NAMES, Array, rounded, ulp


def numbers(name: str) -> Array:
    """Finite numbers of format ``name`` from 0 up: all there are of a 16-bit format, else those at
    every power of two and some between.
    """
    dtype = FORMATS[name].dtype
    if dtype.itemsize == 2:
        patterns = np.arange(1 << 15, dtype=np.uint16).view(dtype)
        return patterns[np.isfinite(patterns.astype(np.float32))]
    info = np.finfo(dtype)
    exponents = np.arange(info.minexp - info.nmant, info.maxexp)
    powers = np.ldexp(dtype.type(1), exponents)
    around = [powers, np.nextafter(powers, dtype.type(0)), following(powers)]
    random = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    return np.unique(np.concatenate([*around, np.abs(random), [dtype.type(0), info.max]]))


def following(x: Array) -> Array:
    """The next number of x's dtype, by its bit pattern."""
    return (x.view(f"u{x.itemsize}") + np.array(1, f"u{x.itemsize}")).view(x.dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_that_of_its_dtype(name: str) -> None:
    found, info = FORMATS[name], ml_dtypes.finfo(FORMATS[name].dtype)
    assert found.dtype.name == found.name == name
    assert found.digits == info.nmant + 1
    assert found.unit_roundoff == float(info.eps) / 2
    assert found.smallest == float(info.smallest_subnormal)
    assert found.largest == float(info.max)
    assert SHORT_NAMES[found.short] == name


@pytest.mark.parametrize("name", FORMATS)
def test_ulp_is_the_distance_to_the_next_number(name: str) -> None:
    x = numbers(name)[:-1]  # what follows the largest is infinite
    wide = x.astype(np.float64)
    distance = following(x).astype(np.float64) - wide
    np.testing.assert_array_equal(ulp(wide, name), distance)
    np.testing.assert_array_equal(ulp(-wide, name), distance)
    assert ulp(np.zeros(()), name) == distance[0] == FORMATS[name].smallest


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_ulp_between_numbers_is_that_of_the_one_below(name: str) -> None:
    x = numbers(name)[1:-1]
    below, spacing = x.astype(np.float64), ulp(x, name)
    for part in (0.25, 0.5, 0.9375):
        np.testing.assert_array_equal(ulp(below + part * spacing, name), spacing)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_rounded_takes_the_nearest_number_and_ties_to_even(name: str) -> None:
    x = numbers(name)[:-1]
    low, high = x.astype(np.float64), following(x).astype(np.float64)
    spacing = high - low
    even = x.view(f"u{x.itemsize}") % 2 == 0
    for part, wanted in [
        (0.0, low),
        (0.25, low),
        (0.4375, low),
        (0.5, np.where(even, low, high)),
        (0.5625, high),
        (0.75, high),
    ]:
        np.testing.assert_array_equal(rounded(low + part * spacing, name), wanted)
        np.testing.assert_array_equal(rounded(-low - part * spacing, name), -wanted)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_rounded_beyond_the_largest_is_infinite(name: str) -> None:
    largest = np.array(FORMATS[name].largest)
    half = ulp(largest, name) / 2
    assert rounded(largest, name) == rounded(largest + half * (1 - 2**-10), name) == largest
    assert rounded(largest + half, name) == np.inf
    assert rounded(-largest - half, name) == -np.inf


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounded_keeps_dtype_shape_and_what_is_not_finite(name: str, dtype: type) -> None:
    x = np.array([[0.0, -0.0, np.inf], [-np.inf, np.nan, 1.5]], dtype)
    kept = rounded(x, name)
    assert (kept.dtype, kept.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_array_equal(np.signbit(kept), np.signbit(x))


def test_rounded_errs_by_unit_roundoff_at_most() -> None:
    x = np.random.default_rng(0).standard_normal(10_000)
    for name, float_format in FORMATS.items():
        largest = np.abs((rounded(x, name) - x) / x).max()
        assert largest <= float_format.unit_roundoff * (1 + 2**-15)  # bfloat16 by way of float32
        assert name == "float64" or largest > 0.9 * float_format.unit_roundoff
