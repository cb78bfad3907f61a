"""The oracle against 60 digits, against complex steps, and against each rule of the contract."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.reference.contract import DIFFERENTIABLE, OPTIONAL_OPERANDS, Shape
from isoform.reference.numpy import (
    evoformer_attention,
    evoformer_attention_backward,
    evoformer_attention_backward_tiled,
    evoformer_attention_tiled,
)

# Rules that hold for every form are checked on both; tiles are smaller than the problems.
FORMS: dict[str, tuple[Any, Any]] = {
    "plain": (evoformer_attention, evoformer_attention_backward),
    "tiled": (
        lambda *args, **options: evoformer_attention_tiled(*args, **options, block_q=2, block_k=3),
        lambda *args, **options: evoformer_attention_backward_tiled(
            *args, **options, block_q=2, block_k=3
        ),
    ),
}
COMBINATIONS = [names for n in range(5) for names in combinations(OPTIONAL_OPERANDS, n)]
SMALL = Shape(B=1, S=2, Q=5, K=7, H=4, G=2, D=3)

every_form = pytest.mark.parametrize(("forward", "backward"), FORMS.values(), ids=list(FORMS))
same_examples = settings(deadline=None, derandomize=True, max_examples=60)


def results(forward: Any, backward: Any, operands: Any, dout: Any, **options: Any) -> Any:
    """out, lse and the gradients by name; the absent ones left out."""
    out, lse = forward(**operands, return_lse=True, **options)
    gradients = backward(dout, **operands, **options)._asdict()
    return {"out": out, "lse": lse} | {
        name: gradient for name, gradient in gradients.items() if gradient is not None
    }


# --- against 60 digits ---


@pytest.mark.parametrize("optional", COMBINATIONS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("G", [1, 2, 4])
@every_form
def test_exact_to_14_digits(draw, exact, relative_error, forward, backward, G, optional):
    """EVO-2 and EVO-3: forward and gradients, for every combination of operands."""
    problem = draw(Shape(1, 2, 3, 5, 4, G, 2), optional, seed=G)
    if "mask" in optional:  # where a single key is left, all of ds is rounding error
        problem.operands["mask"][..., 1:3] = True
    expected = exact(problem)
    actual = results(forward, backward, problem.operands, problem.dout)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-14, errors


@pytest.mark.parametrize("seed", range(3))
@every_form
def test_exact_where_keys_are_missing(draw, exact, relative_error, forward, backward, seed):
    """EVO-4 and EVO-5: the definition leaves such keys out of every sum."""
    problem = draw(
        Shape(2, 3, 3, 5, 2, 1, 2), seed=seed, dead=True, infinite=True, garbage=True
    )  # fmt: skip
    expected = exact(problem)
    assert (expected["lse"] == -np.inf).any() and np.isfinite(expected["lse"]).any()
    actual = results(forward, backward, problem.operands, problem.dout)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-14, errors


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
@every_form
def test_scale_is_a_factor_of_the_logits_alone(
    draw, exact, relative_error, forward, backward, scale
):
    """EVO-2: biases are not scaled; negative scales and 0 are numbers like others."""
    problem = draw(Shape(1, 2, 3, 5, 2, 2, 2), ["mask_bias", "pair_bias", "gate"], seed=3)
    expected = exact(problem, scale)
    actual = results(forward, backward, problem.operands, problem.dout, scale=scale)
    assert max(relative_error(actual[name], expected[name]) for name in expected) <= 1e-14


@every_form
def test_wide_open_and_shut_gates_keep_their_digits(draw, exact, relative_error, forward, backward):
    """EVO-3: 1 − σ(gate) is not left to cancellation, which would lose all digits at 37."""
    problem = draw(Shape(1, 1, 1, 2, 1, 1, 2), ["gate"], seed=4)
    for size in (30.0, -30.0, 45.0, -700.0):
        problem.operands["gate"] = np.full(problem.shape.of("gate"), size)
        expected = exact(problem)
        actual = results(forward, backward, problem.operands, problem.dout)
        assert relative_error(actual["out"], expected["out"]) <= 1e-14
        assert relative_error(actual["dgate"], expected["dgate"]) <= 1e-14


# --- against complex steps ---


def complex_step(forward: Any, operands: Any, name: str, dout: Any, step: float = 1e-30) -> Any:
    """The gradient of <dout, out> by one operand: Im f(x + ih) / h, without any cancellation.

    Every number is moved in a copy of its own; the copies lie along B.
    """
    one = {other: x.astype(complex) if x.dtype != bool else x for other, x in operands.items()}
    count = one[name].size
    many = {other: np.repeat(x, count, axis=0) for other, x in one.items()}
    many[name].reshape(count, count)[np.diag_indices(count)] += 1j * step
    out = forward(**many)
    return ((out.imag / step) * dout).reshape(count, -1).sum(1).reshape(one[name].shape)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("hard", [False, True], ids=["plain", "dead-infinite-garbage"])
@every_form
def test_backward_agrees_with_complex_steps(draw, relative_error, forward, backward, hard, name):
    for shape in (SMALL, Shape(1, 3, 4, 6, 2, 1, 5), Shape(1, 2, 3, 9, 3, 3, 8)):
        problem = draw(shape, seed=shape.K, spread=2, dead=hard, infinite=hard, garbage=hard)
        expected = complex_step(forward, problem.operands, name, problem.dout)
        actual = backward(problem.dout, **problem.operands)._asdict()[f"d{name}"]
        assert np.abs(expected).max() > 1e-3
        assert relative_error(actual, expected) <= 1e-13


@same_examples
@given(data=st.data())
@every_form
def test_gradients_are_adjoint_to_the_forward(problems, forward, backward, data):
    """<dout, out(x + h·dx)> rises by h·<gradient, dx>, in one random direction for all operands."""
    _, operands, dout = data.draw(problems(spreads=(1.0, 3.0)))
    gradients = backward(dout, **operands)._asdict()
    rng = np.random.default_rng(1)
    moved, rise, size = {}, 0.0, 0.0
    for name, x in operands.items():
        if name == "mask":
            moved[name] = x
            continue
        direction = rng.standard_normal(x.shape)
        moved[name] = x + 1e-30j * direction
        rise += float((gradients[f"d{name}"] * direction).sum())
        size += float(np.abs(gradients[f"d{name}"] * direction).sum())
    seen = float((forward(**moved).imag * dout).sum() / 1e-30)
    assert abs(seen - rise) <= 1e-12 * max(size, 1e-300)


# --- dropped keys and queries without any ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308])
@every_form
def test_dropped_keys_are_not_seen(draw, forward, backward, bad):
    """EVO-4: results are bitwise those of harmless padding, gradients there exactly zero."""
    shape, operands, dout = draw(SMALL, seed=5)
    operands["mask"][:, :, 2] = False
    dropped = ~operands["mask"]
    spoiled = {name: x.copy() for name, x in operands.items()}
    spoiled["k"][dropped] = spoiled["v"][dropped] = bad
    spoiled["mask_bias"][:, :, 0, 0][dropped] = bad
    spoiled["pair_bias"][..., 2] = bad  # which all rows share, and all drop key 2

    expected = results(forward, backward, operands, dout)
    actual = results(forward, backward, spoiled, dout)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
    for name in ("dk", "dv"):
        assert (actual[name][dropped] == 0).all()
    assert (actual["dmask_bias"][:, :, 0, 0][dropped] == 0).all()
    assert (actual["dpair_bias"][..., 2] == 0).all()


@every_form
def test_a_dropped_key_has_zero_gradient_beside_nan(draw, forward, backward):
    """EVO-4 before EVO-9: NaN in q spoils its row's attended keys, never the dropped ones."""
    _, operands, dout = draw(SMALL, seed=6)
    operands["mask"][:, :, 2] = False
    operands["q"][:, 0, 1] = np.nan
    actual = results(forward, backward, operands, dout)
    for name in ("dk", "dv"):
        assert (actual[name][:, :, 2] == 0).all() and np.isnan(actual[name][:, 0]).any()
    assert (actual["dmask_bias"][..., 2] == 0).all() and np.isnan(actual["dmask_bias"]).any()
    assert (actual["dpair_bias"][..., 2] == 0).all() and np.isnan(actual["dpair_bias"]).any()


