"""Attention over a sequence against 60 digits, complex steps, and each rule of its contract."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.reference.attention_contract import SequenceShape
from isoform.reference.numpy import (
    AttentionGradients,
    attention,
    attention_backward,
    attention_backward_tiled,
    attention_block,
    attention_block_backward,
    attention_block_backward_tiled,
    attention_block_tiled,
    attention_delta,
    attention_tiled,
    merge,
)

TILES = {"block_q": 2, "block_k": 3}
SMALL = SequenceShape(B=2, Q=7, K=7, H=4, G=2, D=3)
VARIANTS = (
    "full",
    "causal",
    "window",
    "causal-window",
    "shuffled",
    "packed",
    "padded",
    "everything",
)


def parts(k: Any, options: Any) -> Any:
    """The keys in three blocks, the middle one empty, each with its places."""
    K = k.shape[1]
    queries = options.get("positions")
    own = queries if queries is not None else np.arange(K)
    whole = {
        "positions": np.arange(K) if queries is None else queries,
        "key_positions": options.get("key_positions", own),
    }
    if (segments := options.get("segments")) is not None:
        whole["key_segments"] = options.get("key_segments", segments)
    cut = (2 * K) // 3
    for keys in (slice(0, cut), slice(cut, cut), slice(cut, K)):
        places = {name: x[..., keys] if name.startswith("key_") else x for name, x in whole.items()}
        yield keys, options | places


def in_blocks(attend: Any) -> Any:
    """The forward of a ring: each block by itself, then merged."""

    def forward(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
        found = [attend(q, k[:, at], v[:, at], **more) for at, more in parts(k, options)]
        out, lse = found[0]
        for more in found[1:]:
            out, lse = merge(out, lse, *more)
        return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)

    return forward


def in_blocks_backward(attend: Any, differentiate: Any) -> Any:
    """The backward of a ring: lse and δ of the whole, the gradients of each block."""

    def backward(dout: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
        whole = {name: x for name, x in options.items() if name != "compute_dtype"}
        out, lse = in_blocks(attend)(q, k, v, return_lse=True, **whole)
        delta = attention_delta(dout, out)
        found = [
            differentiate(dout, q, k[:, at], v[:, at], lse, delta, **more)
            for at, more in parts(k, options)
        ]
        dq = sum(gradients.dq for gradients in found)
        dk, dv = (np.concatenate([g[at] for g in found], axis=1) for at in (1, 2))
        return AttentionGradients(*(x.astype(q.dtype) for x in (dq, dk, dv)))

    return backward


def tiled(function: Any) -> Any:
    """``function`` in tiles smaller than the problems."""
    return lambda *args, **options: function(*args, **options, **TILES)


# Rules that hold for every form are checked on all: in one piece, in tiles, and in blocks of keys.
FORMS = {
    "plain": (attention, attention_backward),
    "tiled": (tiled(attention_tiled), tiled(attention_backward_tiled)),
    "blocks": (
        in_blocks(attention_block),
        in_blocks_backward(attention_block, attention_block_backward),
    ),
    "blocks-tiled": (
        in_blocks(tiled(attention_block_tiled)),
        in_blocks_backward(tiled(attention_block_tiled), tiled(attention_block_backward_tiled)),
    ),
}
WHOLE = {name: FORMS[name] for name in ("plain", "tiled")}
every_form = pytest.mark.parametrize(("forward", "backward"), FORMS.values(), ids=list(FORMS))
whole_forms = pytest.mark.parametrize(("forward", "backward"), WHOLE.values(), ids=list(WHOLE))
every_variant = pytest.mark.parametrize("variant", VARIANTS)
same_examples = settings(deadline=None, derandomize=True, max_examples=60)


def results(forward: Any, backward: Any, call: Any, **more: Any) -> Any:
    """out, lse and the gradients by name."""
    out, lse = forward(**call.operands, **call.options, return_lse=True, **more)
    gradients = backward(call.dout, **call.operands, **call.options, **more)
    return {"out": out, "lse": lse, **gradients._asdict()}


def assert_close(actual: Any, expected: Any, bound: float = 1e-13) -> None:
    """Every result within ``bound`` of the largest number expected."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        scale = max(np.abs(x[np.isfinite(x)]).max(initial=0), 1e-30)
        np.testing.assert_allclose(actual[name], x, rtol=0, atol=bound * scale, err_msg=name)


