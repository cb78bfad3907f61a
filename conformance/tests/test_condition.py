"""κ is what errors of every step come to: never less, and not much more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from isoform.conformance.budgets import units
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.evoformer.cases import CASES, scale_of
from isoform.conformance.evoformer.condition import conditions
from isoform.conformance.evoformer.mutants import Faults
from isoform.conformance.evoformer.operation import reference
from isoform.conformance.evoformer.twin import twin
from isoform.conformance.evoformer.values import draw
from isoform.conformance.operation import Condition
from isoform.reference.contract import Arithmetic, Shape
from isoform.reference.numpy.evoformer import sigmoid

EPSILON = 1e-7  # far above float64's errors, and its square far below it

Noise = Callable[[Array], Array]

PERTURBED = [
    f"evoformer/{name}"
    for name in (
        "operands/fp32/bare",
        "operands/fp32/mask+mask-bias+pair-bias+gate",
        "heads-4-2/fp32/all-operands",
        "head-dim-1/fp32/all-operands",
        "lengths-5-300/fp32/all-operands",
        "values/fp32/large-logits",
        "values/fp32/one-hot",
        "values/fp32/equal-logits",
        "values/fp32/spread-values",
        "values/fp32/minus-inf-bias",
        "values/fp32/masked-rows",
        "values/fp32/first-key-only",
        "values/fp32/garbage-in-dropped",
        "values/fp32/huge-negative-bias",
        "values/fp32/constant-values",
        "values/fp32/closed-gate",
        "scale/fp32/-0.5",
    )
]


class Problem(NamedTuple):
    case: Case
    operands: Operands
    results: Operands
    conditions: dict[str, Condition]


def problem(case_id: str, *, gradients: bool | None = None) -> Problem:
    case = CASES[case_id]
    wanted = case.differentiate if gradients is None else gradients
    operands = draw(case)
    results = reference(operands, case, wanted)
    return Problem(
        case, operands, results, conditions(operands, scale_of(case), results, gradients=wanted)
    )


def noisy(rng: np.random.Generator) -> Noise:
    """A function that makes every element wrong by ±ε, relative."""
    return lambda x: (
        x
        if x.dtype == bool
        else x.astype(np.float64) * (1 + EPSILON * rng.choice([-1, 1], x.shape))
    )


def with_noise_at_every_step(operands: Operands, case: Case, noise: Noise) -> Operands:
    """The definition in float64, each intermediate result put through ``noise``."""
    steps = Faults(
        logits=noise,
        probabilities=noise,
        product=lambda p, v: noise(p @ v),
        opening=lambda gate: noise(sigmoid(gate)),
        out=noise,
        lse=noise,
        delta=noise,
        dlogits=noise,
    )
    wide = {name: x if x.dtype == bool else x.astype(np.float64) for name, x in operands.items()}
    dout = wide.pop("dout")
    out, lse = steps.forward(**wide, scale=scale_of(case), return_lse=True)
    gradients = steps.backward(dout, **wide, scale=scale_of(case))._asdict()
    return {
        "out": out,
        "lse": lse,
        **{name: x for name, x in gradients.items() if name[1:] in wide},
    }


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
    moved = {
        "operands": reference({name: noise(x) for name, x in operands.items()}, case, True),
        "steps": with_noise_at_every_step(operands, case, noise),
    }
    for name, truth in results.items():
        allowed = EPSILON * found[name].relative
        reached = {
            what: over(np.where(np.isfinite(truth), x[name] - truth, 0), allowed)
            for what, x in moved.items()
        }
        assert max(reached.values()) < 2, (name, reached)
        assert max(reached.values()) > 5e-3, (name, reached)


def test_the_worst_perturbation_of_the_logits_reaches_it() -> None:
    """The term ``Σ p A |v − o|`` is attained, where every logit errs to the same end."""
    case = CASES["evoformer/operands/fp32/pair-bias"]
    operands = {name: x.astype(np.float64) for name, x in draw(case).items()}
    results = reference(operands, case, False)
    bound = conditions(operands, scale_of(case), results, gradients=False)["out"].relative

    # all keys' biases of one query and head, each to the side that pushes one channel up
    b, h, i, d = 0, 1, 3, 2
    bias = operands["pair_bias"]
    q, k, v = (operands[name][b] for name in "qkv")
    s = case.shape.D**-0.5 * np.einsum("shd,skhd->shk", q[:, i], k)[:, h] + bias[b, 0, h, i]
    size = case.shape.D**-0.5 * np.einsum("shd,skhd->shk", abs(q[:, i]), abs(k))[:, h]
    row = 0
    A = size[row] + np.abs(bias[b, 0, h, i]) + np.abs(s[row])
    push = np.sign(v[row, :, h, d] - results["out"][b, row, i, h, d])
    bias = bias.copy()
    bias[b, 0, h, i] += EPSILON * A * push
    after = reference(operands | {"pair_bias": bias}, case, False)["out"]
    moved = (after - results["out"])[b, row, i, h, d] / EPSILON
    assert 0.5 < moved / bound[b, row, i, h, d] < 1


EVERYTHING = [
    case.id
    for case in CASES.values()
    if not case.large
    and not case.tags.isdisjoint({"adversarial", "empty", "grouped-heads", "scale", "layout"})
]


@pytest.mark.parametrize("case_id", EVERYTHING)
def test_it_is_finite_and_allows_rounding_wherever_the_result_is_finite(case_id: str) -> None:
    case, operands, results, found = problem(case_id)
    assert found.keys() == results.keys()
    assert results.keys() == {"out", "lse"} | {
        f"d{name}" for name in operands if case.differentiate and name not in ("mask", "dout")
    }
    for name, (relative, underflow) in found.items():
        truth = results[name]
        assert relative.shape == underflow.shape == truth.shape
        finite = np.isfinite(truth)
        assert np.isfinite(relative[finite]).all(), name
        assert np.isfinite(underflow[finite]).all(), name
        assert (relative[finite] >= np.abs(truth[finite]) * (1 - 1e-12)).all(), name
        assert (underflow[finite] >= 1).all(), name  # an error of η is no fault, anywhere


def test_what_no_key_is_left_to_must_be_exact() -> None:
    _, _, results, found = problem("evoformer/values/fp32/masked-rows")
    for name in ("out", "dq", "dgate"):
        assert (results[name][:, ::2] == 0).all()
        assert (found[name].relative[:, ::2] == 0).all()
        assert (found[name].relative[:, 1::2] > 0).all()
    assert (found["lse"].relative[:, ::2] == 1).all()


def test_what_dropped_keys_hold_does_not_count() -> None:
    case, operands, results, found = problem("evoformer/values/fp32/garbage-in-dropped")
    assert not np.isfinite(operands["k"]).all()
    dropped = ~operands["mask"][..., None, None]
    clean = operands | {name: np.where(dropped, np.float32(0), operands[name]) for name in "kv"}
    for name, condition in conditions(clean, scale_of(case), results, gradients=True).items():
        np.testing.assert_array_equal(condition.relative, found[name].relative)
        np.testing.assert_array_equal(condition.underflow, found[name].underflow)
    for name in ("dk", "dv"):
        where = np.broadcast_to(dropped, results[name].shape)
        assert (found[name].relative[where] == 0).all()


def test_of_gradients_only_if_wanted() -> None:
    assert problem("evoformer/operands/fp32/gate", gradients=False).conditions.keys() == {
        "out",
        "lse",
    }


# λ: underflow


def one_query(dtype: str) -> tuple[Case, Operands]:
    """A query that looks at one key, whose value is 0, and hardly at another, whose is large."""
    dtype_ = FORMATS[dtype].dtype
    case = Case(
        "evoformer/underflow", "evoformer_attention", Shape(1, 1, 1, 2, 1, 1, 1), dtype, frozenset()
    )
    operands = {
        "q": np.array([1.0]).reshape(1, 1, 1, 1, 1),
        "k": np.array([10.0, -10.0]).reshape(1, 1, 2, 1, 1),  # p = 1 and 2e-9
        "v": np.array([0.0, 1e4]).reshape(1, 1, 2, 1, 1),
        "dout": np.array([1.0]).reshape(1, 1, 1, 1, 1),
    }
    return case, {name: x.astype(dtype_) for name, x in operands.items()}


def test_probabilities_that_underflow_are_allowed_for_by_lambda_alone() -> None:
    case, operands = one_query("float16")
    results = reference(operands, case, True)
    found = conditions(operands, None, results, gradients=True)
    stored = Arithmetic(probabilities="float16", dlogits="float16")
    out = twin(operands, None, "float16", stored, gradients=True)["out"]
    u, eta = units("out", "float16", stored)
    assert out == 0 < results["out"]  # p·v = 2e-5 is lost
    error = np.abs(out - results["out"])
    assert error > 5 * u * found["out"].relative
    assert error < u * found["out"].relative + eta * found["out"].underflow


@pytest.mark.parametrize(
    "values", ["large-logits", "one-hot", "spread-values", "closed-gate", "huge-negative-bias"]
)
def test_storing_steps_in_float16_stays_within_the_budget(values: str) -> None:
    case, operands, results, found = problem(f"evoformer/values/fp16/{values}")
    stored = Arithmetic(probabilities="operand", cotangent="operand", dlogits="operand")
    rounded = twin(operands, None, "float16", stored, gradients=True)
    for name, truth in results.items():
        u, eta = units(name, "float16", stored)
        finite = np.isfinite(truth) & np.isfinite(rounded[name])  # dq of large logits overflows
        allowed = u * found[name].relative + eta * found[name].underflow
        assert over(np.where(finite, rounded[name] - truth, 0), allowed) < 2, name


def test_subnormal_products_are_counted_in_the_units_of_the_sum() -> None:
    """Sums are in float32 at least: its own smallest number counts little for a shorter dtype."""
    shape = CASES["evoformer/values/fp32/subnormal"].shape
    smallest = {
        dtype: problem(f"evoformer/values/{dtype}/subnormal")
        .conditions["dmask_bias"]
        .underflow.min()
        for dtype in ("fp32", "bf16", "fp16")
    }
    assert smallest["fp32"] >= max(shape.Q, shape.K)
    assert 1 <= smallest["bf16"] < smallest["fp32"]
    assert 1 <= smallest["fp16"] < smallest["fp32"]


def test_scale_counts_by_its_size() -> None:
    case = CASES["evoformer/scale/fp32/-0.5"]
    operands = draw(case)
    mirrored = operands | {"q": -operands["q"]}
    both = []
    for given, scale in ((operands, -0.5), (mirrored, 0.5)):
        results = reference(given, replace(case, options=(("scale", scale),)), True)
        both.append(conditions(given, scale, results, gradients=True))
    for name in both[0]:
        np.testing.assert_allclose(both[0][name].relative, both[1][name].relative, rtol=1e-12)