@every_form
def test_dropped_keys_equal_absent_keys(draw, relative_error, forward, backward):
    """EVO-4: dropping a key in all rows is the same as not having it."""
    shape, operands, dout = draw(SMALL, ["mask", "mask_bias", "pair_bias", "gate"], seed=6)
    operands["mask"][:] = True
    operands["mask"][:, :, [1, 4]] = False
    left = [0, 2, 3, 5, 6]
    fewer = {name: x for name, x in operands.items() if name in ("q", "gate")}
    fewer |= {name: operands[name][:, :, left] for name in "kv"}
    fewer |= {name: operands[name][..., left] for name in ("mask_bias", "pair_bias")}
    expected = results(forward, backward, fewer, dout)
    actual = results(forward, backward, operands, dout)
    for name in ("out", "lse", "dq", "dgate"):
        assert relative_error(actual[name], expected[name]) <= 1e-15
    for name in ("dk", "dv"):
        assert relative_error(actual[name][:, :, left], expected[name]) <= 1e-15
    for name in ("dmask_bias", "dpair_bias"):
        assert relative_error(actual[name][..., left], expected[name]) <= 1e-15


@pytest.mark.parametrize("how", ["mask", "mask_bias", "pair_bias", "K=0"])
@every_form
def test_a_query_with_no_key_left_is_zero(draw, forward, backward, how):
    """EVO-5, however the keys were lost."""
    shape, operands, dout = draw(replace(SMALL, K=0) if how == "K=0" else SMALL, seed=7)
    if how == "mask":
        operands["mask"][:, 0] = False
    elif how != "K=0":
        operands[how][:, 0] = -np.inf
    actual = results(forward, backward, operands, dout)
    assert (actual["out"][:, 0] == 0).all()
    assert (actual["lse"][:, 0] == -np.inf).all()
    for name in ("dq", "dk", "dv", "dmask_bias", "dgate"):
        assert (actual[name][:, 0] == 0).all()
    if how in ("pair_bias", "K=0"):  # no query of any row has a key
        assert all((actual[name] == 0).all() for name in actual if name != "lse")
    else:
        assert all((x[:, -1] != 0).any() for x in actual.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["gate", "dout", "v", "q"])
