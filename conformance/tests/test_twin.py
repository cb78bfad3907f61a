"""The twin: the definition, with just the roundings that are declared."""

from __future__ import annotations

import numpy as np
import pytest

from isoform.conformance.budgets import budget, result_format, units
from isoform.conformance.case import Operands
from isoform.conformance.dtypes import FORMATS, rounded
from isoform.conformance.evoformer.cases import scale_of
from isoform.conformance.evoformer.condition import conditions
from isoform.conformance.evoformer.operation import reference
from isoform.conformance.evoformer.twin import twin
from isoform.conformance.evoformer.values import draw
from isoform.conformance.implementations.numpy import DOUBLE
from isoform.conformance.operations import CASES
from isoform.reference.contract import Arithmetic

GRADIENTS = {"dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate"}
RESULTS = {"out", "lse"} | GRADIENTS

ORDINARY = [
    "evoformer/operands/fp32/bare",
    "evoformer/operands/fp32/mask+mask-bias+pair-bias+gate",
    "evoformer/heads-6-2/fp32/all-operands",
    "evoformer/scale/fp32/-0.5",
    "evoformer/empty/fp32/no-keys",
    "evoformer/empty/fp32/no-queries",
    "evoformer/empty/fp32/no-heads",
    *(
        f"evoformer/values/fp32/{values}"
        for values in (
            *("large-logits", "one-hot", "equal-logits", "minus-inf-bias", "masked-rows"),
            *("all-masked", "garbage-in-dropped", "huge-negative-bias", "closed-gate"),
        )
    ),
]


def in_double(case_id: str) -> Operands:
    """The operands of a case, as they are, called float64."""
    return {
        name: x if x.dtype == bool else x.astype(np.float64)
        for name, x in draw(CASES[case_id]).items()
    }


@pytest.mark.parametrize("case_id", ORDINARY)
def test_in_float64_it_is_the_oracle(case_id: str) -> None:
    operands, case = in_double(case_id), CASES[case_id]
    truth = reference(operands, case, True)
    found = twin(operands, scale_of(case), "float64", Arithmetic(), gradients=True)
    assert found.keys() == truth.keys()
    for name, x in truth.items():
        largest = np.abs(x[np.isfinite(x)]).max(initial=1.0)
        np.testing.assert_allclose(found[name], x, rtol=1e-12, atol=1e-12 * largest)


def test_what_is_not_finite_is_where_it_must_be() -> None:
    for values in ("nan-attended", "inf-attended"):
        case_id = f"evoformer/values/fp32/{values}"
        truth = reference(in_double(case_id), CASES[case_id], False)
        found = twin(in_double(case_id), None, "float64", Arithmetic(), gradients=False)
        for name in ("out", "lse"):
            np.testing.assert_allclose(found[name], truth[name], rtol=1e-12, atol=1e-12)


def test_gradients_only_if_wanted_and_of_what_there_is() -> None:
    operands = in_double("evoformer/operands/fp32/mask+gate")
    assert twin(operands, None, "float32", Arithmetic(), gradients=False).keys() == {"out", "lse"}
    assert twin(operands, None, "float32", Arithmetic(), gradients=True).keys() == {
        *("out", "lse", "dq", "dk", "dv", "dgate")
    }


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic(),
        Arithmetic(probabilities="operand"),
        Arithmetic(probabilities="operand", cotangent="operand", dlogits="operand"),
        Arithmetic(logits="operand", probabilities="operand", output="operand", dlogits="operand"),
    ],
    ids=["wide", "P", "P, dO, dS", "S, P, O, dS"],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_its_errors_are_within_the_budget(dtype: str, arithmetic: Arithmetic) -> None:
    case = CASES[f"evoformer/head-dim-32/{dtype}/all-operands"]
    operands = draw(case)
    truth = reference(operands, case, True)
    condition = conditions(operands, scale_of(case), truth, gradients=True)
    found = twin(operands, scale_of(case), case.dtype, arithmetic, gradients=True)
    for name, x in truth.items():
        u, eta = units(name, case.dtype, arithmetic)
        allowed = u * condition[name].relative + eta * condition[name].underflow
        ratio = float((np.abs(found[name] - x) / allowed).max())
        assert 0 < ratio <= budget(case.operation, case.dtype, name).condition, (name, ratio)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_results_are_numbers_of_the_format_they_are_returned_in(dtype: str) -> None:
    case = CASES[f"evoformer/head-dim-32/{dtype}/all-operands"]
    found = twin(draw(case), None, case.dtype, Arithmetic(), gradients=True)
    for name, x in found.items():
        assert x.dtype == np.float64
        np.testing.assert_array_equal(x, rounded(x, result_format(name, case.dtype)))
    assert (found["lse"] != rounded(found["lse"], "bfloat16")).any()


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        ("logits", RESULTS),
        ("probabilities", {"out", "dv"} | GRADIENTS - {"dv"}),  # through o, all that holds δ too
        ("output", {"dq", "dk", "dmask_bias", "dpair_bias"}),  # through δ
        ("cotangent", GRADIENTS - {"dgate"}),
        ("dlogits", {"dq", "dk"}),
        ("accumulate", RESULTS),
    ],
)
def test_each_rounding_changes_what_comes_after_it(step: str, changed: set[str]) -> None:
    operands = in_double("evoformer/operands/fp32/mask+mask-bias+pair-bias+gate")
    plain = twin(operands, None, "float64", Arithmetic(), gradients=True)
    coarse = "bfloat16" if step != "accumulate" else "float32"
    found = twin(operands, None, "float64", Arithmetic(**{step: coarse}), gradients=True)
    assert {name for name in plain if (found[name] != plain[name]).any()} == changed
    for name in changed:  # by about what the rounding costs, and no more
        size = np.linalg.norm(found[name] - plain[name]) / np.linalg.norm(plain[name])
        u = FORMATS[coarse].unit_roundoff
        assert u / 50 < size < 20 * u, (name, size)


def test_operand_and_wide_are_taken_from_the_call() -> None:
    case = CASES["evoformer/operands/bf16/mask+mask-bias+pair-bias+gate"]
    operands = draw(case)

    def found(arithmetic: Arithmetic) -> Operands:
        return twin(operands, None, case.dtype, arithmetic, gradients=True)

    same = found(Arithmetic(probabilities="operand", dlogits="operand"))
    named = found(Arithmetic(probabilities="bfloat16", dlogits="bfloat16"))
    wide = found(Arithmetic())
    for name, x in same.items():
        np.testing.assert_array_equal(x, named[name])
    assert (same["out"] != wide["out"]).any()
    for name, x in found(Arithmetic(**dict.fromkeys(vars(Arithmetic()), "float32"))).items():
        np.testing.assert_array_equal(x, wide[name])


def test_the_double_arithmetic_of_the_reference_is_more_exact_than_the_operands() -> None:
    """What the NumPy reference declares: then only the result itself is rounded."""
    case = CASES["evoformer/operands/fp32/mask+mask-bias+pair-bias+gate"]
    operands = draw(case)
    truth = reference(operands, case, True)
    found = twin(operands, None, case.dtype, DOUBLE, gradients=True)
    for name, x in truth.items():
        np.testing.assert_array_equal(found[name], rounded(x, "float32"), err_msg=name)


def test_operands_are_left_alone() -> None:
    case = CASES["evoformer/values/fp32/garbage-in-dropped"]
    operands, untouched = draw(case), draw(case)
    twin(operands, None, case.dtype, Arithmetic(), gradients=True)
    for name, x in operands.items():
        np.testing.assert_array_equal(x, untouched[name])
