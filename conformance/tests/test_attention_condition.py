"""Attention over a sequence: κ bounds what errors of every step come to; the twin declares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from isoform.conformance.attention.cases import scale_of, window_of
from isoform.conformance.attention.condition import conditions
from isoform.conformance.attention.mutants import Faults
from isoform.conformance.attention.operation import reference
from isoform.conformance.attention.twin import twin
from isoform.conformance.attention.values import draw
from isoform.conformance.budgets import budget, result_format, units
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import Array, rounded
from isoform.conformance.implementations.numpy import DOUBLE
from isoform.conformance.operation import Condition
from isoform.conformance.operations import CASES
from isoform.reference.attention_contract import PLACES
from isoform.reference.contract import Arithmetic

EPSILON = 1e-7  # far above float64's errors, and its square far below it
RESULTS = {"out", "lse", "dq", "dk", "dv"}

PERTURBED = [
    f"attention/{name}"
    for name in (
        "mask/fp32/bare",
        "mask/fp32/window-causal",
        "mask/fp32/per-example",
        "ring/fp32/packed-uneven",
        "heads-4-2/fp32/causal",
        "head-dim-1/fp32/causal",
        "lengths-300-5/fp32/last-aligned",
        "values/fp32/large-logits",
        "values/fp32/rising-logits",
        "values/fp32/one-hot",
        "values/fp32/equal-logits",
        "values/fp32/spread-values",
        "values/fp32/no-keys-for-some",
        "values/fp32/garbage-in-padding",
        "values/fp32/constant-values",
        "scale/fp32/-0.5",
    )
]


class Problem(NamedTuple):
    case: Case
    operands: Operands
    results: Operands
    conditions: dict[str, Condition]


def conditions_of(
    case: Case, operands: Operands, results: Operands, wanted: bool
) -> dict[str, Condition]:
    return conditions(operands, scale_of(case), window_of(case), results, gradients=wanted)


def twin_of(case: Case, operands: Operands, dtype: str, arithmetic: Arithmetic) -> Operands:
    return twin(
        operands,
        scale_of(case),
        window_of(case),
        dtype,
        arithmetic,
        gradients=case.differentiate,
    )


def problem(case_id: str, *, gradients: bool | None = None) -> Problem:
    case = CASES[case_id]
    wanted = case.differentiate if gradients is None else gradients
    operands = draw(case)
    results = reference(operands, case, wanted)
    return Problem(case, operands, results, conditions_of(case, operands, results, wanted))


def in_double(operands: Operands) -> Operands:
    return {name: x if name in PLACES else x.astype(np.float64) for name, x in operands.items()}


def noisy(rng: np.random.Generator) -> Callable[[Array], Array]:
    """A function that makes every element wrong by ±ε, relative."""
    return lambda x: x.astype(np.float64) * (1 + EPSILON * rng.choice([-1, 1], x.shape))


def over(difference: Array, allowed: Array) -> float:
    """The largest difference, in units of what is allowed."""
    where = np.isfinite(difference) & (difference != 0)
    with np.errstate(divide="ignore"):
        return float((np.abs(difference[where]) / allowed[where]).max(initial=0.0))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("case_id", PERTURBED)
def test_no_perturbation_exceeds_it_and_some_come_near(case_id: str) -> None:
    """Operands and, apart, every step are made wrong by ±ε: results move by ε·κ at most."""
    case, operands, results, found = problem(case_id)
    noise = noisy(np.random.default_rng(0))
    steps = Faults(
        logits=noise,
        probabilities=noise,
        product=lambda p, v: noise(p @ v),
        merged=noise,
        lse=noise,
        delta=noise,
        dlogits=noise,
    )
    wide = in_double(operands)
    dout = wide.pop("dout")
    out, lse = steps.forward(**wide, **dict(case.options), return_lse=True)
    gradients = steps.backward(dout, **wide, **dict(case.options))._asdict()
    moved_operands = {name: x if name in PLACES else noise(x) for name, x in operands.items()}
    moved = {
        "operands": reference(moved_operands, case, True),
        "steps": {"out": out, "lse": lse, **gradients},
    }
    for name, truth in results.items():
        allowed = EPSILON * found[name].relative
        reached = {
            what: over(np.where(np.isfinite(truth), x[name] - truth, 0), allowed)
            for what, x in moved.items()
        }
        assert max(reached.values()) < 2, (name, reached)
        assert max(reached.values()) > 5e-3, (name, reached)


EVERYTHING = [
    case.id
    for case in CASES.values()
    if case.operation == "attention"
    and not case.large
    and not case.tags.isdisjoint({"adversarial", "empty", "ring", "scale", "layout"})
]


@pytest.mark.parametrize("case_id", EVERYTHING)
def test_it_is_finite_and_allows_rounding_wherever_the_result_is_finite(case_id: str) -> None:
    case, _, results, found = problem(case_id)
    assert found.keys() == results.keys() == (RESULTS if case.differentiate else {"out", "lse"})
    for name, (relative, underflow) in found.items():
        truth = results[name]
        assert relative.shape == underflow.shape == truth.shape
        finite = np.isfinite(truth)
        assert np.isfinite(relative[finite]).all(), name
        assert np.isfinite(underflow[finite]).all(), name
        assert (relative[finite] >= np.abs(truth[finite]) * (1 - 1e-12)).all(), name
        assert (underflow[finite] >= 1).all(), name  # an error of η is no fault, anywhere


def test_what_no_key_is_left_to_must_be_exact() -> None:
    _, _, results, found = problem("attention/values/fp32/no-keys-for-some")
    dead = (results["lse"] == -np.inf).swapaxes(1, 2)
    assert 0.2 < dead.mean() < 0.8
    for name in ("out", "dq"):
        assert (results[name][dead] == 0).all()
        assert (found[name].relative[dead] == 0).all()
        assert (found[name].relative[~dead] > 0).all()


def test_what_padding_holds_does_not_count() -> None:
    case, operands, results, found = problem("attention/values/fp32/garbage-in-padding")
    assert not np.isfinite(operands["k"]).all()
    padding = (operands["segments"] < 0)[..., None, None]
    clean = operands | {
        name: np.where(padding, np.float32(0), operands[name]) for name in ("q", "k", "v", "dout")
    }
    for name, condition in conditions_of(case, clean, results, True).items():
        np.testing.assert_array_equal(condition.relative, found[name].relative)
        np.testing.assert_array_equal(condition.underflow, found[name].underflow)
    for name in ("dk", "dv"):
        where = np.broadcast_to(padding, results[name].shape)
        assert (found[name].relative[where] == 0).all()


def test_keys_that_are_not_attended_to_do_not_count() -> None:
    """A document's condition is its own: the others may hold whatever they like."""
    case, operands, results, found = problem("attention/mask/fp32/packed")
    first = operands["segments"] == operands["segments"][:, :1]
    other = operands | {
        name: np.where(first[..., None, None], operands[name], 7 * operands[name]) for name in "kv"
    }
    changed = conditions_of(case, other, reference(other, case, True), True)
    for name in ("out", "dq", "dk", "dv"):
        before, after = found[name].relative, changed[name].relative
        np.testing.assert_allclose(after[first], before[first], rtol=1e-12)
        assert (np.abs(after / before - 1)[~first] > 1e-3).any()