# --- against 60 digits and complex steps ---


@pytest.mark.parametrize("G", [1, 2])
@every_variant
@every_form
def test_exact_to_14_digits(
    draw_sequence, exact_sequence, attending, relative_error, forward, backward, variant, G
):
    """SEQ-3, SEQ-6, SEQ-8: forward and gradients, for every kind of mask."""
    for Q, K in ((6, 6), (3, 7)):
        call = draw_sequence(SequenceShape(1, Q, K, 2, G, 2), variant, seed=G)
        assert attending(call).sum(-1).max() > 1  # of a single key, all of ds is rounding error
        expected = exact_sequence(call)
        actual = results(forward, backward, call)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert actual.keys() == expected.keys()
        assert max(errors.values()) <= 2e-14, errors


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
@every_form
def test_scale_is_a_factor_of_the_logits(
    draw_sequence, exact_sequence, relative_error, forward, backward, scale
):
    """SEQ-6."""
    call = draw_sequence(SequenceShape(1, 4, 4, 2, 1, 2), "causal", seed=3)
    expected = exact_sequence(call, scale)
    actual = results(forward, backward, call, scale=scale)
    assert max(relative_error(actual[name], expected[name]) for name in expected) <= 2e-14


def complex_step(forward: Any, call: Any, name: str, step: float = 1e-30) -> Any:
    """The gradient of <dout, out> by one operand: Im f(x + ih) / h, one number at a time."""
    gradient = np.zeros(call.operands[name].shape)
    for at in np.ndindex(*gradient.shape):
        moved = {other: x.astype(complex) for other, x in call.operands.items()}
        moved[name][at] += 1j * step
        out = forward(**moved, **call.options)
        gradient[at] = (out.imag / step * call.dout).sum()
    return gradient


@pytest.mark.parametrize("name", ["q", "k", "v"])
@every_variant
@whole_forms
def test_backward_agrees_with_complex_steps(
    draw_sequence, relative_error, forward, backward, variant, name
):
    """SEQ-8."""
    call = draw_sequence(SequenceShape(2, 7, 7, 2, 1, 3), variant, seed=1, spread=2)
    expected = complex_step(forward, call, name)
    actual = backward(call.dout, **call.operands, **call.options)._asdict()[f"d{name}"]
    assert np.abs(expected).max() > 1e-3
    assert relative_error(actual, expected) <= 1e-13


# --- who attends to whom ---


@same_examples
@given(data=st.data())
@every_form
def test_the_order_of_keys_and_of_queries_does_not_matter(sequence_calls, forward, backward, data):
    """SEQ-3: tokens are told apart by their places, not by their index."""
    call = data.draw(sequence_calls())
    if call.shape.Q != call.shape.K:
        call.options.setdefault("key_positions", np.arange(call.shape.K))
    rng = np.random.default_rng(1)
    rows, keys = rng.permutation(call.shape.Q), rng.permutation(call.shape.K)
    expected = results(forward, backward, call)
    options = dict(call.options)
    options.setdefault("positions", np.arange(call.shape.Q))
    for name in ("positions", "segments"):
        if name in options:
            own = options.get(f"key_{name}", options[name])
            options[f"key_{name}"] = own[..., keys]
            options[name] = options[name][..., rows]
    operands = {name: x[:, rows if name == "q" else keys] for name, x in call.operands.items()}
    moved = replace(call, operands=operands, options=options, dout=call.dout[:, rows])
    actual = results(forward, backward, moved)
    back = {"out": rows, "dq": rows, "dk": keys, "dv": keys}
    for name, order in back.items():
        np.testing.assert_allclose(actual[name], expected[name][:, order], rtol=0, atol=1e-13)
    np.testing.assert_allclose(actual["lse"], expected["lse"][..., rows], rtol=0, atol=1e-13)