@every_form
def test_nothing_passes_through_a_query_with_no_key_left(draw, forward, backward, name, bad):
    """EVO-5: NaN in the gate or the cotangent of such a query reaches no result and no gradient."""
    shape, operands, dout = draw(SMALL, ["pair_bias", "mask", "gate"], seed=8)
    operands["mask"][:] = True
    operands["mask"][:, 0] = False
    if name != "q":
        operands["pair_bias"][:, :, :, 1] = -np.inf
    expected = results(forward, backward, operands, dout)
    spoiled = {other: x.copy() for other, x in (operands | {"dout": dout}).items()}
    spoiled[name][:, 0] = bad
    if name in ("gate", "dout"):
        spoiled[name][:, :, 1] = bad
    dout = spoiled.pop("dout")
    actual = results(forward, backward, spoiled, dout)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


@every_form
def test_dead_queries_by_bias_send_nothing_to_infinite_values(draw, forward, backward):
    """EVO-5: v is +inf at a key that a bias alone drops; a dead query's own gradients are 0."""
    shape, operands, dout = draw(SMALL, ["pair_bias", "gate"], seed=9)
    operands["pair_bias"][:, :, :, 1] = -np.inf
    operands["v"][:, :, 2] = np.inf
    actual = results(forward, backward, operands, dout)
    assert (actual["out"][:, :, 1] == 0).all()
    assert (actual["dq"][:, :, 1] == 0).all()
    assert (actual["dgate"][:, :, 1] == 0).all()
    assert (actual["dpair_bias"][:, :, :, 1] == 0).all()


# --- biases ---


@pytest.mark.parametrize("name", ["mask_bias", "pair_bias"])
@every_form
def test_a_large_finite_bias_is_a_number(draw, forward, backward, name):
    """EVO-6: −1e9 on every key shifts all logits, and cancels."""
    shape, operands, dout = draw(SMALL, seed=10)
    # With logits that are multiples of 2⁻²⁰, float64 holds the sum with −2³⁰ exactly.
    for other in ("q", "k", "mask_bias", "pair_bias"):
        operands[other] = np.round(operands[other] * 2**9) / 2**9
    expected = results(forward, backward, operands, dout, scale=0.25)
    shifted = operands | {name: operands[name] - 2.0**30}
    actual = results(forward, backward, shifted, dout, scale=0.25)
    assert (expected["lse"] > -np.inf).all()
    np.testing.assert_allclose(actual.pop("lse"), expected.pop("lse") - 2.0**30, rtol=1e-15)
    for other in expected:
        np.testing.assert_allclose(actual[other], expected[other], rtol=1e-6, atol=1e-6)

    billion = results(forward, backward, operands | {name: operands[name] - 1e9}, dout, scale=0.25)
    np.testing.assert_allclose(billion["out"], expected["out"], rtol=1e-5, atol=1e-5)


