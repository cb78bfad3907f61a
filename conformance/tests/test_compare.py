"""Comparisons: differences that are known beforehand must be found, at the right place."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from isoform.conformance.compare import compare
from isoform.conformance.evoformer.cases import CASES as EVOFORMER
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import NUMPY, NUMPY_TILED
from isoform.conformance.implementations.torch import REFERENCE
from isoform.conformance.operations import CASES
from isoform.reference.contract import Capabilities, Unsupported
from isoform.reference.numpy import evoformer_attention

CASE = CASES["evoformer/length-17/fp32/all-operands"]
RESULTS = ["out", "lse", "dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate"]
FORWARD = Capabilities("evoformer_attention", gradients=frozenset(), lse=False)


def spoiled(change: Any, name: str = "spoiled") -> Implementation:
    """The definition, forward only, with its output changed."""

    def attention(q: Any, k: Any, v: Any, **operands: Any) -> Any:
        out = evoformer_attention(q, k, v, **operands)
        change(out)
        return out

    return Implementation(name, "numpy", FORWARD, attention)


def test_the_same_implementation_twice_does_not_differ() -> None:
    found = compare(NUMPY, replace(NUMPY, name="again"), [CASE])
    assert [x.result for x in found.differences] == RESULTS
    assert all(x.between.max_abs == 0 and x.apart == 0 for x in found.differences)
    assert found.within
    assert not found.skipped


def test_both_are_measured_against_the_definition() -> None:
    found = compare(NUMPY, NUMPY_TILED, [CASE])
    for x in found.differences:
        assert x.a.within and x.b.within
        assert 0 < x.a.share < 1
        assert x.dtype == "float32"
        assert x.between.ulp_max <= x.a.errors.ulp_max + x.b.errors.ulp_max + 1


def test_a_known_difference_is_found_where_it_is() -> None:
    where = (0, 1, 5, 1, 3)

    def change(out: Any) -> None:
        out[where] += 0.5

    found = compare(spoiled(change), NUMPY, [CASE])
    (out,) = found.differences
    assert out.result == "out"
    assert out.between.worst == where
    assert out.between.max_abs == pytest.approx(0.5, rel=1e-6)
    assert out.between.worst_value == pytest.approx(out.between.worst_reference + 0.5, rel=1e-6)
    assert out.definition == pytest.approx(out.between.worst_reference, rel=1e-6)
    assert out.a.share > 1 and not out.a.within
    assert out.b.within
    assert not found.within


def test_ulps_are_those_of_the_result() -> None:
    def change(out: Any) -> None:
        out[...] = np.nextafter(out, np.float32(np.inf))

    (out,) = compare(spoiled(change), NUMPY, [CASE]).differences
    assert out.between.ulp_p50 == 1
    assert 1 <= out.between.ulp_max <= 2  # beside a power of two the units differ


def test_disagreement_about_nan_is_counted_apart() -> None:
    def change(out: Any) -> None:
        out[0, 0, :3] = np.nan

    (out,) = compare(spoiled(change), NUMPY, [CASE]).differences
    assert out.apart == 3 * CASE.shape.H * CASE.shape.D
    assert "must not be NaN" in out.a.fault
    assert not out.a.within and out.b.within


def test_what_one_does_not_offer_is_skipped_with_the_reason() -> None:
    found = compare(NUMPY, spoiled(lambda out: None), [CASE])
    assert [x.result for x in found.differences] == ["out"]
    assert found.skipped[f"{CASE.id} dq"] == "spoiled: no dq"
    assert found.skipped[f"{CASE.id} lse"] == "spoiled: no lse"


def test_a_case_that_one_does_not_support_is_skipped() -> None:
    narrow = replace(spoiled(lambda out: None), capabilities=replace(FORWARD, head_dims=(32, 32)))
    found = compare(NUMPY, narrow, [CASE])
    assert not found.differences
    assert "head dim D=16" in found.skipped[CASE.id]


@pytest.mark.parametrize("exception", [Unsupported(["a whim"]), RuntimeError("out of luck")])
def test_whoever_raises_is_named(exception: Exception) -> None:
    def change(out: Any) -> None:
        raise exception

    found = compare(NUMPY, spoiled(change, "moody"), [CASE])
    assert found.skipped[CASE.id].startswith(f"moody raised {type(exception).__name__}")


def test_a_wrong_shape_is_said() -> None:
    odd = Implementation("odd", "numpy", FORWARD, lambda q, k, v, **_: q[..., :-1])
    found = compare(NUMPY, odd, [CASE])
    assert "shapes" in found.skipped[f"{CASE.id} out"]


def test_other_operations_are_skipped() -> None:
    other = replace(NUMPY, capabilities=replace(NUMPY.capabilities, operation="another"), others=())
    assert "not both" in compare(NUMPY, other, [CASE]).skipped[CASE.id]


def test_operations_that_both_offer_are_compared() -> None:
    rotary = CASES["rotary/length-65/fp32/half"]
    found = compare(NUMPY, REFERENCE, [CASE, rotary])
    assert {(x.case, x.result) for x in found.differences} >= {
        (rotary.id, "out"),
        (rotary.id, "dx"),
        (CASE.id, "out"),
    }
    assert found.within
    assert "not both" in compare(NUMPY, NUMPY_TILED, [rotary]).skipped[rotary.id]


def test_large_cases_are_not_run_unasked() -> None:
    large = next(case for case in CASES.values() if case.large)
    assert "--large" in compare(NUMPY, NUMPY_TILED, [large]).skipped[large.id]


def test_empty_results_compare() -> None:
    empty = [case for case in EVOFORMER.values() if "empty" in case.tags and "fp32" in case.id]
    found = compare(NUMPY, NUMPY_TILED, empty)
    assert len({x.case for x in found.differences}) == len(empty)
    assert found.within


def test_the_largest_of_each_result_is_picked() -> None:
    cases = [case for case in EVOFORMER.values() if "scale" in case.tags]
    found = compare(NUMPY, NUMPY_TILED, cases)
    assert len(found.differences) == len(cases) * len(RESULTS)
    assert [x.result for x in found.largest()] == RESULTS
    for x in found.largest():
        same = [y.between.ratio_max for y in found.differences if y.result == x.result]
        assert x.between.ratio_max == max(same)


def test_json_is_strict_json() -> None:
    def change(out: Any) -> None:
        out[0, 0] = np.nan

    found = compare(spoiled(change), NUMPY, [CASE])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(found.as_json(), parse_constant=refuse)
    assert document["differences"][0]["between"]["worst"]
    assert (document["a"], document["b"]) == ("spoiled", "numpy")