@same_examples
@given(data=st.data())
def test_any_split_of_the_keys_can_be_merged(sequence_calls, data):
    """SEQ-11: which keys are where, and in how many blocks, does not matter."""
    call = data.draw(sequence_calls())
    K = call.shape.K
    where = np.array(data.draw(st.lists(st.integers(0, 2), min_size=K, max_size=K)))
    places = {"positions": call.options.get("positions", np.arange(call.shape.Q))}
    places["key_positions"] = call.options.get(
        "key_positions", places["positions"] if call.shape.Q == K else np.arange(K)
    )
    if "segments" in call.options:
        places["segments"] = call.options["segments"]
        places["key_segments"] = call.options.get("key_segments", places["segments"])
    options = call.options | places
    whole = replace(call, options=options)
    expected = results(attention, attention_backward, whole)
    delta = attention_delta(call.dout, expected["out"])
    dq, dk, dv = 0, np.zeros_like(expected["dk"]), np.zeros_like(expected["dv"])
    found = []
    for block in range(3):
        keys = where == block
        mine = {name: x[..., keys] for name, x in options.items() if name.startswith("key_")}
        block_of = {"k": call.operands["k"][:, keys], "v": call.operands["v"][:, keys]}
        given = {"q": call.operands["q"], **block_of, **(options | mine)}
        found.append(attention_block(**given))
        more = attention_block_backward(call.dout, **given, lse=expected["lse"], delta=delta)
        dq, dk[:, keys], dv[:, keys] = dq + more.dq, more.dk, more.dv
    first = merge(*merge(*found[0], *found[1]), *found[2])
    last = merge(*found[2], *merge(*found[1], *found[0]))
    for out, lse in (first, last):
        assert_close(
            {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv},
            {name: expected[name] for name in ("out", "lse", "dq", "dk", "dv")},
        )


@every_form
def test_segments_equal_separate_calls(draw_sequence, forward, backward):
    """SEQ-3: documents packed into one sequence do not see each other."""
    call = draw_sequence(SequenceShape(2, 11, 11, 4, 2, 3), "causal", seed=4)
    lengths = (4, 2, 5)
    call.options["segments"] = np.repeat([7, 2, 5], lengths)
    packed = results(forward, backward, call)
    start = 0
    for length in lengths:
        at = slice(start, start + length)
        operands = {name: x[:, at] for name, x in call.operands.items()}
        alone = replace(call, operands=operands, options={"causal": True}, dout=call.dout[:, at])
        expected = results(attention, attention_backward, alone)
        actual = {name: x[..., at] if name == "lse" else x[:, at] for name, x in packed.items()}
        assert_close(actual, expected, 1e-14)
        start += length


