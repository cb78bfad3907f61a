"""The fused operations: two references, and what each has to hold to."""

import ml_dtypes
import numpy as np
import pytest

from isoform.reference import fused_contract
from isoform.reference.numpy import fused as oracle

torch = pytest.importorskip("torch")

from isoform.reference.torch import fused as reference  # noqa: E402

SHAPE = (3, 5, 21)  # channels that are no multiple of eight
FORMS = fused_contract.APPROXIMATIONS
SEED = 0x0123456789ABCDEF


def drawn(*shape, seed=1):
    return 2 * np.random.default_rng(seed).standard_normal(shape)


def operands():
    return drawn(*SHAPE), drawn(SHAPE[-1], seed=2), drawn(*SHAPE, seed=3), drawn(*SHAPE, seed=4)


# --- Draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "seed", "wanted"),
    [  # known answers of Random123
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, seed, wanted):
    found = oracle.philox([np.uint64(word) for word in counter], seed)
    assert tuple(map(int, found)) == wanted
    found = reference.philox(tuple(torch.tensor(word) for word in counter), seed)
    assert tuple(map(int, found)) == wanted


@pytest.mark.parametrize("seed", [0, SEED, -1, 2**64 - 1])
def test_both_references_draw_alike(seed):
    found = oracle.draws(SHAPE, seed)
    np.testing.assert_array_equal(found, reference.draws(SHAPE, seed).numpy())
    assert found.max() < fused_contract.DRAWS


def test_draws_are_even_and_of_their_own():
    found = oracle.draws((4096, 64), SEED)
    for bit in range(16):
        ones = (found >> np.uint64(bit) & np.uint64(1)).mean()
        assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(found.size)
    centred = found - found.mean()
    for axis in (0, 1):
        correlation = (centred * np.roll(centred, 1, axis)).mean() / centred.var()
        assert abs(correlation) < 5 / np.sqrt(found.size)
    assert (found != oracle.draws((4096, 64), SEED + 1)).mean() > 0.999


def test_the_draw_of_a_token_does_not_depend_on_how_many_there_are():
    np.testing.assert_array_equal(oracle.draws((5, 21), 7), oracle.draws((9, 30), 7)[:5, :21])


@pytest.mark.parametrize(("p", "threshold"), [(0, 0), (0.1, 6554), (1, 65536), (1e-6, 0)])
def test_a_probability_is_a_number_of_draws(p, threshold):
    assert fused_contract.threshold_of(p) == threshold


# --- What is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gelu_and_its_gradients_are_pytorchs(form):
    x, bias, _, dout = operands()
    leaves = [torch.from_numpy(each).requires_grad_() for each in (x, bias)]
    out = reference.bias_gelu(*leaves, approximate=form)
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(dout))
    found = oracle.bias_gelu(x, bias, approximate=form)
    np.testing.assert_allclose(found, out.detach(), rtol=1e-12, atol=1e-14)
    found = oracle.bias_gelu_backward(dout, x, bias, approximate=form)
    for each, wanted in zip(found, gradients, strict=True):
        np.testing.assert_allclose(each, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("p", [0, 0.1, 0.75, 1])
def test_dropout_and_its_gradients(p):
    x, bias, residual, dout = operands()
    leaves = [torch.from_numpy(each).requires_grad_() for each in (x, bias, residual)]
    out = reference.bias_dropout_residual(*leaves, p, seed=SEED)
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(dout))
    found = oracle.bias_dropout_residual(x, bias, residual, p, seed=SEED)
    np.testing.assert_allclose(found, out.detach(), 1e-12)
    back = oracle.bias_dropout_residual_backward(dout, p, seed=SEED)
    for each, wanted in zip(back, gradients, strict=True):
        np.testing.assert_allclose(each, wanted, rtol=1e-12, atol=1e-13)
    kept = back[0] != 0
    np.testing.assert_array_equal(kept, found != residual)
    assert abs(1 - kept.mean() - p) < 0.1


def test_what_is_dropped_is_not_looked_at():
    x, bias, residual, _ = operands()
    found = oracle.bias_dropout_residual(np.full_like(x, np.nan), bias, residual, 1, seed=1)
    np.testing.assert_array_equal(found, residual)


