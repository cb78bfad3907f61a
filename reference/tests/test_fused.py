"""Bias and GeLU, and bias, dropout and residual: two references, and what each has to hold to."""

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