@every_form
def test_positions_may_start_anew_in_each_segment(draw_sequence, forward, backward):
    """SEQ-3: only positions of one segment are compared."""
    call = draw_sequence(SMALL, "causal", seed=5)
    call.options |= {"segments": np.array([0, 0, 0, 1, 1, 1, 1]), "window": (1, 0)}
    expected = results(forward, backward, call)
    call.options["positions"] = np.array([0, 1, 2, 0, 1, 2, 3])
    assert_close(results(forward, backward, call), expected, 1e-15)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"window": 7}, {}),
        ({"window": (-1, -1)}, {}),
        ({"window": -1}, {}),
        ({"window": [6, 6]}, {}),
        ({"window": (-1, 0)}, {"causal": True}),
        ({"causal": True, "window": (9, 9)}, {"causal": True}),
        ({"causal": True, "window": 2}, {"window": (2, 0)}),
        ({"window": np.int32(2)}, {"window": (2, 2)}),
    ],
    ids=str,
)
@every_form
def test_windows_that_are_the_same(draw_sequence, forward, backward, options, same):
    """SEQ-3: a window without end is none, and causal attention is a window."""
    call = draw_sequence(SMALL, "full", seed=6)
    expected = results(forward, backward, replace(call, options=same))
    actual = results(forward, backward, replace(call, options=options))
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (0, 2), (2, 1), (-1, 1), (2, -1)])
@every_form
def test_a_window_ends_where_it_says(draw_sequence, forward, backward, window):
    """SEQ-3: both ends are inside; one position further is not seen at all."""
    call = draw_sequence(SMALL, "full", seed=8)
    left, right = (call.shape.K if side == -1 else side for side in window)
    for i in range(call.shape.Q):
        values = np.zeros_like(call.operands["v"])
        for j in range(call.shape.K):
            values[:, j] = 2.0**j  # a sum of distinct powers of two says which keys are in it
        out = forward(
            call.operands["q"] * 0, call.operands["k"], values, window=window, positions=None
        )
        seen = [j for j in range(call.shape.K) if i - left <= j <= i + right]
        np.testing.assert_allclose(
            out[:, i], np.full_like(out[:, i], sum(2.0**j for j in seen) / len(seen)), rtol=1e-14
        )


@pytest.mark.parametrize("offset", [-5, 2**31 - 3, 2**62])
@every_form
def test_only_differences_of_positions_matter(draw_sequence, forward, backward, offset):
    """SEQ-2: positions may lie anywhere among 64-bit integers, and be negative."""
    call = draw_sequence(SMALL, "everything", seed=9)
    expected = results(forward, backward, call)
    call.options["positions"] = call.options["positions"].astype(np.int64) + offset
    actual = results(forward, backward, call)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


@every_form
def test_differences_of_32_bit_positions_do_not_wrap_around(draw_sequence, forward, backward):
    """SEQ-2: 2³¹−1 and −2³¹ are far apart, and were neighbours in 32-bit arithmetic."""
    call = draw_sequence(replace(SMALL, Q=2, K=2), "full", seed=10)
    ends = np.array([2**31 - 1, -(2**31)], np.int32)
    out = forward(**call.operands, positions=ends, window=1)
    wanted = np.repeat(call.operands["v"], 2, axis=2)
    np.testing.assert_allclose(out, wanted, rtol=1e-15)


@every_form
def test_a_key_shard_has_its_own_places(draw_sequence, attending, forward, backward):
    """SEQ-2: where Q = K, key_positions still win over positions."""
    call = draw_sequence(SMALL, "causal", seed=11)
    call.options |= {"positions": np.arange(7) + 7, "key_positions": np.arange(7)}
    past = results(forward, backward, call)
    assert attending(call).all()
    full = results(forward, backward, replace(call, options={}))
    assert_close(past, full, 1e-15)
    call.options["positions"] = np.arange(7) - 7
    future = results(forward, backward, call)
    assert (future["lse"] == -np.inf).all() and (future["dk"] == 0).all()


# --- padding, and queries without keys ---


@every_form
def test_padding_is_not_seen(draw_sequence, forward, backward):
    """SEQ-4 and SEQ-5: bitwise the results of harmless padding; its own are exactly zero."""
    for seed in range(4):
        clean = draw_sequence(SMALL, "everything", seed=seed)
        dirty = draw_sequence(SMALL, "everything", seed=seed, garbage=True)
        padding = clean.options["segments"] < 0
        assert padding.any() and np.isnan(dirty.operands["k"]).any()
        expected, actual = (results(forward, backward, call) for call in (clean, dirty))
        for name in expected:
            np.testing.assert_array_equal(actual[name], expected[name])
        assert all((actual[name][padding] == 0).all() for name in ("out", "dq", "dk", "dv"))
        assert (actual["lse"].swapaxes(1, 2)[padding] == -np.inf).all()