@every_form
def test_a_large_finite_bias_on_some_keys_leaves_no_trace_of_them(draw, forward, backward):
    """EVO-6: −1e9 on some keys underflows to the same result as dropping them, if finite there."""
    shape, operands, dout = draw(SMALL, ["mask_bias", "mask"], seed=11)
    assert operands["mask"].any(-1).all()
    expected = results(forward, backward, operands, dout)
    mask = operands.pop("mask")
    operands["mask_bias"][:, :, 0, 0][~mask] = -1e9
    actual = results(forward, backward, operands, dout)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-12, atol=1e-14)


@every_form
def test_biases_are_broadcast_as_their_axes_say(draw, relative_error, forward, backward):
    """EVO-2: a mask bias is one number per row and key, a pair bias one per head, query and key."""
    shape, operands, dout = draw(SMALL, ["mask_bias", "pair_bias"], seed=12)
    out, lse = forward(**operands, return_lse=True)
    for s in range(shape.S):
        both = operands["pair_bias"] + operands["mask_bias"][:, s : s + 1]
        one = {name: operands[name][:, s : s + 1] for name in "qkv"}
        row, row_lse = forward(**one, pair_bias=both, return_lse=True)
        assert relative_error(row, out[:, s : s + 1]) <= 1e-14
        assert relative_error(row_lse, lse[:, s : s + 1]) <= 1e-14


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@every_form
def test_bias_gradients_are_summed_wide_and_rounded_once(draw, forward, backward, dtype):
    """EVO-8: a sum of a thousand terms in the operands' dtype would be off by many roundings."""
    wanted = {
        "dpair_bias": Shape(1, 1000, 1, 2, 1, 1, 2),
        "dmask_bias": Shape(1, 1, 999, 2, 1, 1, 2),
    }
    for name, shape in wanted.items():
        _, operands, dout = draw(shape, ["mask_bias", "pair_bias"], seed=13, dtype=dtype)
        dout = np.abs(dout)
        wide = {other: x.astype(np.float64) for other, x in operands.items()}
        expected = getattr(backward(dout.astype(np.float64), **wide), name)
        actual = getattr(backward(dout, **operands), name)
        np.testing.assert_array_equal(actual, expected.astype(dtype))


# --- NaN and infinities in attended operands ---


def attended_everywhere(draw, seed: int) -> Any:
    """No key dropped; all optional operands but the mask."""
    return draw(SMALL, ["mask_bias", "pair_bias", "gate"], seed=seed)


@every_form
def test_nan_in_an_attended_key_reaches_its_row_and_heads_alone(draw, forward, backward):
    """EVO-9."""
    shape, operands, dout = attended_everywhere(draw, 14)
    operands["k"][0, 1, 3, 1, 0] = np.nan  # head 1 of 2 serves query heads 2 and 3
    actual = results(forward, backward, operands, dout)
    reached = np.zeros(shape.of("out"), bool)
    reached[0, 1, :, 2:] = True
    np.testing.assert_array_equal(np.isnan(actual["out"]), reached)
    np.testing.assert_array_equal(np.isnan(actual["lse"]), reached[..., 0].swapaxes(2, 3))
    np.testing.assert_array_equal(np.isnan(actual["dq"]), reached)
    np.testing.assert_array_equal(np.isnan(actual["dgate"]), reached)
    for name in ("dk", "dv"):
        assert np.isnan(actual[name][0, 1, :, 1]).all()
        assert np.isnan(actual[name]).sum() == shape.K * shape.D


@every_form
def test_nan_in_a_query_reaches_that_query_alone(draw, forward, backward):
    """EVO-9."""
    shape, operands, dout = attended_everywhere(draw, 15)
    operands["q"][0, 0, 2, 1, 1] = np.nan
    out, lse = forward(**operands, return_lse=True)
    assert np.isnan(out[0, 0, 2, 1]).all() and np.isnan(out).sum() == shape.D
    assert np.isnan(lse[0, 0, 1, 2]) and np.isnan(lse).sum() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_form
