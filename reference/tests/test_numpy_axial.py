"""Each layer over a list of shards is the layer on one rank, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.reference.numpy import axial
from isoform.reference.numpy.evoformer import evoformer_attention, evoformer_attention_backward

same_examples = settings(deadline=None, derandomize=True, max_examples=60)
H, D, C, E = 2, 3, 4, 2


@st.composite
def divisions(draw: Any) -> tuple[list[int], list[int], int]:
    """S_r and R_r of up to 4 ranks, 0 among them, and a seed."""
    P = draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, 3), min_size=P, max_size=P)
    return draw(lengths), draw(lengths), draw(st.integers(0, 1000))


def cut(x: Any, axis: int, lengths: list[int]) -> list[Any]:
    return np.split(x, np.cumsum(lengths)[:-1], axis)


def close(shards: list[Any], whole: Any, axis: int, lengths: list[int]) -> None:
    assert [x.shape[axis] for x in shards] == lengths
    np.testing.assert_allclose(np.concatenate(shards, axis), whole, rtol=1e-11, atol=1e-12)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


@same_examples
@given(divisions())
def test_row_attention(division):
    S_r, R_r, seed = division
    B, S, R = 2, sum(S_r), sum(R_r)
    *operands, bias = normal(seed, *[(B, S, R, H, D)] * 4, (B, 1, H, R, R))
    mask = np.random.default_rng(seed).random((B, S, R)) < 0.7
    dout, q, k, v = (cut(x, 1, S_r) for x in operands)
    shards = cut(bias, 3, R_r), cut(mask, 1, S_r)
    out = evoformer_attention(*operands[1:], mask=mask, pair_bias=bias)
    right = evoformer_attention_backward(*operands, mask=mask, pair_bias=bias)
    close(axial.row_attention(q, k, v, *shards), out, 1, S_r)
    found = axial.row_attention_backward(dout, q, k, v, *shards)
    for name in ("dq", "dk", "dv"):
        close(getattr(found, name), getattr(right, name), 1, S_r)
    close(found.dpair_bias, right.dpair_bias, 3, R_r)


@same_examples
@given(divisions())
def test_column_attention(division):
    S_r, R_r, seed = division
    B, S, R = 2, sum(S_r), sum(R_r)
    operands = normal(seed, *[(B, S, R, H, D)] * 4)
    mask = np.random.default_rng(seed).random((B, S, R)) < 0.7
    turned = [x.swapaxes(1, 2) for x in operands]
    out = evoformer_attention(*turned[1:], mask=mask.swapaxes(1, 2))
    right = evoformer_attention_backward(*turned, mask=mask.swapaxes(1, 2))
    dout, q, k, v = (cut(x, 1, S_r) for x in operands)
    masks = cut(mask, 1, S_r)
    close(axial.column_attention(q, k, v, R_r, masks), out.swapaxes(1, 2), 1, S_r)
    found = axial.column_attention_backward(dout, q, k, v, R_r, masks)
    for name in ("dq", "dk", "dv"):
        close(getattr(found, name), getattr(right, name).swapaxes(1, 2), 1, S_r)
    assert found.dpair_bias is None


PRODUCTS: dict[str, tuple[str, Any]] = {
    "outer_product": ("bsic,bsjd->bijcd", lambda B, S, R: [(B, S, R, C), (B, S, R, E)]),
    "multiplication_outgoing": ("bikc,bjkc->bijc", lambda B, S, R: [(B, R, R, C)] * 2),
    "multiplication_incoming": ("bkic,bkjc->bijc", lambda B, S, R: [(B, R, R, C)] * 2),
}


@pytest.mark.parametrize("name", PRODUCTS)
@same_examples
@given(division=divisions())
def test_products(name, division):
    """Their gradients, from the definition: the product is linear in each factor."""
    equation, shapes = PRODUCTS[name]
    _, R_r, seed = division
    B, S, R = 2, 3, sum(R_r)
    a, b = normal(seed, *shapes(B, S, R))
    axis = 2 if name == "outer_product" else 1
    out = np.einsum(equation, a, b)
    (dout,) = normal(seed + 1, out.shape)
    factors = cut(a, axis, R_r), cut(b, axis, R_r)
    close(getattr(axial, name)(*factors), out, 1, R_r)
    da, db = getattr(axial, f"{name}_backward")(cut(dout, 1, R_r), *factors)
    operands, _, result = equation.partition("->")
    first, _, second = operands.partition(",")
    close(da, np.einsum(f"{result},{second}->{first}", dout, b), axis, R_r)
    close(db, np.einsum(f"{result},{first}->{second}", dout, a), axis, R_r)


@same_examples
@given(divisions())
def test_movements_are_adjoint(division):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, summed over ranks."""
    S_r, R_r, seed = division
    (x,) = normal(seed, (2, sum(S_r), sum(R_r), 3))
    shards = cut(x, 1, S_r)

    def check(there: list[Any], adjoint: Any) -> None:
        y = [normal(seed + r, part.shape)[0] for r, part in enumerate(there)]
        pairs = ((there, y), (shards, adjoint(y)))
        left, right = (sum((a * b).sum() for a, b in zip(*both, strict=True)) for both in pairs)
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)

    check(axial.recut(shards, 1, 2, R_r), lambda y: axial.recut(y, 2, 1, S_r))
    check(axial.gathered(shards, 1), lambda y: axial.gathered_backward(y, 1, S_r))