@pytest.mark.parametrize("name", ["q", "dout"])
@every_form
def test_padding_has_zero_gradient_beside_nan(draw_sequence, forward, backward, name):
    """SEQ-4 before SEQ-9."""
    call = draw_sequence(SMALL, "padded", seed=12)
    call.options["segments"] = np.array([0, 0, 0, 0, -1, 0, -1])
    (call.operands | {"dout": call.dout})[name][:, 0] = np.nan
    actual = results(forward, backward, call)
    padding = call.options["segments"] < 0
    for gradient in ("dk", "dv"):
        assert (actual[gradient][:, padding] == 0).all()
        assert np.isnan(actual[gradient][:, ~padding]).all()


@pytest.mark.parametrize("how", ["segments", "window", "causal", "K=0", "minus-inf"])
@every_form
def test_a_query_with_no_key_left_is_zero(draw_sequence, forward, backward, how):
    """SEQ-5, however the keys were lost."""
    call = draw_sequence(replace(SMALL, K=0) if how == "K=0" else SMALL, "full", seed=13)
    positions = np.arange(7)
    call.options = {
        "segments": {"segments": np.array([3, 0, 0, 0, 0, 0, 0]), "key_segments": np.zeros(7, int)},
        "window": {"positions": positions * 9, "key_positions": positions * 9 + 9, "window": 1},
        "causal": {"positions": positions, "key_positions": positions + 1, "causal": True},
        "K=0": {"positions": positions, "key_positions": positions[:0], "causal": True},
        "minus-inf": {},
    }[how]
    if how == "minus-inf":
        call.operands["k"] = np.abs(call.operands["k"])
        call.operands["q"][:, 0] = -np.inf
    actual = results(forward, backward, call)
    assert (actual["out"][:, 0] == 0).all()
    assert (actual["lse"][..., 0] == -np.inf).all()
    if how != "minus-inf":  # an infinite q makes its own keys' gradients NaN, and may
        assert (actual["dq"][:, 0] == 0).all()
        assert all(np.isfinite(actual[name]).all() for name in ("dk", "dv"))
    if how in ("segments", "causal"):
        assert all((actual[name][:, -1] != 0).any() for name in ("out", "dq"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "dout"])
@every_form
def test_nothing_passes_through_a_query_with_no_key_left(
    draw_sequence, forward, backward, name, bad
):
    """SEQ-5: NaN in such a query, or in its cotangent, reaches nothing."""
    call = draw_sequence(SMALL, "causal", seed=14)
    call.options |= {"positions": np.arange(7), "key_positions": np.arange(7) + 1}
    expected = results(forward, backward, call)
    (call.dout if name == "dout" else call.operands["q"])[:, 0] = bad
    actual = results(forward, backward, call)
    for result in expected:
        np.testing.assert_array_equal(actual[result], expected[result])


# --- NaN and infinities in attended operands ---


@every_form
def test_nan_in_an_attended_key_reaches_its_queries_and_heads(draw_sequence, forward, backward):
    """SEQ-9: the first key of a causal call is attended by all."""
    call = draw_sequence(SMALL, "causal", seed=15)
    call.operands["k"][0, 0, 1, 0] = np.nan  # head 1 of 2 serves query heads 2 and 3
    actual = results(forward, backward, call)
    reached = np.zeros(call.shape.of("out"), bool)
    reached[0, :, 2:] = True
    np.testing.assert_array_equal(np.isnan(actual["out"]), reached)
    np.testing.assert_array_equal(np.isnan(actual["lse"]), reached[..., 0].swapaxes(1, 2))
    np.testing.assert_array_equal(np.isnan(actual["dq"]), reached)


@every_form
def test_nan_in_a_query_reaches_that_query_alone(draw_sequence, forward, backward):
    """SEQ-9."""
    call = draw_sequence(SMALL, "causal", seed=16)
    call.operands["q"][0, 2, 1, 1] = np.nan
    out, lse = forward(**call.operands, **call.options, return_lse=True)
    assert np.isnan(out[0, 2, 1]).all() and np.isnan(out).sum() == call.shape.D
    assert np.isnan(lse[0, 1, 2]) and np.isnan(lse).sum() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_form