def test_of_gradients_only_if_wanted() -> None:
    found = problem("attention/mask/fp32/causal", gradients=False).conditions
    assert found.keys() == {"out", "lse"}


@pytest.mark.parametrize("case_id", [case_id for case_id in PERTURBED if "large" not in case_id])
def test_the_twin_in_float64_is_the_oracle(case_id: str) -> None:
    case = CASES[case_id]
    operands = in_double(draw(case))
    truth = reference(operands, case, True)
    found = twin_of(case, operands, "float64", Arithmetic())
    assert found.keys() == truth.keys()
    for name, x in truth.items():
        largest = np.abs(x[np.isfinite(x)]).max(initial=1.0)
        np.testing.assert_allclose(found[name], x, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic(),
        Arithmetic(probabilities="operand", cotangent="operand", dlogits="operand"),
        Arithmetic(logits="operand", probabilities="operand", output="operand", dlogits="operand"),
    ],
    ids=["wide", "P, dO, dS", "S, P, O, dS"],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_twin_s_errors_are_within_the_budget(dtype: str, arithmetic: Arithmetic) -> None:
    case, operands, truth, condition = problem(f"attention/head-dim-32/{dtype}/causal")
    found = twin_of(case, operands, case.dtype, arithmetic)
    for name, x in truth.items():
        u, eta = units(name, case.dtype, arithmetic)
        allowed = u * condition[name].relative + eta * condition[name].underflow
        ratio = over(found[name] - x, allowed)
        assert 0 < ratio <= budget(case.operation, case.dtype, name).condition, (name, ratio)
        np.testing.assert_array_equal(
            found[name], rounded(found[name], result_format(name, case.dtype))
        )


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        ("logits", RESULTS),
        ("probabilities", RESULTS - {"lse"}),  # through o, all that holds δ too
        ("output", {"dq", "dk"}),  # through δ
        ("cotangent", {"dq", "dk", "dv"}),
        ("dlogits", {"dq", "dk"}),
        ("accumulate", RESULTS),
    ],
)
def test_the_twin_rounds_what_is_declared_and_nothing_else(step: str, changed: set[str]) -> None:
    case = CASES["attention/head-dim-32/fp32/causal"]
    operands = draw(case)
    exact = twin_of(case, operands, "float32", DOUBLE)
    shorter = replace(DOUBLE, **{step: "float32" if step == "accumulate" else "bfloat16"})
    found = twin_of(case, operands, "float32", shorter)
    assert {name for name in RESULTS if (found[name] != exact[name]).any()} == changed
