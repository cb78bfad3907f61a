"""The other layers of the Evoformer, and the whole of it, against the papers' algorithms."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isoform.reference.torch.evoformer import evoformer_attention, evoformer_attention_tiled
from isoform.reference.torch.evoformer_stack import (
    EvoformerBlock,
    EvoformerStack,
    MSATransition,
    OuterProductMean,
    PairTransition,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from isoform.reference.torch.layers import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    init_as_published_,
)

B, S, R = 2, 3, 5
C_M, C_Z, C_S, C = 6, 7, 8, 4

MULTIPLICATIONS = [TriangleMultiplicationOutgoing, TriangleMultiplicationIncoming]

# Example 0 is padded at its last residue, and two of its sequences are short.
RESIDUES = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
PAIRS = RESIDUES[:, :, None] & RESIDUES[:, None, :]
ROWS = RESIDUES[:, None, :].repeat(1, S, 1)
ROWS[0, 1, 2:] = False
ROWS[0, 2, 3:] = False


def randomised(module: Any, seed: int = 7) -> Any:
    """The module in float64 with every parameter random, layer norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return module


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def small(**options: Any) -> dict[str, Any]:
    return {
        "c": 3,
        "heads": 2,
        "c_triangle": 4,
        "heads_triangle": 3,
        "c_outer": 3,
        "c_multiplication": 5,
        "n": 2,
    } | options