def test_what_a_value_holds_reaches_its_channel_alone(draw_sequence, forward, backward, bad):
    """SEQ-9: lse does not see values."""
    call = draw_sequence(SMALL, "full", seed=17)
    expected, expected_lse = forward(**call.operands, return_lse=True)
    call.operands["v"][0, 3, 0, 2] = bad
    out, lse = forward(**call.operands, return_lse=True)
    np.testing.assert_array_equal(lse, expected_lse)
    np.testing.assert_array_equal(out[0, :, :2, 2], np.full((7, 2), bad))
    out[0, :, :2, 2] = expected[0, :, :2, 2] = 0
    np.testing.assert_array_equal(out, expected)


# --- shapes, strides, dtypes, memory ---


@pytest.mark.parametrize("axis", ["B", "Q", "K", "H", "Q K", "all"])
@every_form
def test_empty_axes(draw_sequence, forward, backward, axis):
    """SEQ-10: every length may be 0; G is 0 only where H is."""
    emptied = {"H": ("G", "H"), "Q K": ("Q", "K"), "all": tuple("BQKHG")}.get(axis, (axis,))
    shape = SequenceShape(**(vars(SMALL) | dict.fromkeys(emptied, 0)))
    call = draw_sequence(shape, "everything", seed=20)
    actual = results(forward, backward, call)
    for name, x in call.operands.items():
        assert actual[f"d{name}"].shape == x.shape and (actual[f"d{name}"] == 0).all()
    assert actual["out"].shape == shape.of("out") and (actual["out"] == 0).all()
    assert actual["lse"].shape == shape.of("lse") and (actual["lse"] == -np.inf).all()


@every_form
def test_strides_do_not_matter(draw_sequence, forward, backward):
    """SEQ-10: any layout, and stride 0 where one place serves all examples."""
    call = draw_sequence(SMALL, "everything", seed=21)
    expected = results(forward, backward, call)
    wide = {name: np.repeat(x, 2, axis=-1)[..., ::2] for name, x in call.operands.items()}
    fortran = {name: np.asfortranarray(x) for name, x in call.operands.items()}
    for operands in (wide, fortran):
        assert_close(results(forward, backward, replace(call, operands=operands)), expected)
    packed = draw_sequence(SMALL, "packed", seed=22)
    expected = results(forward, backward, packed)
    packed.options["segments"] = np.broadcast_to(packed.options["segments"], (2, 7))
    assert_close(results(forward, backward, packed), expected, 1e-15)


