"""The attention layers against the papers' algorithms, written out as loops over single places."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isoform.reference.torch.evoformer import evoformer_attention, evoformer_attention_tiled
from isoform.reference.torch.layers import (
    AdaptiveLayerNorm,
    AttentionPairBias,
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    TemplatePointwiseAttention,
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    init_as_published_,
)

# Sizes that are all different, so that no two axes can be taken for each other.
B, S, R, T = 2, 3, 5, 4
C_M, C_Z, C_T, C_A, C_S = 6, 7, 8, 9, 10
C, H = 3, 2

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "row": partial(MSARowAttentionWithPairBias, C_M, C_Z, C, H),
    "column": partial(MSAColumnAttention, C_M, C, H),
    "global": partial(MSAColumnGlobalAttention, C_M, C, H),
    "starting": partial(TriangleAttentionStartingNode, C_Z, C, H),
    "ending": partial(TriangleAttentionEndingNode, C_Z, C, H),
    "template": partial(TemplatePointwiseAttention, C_T, C_Z, C, H),
    "token": partial(AttentionPairBias, C_A, C_Z, C, H),
    "conditioned": partial(AttentionPairBias, C_A, C_Z, C, H, C_S),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name: str, attention: Any = evoformer_attention) -> nn.Module:
    """The layer in float64, every parameter random (layer norms would start at 1 and 0)."""
    made = LAYERS[name](attention=attention).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return made


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Example 0 is padded at its last residue, and one of its sequences is short. Example 1 is whole,
# but for one gap.
RESIDUES = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
PAIRS = RESIDUES[:, :, None] & RESIDUES[:, None, :]
ROWS = RESIDUES[:, None, :].repeat(1, S, 1)
ROWS[0, 1, 2:] = False
ROWS[1, 2, 0] = False
TEMPLATES = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]).bool()


def operands(name: str, masked: bool = True) -> dict[str, Tensor]:
    """Arguments of the layer's ``forward``."""
    msa, pair = normal(B, S, R, C_M), normal(B, R, R, C_Z)
    everything: dict[str, dict[str, Tensor]] = {
        "row": {"msa": msa, "pair": pair, "msa_mask": ROWS},
        "column": {"msa": msa, "msa_mask": ROWS},
        "global": {"msa": msa, "msa_mask": ROWS},
        "starting": {"pair": pair, "pair_mask": PAIRS},
        "ending": {"pair": pair, "pair_mask": PAIRS},
        "template": {
            "templates": normal(B, T, R, R, C_T),
            "pair": pair,
            "template_mask": TEMPLATES,
        },
        "token": {"a": normal(B, S, R, C_A), "pair": pair, "mask": ROWS},
        "conditioned": {
            "a": normal(B, S, R, C_A),
            "pair": pair,
            "s": normal(B, S, R, C_S),
            "mask": ROWS,
            "beta": normal(B, R, R),
            "mask_bias": normal(B, S, R),
        },
    }
    return {key: x for key, x in everything[name].items() if masked or x.dtype != torch.bool}


# The algorithms, in NumPy, one place at a time.