@pytest.mark.parametrize("library", [oracle, reference], ids=["numpy", "torch"])
def test_wrong_calls(library):
    def array(*shape, dtype="float32"):
        made = np.zeros(shape, dtype)
        return made if library is oracle else torch.from_numpy(made)

    x, bias = array(3, 4), array(4)
    for call, raises, says in (
        (lambda: library.bias_gelu(None, bias), TypeError, "x must be an array"),
        (lambda: library.bias_gelu(array(3, 4, dtype="int32"), bias), TypeError, "x must be one"),
        (lambda: library.bias_gelu(array(), bias), ValueError, r"x must have axes \[..., C\]"),
        (lambda: library.bias_gelu(x, array(3)), ValueError, r"bias must be \[C\] with C=4 of x"),
        (
            lambda: library.bias_gelu(x, array(4, dtype="float64")),
            TypeError,
            "bias must be float32, the dtype of x, got float64",
        ),
        (lambda: library.bias_gelu(x, bias, approximate="erf"), ValueError, "approximate must be"),
        (
            lambda: library.bias_dropout_residual(x, bias, array(4, 4), 0.1, seed=1),
            ValueError,
            r"residual must be of shape \(3, 4\) of x, got shape \(4, 4\)",
        ),
        (
            lambda: library.bias_dropout_residual(x, bias, x, 1.5, seed=1),
            ValueError,
            "p must be from 0 to 1, got 1.5",
        ),
        (
            lambda: library.bias_dropout_residual(x, bias, x, "half", seed=1),
            TypeError,
            "p must be a real number, got str",
        ),
        (
            lambda: library.bias_dropout_residual(x, bias, x, 0.5, seed=2**64),
            ValueError,
            "seed must have 64 bits",
        ),
        (
            lambda: library.bias_dropout_residual(x, bias, x, 0.5, seed=0.5),
            TypeError,
            "seed must be an int, got float",
        ),
    ):
        with pytest.raises(raises, match=says):
            call()


# --- LayerNorm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 21), (4, 1), (21,), (0, 6), (3, 0)])
def test_layer_norm_and_its_gradients_are_pytorchs(shape):
    x, dout = drawn(*shape) + 30, drawn(*shape, seed=2)
    weight, bias = drawn(shape[-1], seed=3), drawn(shape[-1], seed=4)
    leaves = [torch.from_numpy(each).requires_grad_() for each in (x, weight, bias)]
    out = torch.nn.functional.layer_norm(leaves[0], shape[-1:], *leaves[1:], eps=0.01)
    wanted = torch.autograd.grad(out, leaves, torch.from_numpy(dout))
    mine = reference.layer_norm(*leaves, epsilon=0.01)
    gradients = torch.autograd.grad(mine, leaves, torch.from_numpy(dout))
    for found in (oracle.layer_norm(x, weight, bias, epsilon=0.01), mine.detach()):
        np.testing.assert_allclose(found, out.detach(), rtol=1e-11, atol=1e-12)
    for found in (oracle.layer_norm_backward(dout, x, weight, epsilon=0.01), gradients):
        for each, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(each, right, rtol=1e-9, atol=1e-10)


def test_layer_norm_is_differentiable_as_often_as_need_be():
    leaves = [torch.from_numpy(drawn(*s)).requires_grad_() for s in ((3, 4), (4,), (4,))]
    assert torch.autograd.gradcheck(reference.layer_norm, leaves)
    assert torch.autograd.gradgradcheck(reference.layer_norm, leaves)


@pytest.mark.parametrize("library", [oracle, reference], ids=["numpy", "torch"])
def test_a_token_of_equal_channels_is_the_bias(library):
    given = [np.full((2, 8), 3e4, "f2"), np.full(8, 2, "f2"), np.arange(8, dtype="f2")]
    if library is reference:
        given = [torch.from_numpy(each) for each in given]
    out = library.layer_norm(*given)
    assert out.dtype == given[0].dtype
    np.testing.assert_array_equal(np.asarray(out), [[*range(8)]] * 2)


@pytest.mark.parametrize("library", [oracle, reference], ids=["numpy", "torch"])
def test_wrong_calls_of_layer_norm(library):
    def array(*shape, dtype="float32"):
        made = np.zeros(shape, dtype)
        return made if library is oracle else torch.from_numpy(made)

    for wrong, raises, says in (
        ({"weight": array(3)}, ValueError, r"weight must be \[C\] with C=4 of x, got shape \(3,\)"),
        ({"bias": array(4, dtype="float64")}, TypeError, "bias must be float32, the dtype of x"),
        ({"epsilon": 0}, ValueError, "epsilon must be finite and above 0, got 0"),
        ({"epsilon": np.nan}, ValueError, "epsilon must be finite and above 0, got nan"),
        ({"epsilon": None}, TypeError, "epsilon must be a real number, got NoneType"),
    ):
        call = {"x": array(3, 4), "weight": array(4), "bias": array(4)} | wrong
        with pytest.raises(raises, match=says):
            library.layer_norm(**call)


# --- The masked softmax ---------------------------------------------------------------------------