@every_form
def test_inputs_are_never_written(draw_sequence, forward, backward):
    """SEQ-10: read-only arrays do, and nothing returned is a view of an operand."""
    call = draw_sequence(SMALL, "everything", seed=23, garbage=True)
    places = [x for x in call.options.values() if isinstance(x, np.ndarray)]
    arrays = [*call.operands.values(), *places, call.dout]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    actual = results(forward, backward, call)
    for x, was in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, was)
    for result in actual.values():
        assert result.flags.writeable
        assert not any(np.may_share_memory(result, x) for x in arrays)


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
@whole_forms
def test_results_are_those_of_float64_rounded_once(
    draw_sequence, forward, backward, dtype, lse_dtype
):
    """SEQ-7: results have the operands' dtype, lse float32 or wider; nothing else is rounded."""
    call = draw_sequence(SMALL, "everything", seed=24, dtype=dtype)
    actual = results(forward, backward, call)
    assert actual["lse"].dtype == lse_dtype
    assert {x.dtype for name, x in actual.items() if name != "lse"} == {np.dtype(dtype)}
    wide = np.promote_types(dtype, np.float64)
    lifted = replace(
        call,
        operands={name: x.astype(wide) for name, x in call.operands.items()},
        dout=call.dout.astype(wide),
    )
    expected = results(forward, backward, lifted)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name].astype(actual[name].dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("tiles", [False, True], ids=["plain", "tiled"])
def test_blocks_are_not_yet_rounded(draw_sequence, dtype, tiles):
    """SEQ-11: what is merged and summed is float32 at least, and rounded after."""
    attend, differentiate = (
        (tiled(attention_block_tiled), tiled(attention_block_backward_tiled))
        if tiles
        else (attention_block, attention_block_backward)
    )
    call = draw_sequence(SMALL, "packed", seed=25, dtype=dtype)
    out, lse = attend(**call.operands, **call.options)
    delta = attention_delta(call.dout, out)
    gradients = differentiate(call.dout, **call.operands, lse=lse, delta=delta, **call.options)
    wide = np.promote_types(dtype, np.float32)
    assert {x.dtype for x in (out, lse, delta, *gradients)} == {wide}
    expected = results(*WHOLE["tiled" if tiles else "plain"], call)
    np.testing.assert_array_equal(out.astype(dtype), expected["out"])
    if dtype != np.float64:
        assert (out != expected["out"]).any() == (dtype != np.float32)
    unit = float(ml_dtypes.finfo(dtype).eps)
    for name, x in gradients._asdict().items():
        size = np.abs(expected[name].astype(float)).max()
        assert np.abs(x - expected[name].astype(float)).max() <= unit * size


@whole_forms
def test_compute_dtype_is_the_arithmetic(draw_sequence, relative_error, forward, backward):
    """SEQ-7: float32 arithmetic errs by float32's roundoff, not by float64's nor by float16's."""
    call = draw_sequence(SequenceShape(1, 65, 65, 4, 2, 16), "causal", seed=26)
    expected = results(forward, backward, call)
    actual = results(forward, backward, call, compute_dtype="float32")
    for name in expected:
        assert actual[name].dtype == np.float64
        assert 1e-9 < relative_error(actual[name], expected[name]) < 1e-5
    with pytest.raises(ValueError, match="compute_dtype must be one of float32, float64"):
        forward(**call.operands, compute_dtype="float16")


@whole_forms
def test_float16_does_not_overflow_inside(draw_sequence, forward, backward):
    """SEQ-7: q·k is 2.5 million here, and float16 ends at 65504."""
    shape = SequenceShape(1, 3, 3, 1, 1, 64)
    ones = {name: np.full(shape.of(name), 200, np.float16) for name in "qk"}
    v = np.arange(3 * 64, dtype=np.float16).reshape(shape.of("v"))
    out, lse = forward(**ones, v=v, return_lse=True)
    np.testing.assert_array_equal(out[0, 0, 0], v[0].mean((0, 1), dtype=np.float64))
    np.testing.assert_allclose(lse, 200 * 200 * 8 + np.log(3), rtol=1e-7)
    dout = np.full(shape.of("out"), 2**-10, np.float16)
    assert all(np.isfinite(x).all() for x in backward(dout, **ones, v=v))


@every_form
def test_equal_calls_have_equal_results(draw_sequence, forward, backward):
    """SEQ-13: bit by bit, gradients included."""
    call = draw_sequence(SequenceShape(2, 33, 33, 4, 2, 16), "everything", seed=29)
    first, again = (results(forward, backward, call) for _ in range(2))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)


def test_tiles_hold_nothing_of_size_q_k(draw_sequence):
    """No L × L memory, not even of the mask: 2 MB for what has 16 million pairs."""
    call = draw_sequence(SequenceShape(1, 4096, 4096, 1, 1, 4), "packed", seed=30)
    for run in (
        lambda: attention_tiled(**call.operands, **call.options, block_q=128, block_k=128),
        lambda: attention_backward_tiled(
            call.dout, **call.operands, **call.options, block_q=128, block_k=128
        ),
    ):
        tracemalloc.start()
        run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * 2**20, peak


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 256), ({"causal": True}, 136), ({"causal": True, "window": (3, 0)}, 31)],
    ids=["full", "causal", "window"],
)
def test_tiles_without_a_pair_are_not_computed(draw_sequence, monkeypatch, options, most):
    """16 · 16 tiles; half of them, and the diagonal, are causal; a window has one beside it."""
    module = import_module("isoform.reference.numpy.attention_tiled")
    count = []
    plain = module.logits
    monkeypatch.setattr(module, "logits", lambda *args: count.append(1) or plain(*args))
    call = draw_sequence(SequenceShape(1, 64, 64, 1, 1, 4), "full", seed=31)
    attention_tiled(**call.operands, **options, block_q=4, block_k=4)
    assert len(count) == most
    attention_backward_tiled(call.dout, **call.operands, **options, block_q=4, block_k=4)
    assert len(count) == 3 * most  # the backward recomputes the forward first