def test_recut_and_back_is_the_same():
    (x,) = normal(0, (2, 5, 7, 3))
    shards = cut(x, 1, [2, 0, 3])
    columns = axial.recut(shards, 1, 2, [0, 4, 3])
    assert [part.shape for part in columns] == [(2, 5, 0, 3), (2, 5, 4, 3), (2, 5, 3, 3)]
    for part, same in zip(axial.recut(columns, 2, 1, [2, 0, 3]), shards, strict=True):
        np.testing.assert_array_equal(part, same)


def test_results_are_rounded_once():
    """In float16 sums over ranks are those of float64, as on one rank."""
    operands = [x.astype(np.float16) for x in normal(0, *[(1, 6, 4, H, D)] * 4, (1, 1, H, 4, 4))]
    dout, q, k, v = (cut(x, 1, [2, 2, 2]) for x in operands[:4])
    found = axial.row_attention_backward(dout, q, k, v, cut(operands[4], 3, [3, 1, 0]))
    wide = [x.astype(float) for x in operands]
    right = evoformer_attention_backward(*wide[:4], pair_bias=wide[4])
    bias = np.concatenate(found.dpair_bias, 3)
    assert bias.dtype == np.float16
    np.testing.assert_array_equal(bias, right.dpair_bias.astype(np.float16))


# --- faults: each is seen ---


def gradients_of_bias() -> tuple[Any, Any]:
    """From shards, and on one rank."""
    operands = normal(3, *[(1, 4, 5, H, D)] * 4, (1, 1, H, 5, 5))
    dout, q, k, v = (cut(x, 1, [3, 1]) for x in operands[:4])
    found = axial.row_attention_backward(dout, q, k, v, cut(operands[4], 3, [2, 3]))
    right = evoformer_attention_backward(*operands[:4], pair_bias=operands[4])
    return np.concatenate(found.dpair_bias, 3), right.dpair_bias


def test_a_bias_gradient_that_is_not_summed_is_seen(monkeypatch):
    """The usual fault: each rank keeps its part of what it has found itself."""
    found, right = gradients_of_bias()
    np.testing.assert_allclose(found, right, rtol=1e-11, atol=1e-13)
    monkeypatch.setattr(
        axial,
        "gathered_backward",
        lambda dwhole, axis, lengths: [
            np.split(x, np.cumsum(lengths)[:-1], axis)[r] for r, x in enumerate(dwhole)
        ],
    )
    found, right = gradients_of_bias()
    assert np.abs(found - right).max() > 0.1


def test_a_mask_that_is_not_recut_is_seen(monkeypatch):
    """With as many sequences as residues the shapes fit, and only the numbers tell."""
    q, k, v = normal(4, *[(1, 4, 4, H, D)] * 3)
    mask = np.random.default_rng(0).random((1, 4, 4)) < 0.6
    lengths = [2, 2]
    turned = [x.swapaxes(1, 2) for x in (q, k, v)]
    right = evoformer_attention(*turned, mask=mask.swapaxes(1, 2)).swapaxes(1, 2)
    shards = [cut(x, 1, lengths) for x in (q, k, v)]
    masks = cut(mask, 1, lengths)

    def error() -> float:
        found = axial.column_attention(*shards, lengths, masks)
        return float(np.abs(np.concatenate(found, 1) - right).max())

    assert error() < 1e-13
    columns = axial._columns
    monkeypatch.setattr(
        axial, "_columns", lambda x, to: list(x) if x[0].dtype == bool else columns(x, to)
    )
    assert error() > 0.1