def array(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def linear(projection: Any, x: np.ndarray) -> np.ndarray:
    y = x @ array(projection.weight).T
    return y if projection.bias is None else y + array(projection.bias)


def norm(layer_norm: Any, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    if layer_norm.weight is not None:
        y = y * array(layer_norm.weight)
    return y if layer_norm.bias is None else y + array(layer_norm.bias)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def attend(q: np.ndarray, keys: Any, values: Any, left: Any, bias: Any = None) -> np.ndarray:
    """One query and one head: the softmax over the keys that are left, times their values."""
    logits = {j: q @ k / np.sqrt(C) for j, k in enumerate(keys) if left[j]}
    if bias is not None:
        logits = {j: logit + bias[j] for j, logit in logits.items()}
    total = sum(np.exp(logit) for logit in logits.values())
    return sum((np.exp(logits[j]) / total * values[j] for j in logits), np.zeros(C))


def row(m: Any, msa: Any, pair: Any, msa_mask: Any) -> np.ndarray:
    out = np.zeros_like(msa)
    for b in range(B):
        x, z = norm(m.norm, msa[b]), norm(m.norm_pair, pair[b])
        q, k, v, g = (linear(p, x).reshape(S, R, H, C) for p in (m.query, m.key, m.value, m.gate))
        bias = linear(m.pair_bias, z)
        for s in range(S):
            for i in range(R):
                o = [
                    sigmoid(g[s, i, h])
                    * attend(q[s, i, h], k[s, :, h], v[s, :, h], msa_mask[b, s], bias[i, :, h])
                    for h in range(H)
                ]
                out[b, s, i] = linear(m.output, np.concatenate(o))
    return out


def column(m: Any, msa: Any, msa_mask: Any) -> np.ndarray:
    out = np.zeros_like(msa)
    for b in range(B):
        x = norm(m.norm, msa[b])
        q, k, v, g = (linear(p, x).reshape(S, R, H, C) for p in (m.query, m.key, m.value, m.gate))
        for s in range(S):
            for i in range(R):
                o = [
                    sigmoid(g[s, i, h])
                    * attend(q[s, i, h], k[:, i, h], v[:, i, h], msa_mask[b, :, i])
                    for h in range(H)
                ]
                out[b, s, i] = linear(m.output, np.concatenate(o))
    return out


def global_column(m: Any, msa: Any, msa_mask: Any) -> np.ndarray:
    out = np.zeros_like(msa)
    for b in range(B):
        x = norm(m.norm, msa[b])
        q, g = (linear(p, x).reshape(S, R, H, C) for p in (m.query, m.gate))
        k, v = linear(m.key, x), linear(m.value, x)  # [S, R, C]: one head
        for i in range(R):
            left = [t for t in range(S) if msa_mask[b, t, i]]
            mean = sum((q[t, i] for t in left), np.zeros((H, C))) / max(len(left), 1)
            for s in range(S):
                o = [
                    sigmoid(g[s, i, h]) * attend(mean[h], k[:, i], v[:, i], msa_mask[b, :, i])
                    for h in range(H)
                ]
                out[b, s, i] = linear(m.output, np.concatenate(o))
    return out


def triangle(m: Any, pair: Any, pair_mask: Any, *, start: bool) -> np.ndarray:
    out = np.zeros_like(pair)
    for b in range(B):
        z = norm(m.norm, pair[b])
        q, k, v, g = (linear(p, z).reshape(R, R, H, C) for p in (m.query, m.key, m.value, m.gate))
        bias = linear(m.pair_bias, z)
        for i in range(R):
            for j in range(R):
                # Edges i→k and the third edge j→k; or edges k→j and the third edge k→i.
                edges = [(i, n) if start else (n, j) for n in range(R)]
                third = [(j, n) if start else (n, i) for n in range(R)]
                o = [
                    sigmoid(g[i, j, h])
                    * attend(
                        q[i, j, h],
                        [k[edge][h] for edge in edges],
                        [v[edge][h] for edge in edges],
                        [pair_mask[b][edge] for edge in edges],
                        [bias[edge][h] for edge in third],
                    )
                    for h in range(H)
                ]
                out[b, i, j] = linear(m.output, np.concatenate(o))
    return out


def template(m: Any, templates: Any, pair: Any, template_mask: Any) -> np.ndarray:
    out = np.zeros_like(pair)
    for b in range(B):
        q = linear(m.query, pair[b]).reshape(R, R, H, C)
        k = linear(m.key, templates[b]).reshape(T, R, R, H, C)
        v = linear(m.value, templates[b]).reshape(T, R, R, H, C)
        for i in range(R):
            for j in range(R):
                o = [
                    attend(q[i, j, h], k[:, i, j, h], v[:, i, j, h], template_mask[b])
                    for h in range(H)
                ]
                out[b, i, j] = linear(m.output, np.concatenate(o))
    return out


def token(
    m: Any, a: Any, pair: Any, mask: Any, s: Any = None, beta: Any = None, mask_bias: Any = None
) -> np.ndarray:
    out = np.zeros_like(a)
    for b in range(B):
        pair_bias = linear(m.pair_bias, norm(m.norm_pair, pair[b]))
        if beta is not None:
            pair_bias = pair_bias + beta[b][:, :, None]
        for n in range(S):  # each sample by itself, with the same pair representation
            if s is None:
                x = norm(m.norm, a[b, n])
            else:
                condition = norm(m.norm.norm_condition, s[b, n])
                x = sigmoid(linear(m.norm.condition_scale, condition)) * norm(m.norm.norm, a[b, n])
                x = x + linear(m.norm.condition_offset, condition)
            q, k, v, g = (linear(p, x).reshape(R, H, C) for p in (m.query, m.key, m.value, m.gate))
            for i in range(R):
                bias = (
                    pair_bias[i] if mask_bias is None else pair_bias[i] + mask_bias[b, n][:, None]
                )
                o = [
                    sigmoid(g[i, h]) * attend(q[i, h], k[:, h], v[:, h], mask[b, n], bias[:, h])
                    for h in range(H)
                ]
                out[b, n, i] = linear(m.output, np.concatenate(o))
                if s is not None:
                    out[b, n, i] *= sigmoid(linear(m.condition_gate, s[b, n, i]))
    return out


ALGORITHMS: dict[str, Callable[..., np.ndarray]] = {
    "row": row,
    "column": column,
    "global": global_column,
    "starting": partial(triangle, start=True),
    "ending": partial(triangle, start=False),
    "template": template,
    "token": token,
    "conditioned": token,
}


@every_layer
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
def test_equals_the_algorithm(name: str, masked: bool) -> None:
    given = operands(name, masked)
    m = layer(name)
    written_out = {key: array(x) for key, x in operands(name).items()}
    if not masked:
        written_out |= {
            key: np.ones_like(x) for key, x in written_out.items() if x.dtype == np.bool_
        }
    expected = ALGORITHMS[name](m, **written_out)
    np.testing.assert_allclose(array(m(**given)), expected, rtol=1e-11, atol=1e-11)


@every_layer
@pytest.mark.parametrize("mask_kind", ["arbitrary", "nothing left"])
def test_equals_the_algorithm_under_any_mask(name: str, mask_kind: str) -> None:
    given = operands(name)
    masks = [key for key, x in given.items() if x.dtype == torch.bool]
    for key in masks:
        drawn = torch.rand(given[key].shape, generator=torch.Generator().manual_seed(3)) < 0.5
        given[key] = drawn if mask_kind == "arbitrary" else torch.zeros_like(drawn)
    m = layer(name)
    expected = ALGORITHMS[name](m, **{key: array(x) for key, x in given.items()})
    if name == "template":  # no template left: no update
        expected[~array(given["template_mask"]).any(1)] = 0
    np.testing.assert_allclose(array(m(**given)), expected, rtol=1e-11, atol=1e-11)


# The attention function is the caller's.


class Spy:
    """The reference, noting what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        given = {"q": q, "k": k, "v": v, **options}
        self.calls.append({key: x for key, x in given.items() if x is not None})
        return evoformer_attention(q, k, v, **options)


@every_layer
def test_any_implementation_can_be_put_in(name: str) -> None:
    given = operands(name)
    plain = layer(name)(**given)
    tiled = layer(name, partial(evoformer_attention_tiled, block_q=2))(**given)
    torch.testing.assert_close(tiled, plain, rtol=1e-12, atol=1e-12)


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "row": {
        "q": (B, S, R, H, C),
        "k": (B, S, R, H, C),
        "mask": (B, S, R),
        "pair_bias": (B, 1, H, R, R),
        "gate": (B, S, R, H, C),
    },
    "column": {
        "q": (B, R, S, H, C),
        "k": (B, R, S, H, C),
        "mask": (B, R, S),
        "gate": (B, R, S, H, C),
    },
    "global": {"q": (B, R, 1, H, C), "k": (B, R, S, 1, C), "mask": (B, R, S)},
    "starting": {
        "q": (B, R, R, H, C),
        "k": (B, R, R, H, C),
        "mask": (B, R, R),
        "pair_bias": (B, 1, H, R, R),
        "gate": (B, R, R, H, C),
    },
    "template": {"q": (B, R * R, 1, H, C), "k": (B, R * R, T, H, C), "mask": (B, R * R, T)},
    "token": {
        "q": (B, S, R, H, C),
        "k": (B, S, R, H, C),
        "mask": (B, S, R),
        "pair_bias": (B, 1, H, R, R),
        "gate": (B, S, R, H, C),
    },
}
SHAPES["ending"] = SHAPES["starting"]
SHAPES["conditioned"] = SHAPES["token"] | {"mask_bias": (B, S, 1, 1, R)}


@every_layer
def test_tensors_map_on_the_axes_as_documented(name: str) -> None:
    spy = Spy()
    layer(name, spy)(**operands(name))
    (call,) = spy.calls
    expected = SHAPES[name] | {"v": SHAPES[name]["k"]}
    assert {key: tuple(x.shape) for key, x in call.items()} == expected


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (MSARowAttentionWithPairBias, (8, 8, 32)),
        (MSAColumnAttention, (8, 8, 32)),
        (MSAColumnGlobalAttention, (8, 1, 8)),
        (TriangleAttentionStartingNode, (4, 4, 32)),
        (TriangleAttentionEndingNode, (4, 4, 32)),
        (TemplatePointwiseAttention, (4, 4, 16)),
        (AttentionPairBias, (16, 16, 24)),
        (partial(AttentionPairBias, 768, c_s=384), (16, 16, 48)),
    ],
)
def test_defaults_are_the_published_sizes(make: Any, heads: tuple[int, int, int]) -> None:
    spy = Spy()
    with torch.device("meta"):
        made = make(attention=spy)
        msa, pair, t = torch.empty(1, 2, 3, 256), torch.empty(1, 3, 3, 128), torch.empty(1, 2)
        inputs = {
            MSARowAttentionWithPairBias: (msa, pair),
            MSAColumnAttention: (msa,),
            MSAColumnGlobalAttention: (msa[..., :64],),
            TriangleAttentionStartingNode: (pair,),
            TriangleAttentionEndingNode: (pair,),
            TemplatePointwiseAttention: (torch.empty(*t.shape, 3, 3, 64), pair),
            AttentionPairBias: (torch.empty(1, 2, 3, 384), pair),
        }.get(make, (torch.empty(1, 2, 3, 768), pair, torch.empty(1, 2, 3, 384)))
        out = made(*inputs)
    (call,) = spy.calls
    assert (call["q"].shape[3], call["k"].shape[3], call["q"].shape[4]) == heads
    assert out.shape == inputs[make is TemplatePointwiseAttention].shape


@every_layer
def test_projections_have_a_bias_where_the_algorithm_says_linear(name: str) -> None:
    with_bias = {
        key
        for key, module in layer(name).named_modules()
        if isinstance(module, nn.Linear) and module.bias is not None
    }
    expected = {
        "template": {"output"},
        "token": {"query"},
        "conditioned": {"query", "norm.condition_scale", "condition_gate"},
    }
    assert with_bias == expected.get(name, {"gate", "output"})


# Properties.


@every_layer
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e30])
def test_masked_places_reach_no_other(name: str, padding: float) -> None:
    m, given = layer(name), operands(name)
    spoilt = dict(given)
    for key in ("msa", "a", "s"):
        if key in given:
            spoilt[key] = given[key].masked_fill(~ROWS[..., None], padding)
    if name == "template":
        spoilt["templates"] = given["templates"].masked_fill(
            ~TEMPLATES[:, :, None, None, None], padding
        )
    else:
        if "pair" in given:
            spoilt["pair"] = given["pair"].masked_fill(~PAIRS[..., None], padding)
        if "beta" in given:
            spoilt["beta"] = given["beta"].masked_fill(~PAIRS, padding)
            spoilt["mask_bias"] = given["mask_bias"].masked_fill(~ROWS, padding)
    assert any(not torch.equal(spoilt[key], given[key]) for key in given)
    whole = {"starting": PAIRS, "ending": PAIRS, "template": torch.ones(B, R, R).bool()}
    places = whole.get(name, ROWS)
    assert torch.equal(m(**spoilt)[places], m(**given)[places])


@every_layer
def test_gradients_reach_every_parameter_and_input(name: str) -> None:
    m = layer(name)
    given = {
        key: x.requires_grad_() if x.is_floating_point() else x for key, x in operands(name).items()
    }
    out = m(**given)
    out.backward(normal(*out.shape))
    for key, leaf in [*m.named_parameters(), *given.items()]:
        if leaf.requires_grad:
            assert leaf.grad is not None, key
            assert leaf.grad.isfinite().all(), key
            # An offset of the pairs' norm adds the same to all logits of a query, which cancels.
            none = key == "norm_pair.bias"
            assert (leaf.grad.abs().max() < 1e-10) == none, key


@every_layer
def test_update_has_the_shape_and_dtype_of_what_it_updates(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = {
            key: x.to(dtype) if x.is_floating_point() else x for key, x in operands(name).items()
        }
        updated = given["pair" if name in ("starting", "ending", "template") else next(iter(given))]
        out = layer(name).to(dtype)(**given)
        assert out.shape == updated.shape
        assert out.dtype == dtype


def test_ending_node_is_the_starting_node_of_the_transposed_pairs() -> None:
    starting, ending = layer("starting"), layer("ending")
    ending.load_state_dict(starting.state_dict())
    pair, mask = normal(B, R, R, C_Z), normal(B, R, R) < 0.5
    turned = starting(pair.transpose(1, 2), mask.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(ending(pair, mask), turned)
    assert not torch.allclose(ending(pair, mask), starting(pair, mask))


@pytest.mark.parametrize("name", ["row", "column", "global", "token"])
def test_equivariant_under_permutation_of_the_sequences(name: str) -> None:
    m, given = layer(name), operands(name)
    order = torch.tensor([2, 0, 1])
    permuted = {key: x if key == "pair" else x[:, order] for key, x in given.items()}
    torch.testing.assert_close(m(**permuted), m(**given)[:, order], rtol=1e-12, atol=1e-12)


@every_layer
def test_equivariant_under_permutation_of_the_residues(name: str) -> None:
    m, given = layer(name), operands(name)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = {}
    for key, x in given.items():
        for axis, size in enumerate(x.shape):
            if size == R:
                x = x.index_select(axis, order)
        permuted[key] = x
    expected = m(**given)[:, :, order]
    if name in ("starting", "ending", "template"):
        expected = expected[:, order]
    torch.testing.assert_close(m(**permuted), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["column", "global"])
def test_columns_do_not_see_each_other(name: str) -> None:
    m, given = layer(name), operands(name, masked=False)
    changed = given["msa"].clone()
    changed[:, :, 2] += 1
    others = [0, 1, 3, 4]
    assert torch.equal(m(changed)[:, :, others], m(given["msa"])[:, :, others])


def test_order_of_the_templates_does_not_matter() -> None:
    m, given = layer("template"), operands("template")
    order = torch.tensor([3, 1, 0, 2])
    shuffled = m(given["templates"][:, order], given["pair"], given["template_mask"][:, order])
    torch.testing.assert_close(shuffled, m(**given), rtol=1e-12, atol=1e-12)


def test_samples_share_the_pairs_and_nothing_else() -> None:
    m, given = layer("conditioned"), operands("conditioned")
    together = m(**given)
    for n in range(S):
        alone = {key: x if key in ("pair", "beta") else x[:, n : n + 1] for key, x in given.items()}
        torch.testing.assert_close(m(**alone)[:, 0], together[:, n], rtol=1e-12, atol=1e-12)


def test_one_conditioning_signal_serves_all_samples() -> None:
    m, given = layer("conditioned"), operands("conditioned")
    given["s"] = given["s"][:, :1]
    shared = m(**given)
    given["s"] = given["s"].expand(B, S, R, C_S)
    torch.testing.assert_close(shared, m(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["beta", "mask_bias"])
def test_minus_infinite_beta_masks(kind: str) -> None:
    m, given = layer("token"), operands("token")
    mask = given.pop("mask")
    mask[...] = RESIDUES[:, None]
    shape = (B, R, R) if kind == "beta" else (B, S, R)
    bias = torch.zeros(shape, dtype=torch.float64).masked_fill(~RESIDUES[:, None], -torch.inf)
    torch.testing.assert_close(
        m(**given, **{kind: bias}), m(**given, mask=mask), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("templates", [0, T])
def test_no_template_no_update(templates: int) -> None:
    m = layer("template")
    mask = None if templates == 0 else torch.zeros(B, T, dtype=torch.bool)
    update = m(normal(B, templates, R, R, C_T), normal(B, R, R, C_Z), mask)
    assert torch.equal(update, torch.zeros(B, R, R, C_Z, dtype=torch.float64))


@every_layer
def test_empty_axes_are_legal(name: str) -> None:
    for size in {S, R} & {size for x in operands(name).values() for size in x.shape}:
        empty = {}
        for key, x in operands(name).items():
            for axis, length in enumerate(x.shape):
                if length == size:
                    x = x.narrow(axis, 0, 0)
            empty[key] = x
        assert layer(name)(**empty).numel() == 0


def test_adaptive_layer_norm_starts_from_a_plain_one() -> None:
    adaptive = AdaptiveLayerNorm(C_A, C_S).double()
    init_as_published_(adaptive)
    a = normal(B, R, C_A)
    expected = nn.functional.layer_norm(a, (C_A,)) / 2
    torch.testing.assert_close(adaptive(a, normal(B, R, C_S)), expected)


# Initialisation.


def ignoring(operand: str, *args: Tensor, **options: Any) -> Any:
    return evoformer_attention(*args, **(options | {operand: None}))


@every_layer
def test_a_fresh_layer_uses_every_operand(name: str) -> None:
    given = {key: x.float() if x.is_floating_point() else x for key, x in operands(name).items()}
    torch.manual_seed(0)
    fresh = LAYERS[name]()
    out = fresh(**given)
    assert out.std() > 1e-2
    for operand in set(SHAPES[name]) - {"q", "k", "v"}:
        spoilt = LAYERS[name](attention=partial(ignoring, operand))
        spoilt.load_state_dict(fresh.state_dict())
        assert (spoilt(**given) - out).abs().max() > 1e-2 * out.std(), operand


@every_layer
def test_published_initialisation(name: str) -> None:
    torch.manual_seed(0)
    m = LAYERS[name]().double()
    init_as_published_(m)
    if isinstance(gate := getattr(m, "gate", None), nn.Linear):
        assert (gate.weight == 0).all()
        assert gate.bias is None or (gate.bias == 1).all()
    assert 0 < m.query.weight.abs().max() <= (6 / sum(m.query.weight.shape)) ** 0.5
    out = m(**operands(name))
    if name == "conditioned":
        opening = 1 / (1 + np.exp(2.0))
        m.condition_gate = nn.Linear(C_S, C_A).double()
        nn.init.zeros_(m.condition_gate.weight)
        nn.init.constant_(m.condition_gate.bias, 50.0)  # wide open
        torch.testing.assert_close(out, m(**operands(name)) * opening)
        assert out.abs().max() > 1e-3
    else:
        assert (out == 0).all()


# Wrong calls.


@every_layer
def test_wrong_masks_are_refused_by_name(name: str) -> None:
    given = operands(name)
    key = next(key for key in given if key.endswith("mask"))
    with pytest.raises(TypeError, match=f"^{key} must be bool, got float32"):
        layer(name)(**given | {key: given[key].float()})
    with pytest.raises(ValueError, match=f"^{key} must have shape"):
        layer(name)(**given | {key: given[key][:1]})


@pytest.mark.parametrize("name", ["row", "template", "token"])
def test_pairs_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"pair_bias|k must have"):
        layer(name)(**operands(name) | {"pair": normal(B, R + 1, R + 1, C_Z)})


def test_conditioning_must_fit_the_layer() -> None:
    given = operands("token")
    with pytest.raises(ValueError, match="a layer with no c_s got s"):
        layer("token")(**given, s=normal(B, S, R, C_S))
    with pytest.raises(ValueError, match="a layer with c_s got no s"):
        layer("conditioned")(**given)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="c_a=10 and heads=4"):
        AttentionPairBias(10, 4, heads=4)
    assert AttentionPairBias(12, 4, heads=4).query.out_features == 12
