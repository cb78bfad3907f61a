"""The cases of attention: that each is what its name says, and that together they cover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from isoform.conformance.attention.cases import (
    ADVERSARIAL,
    CASES,
    CROSS_LENGTHS,
    EMPTY,
    GROUPS,
    HEAD_DIMS,
    LENGTHS,
    MASKS,
    MODELS,
    RANKS,
    RINGS,
    WINDOWS,
    shape_of,
    window_of,
)
from isoform.conformance.attention.operation import (
    ATTENTION,
    INVALID_CALLS,
    call_for,
    memory_case,
    reference,
    zeros,
)
from isoform.conformance.attention.values import LAYOUTS, VALUES, draw, mask_of, with_places
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, SHORT_NAMES, Array
from isoform.reference.attention_contract import OPTIONS, PLACES, attention_call

SMALL = [case for case in CASES.values() if not case.large]


def having(*tags: str) -> list[Case]:
    return [case for case in CASES.values() if case.tags.issuperset(tags)]


def operands_of(values: str) -> Operands:
    return draw(CASES[f"attention/values/fp32/{values}"])


def pairs_of(case: Case) -> Array:
    """Who attends to whom, ``[B, Q, K]``."""
    pairs: Array = mask_of(with_places(draw(case)), window_of(case)).pairs()[:, 0]
    return pairs


def test_each_is_named_for_what_it_is() -> None:
    assert len(CASES) >= 250
    for case_id, case in CASES.items():
        operation, sizes, dtype, variant = case_id.split("/")
        assert (case.id, operation) == (case_id, ATTENTION.short)
        assert sizes
        assert variant
        assert SHORT_NAMES[dtype] == case.dtype
        assert case.operation == ATTENTION.name
        assert case.values in VALUES
        assert case.layout in LAYOUTS
        assert case.operands <= set(OPTIONS)
        assert case.tags
        hash(case)  # the oracle keeps what it found by case


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_operands_make_the_call_that_the_case_says(case: Case) -> None:
    operands = draw(case)
    places = case.operands & set(PLACES)
    assert operands.keys() == {"q", "k", "v", "dout", *places}
    dout = operands.pop("dout")
    assert attention_call(**operands, **dict(case.options)) == call_for(case)
    assert (dout.shape, dout.dtype) == (operands["q"].shape, FORMATS[case.dtype].dtype)
    assert shape_of(operands) == case.shape


def test_no_two_cases_are_the_same_but_for_their_name() -> None:
    described = {repr(replace(case, id="", tags=frozenset(), note="")) for case in CASES.values()}
    assert len(CASES) - len(described) <= 0.05 * len(CASES)


def test_quick_cases_are_quick_and_of_every_kind() -> None:
    quick = having("quick")
    assert sum(case.shape.largest for case in quick) < 3e7
    kinds = {tag for case in quick for tag in case.tags}
    assert kinds >= {"model", "mask", "ring", "length", "head-dim", "grouped-heads", "double"}
    assert kinds >= {"adversarial", "layout", "empty"}


def test_all_that_can_be_asked_for_is_asked_for() -> None:
    assert frozenset().union(*(case.operands for case in SMALL)) == set(OPTIONS)
    assert {case.values for case in SMALL} == VALUES.keys()
    assert {case.layout for case in SMALL} == LAYOUTS.keys()
    shapes = {(case.shape.Q, case.shape.K) for case in SMALL}
    assert shapes >= {(length, length) for length in LENGTHS} | {*CROSS_LENGTHS}
    assert {case.shape.D for case in having("head-dim")} == {*HEAD_DIMS} >= {1, 64, 127, 128, 256}
    assert {(case.shape.H, case.shape.G) for case in having("grouped-heads")} == {*GROUPS}
    assert {dict(case.options)["window"] for case in having("window")} == {*WINDOWS}
    assert {case.dtype for case in having("mask")} == {"float32", "bfloat16", "float16"}
    assert len(having("ring")) == 2 * len(RINGS)
    assert len(having("adversarial")) == 3 * len(ADVERSARIAL)
    assert {axis for shape in EMPTY.values() for axis, size in vars(shape).items() if not size} == {
        *"BQKHG"
    }


def test_models_are_there_in_full_and_cut_to_what_a_cpu_can_do() -> None:
    for name, (full, *_, cut) in MODELS.items():
        for dtype in ("bf16", "fp32", "fp16"):
            case = CASES[f"attention/{name}/{dtype}/masked"]
            small = CASES[f"attention/{name}-small/{dtype}/masked"]
            assert case.shape == full
            assert case.large
            assert small.shape == replace(full, **cut)
            assert not small.large
            assert (small.operands, small.options) == (case.operands, case.options)
    assert all(("full-size" in case.tags) == case.large for case in CASES.values())
    assert {full.D for full, *_ in MODELS.values()} == {64, 128}


# Where tokens lie


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_drops_some_pairs_and_keeps_some(name: str) -> None:
    pairs = pairs_of(CASES[f"attention/mask/fp32/{name}"])
    assert pairs.any()
    assert pairs.all() == (name == "bare")


def test_places_are_what_their_names_say() -> None:
    def places(name: str) -> Operands:
        return draw(CASES[f"attention/mask/fp32/{name}"])

    shuffled = places("shuffled")["positions"]
    assert (np.diff(shuffled) < 0).any() and len(set(shuffled.tolist())) == len(shuffled)
    zigzag = places("zigzag-window")["positions"]
    assert (np.diff(zigzag) > 0).all() and sorted(np.diff(zigzag))[-2:][0] == 1
    assert zigzag[0] > 0 and np.diff(zigzag).max() > 100
    restarting = places("packed-restarting")
    starts = np.flatnonzero(np.diff(restarting["segments"]) != 0) + 1
    assert len(starts) > 1 and (restarting["positions"][starts] == 0).all()
    padded = places("padded")["segments"]
    assert padded.ndim == 2 and (padded == -1).any(axis=1)[0] and (padded[:, 0] >= 0).all()
    example = places("per-example")
    assert (example["positions"][0] != example["positions"][1]).any()
    assert places("far")["positions"].min() < 2**31 <= places("far")["positions"].max()
    assert example["positions"].dtype == np.int64 and example["segments"].dtype == np.int32


def test_every_window_differs_from_its_neighbours() -> None:
    """A window of one position more or less, on either side, is another mask."""
    for case in having("window"):
        left, right = window_of(case)
        pairs = pairs_of(case)
        for other in ((left + 1, right), (left - 1, right), (left, right + 1), (left, right - 1)):
            changed = mask_of(with_places(draw(case)), other).pairs()[:, 0]
            side = left if other[0] != left else right
            reaches = 0 < side < case.shape.Q - 1
            assert (changed != pairs).any() or not reaches, (case.id, other)


@pytest.mark.parametrize("name", RINGS)
def test_rings_are_blocks_of_attention(name: str) -> None:
    pairs = pairs_of(CASES[f"attention/ring/fp32/{name}"])
    expected = {
        "past": (1.0, 1.0),
        "future": (0.0, 0.0),
        "zigzag": (0.5, 0.5),  # of the two chunks of keys, all see the early one alone
        "zigzag-uneven": (0.45, 0.5),
        "striped": (0.4, 0.5),
    }
    low, high = expected.get(name, (0.001, 0.999))
    assert low <= pairs.mean() <= high


def test_a_million_cannot_be_counted_in_float32() -> None:
    operands = draw(CASES["attention/ring/fp32/million"])
    assert (operands["positions"].astype(np.float32) != operands["positions"]).any()
    pairs = pairs_of(CASES["attention/ring/fp32/million"])
    assert 0 < pairs.mean() < 1


# What q, k and v hold


def logits_of(operands: Operands) -> Array:
    q, k = (operands[name].astype(float) for name in "qk")
    s: Array = np.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return s


def test_values_are_what_their_names_say() -> None:
    assert np.abs(logits_of(operands_of("large-logits"))).max() > 5e3
    rising = logits_of(operands_of("rising-logits"))
    assert (np.diff(rising[..., ::8], axis=-1) > 0).mean() > 0.95
    p = np.exp(logits_of(operands_of("one-hot")))
    assert ((p / p.sum(-1, keepdims=True)).max(-1) > 0.99).mean() > 0.9
    equal = logits_of(operands_of("equal-logits"))
    np.testing.assert_allclose(equal, np.broadcast_to(equal[..., :1], equal.shape), rtol=1e-6)
    spread = np.abs(operands_of("spread-values")["v"])
    assert spread.max() / np.median(spread) > 100
    subnormal = np.abs(operands_of("subnormal")["v"])
    assert 0 < subnormal.max() < np.finfo(np.float32).tiny
    constant = operands_of("constant-values")["v"]
    assert (constant == constant[:, :1]).all()
    assert (operands_of("all-padding")["segments"] < 0).all()
    alone = operands_of("alone")["segments"]
    assert len(set(alone.tolist())) == len(alone)
    for name, at in (("first", 0), ("last", -1)):
        kept = operands_of(f"{name}-key-only")["key_segments"] >= 0
        assert kept.sum() == 1 and kept[at]
    assert np.isnan(operands_of("nan-attended")["k"]).sum() == 2
    assert np.isinf(operands_of("inf-attended")["v"]).sum() == 2


def test_garbage_is_in_padding_and_nowhere_else() -> None:
    operands = operands_of("garbage-in-padding")
    padding = operands["segments"] < 0
    assert padding.any()
    for name in ("q", "k", "v", "dout"):
        finite = np.isfinite(operands[name])
        assert not finite[padding].any()
        assert finite[~padding].all()


def test_zeros_are_where_the_contract_fixes_them() -> None:
    """SEQ-4 and SEQ-5."""
    for values in ("garbage-in-padding", "no-keys-for-some", "all-padding"):
        case = CASES[f"attention/values/fp32/{values}"]
        operands = draw(case)
        results = reference(operands, case, True)
        fixed = zeros(operands, case, results)
        dead = results["lse"].swapaxes(1, 2) == -np.inf
        for name in ("out", "dq"):
            assert (fixed[name] == dead[..., None]).all() and fixed[name].any()
        padding = with_places(operands)["key_segments"] < 0
        assert ("dk" in fixed) == padding.any()
        for name, where in fixed.items():
            assert (results[name][where] == 0).all()
            assert where.shape == results[name].shape
    case = CASES["attention/values/fp32/nan-attended"]
    results = reference(draw(case), case, False)
    assert np.isnan(results["lse"][:, 0]).all() and np.isfinite(results["lse"][:, 1]).all()
    assert zeros(draw(case), case, results).keys() == {"out"}


# How they lie in memory


def test_layouts_hold_the_same_numbers() -> None:
    for layout in LAYOUTS.keys() - {"broadcast", "contiguous"}:
        case = CASES[f"attention/layout/fp32/{layout}"]
        plain = draw(replace(case, layout="contiguous"))
        other = draw(case)
        for name, x in plain.items():
            np.testing.assert_array_equal(other[name], x)
            assert other[name].dtype == x.dtype
        assert not other["q"].flags.c_contiguous
    operands = draw(CASES["attention/layout/fp32/broadcast"])
    assert operands["k"].strides[2] == operands["v"].strides[2] == 0
    assert draw(CASES["attention/layout/fp32/sliced"])["segments"].strides[-1] == 8
    offset = draw(CASES["attention/layout/fp32/packed-qkv"])["q"]
    assert offset.strides[2] == 4 * (3 * offset.shape[3] + 1)


# Memory, and wrong calls


def test_the_memory_case_has_a_mask_that_could_be_made() -> None:
    case = memory_case(512)
    assert attention_call(
        **{name: x for name, x in draw(case).items() if name != "dout"}, **dict(case.options)
    ) == call_for(case)
    assert {"segments", "causal"} == case.operands


def test_every_argument_has_a_wrong_call() -> None:
    about = {invalid.about for invalid in INVALID_CALLS}
    assert about == {"q", "k", "v", "heads", "scale", *OPTIONS}
    assert len({invalid.name for invalid in INVALID_CALLS}) == len(INVALID_CALLS)


def test_what_is_hard_to_divide_among_eight_ranks_is_there() -> None:
    cases = having("ranks")
    assert len(cases) == sum(len(masks) * len(dtypes) for _, masks, dtypes in RANKS.values())
    assert {case.dtype for case in cases} == {*FORMATS}
    assert {case.shape.Q for case in cases} >= {0, 7}  # none, and fewer than ranks
    assert {case.shape.H for case in cases} >= {3, 12}  # fewer than ranks, and no multiple
    assert all(case.shape.Q == case.shape.K for case in cases)
    assert {name for case in cases for name in case.operands} == {
        "causal", "window", "positions", "segments",
    }  # fmt: skip
