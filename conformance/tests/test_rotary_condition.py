"""κ and the twin of rotary embedding: they follow from perturbing the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isoform.conformance.case import Case
from isoform.conformance.dtypes import FORMATS, rounded
from isoform.conformance.oracle import expected
from isoform.conformance.rotary.cases import CASES, turn_of
from isoform.conformance.rotary.condition import ANGLE, conditions
from isoform.conformance.rotary.operation import reference
from isoform.conformance.rotary.twin import twin
from isoform.conformance.rotary.values import draw
from isoform.reference.contract import Arithmetic
from isoform.reference.numpy.rotary import pairs, rotary_tables

SOME = [
    CASES[case_id]
    for case_id in (
        "rotary/positions/fp32/to-2m",
        "rotary/partial-80-32/bf16/interleaved",
        "rotary/scaling/fp16/yarn",
        "rotary/double/fp64/interleaved-yarn",
        "rotary/values/fp32/spread-values",
    )
]


def perturbed(case: Case, step: float, angle: float, rng: Any) -> dict[str, Any]:
    """The definition with a random error of ``step`` in each table and product, and of ``angle``
    in each angle, in float64.
    """
    operands, turn = draw(case), turn_of(case)
    d = turn.rotary_dim or case.shape.D
    exact = rotary_tables(
        operands["positions"], d, base=turn.base, scaling=turn.scaling, dtype=np.longdouble
    )
    results = {}

    def off(x: Any, size: float = step) -> Any:
        return x * (1 + size * rng.choice([-1, 1], size=x.shape))

    for name, source, direction in (("out", "x", 1), ("dx", "dout", -1)):
        x = operands[source].astype(np.longdouble)
        cos, sin = (table[..., None, :] for table in exact)
        # a wrong angle turns a little further: cos − δ sin, sin + δ cos
        cos, sin = cos - angle * sin, sin + angle * cos
        sin = direction * sin
        x1, x2 = pairs(x[..., :d], turn.layout)
        y1, y2 = pairs(x[..., :d], turn.layout)
        y1, y2 = (
            off(off(x1 * off(cos)) - off(x2 * off(sin))),
            off(off(x2 * off(cos)) + off(x1 * off(sin))),
        )
        out = x.copy()
        pairs(out[..., :d], turn.layout)[0][...] = y1
        pairs(out[..., :d], turn.layout)[1][...] = y2
        results[name] = out.astype(np.float64)
    return results


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_errors_of_every_step_stay_within_a_small_multiple(case: Case) -> None:
    """And reach it: κ is neither too small nor much too large."""
    truth = expected(case, True)
    found = perturbed(case, 1e-9, 0.0, np.random.default_rng(0))
    wide_unit = min(1.0, 2.0**-24 / FORMATS[case.dtype].unit_roundoff)
    for name, x in found.items():
        error = np.abs(x - truth.results[name])
        kappa = truth.conditions[name].relative
        # κ counts the steps in units of the short dtype
        ratio = np.where(error > 0, error * wide_unit / np.where(kappa, kappa * 1e-9, 1), 0)
        assert ratio.max() <= 3.5
        if wide_unit == 1:
            assert ratio.max() > 0.5


def test_the_part_of_the_angle() -> None:
    """An angle that is off by 2⁻⁵² of itself moves a result by what κ says, and by no more."""
    case = CASES["rotary/double/fp64/to-2m"]
    truth = expected(case, True)
    highest = 2.0**21
    found = perturbed(case, 0.0, ANGLE * highest, np.random.default_rng(0))
    u = FORMATS["float64"].unit_roundoff
    error = np.abs(found["out"] - truth.results["out"])[..., [0, 32]]  # ω = 1
    allowed = u * truth.conditions["out"].relative[..., [0, 32]]
    assert (error <= 1.001 * allowed).all()
    assert (error > 0.2 * allowed).any()


def test_float32_and_shorter_are_hardly_moved_by_the_angle() -> None:
    operands = draw(CASES["rotary/positions/fp32/to-2m"])
    turn = turn_of(CASES["rotary/positions/fp32/to-2m"])
    near = operands | {"positions": operands["positions"] * 0}
    far = conditions(operands, turn, gradients=False)["out"].relative
    close = conditions(near, turn, gradients=False)["out"].relative
    assert far.max() < 3 * close.max()


def test_a_short_dtype_is_held_to_its_own_last_place() -> None:
    case = CASES["rotary/positions/bf16/to-2m"]
    truth = expected(case, True)
    for name in ("out", "dx"):
        size = np.abs(truth.results[name])
        kappa = truth.conditions[name].relative
        assert (kappa >= size).all()
        assert (kappa <= size + 1e-3).all()


def test_what_passes_through_has_no_error() -> None:
    case = CASES["rotary/values/fp32/nan-passing"]
    found = conditions(draw(case), turn_of(case), gradients=True)
    for condition in found.values():
        assert (condition.relative[..., 32:] == 0).all()
        assert (condition.underflow[..., 32:] == 0).all()
        assert (condition.relative[..., :32] > 0).all()
        assert (condition.underflow[..., :32] >= 1).all()


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_the_twin_is_the_definition_rounded(case: Case) -> None:
    operands, turn = draw(case), turn_of(case)
    exact = reference(operands, case, True)
    double = Arithmetic(accumulate="float64")
    found = twin(operands, turn, case.dtype, double, gradients=True)
    for name, x in found.items():
        np.testing.assert_array_equal(x, rounded(exact[name], case.dtype))
    assert twin(operands, turn, case.dtype, double, gradients=False).keys() == {"out"}


def test_the_twin_shows_what_the_declared_arithmetic_costs() -> None:
    case = CASES["rotary/positions/fp32/to-2m"]
    operands, turn = draw(case), turn_of(case)
    exact = reference(operands, case, False)["out"]

    def mean(accumulate: str) -> float:
        arithmetic = Arithmetic(accumulate=accumulate)
        found = twin(operands, turn, "float32", arithmetic, gradients=False)["out"]
        return float(np.abs(found - exact).mean())

    assert mean("float64") < mean("wide") == mean("float32") < 1e-2 * mean("float16")


def test_the_twin_of_far_positions_has_exact_angles() -> None:
    case = CASES["rotary/positions/fp32/to-2m"]
    found = twin(draw(case), turn_of(case), "float32", Arithmetic(), gradients=False)["out"]
    exact = reference(draw(case), case, False)["out"]
    assert np.abs(found - exact).max() < 1e-6