def test_what_a_value_holds_reaches_its_channel_alone(draw, forward, backward, bad):
    """EVO-9: +inf times a positive probability is +inf; lse does not see values."""
    shape, operands, dout = attended_everywhere(draw, 16)
    expected, expected_lse = forward(**operands, return_lse=True)
    operands["v"][0, 1, 3, 0, 2] = bad
    out, lse = forward(**operands, return_lse=True)
    np.testing.assert_array_equal(lse, expected_lse)
    np.testing.assert_array_equal(out[0, 1, :, :2, 2], np.full((shape.Q, 2), bad))
    out[0, 1, :, :2, 2] = expected[0, 1, :, :2, 2] = 0
    np.testing.assert_array_equal(out, expected)


@every_form
def test_a_bias_of_minus_infinity_is_no_mask(draw, forward, backward):
    """EVO-9: probability 0 times NaN is NaN; only the bool mask hides what a key holds."""
    shape, operands, dout = draw(SMALL, ["pair_bias"], seed=17)
    operands["pair_bias"][..., 2] = -np.inf
    operands["v"][:, :, 2] = np.nan
    assert np.isnan(forward(**operands)).all()


@pytest.mark.parametrize("name", ["mask_bias", "pair_bias"])
@every_form
def test_a_logit_of_plus_infinity(draw, forward, backward, name):
    """EVO-9: ∞ − ∞ on the way: the output is NaN, lse is NaN or +inf; other rows are untouched."""
    shape, operands, dout = draw(SMALL, ["mask_bias", "pair_bias"], seed=18)
    expected, expected_lse = forward(**operands, return_lse=True)
    operands[name][0, 0, 0, 0, 3] = np.inf  # row 0 of the mask bias, or query 0 of head 0
    out, lse = forward(**operands, return_lse=True)
    reached = np.zeros(shape.of("lse"), bool)
    reached[(0, 0) if name == "mask_bias" else (0, slice(None), 0, 0)] = True
    assert np.isnan(out.swapaxes(2, 3)[reached]).all()
    assert (np.isnan(lse[reached]) | (lse[reached] == np.inf)).all()
    np.testing.assert_array_equal(out.swapaxes(2, 3)[~reached], expected.swapaxes(2, 3)[~reached])
    np.testing.assert_array_equal(lse[~reached], expected_lse[~reached])


@every_form
def test_gates_at_infinity_are_open_and_shut(draw, forward, backward):
    """EVO-9: σ(+inf) = 1 and σ(−inf) = 0 are exact; σ(NaN) is NaN."""
    shape, operands, dout = draw(SMALL, ["gate"], seed=19)
    gate = operands.pop("gate")
    ungated = forward(**operands)
    gate[:, :, 0], gate[:, :, 1], gate[:, :, 2] = np.inf, -np.inf, np.nan
    out = forward(**operands, gate=gate)
    np.testing.assert_array_equal(out[:, :, 0], ungated[:, :, 0])
    assert (out[:, :, 1] == 0).all() and np.isnan(out[:, :, 2]).all()
    assert (backward(dout, **operands, gate=gate).dgate[:, :, :2] == 0).all()


# --- shapes, strides, dtypes ---


@pytest.mark.parametrize("axis", ["B", "S", "Q", "K", "H", "G", "all"])
@every_form
def test_empty_axes(draw, forward, backward, axis):
    """EVO-10: every length may be 0; G is 0 only where H is."""
    sizes = vars(SMALL) | {"K": 7}
    emptied = {"G": ("G", "H"), "all": tuple("BSQKHG")}.get(axis, (axis,))
    shape = Shape(**(sizes | dict.fromkeys(emptied, 0)))
    _, operands, dout = draw(shape, seed=20)
    actual = results(forward, backward, operands, dout)
    for name, x in operands.items():
        if name != "mask":
            assert actual[f"d{name}"].shape == x.shape
            assert (actual[f"d{name}"] == 0).all()
    assert actual["out"].shape == shape.of("out") and (actual["out"] == 0).all()
    assert actual["lse"].shape == shape.of("lse") and (actual["lse"] == -np.inf).all()


def strided(x: Any, how: str) -> Any:
    """An array equal to ``x`` in another layout."""
    if how == "every-other":
        wide = np.repeat(np.repeat(x, 2, axis=-1), 2, axis=-2)
        return wide[..., ::2, ::2]
    if how == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if how == "fortran":
        return np.asfortranarray(x)
    assert how == "offset"
    return np.pad(x, 1)[tuple(slice(1, -1) for _ in x.shape)]