SCORES = (2, 3, 7, 7)
MASKS = {
    "none": None,
    "padding": (2, 1, 1, 7),
    "of one item": (1, 1, 7, 7),
    "of heads": (2, 3, 1, 7),
    "full": (2, 3, 7, 7),
}
CAUSAL = [False, True]


def mask_of(shape):
    return None if shape is None else np.random.default_rng(5).random(shape) < 0.6


def attended_in(shape, mask, causal):
    """Key by key, in words."""
    attended = np.zeros(shape, bool)
    for b, h, q, k in np.ndindex(*shape):
        spread = None if mask is None else np.broadcast_to(mask, shape)
        attended[b, h, q, k] = (mask is None or spread[b, h, q, k]) and (not causal or k <= q)
    return attended


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("kind", MASKS)
def test_softmax_and_its_gradient_are_pytorchs(kind, causal):
    mask, scores, dout = mask_of(MASKS[kind]), drawn(*SCORES), drawn(*SCORES, seed=2)
    attended = attended_in(SCORES, mask, causal)
    keyless = ~attended.any(-1)
    leaf = torch.from_numpy(scores).requires_grad_()
    logits = (0.37 * leaf).masked_fill(torch.from_numpy(~attended), -torch.inf)
    wanted = torch.softmax(logits, -1).masked_fill(torch.from_numpy(keyless)[..., None], 0)
    found = oracle.masked_softmax(scores, mask=mask, causal=causal, scale=0.37)
    np.testing.assert_allclose(found, wanted.detach(), rtol=1e-12, atol=0)
    np.testing.assert_array_equal(found == 0, ~attended)

    theirs = torch.from_numpy(mask) if mask is not None else None
    ours = reference.masked_softmax(leaf, mask=theirs, causal=causal, scale=0.37)
    np.testing.assert_allclose(found, ours.detach(), rtol=1e-12, atol=0)
    (dscores,) = torch.autograd.grad(wanted, leaf, torch.from_numpy(dout))
    dscores = torch.where(torch.from_numpy(keyless)[..., None], 0, dscores)  # PyTorch's is NaN
    (mine,) = torch.autograd.grad(ours, leaf, torch.from_numpy(dout))
    for each in (oracle.masked_softmax_backward(dout, found, scale=0.37), mine):
        np.testing.assert_allclose(each, dscores, rtol=1e-9, atol=1e-14)
        np.testing.assert_array_equal(each[~attended], 0)


@pytest.mark.parametrize("causal", CAUSAL)
def test_softmax_is_differentiable_as_often_as_need_be(causal):
    scores = torch.from_numpy(drawn(1, 2, 4, 4)).requires_grad_()
    mask = torch.from_numpy(mask_of((1, 1, 4, 4)))
    mask[..., 1, :] = False  # a query without a key

    def function(x):
        return reference.masked_softmax(x, mask=mask, causal=causal, scale=-1.3)

    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