def array(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def linear(projection: Any, x: np.ndarray) -> np.ndarray:
    return x @ array(projection.weight).T + array(projection.bias)


def norm(layer_norm: Any, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return y * array(layer_norm.weight) + array(layer_norm.bias)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(array(actual), expected, rtol=1e-11, atol=1e-11)


# Each layer by itself.


@pytest.mark.parametrize(("make", "channels"), [(MSATransition, C_M), (PairTransition, C_Z)])
def test_transition(make: Any, channels: int) -> None:
    m = randomised(make(channels, n=3))
    x = normal(B, 2, 3, channels)
    hidden = np.maximum(linear(m.expand, norm(m.norm, array(x))), 0)
    assert hidden.shape[-1] == 3 * channels
    close(m(x), linear(m.output, hidden))


@pytest.mark.parametrize("mask", [None, ROWS, torch.zeros_like(ROWS)], ids=["no", "some", "all"])
def test_outer_product_mean(mask: Tensor | None) -> None:
    m = randomised(OuterProductMean(C_M, C_Z, C))
    msa = normal(B, S, R, C_M)
    x = norm(m.norm, array(msa))
    a, b = linear(m.left, x), linear(m.right, x)
    left = np.ones((B, S, R), bool) if mask is None else array(mask)
    expected = np.zeros((B, R, R, C_Z))
    for n in range(B):
        for i in range(R):
            for j in range(R):
                products = [
                    np.outer(a[n, s, i], b[n, s, j])
                    for s in range(S)
                    if left[n, s, i] and left[n, s, j]
                ]
                mean = np.mean(products, axis=0) if products else np.zeros((C, C))
                expected[n, i, j] = linear(m.output, mean.reshape(-1))
    close(m(msa, mask), expected)


@pytest.mark.parametrize("make", MULTIPLICATIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_triangle_multiplication(make: Any, masked: bool) -> None:
    m = randomised(make(C_Z, C))
    pair = normal(B, R, R, C_Z)
    mask = torch.rand(B, R, R, generator=torch.Generator().manual_seed(0)) < 0.7
    left = array(mask) if masked else np.ones((B, R, R), bool)
    z = norm(m.norm, array(pair))
    a = sigmoid(linear(m.gate_left, z)) * linear(m.left, z) * left[..., None]
    b = sigmoid(linear(m.gate_right, z)) * linear(m.right, z) * left[..., None]
    g = sigmoid(linear(m.gate, z))
    expected = np.zeros((B, R, R, C_Z))
    for n in range(B):
        for i in range(R):
            for j in range(R):
                if make is TriangleMultiplicationOutgoing:
                    product = sum(a[n, i, k] * b[n, j, k] for k in range(R))
                else:
                    product = sum(a[n, k, i] * b[n, k, j] for k in range(R))
                expected[n, i, j] = g[n, i, j] * linear(m.output, norm(m.norm_product, product))
    close(m(pair, mask if masked else None), expected)


def test_default_widths_are_the_published_ones() -> None:
    with torch.device("meta"):
        block = EvoformerBlock()
        stack = EvoformerStack(blocks=3)
    assert block.msa_row.query.weight.shape == (8 * 32, 256)
    assert block.triangle_starting.query.weight.shape == (4 * 32, 128)
    assert block.outer_product_mean.output.weight.shape == (128, 32 * 32)
    assert block.multiplication_incoming.left.weight.shape == (128, 128)
    assert block.msa_transition.expand.weight.shape == (4 * 256, 256)
    assert block.pair_transition.expand.weight.shape == (4 * 128, 128)
    assert isinstance(block.msa_column, MSAColumnAttention)
    assert len(stack.blocks) == 3
    assert stack.single.weight.shape == (384, 256)


# The whole.


@pytest.mark.parametrize("extra_msa", [False, True])
def test_block_is_algorithm_6_line_by_line(extra_msa: bool) -> None:
    block = randomised(EvoformerBlock(C_M, C_Z, **small(extra_msa=extra_msa)))
    assert isinstance(block.msa_column, MSAColumnGlobalAttention) == extra_msa
    m, z = msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    m = m + block.msa_row(m, z, ROWS)
    m = m + block.msa_column(m, ROWS)
    m = m + block.msa_transition(m)
    z = z + block.outer_product_mean(m, ROWS)
    z = z + block.multiplication_outgoing(z, PAIRS)
    z = z + block.multiplication_incoming(z, PAIRS)
    z = z + block.triangle_starting(z, PAIRS)
    z = z + block.triangle_ending(z, PAIRS)
    z = z + block.pair_transition(z)
    out_msa, out_pair = block(msa, pair, ROWS, PAIRS)
    assert torch.equal(out_msa, m)
    assert torch.equal(out_pair, z)


def test_stack_is_its_blocks_in_a_row() -> None:
    stack = randomised(EvoformerStack(2, C_M, C_Z, C_S, **small()))
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    m, z = stack.blocks[1](*stack.blocks[0](msa, pair, ROWS, PAIRS), ROWS, PAIRS)
    out_msa, out_pair, single = stack(msa, pair, ROWS, PAIRS)
    assert torch.equal(out_msa, m)
    assert torch.equal(out_pair, z)
    assert torch.equal(single, stack.single(m[:, 0]))
    assert single.shape == (B, R, C_S)


@pytest.mark.parametrize("extra_msa", [False, True])
def test_any_attention_can_be_put_in(extra_msa: bool) -> None:
    calls: list[tuple[int, ...]] = []

    def tiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append((*q.shape[1:4], k.shape[3]))
        return evoformer_attention_tiled(q, k, v, **options, block_q=2)

    torch.manual_seed(0)
    options = small(extra_msa=extra_msa)
    stack = EvoformerStack(2, C_M, C_Z, C_S, **options).double()
    other = EvoformerStack(2, C_M, C_Z, C_S, **options, attention=tiled).double()
    other.load_state_dict(stack.state_dict())
    inputs = normal(B, S, R, C_M), normal(B, R, R, C_Z), ROWS, PAIRS
    for expected, actual in zip(stack(*inputs), other(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    column = (R, 1, 2, 1) if extra_msa else (R, S, 2, 2)
    assert calls == 2 * [(S, R, 2, 2), column, (R, R, 3, 3), (R, R, 3, 3)]


@pytest.mark.parametrize("extra_msa", [False, True])
@pytest.mark.parametrize("padding", [torch.nan, 1e30])
def test_padding_reaches_nothing(extra_msa: bool, padding: float) -> None:
    stack = randomised(EvoformerStack(2, C_M, C_Z, C_S, **small(extra_msa=extra_msa)))
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    spoilt = (
        msa.masked_fill(~ROWS[..., None], padding),
        pair.masked_fill(~PAIRS[..., None], padding),
    )
    clean = stack(msa, pair, ROWS, PAIRS)
    for actual, expected, places in zip(
        stack(*spoilt, ROWS, PAIRS), clean, (ROWS, PAIRS, RESIDUES), strict=True
    ):
        assert torch.equal(actual[places], expected[places])


@pytest.mark.parametrize("extra_msa", [False, True])
def test_padded_equals_cut_out(extra_msa: bool) -> None:
    stack = randomised(EvoformerStack(2, C_M, C_Z, C_S, **small(extra_msa=extra_msa)))
    msa, pair = normal(1, S, R, C_M), normal(1, R, R, C_Z)
    rows, residues = torch.arange(S) < S - 1, torch.arange(R) < R - 2
    msa_mask = (rows[:, None] & residues)[None]
    pair_mask = (residues[:, None] & residues)[None]
    padded = stack(msa, pair, msa_mask, pair_mask)
    cut = stack(msa[:, : S - 1, : R - 2], pair[:, : R - 2, : R - 2])
    for actual, expected, places in zip(
        padded, cut, (msa_mask, pair_mask, residues[None]), strict=True
    ):
        torch.testing.assert_close(actual[places], expected.flatten(0, -2), rtol=1e-10, atol=1e-10)


def test_examples_do_not_see_each_other() -> None:
    stack = randomised(EvoformerStack(1, C_M, C_Z, C_S, **small()))
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    together = stack(msa, pair, ROWS, PAIRS)
    for b in range(B):
        one = slice(b, b + 1)
        alone = stack(msa[one], pair[one], ROWS[one], PAIRS[one])
        for actual, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(actual[0], expected[b], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("extra_msa", [False, True])
def test_gradients_reach_every_parameter(extra_msa: bool) -> None:
    torch.manual_seed(0)
    stack = EvoformerStack(2, C_M, C_Z, C_S, **small(extra_msa=extra_msa)).double()
    msa = normal(B, S, R, C_M).requires_grad_()
    pair = normal(B, R, R, C_Z).requires_grad_()
    outs = stack(msa, pair, ROWS, PAIRS)
    torch.autograd.backward(outs, [normal(*out.shape) for out in outs])
    for name, leaf in [*stack.named_parameters(), ("msa", msa), ("pair", pair)]:
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        # An offset of the pairs' norm adds the same to all logits of a query, which cancels.
        assert (leaf.grad.abs().max() < 1e-10) == name.endswith("norm_pair.bias"), name


@pytest.mark.parametrize("extra_msa", [False, True])
def test_gradients_are_those_of_finite_differences(extra_msa: bool) -> None:
    """Of both outputs of a block, by both inputs and by every parameter."""
    block = randomised(EvoformerBlock(C_M, C_Z, **small(extra_msa=extra_msa)))
    names = [name for name, _ in block.named_parameters()]

    def call(msa: Tensor, pair: Tensor, *parameters: Tensor) -> Any:
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(block, replaced, (msa, pair, ROWS, PAIRS))

    leaves = [normal(B, S, R, C_M), normal(B, R, R, C_Z), *block.parameters()]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("extra_msa", [False, True])
def test_sequences_after_the_first_have_no_order(extra_msa: bool) -> None:
    stack = randomised(EvoformerStack(2, C_M, C_Z, C_S, **small(extra_msa=extra_msa)))
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    order = [0, 2, 1]
    right = stack(msa, pair, ROWS, PAIRS)
    moved = stack(msa[:, order], pair, ROWS[:, order], PAIRS)
    for actual, expected in zip(moved, (right[0][:, order], *right[1:]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("extra_msa", [False, True])
def test_residues_are_known_by_their_features_alone(extra_msa: bool) -> None:
    """Another order of residues, in the MSA and on both axes of the pairs, is followed by all."""
    stack = randomised(EvoformerStack(2, C_M, C_Z, C_S, **small(extra_msa=extra_msa)))
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    order = [3, 0, 4, 1, 2]

    def both(x: Tensor) -> Tensor:
        return x[:, order][:, :, order]

    m, z, s = stack(msa, pair, ROWS, PAIRS)
    moved = stack(msa[:, :, order], both(pair), ROWS[:, :, order], both(PAIRS))
    for actual, expected in zip(moved, (m[:, :, order], both(z), s[:, order]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_fresh_stack_tells_wrong_attention_from_right() -> None:
    """What the demo relies on: with PyTorch's initialisation each operand matters to the output."""

    def wrong(operand: str, *args: Tensor, **options: Any) -> Any:
        spoilt = {"scale": 1.0} if operand == "scale" else {operand: None}
        return evoformer_attention(*args, **(options | spoilt))

    torch.manual_seed(0)
    stack = EvoformerStack(2, C_M, C_Z, C_S, **small())
    inputs = normal(B, S, R, C_M).float(), normal(B, R, R, C_Z).float(), ROWS, PAIRS
    right = stack(*inputs)
    assert all(out.dtype == torch.float32 for out in right)
    for operand in ("mask", "pair_bias", "gate", "scale"):
        other = EvoformerStack(2, C_M, C_Z, C_S, **small(attention=partial(wrong, operand)))
        other.load_state_dict(stack.state_dict())
        for places, out, expected in zip(
            (ROWS, PAIRS, RESIDUES), other(*inputs), right, strict=True
        ):
            assert (out - expected)[places].abs().max() > 1e-4 * expected.std(), operand


def test_published_initialisation_is_the_identity() -> None:
    stack = EvoformerStack(2, C_M, C_Z, C_S, **small()).double()
    init_as_published_(stack)
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    out_msa, out_pair, single = stack(msa, pair)
    assert torch.equal(out_msa, msa)
    assert torch.equal(out_pair, pair)
    assert single.abs().max() > 0


def test_published_initialisation_has_the_published_variances() -> None:
    torch.manual_seed(0)
    block = EvoformerBlock(64, 64, n=4)
    init_as_published_(block)
    for linear_, variance in [
        (block.msa_transition.expand, 2 / 64),
        (block.multiplication_outgoing.left, 1 / 64),
        (block.triangle_starting.query, 2 / (64 + 4 * 32)),
    ]:
        assert isinstance(linear_, nn.Linear)
        assert linear_.weight.var().item() == pytest.approx(variance, rel=0.1)
        assert linear_.bias is None or (linear_.bias == 0).all()
    gate = block.multiplication_outgoing.gate_left
    assert (gate.weight == 0).all()
    assert (gate.bias == 1).all()


@pytest.mark.parametrize(
    ("layer", "channels", "leading", "key"),
    [
        (OuterProductMean(C_M, C_Z, C), C_M, (B, S, R), "msa_mask"),
        (TriangleMultiplicationOutgoing(C_Z, C), C_Z, (B, R, R), "pair_mask"),
        (TriangleMultiplicationIncoming(C_Z, C), C_Z, (B, R, R), "pair_mask"),
    ],
)
def test_wrong_masks_are_refused_by_name(
    layer: nn.Module, channels: int, leading: tuple[int, ...], key: str
) -> None:
    x = torch.zeros(*leading, channels)
    with pytest.raises(TypeError, match=f"^{key} must be bool, got float32"):
        layer(x, torch.ones(leading))
    with pytest.raises(ValueError, match=f"^{key} must have shape"):
        layer(x, torch.ones(leading, dtype=torch.bool)[:1])