@pytest.mark.parametrize("how", ["every-other", "reversed", "fortran", "offset"])
@every_form
def test_strides_do_not_matter(draw, forward, backward, how):
    """EVO-10."""
    shape, operands, dout = draw(SMALL, seed=21)
    expected = results(forward, backward, operands, dout)
    views = {name: strided(x, how) for name, x in operands.items()}
    assert not views["q"].flags.c_contiguous
    actual = results(forward, backward, views, strided(dout, how))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-13, atol=1e-13)


@every_form
def test_broadcast_operands(draw, forward, backward):
    """EVO-10: stride 0 along any axis; gradients have the shape seen, not the one stored."""
    shape, operands, dout = draw(SMALL, seed=22)
    rng = np.random.default_rng(22)
    for axes in ((0,), (1,), (2,), (3,), (4,), (0, 1, 2)):
        views = {}
        for name, x in operands.items():
            chosen = [axis for axis in axes if axis < x.ndim]
            first = x[
                tuple(slice(0, 1) if axis in chosen else slice(None) for axis in range(x.ndim))
            ]
            views[name] = np.broadcast_to(first, x.shape)
        copies = {name: x.copy() for name, x in views.items()}
        cotangent = np.broadcast_to(rng.standard_normal(shape.D), dout.shape)
        expected = results(forward, backward, copies, cotangent.copy())
        actual = results(forward, backward, views, cotangent)
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-13, atol=1e-13)


@every_form
def test_inputs_are_never_written(draw, forward, backward):
    """EVO-10: read-only arrays do, and nothing returned is a view of an operand."""
    shape, operands, dout = draw(SMALL, seed=23, dead=True, infinite=True, garbage=True)
    before = {name: x.copy() for name, x in operands.items()}
    for x in (*operands.values(), dout):
        x.flags.writeable = False
    actual = results(forward, backward, operands, dout)
    for name, x in operands.items():
        np.testing.assert_array_equal(x, before[name])
    for result in actual.values():
        assert result.flags.writeable
        assert not any(np.may_share_memory(result, x) for x in (*operands.values(), dout))


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.longdouble, np.longdouble),
    ],
    ids=["float16", "bfloat16", "float32", "float64", "longdouble"],
)
@every_form
def test_results_are_those_of_float64_rounded_once(draw, forward, backward, dtype, lse_dtype):
    """EVO-7: results have the operands' dtype, lse float32 or wider; nothing else is rounded."""
    shape, operands, dout = draw(SMALL, seed=24, dtype=dtype, dead=True)
    actual = results(forward, backward, operands, dout)
    lse = actual.pop("lse")
    assert lse.dtype == lse_dtype
    assert {x.dtype for x in actual.values()} == {np.dtype(dtype)}

    wide = np.promote_types(dtype, np.float64)
    lifted = {name: x.astype(wide) if x.dtype != bool else x for name, x in operands.items()}
    expected = results(forward, backward, lifted, dout.astype(wide))
    np.testing.assert_array_equal(lse, expected.pop("lse").astype(lse_dtype))
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name].astype(dtype))


@pytest.mark.skipif(np.finfo(np.longdouble).eps == np.finfo(float).eps, reason="no longer double")
@every_form
def test_longdouble_is_computed_in_longdouble(draw, forward, backward):
    """EVO-7: three digits more than float64, or it would be float64 in disguise."""
    shape, operands, dout = draw(SMALL, seed=25, dtype=np.longdouble)
    exact = results(forward, backward, operands, dout)
    rounded = results(forward, backward, operands, dout, compute_dtype=np.float64)
    plain = results(evoformer_attention, evoformer_attention_backward, operands, dout)
    for name in exact:
        size = np.abs(exact[name]).max()
        assert 1e-18 * size < np.abs(rounded[name] - exact[name]).max() <= 1e-14 * size
        assert np.abs(plain[name] - exact[name]).max() <= 1e-17 * size


@every_form
def test_compute_dtype_is_the_arithmetic(draw, relative_error, forward, backward):
    """EVO-7: float32 arithmetic errs by float32's roundoff, not by float64's nor by float16's."""
    shape, operands, dout = draw(Shape(1, 2, 33, 65, 4, 2, 16), seed=26)
    expected = results(forward, backward, operands, dout)
    actual = results(forward, backward, operands, dout, compute_dtype="float32")
    for name in expected:
        assert actual[name].dtype == np.float64
        assert 1e-9 < relative_error(actual[name], expected[name]) < 1e-5
    for unknown in ("float16", "int32", "complex64"):
        with pytest.raises(ValueError, match="compute_dtype must be one of float32, float64"):
            forward(**operands, compute_dtype=unknown)
        with pytest.raises(ValueError, match="compute_dtype must be one of float32, float64"):
            backward(dout, **operands, compute_dtype=unknown)