def test_the_gradient_of_softmax_is_that_of_finite_differences():
    scores, dout, step = drawn(1, 1, 2, 5), drawn(1, 1, 2, 5, seed=2), 1e-6
    mask = np.array([True, False, True, True, True])[None, None, None]
    call = {"mask": mask, "scale": 0.7}
    found = oracle.masked_softmax_backward(dout, oracle.masked_softmax(scores, **call), scale=0.7)
    for place in np.ndindex(*scores.shape):
        moved = np.zeros_like(scores)
        moved[place] = step
        up, down = (oracle.masked_softmax(scores + sign * moved, **call) for sign in (1, -1))
        np.testing.assert_allclose(
            found[place], ((up - down) * dout).sum() / (2 * step), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("library", [oracle, reference], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_softmax_of_each_dtype_is_rounded_once(library, dtype):
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    scores = (30 * drawn(*SCORES)).astype(narrow)
    wanted = oracle.masked_softmax(scores.astype("f8"), causal=True, scale=3.0)
    if library is oracle:
        found = oracle.masked_softmax(scores, causal=True, scale=3.0)
        assert found.dtype == scores.dtype
    else:
        given = torch.from_numpy(scores.astype("f4")).to(getattr(torch, dtype))
        found = reference.masked_softmax(given, causal=True, scale=3.0)
        assert found.dtype == given.dtype
        found = found.float().numpy()
    unit = 2.0**-15 if dtype == "float32" else float(ml_dtypes.finfo(narrow).eps)
    np.testing.assert_allclose(found.astype("f8"), wanted, rtol=unit, atol=2.0**-24)


def both(scores, dout, mask, **call):
    """Probabilities and gradient, by the oracle and by the other reference."""
    p = oracle.masked_softmax(scores, mask=mask, **call)
    yield p, oracle.masked_softmax_backward(dout, p)
    leaf = torch.from_numpy(scores).requires_grad_()
    theirs = torch.from_numpy(mask) if mask is not None else None
    out = reference.masked_softmax(leaf, mask=theirs, **call)
    (gradient,) = torch.autograd.grad(out, leaf, torch.from_numpy(dout))
    yield out.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_attended_to_is_not_looked_at(garbage):
    mask, scores, dout = mask_of((2, 3, 7, 7)), drawn(*SCORES), drawn(*SCORES, seed=2)
    attended = attended_in(SCORES, mask, True)
    clean = list(
        both(np.where(attended, scores, 0), np.where(attended, dout, 0), mask, causal=True)
    )
    for found, wanted in zip(
        both(
            np.where(attended, scores, garbage),
            np.where(attended, dout, garbage),
            mask,
            causal=True,
        ),
        clean,
        strict=True,
    ):
        for each, right in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(each, right)


@pytest.mark.parametrize("how", ["masked", "of minus infinity", "no key at all"])
def test_a_query_without_a_key_is_zero_whatever_it_is_given(how):
    keys = 0 if how == "no key at all" else 5
    scores, dout = np.full((1, 2, 3, keys), -np.inf), np.full((1, 2, 3, keys), np.nan)
    if how == "masked":
        scores[...] = np.nan
    mask = np.zeros((1, 1, 1, keys), bool) if how == "masked" else None
    for p, gradient in both(scores, dout, mask):
        np.testing.assert_array_equal(p, np.zeros((1, 2, 3, keys)))
        np.testing.assert_array_equal(gradient, p)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_an_attended_score_that_is_no_number_makes_its_query_none(odd):
    scores = drawn(1, 1, 2, 6)
    scores[0, 0, 0, 2] = odd
    scores[0, 0, 0, 3] = -np.inf
    mask = np.ones((1, 1, 1, 6), bool)
    mask[..., 5] = False
    for p, gradient in both(scores, np.ones_like(scores), mask):
        for each in (p, gradient):
            np.testing.assert_array_equal(np.isnan(each[0, 0, 0]), [True] * 5 + [False])
            assert np.isfinite(each[0, 0, 1]).all() and not each[..., 5].any()


def test_a_score_of_minus_infinity_is_a_key_that_is_not_there():
    scores = drawn(1, 1, 3, 6)
    mask = mask_of((1, 1, 3, 6))
    dout = drawn(1, 1, 3, 6, seed=2)
    dropped = both(np.where(mask, scores, -np.inf), dout, None)
    for found, wanted in zip(dropped, both(scores, dout, mask), strict=True):
        for each, right in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(each, right)


@pytest.mark.parametrize("library", [oracle, reference], ids=["numpy", "torch"])
def test_wrong_calls_of_softmax(library):
    def array(*shape, dtype="float32"):
        made = np.zeros(shape, dtype)
        return made if library is oracle else torch.from_numpy(made)

    def mask(*shape):
        return array(*shape, dtype="bool")

    x = array(2, 3, 4, 5)
    sizes = (
        r"mask must be \[B or 1, H or 1, Q or 1, K\] with B=2, H=3, Q=4, K=5 of scores, got shape "
    )
    for wrong, raises, says in (
        ({"scores": None}, TypeError, "scores must be an array"),
        ({"scores": array(2, 3, 4, 5, dtype="int32")}, TypeError, "scores must be one of"),
        ({"scores": array(3, 4, 5)}, ValueError, r"scores must have 4 axes \[B, H, Q, K\]"),
        ({"mask": 1}, TypeError, "mask must be an array, got int"),
        ({"mask": array(2, 1, 1, 5)}, TypeError, "mask must be bool, got float32"),
        ({"mask": mask(5)}, ValueError, sizes + r"\(5,\)"),
        ({"mask": mask(2, 2, 1, 5)}, ValueError, sizes + r"\(2, 2, 1, 5\)"),
        ({"mask": mask(2, 1, 1, 1)}, ValueError, sizes + r"\(2, 1, 1, 1\)"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"causal": True}, ValueError, "as many queries as keys, got Q=4 and K=5: give a mask"),
        ({"scale": None}, TypeError, "scale must be a real number, got NoneType"),
        ({"scale": "half"}, TypeError, "scale must be a real number"),
        ({"scale": np.inf}, ValueError, "scale must be finite"),
    ):
        call = {"scores": x} | wrong
        with pytest.raises(raises, match=says):
            library.masked_softmax(call.pop("scores"), **call)
    for dout, raises, says in (
        (array(2, 3, 4, 4), ValueError, r"dout must be of shape \(2, 3, 4, 5\) of probabilities"),
        (array(2, 3, 4, 5, dtype="float64"), TypeError, "dout must be float32, the dtype of prob"),
    ):
        with pytest.raises(raises, match=says):
            library.masked_softmax_backward(dout, x)