# --- wrong calls (the operand check is tested in test_attention_contract) ---

DOORS = {
    "attention": lambda call, **more: attention(**(call.operands | call.options | more)),
    "attention_tiled": lambda call, **more: attention_tiled(
        **(call.operands | call.options | more)
    ),
    "attention_block": lambda call, **more: attention_block(
        **(call.operands | call.options | more)
    ),
    "attention_block_tiled": lambda call, **more: attention_block_tiled(
        **(call.operands | call.options | more)
    ),
    "attention_backward": lambda call, **more: attention_backward(
        **({"dout": call.dout} | call.operands | call.options | more)
    ),
    "attention_backward_tiled": lambda call, **more: attention_backward_tiled(
        **({"dout": call.dout} | call.operands | call.options | more)
    ),
    "attention_block_backward": lambda call, **more: attention_block_backward(
        **(statistics(call) | call.operands | call.options | more)
    ),
    "attention_block_backward_tiled": lambda call, **more: attention_block_backward_tiled(
        **(statistics(call) | call.operands | call.options | more)
    ),
}


def statistics(call: Any) -> dict[str, Any]:
    """dout, and lse and δ that fit."""
    zeros = np.zeros(call.shape.of("lse"))
    return {"dout": call.dout, "lse": zeros, "delta": zeros}


@pytest.mark.parametrize("door", DOORS)
def test_wrong_calls_are_refused_at_every_door(draw_sequence, door):
    """SEQ-12."""
    call = draw_sequence(SMALL, "everything", seed=32)
    run = DOORS[door]
    run(call)
    with pytest.raises(ValueError, match=r"v must have K=7 on axis 1"):
        run(call, v=call.operands["v"][:, :-1])
    with pytest.raises(TypeError, match=r"v must be float64, the dtype of q, got float32"):
        run(call, v=call.operands["v"].astype(np.float32))
    with pytest.raises(ValueError, match="scale must be finite"):
        run(call, scale=np.nan)
    with pytest.raises(ValueError, match="window must not be below -1"):
        run(call, window=-2)
    if "backward" in door:
        with pytest.raises(ValueError, match=r"dout must have the shape of q \(2, 7, 4, 3\), got"):
            run(call, dout=call.dout[:, :-1])
        with pytest.raises(TypeError, match="dout must be float64, the dtype of q, got float32"):
            run(call, dout=call.dout.astype(np.float32))
    if "block_backward" in door:
        for name in ("lse", "delta"):
            right = statistics(call)[name]
            with pytest.raises(ValueError, match=rf"{name} must be \[B, H, Q\] of q"):
                run(call, **{name: right.swapaxes(1, 2)})
            with pytest.raises(TypeError, match=f"{name} must be float64 or wider, got float32"):
                run(call, **{name: right.astype(np.float32)})
            with pytest.raises(TypeError, match=f"{name} must be an array, got list"):
                run(call, **{name: right.tolist()})
    if "tiled" in door:
        for name in ("block_q", "block_k"):
            with pytest.raises(ValueError, match="a block must hold at least 1, got 0"):
                run(call, **{name: 0})


def test_delta_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"dout must have the shape of out \(1, 2, 3, 4\)"):
        attention_delta(np.zeros((1, 2, 3, 5)), np.zeros((1, 2, 3, 4)))
