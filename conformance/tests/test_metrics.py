"""The figures, on arrays small enough to work them out by hand."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from isoform.conformance.dtypes import FORMATS, rounded, ulp
from isoform.conformance.metrics import ULP_EDGES, Errors, errors, pattern_fault

NAN, INF = np.nan, np.inf


def measured(actual: list[float], reference: list[float], budget: float = 1e-3) -> Errors:
    """Errors of float32 numbers, with the same budget for all."""
    wanted = np.array(reference, np.float64)
    return errors(np.array(actual, np.float32), wanted, np.full(wanted.shape, budget), "float32")


def test_absolute_and_relative_size() -> None:
    found = measured([1, 2, 3.5, -4], [1, 2, 3, -4.25])
    assert found.count == 4
    assert found.max_abs == 0.5
    assert found.mean_abs == 0.75 / 4
    assert found.frobenius == pytest.approx(math.hypot(0.5, 0.25) / math.sqrt(14 + 4.25**2))


def test_exact_results_have_no_error() -> None:
    found = measured([1, -2, 0], [1, -2, 0], budget=0)
    sizes = vars(found)
    assert all(sizes[name] == 0 for name in sizes if name.startswith(("ulp", "ratio", "m", "f")))
    assert found.bias == 0
    assert found.histogram == (3,) + (0,) * (len(ULP_EDGES) - 2)


def test_frobenius_of_a_vanishing_reference_is_undefined() -> None:
    assert math.isnan(measured([1e-3, 0], [0, 0]).frobenius)


@pytest.mark.parametrize("name", FORMATS)
def test_ulp_is_that_of_the_reference(name: str) -> None:
    float_format = FORMATS[name]
    reference = np.array([1.0, 1.5, 1024.0, 0.75])
    steps = np.array([0, 1, 2, 5])
    actual = (reference + steps * ulp(reference, name)).astype(float_format.dtype)
    found = errors(actual, reference, np.ones(4), name)
    assert (found.ulp_p50, found.ulp_p99, found.ulp_max) == (1, 5, 5)
    assert sum(found.histogram) == found.count == 4
    bins = dict(zip(ULP_EDGES, found.histogram, strict=False))
    assert {edge: n for edge, n in bins.items() if n} == {0.0: 1, 1.0: 1, 2.0: 1, 4.0: 1}


def test_ulp_below_the_normal_numbers_and_at_zero() -> None:
    smallest = FORMATS["float32"].smallest
    found = measured([3 * smallest, 2 * smallest], [smallest, 0])
    assert found.ulp_max == 2
    assert found.ulp_p50 == 2


def test_histogram_holds_every_error_however_large() -> None:
    reference = np.ones(1000)
    actual = (1 + 10.0 ** np.random.default_rng(0).uniform(-9, 30, 1000)).astype(np.float32)
    found = errors(actual, reference, np.ones(1000), "float32")
    assert len(found.histogram) == len(ULP_EDGES) - 1
    assert sum(found.histogram) == 1000
    assert found.histogram[-1] > 0 < found.histogram[0]


def test_percentiles() -> None:
    reference = np.ones(200)
    actual = reference.copy()
    actual[:3] = [1.5, 1.25, 1.125]
    actual[100:] += 2.0**-10
    found = errors(actual, reference, np.full(200, 2.0**-10), "float64")
    assert found.ratio_p50 == 1
    assert found.ratio_p99 == 128
    assert found.ratio_max == 512


def test_worst_is_where_the_budget_is_exceeded_most() -> None:
    reference = np.array([[1.0, 1000.0], [2.0, 0.5]])
    actual = reference + np.array([[0.001, 1.0], [0.0, -0.01]])
    budget = np.array([[1e-3, 10.0], [1.0, 1e-3]])
    found = errors(actual, reference, budget, "float64")
    assert found.max_abs == 1.0  # which is within its own budget
    assert found.worst == (1, 1)
    assert (found.worst_value, found.worst_reference) == (0.49, 0.5)
    assert found.ratio_max == pytest.approx(10)


def test_no_budget_at_all_is_exceeded_infinitely() -> None:
    found = measured([1, 1.5, 2], [1, 1, 2], budget=0)
    assert found.ratio_max == INF
    assert found.worst == (1,)
    assert not math.isnan(found.ratio_p50 + found.ratio_p99)


def test_bias_of_truncated_and_of_rounded_numbers() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(1, 2, 4096) * rng.choice([-1, 1], 4096)
    as_float32 = reference.astype(np.float32)
    cut = (as_float32.view(np.uint32) & 0xFFFF0000).view(np.float32)
    budget = np.full(reference.shape, 1e-6)
    nearest = errors(rounded(as_float32, "bfloat16"), reference, budget, "bfloat16")
    truncated = errors(cut, reference, budget, "bfloat16")
    assert nearest.bias < 0.05
    assert truncated.bias == pytest.approx(3**0.5 / 2, rel=0.05)  # uniform: 1/2 over 1/√3
    assert truncated.mean_abs == pytest.approx(2 * nearest.mean_abs, rel=0.1)


def test_bias_is_told_by_growth_of_either_sign_not_by_direction() -> None:
    assert measured([1.5, -1.5], [1, -1]).bias == 1
    assert measured([0.5, -0.5], [1, -1]).bias == 1
    assert measured([1.5, -0.5], [1, -1]).bias == 0


def test_bias_leaves_out_what_is_below_the_budget() -> None:
    """Where the true value is smaller than the allowed error, its sign is noise."""
    tiny = [1e-9] * 3
    assert measured([1e-4, 1e-4, 1e-4, 1], [*tiny, 1]).bias == 0


def test_what_is_not_finite_is_left_out() -> None:
    found = measured([NAN, 1, INF, 2.5, -INF, 3], [1, NAN, 2, 2, -INF, 3])
    assert found.count == 2
    assert found.max_abs == 0.5
    assert found.worst == (3,)
    assert sum(found.histogram) == 2
    assert found.frobenius == pytest.approx(0.5 / math.hypot(2, 3))


@pytest.mark.parametrize("actual", [[NAN, NAN], [INF, -INF], []])
def test_nothing_to_compare(actual: list[float]) -> None:
    found = measured(actual, [1.0] * len(actual))
    assert (found.count, found.ratio_max, found.worst, sum(found.histogram)) == (0, 0, (), 0)


def test_far_from_the_reference_without_overflow() -> None:
    found = errors(np.array([1e300, 1.0]), np.array([-1e300, 1.0]), np.ones(2), "float64")
    assert found.max_abs == 2e300
    assert found.ratio_max == 2e300
    assert 0 <= found.bias <= 1


@pytest.mark.parametrize("size", [2.0**1023, 2.0**-1000, 5e-324])
def test_norms_of_numbers_whose_squares_overflow_or_vanish(size: float) -> None:
    """Where every other of 64 elements is ``size``, the norm itself may be beyond float64."""
    reference = np.full(64, size)
    reference[::2] = 0
    actual = reference.copy()
    actual[1] = 0
    found = errors(actual, reference, np.zeros(64), "float64")
    assert found.frobenius == pytest.approx(1 / 32**0.5)
    assert found.bias == pytest.approx(1 / 64**0.5)


def test_errors_are_plain_numbers() -> None:
    reference = np.random.default_rng(0).standard_normal((3, 4))
    found = errors(reference.astype(ml_dtypes.bfloat16), reference, np.ones((3, 4)), "bfloat16")
    document = json.loads(json.dumps(found.as_json()))
    assert document.keys() == vars(found).keys()
    assert tuple(document["worst"]) == found.worst
    assert tuple(document["histogram"]) == found.histogram


# The pattern


def fault(
    actual: list[float],
    reference: list[float],
    zeros: list[bool] | None = None,
    dtype: str = "float32",
    *,
    lse: bool = False,
) -> str | None:
    with np.errstate(over="ignore"):
        given = np.array(actual, np.float64).astype(FORMATS[dtype].dtype)
    fixed = None if zeros is None else np.array(zeros)
    return pattern_fault(given, np.array(reference, np.float64), fixed, dtype, lse=lse)


@pytest.mark.parametrize(
    ("actual", "reference", "zeros", "said"),
    [
        ([1, 2], [1, NAN], None, "must be NaN"),
        ([1, INF], [1, NAN], None, "must be NaN"),
        ([1, NAN], [1, 2], None, "must not be NaN"),
        ([1, NAN], [1, INF], None, "must not be NaN"),
        ([1, 2], [1, INF], None, "must be infinite"),
        ([1, -INF], [1, INF], None, "must be infinite"),
        ([1, 3e38], [1, -INF], None, "must be infinite"),
        ([1, INF], [1, 2], None, "must be finite"),
        ([1, -INF], [1, 2], None, "must be finite"),
        ([1, 1e-45], [1, 0], [False, True], "must be exactly 0"),
        ([1, NAN], [1, 0], [False, True], "must not be NaN"),
    ],
)
def test_a_fault_of_the_pattern_is_named_and_located(
    actual: list[float], reference: list[float], zeros: list[bool] | None, said: str
) -> None:
    sentence = fault(actual, reference, zeros)
    assert sentence is not None
    assert sentence.startswith(f"1 of 2 elements {said}: at [1] it is ")
    assert sentence.endswith(f"the definition says {reference[1]:g}")


def test_all_faults_of_a_kind_are_counted() -> None:
    sentence = fault([NAN, 1, NAN, NAN], [0, 1, 2, 3])
    assert sentence is not None
    assert "3 of 4 elements must not be NaN: at [0]" in sentence


@pytest.mark.parametrize(
    ("actual", "reference", "zeros"),
    [
        ([1, NAN, INF, -INF, 0], [2, NAN, INF, -INF, 0], None),
        ([0, -0.0, 5], [0, 0, 0], [True, True, False]),
        ([], [], None),
    ],
)
def test_patterns_that_fit(
    actual: list[float], reference: list[float], zeros: list[bool] | None
) -> None:
    assert fault(actual, reference, zeros) is None


def test_lse_of_an_infinite_logit_may_be_nan_or_infinite() -> None:
    for reference in (NAN, INF):
        assert fault([NAN, INF], [reference] * 2, lse=True) is None
        assert fault([-INF], [reference], lse=True) is not None
        assert fault([7], [reference], lse=True) is not None
    assert fault([-INF], [-INF], lse=True) is None
    assert fault([NAN], [-INF], lse=True) is not None
    assert fault([INF], [NAN]) is not None
    assert fault([NAN], [INF]) is not None


@pytest.mark.parametrize("name", FORMATS)
def test_beyond_the_format_infinity_is_right(name: str) -> None:
    largest = FORMATS[name].largest
    assert fault([INF], [largest], dtype=name) is None
    assert fault([largest], [largest], dtype=name) is None
    assert fault([INF], [largest * 0.98], dtype=name) is not None
    assert fault([NAN], [largest], dtype=name) is not None
    assert fault([-INF], [largest], dtype=name) is not None
    assert fault([INF], [-largest], dtype=name) is not None