@every_form
def test_float16_does_not_overflow_inside(draw, forward, backward):
    """EVO-7: q·k is 2.5 million here, and float16 ends at 65504."""
    shape = Shape(1, 1, 2, 3, 1, 1, 64)
    ones = {name: np.full(shape.of(name), 200, np.float16) for name in "qk"}
    v = np.arange(3 * 64, dtype=np.float16).reshape(shape.of("v"))
    out, lse = forward(**ones, v=v, return_lse=True)
    np.testing.assert_array_equal(out[0, 0, 0, 0], v[0, 0].mean((0, 1), dtype=np.float64))
    np.testing.assert_allclose(lse, 200 * 200 * 8 + np.log(3), rtol=1e-7)
    dout = np.full(shape.of("out"), 2**-10, np.float16)
    assert all(np.isfinite(x).all() for x in backward(dout, **ones, v=v)[:3])


@every_form
def test_the_default_scale(draw, forward, backward):
    """EVO-2: D**-0.5."""
    shape, operands, dout = draw(Shape(1, 1, 3, 4, 2, 1, 7), seed=27)
    expected = results(forward, backward, operands, dout, scale=7**-0.5)
    actual = results(forward, backward, operands, dout)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
    assert (forward(**operands, scale=7**-1) != actual["out"]).any()


@every_form
def test_lse_is_that_of_the_logits_before_the_gate(draw, forward, backward):
    """EVO-3: and it is returned on request only."""
    shape, operands, dout = draw(SMALL, seed=28)
    gate = operands.pop("gate")
    _, expected = forward(**operands, return_lse=True)
    out, lse = forward(**operands, gate=gate, return_lse=True)
    np.testing.assert_array_equal(lse, expected)
    alone = forward(**operands, gate=gate)
    assert isinstance(alone, np.ndarray)
    np.testing.assert_array_equal(alone, out)


@every_form
def test_equal_calls_have_equal_results(draw, forward, backward):
    """EVO-13: bit by bit, gradients included."""
    shape, operands, dout = draw(Shape(2, 3, 33, 47, 4, 2, 16), seed=29)
    first = results(forward, backward, operands, dout)
    again = results(forward, backward, operands, dout)
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)


# --- wrong calls ---


@every_form
def test_wrong_calls_are_refused_in_either_direction(draw, forward, backward):
    """EVO-12: the contract's checks stand at every door (they are tested in test_contract)."""
    shape, operands, dout = draw(SMALL, seed=30)
    short = operands | {"gate": operands["gate"][:, :, :-1]}
    mixed = operands | {"v": operands["v"].astype(np.float32)}
    for call in (lambda **x: forward(**x), lambda **x: backward(dout, **x)):
        with pytest.raises(ValueError, match=r"gate must have Q=5 on axis 2"):
            call(**short)
        with pytest.raises(TypeError, match=r"v must be float64, the dtype of q, got float32"):
            call(**mixed)
        with pytest.raises(ValueError, match="scale must be finite"):
            call(**operands, scale=np.nan)
        with pytest.raises(TypeError, match="q must be one of"):
            call(**operands | {"q": operands["q"].astype(int)})


@every_form
def test_wrong_cotangents_are_refused(draw, forward, backward):
    """EVO-12."""
    shape, operands, dout = draw(SMALL, seed=31)
    with pytest.raises(ValueError, match=r"dout must have the shape of q \(1, 2, 5, 4, 3\), got"):
        backward(dout[:, :, :-1], **operands)
    with pytest.raises(TypeError, match="dout must be float64, the dtype of q, got float32"):
        backward(dout.astype(np.float32), **operands)
    with pytest.raises(TypeError, match="dout must be an array, got list"):
        backward(dout.tolist(), **operands)


@every_form
def test_absent_operands_have_no_gradient(draw, forward, backward):
    shape, operands, dout = draw(SMALL, [], seed=32)
    gradients = backward(dout, **operands)
    assert gradients.dmask_bias is gradients.dpair_bias is gradients.dgate is None
    assert gradients._fields == tuple(f"d{name}" for name in DIFFERENTIABLE)
