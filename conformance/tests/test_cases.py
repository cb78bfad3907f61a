"""The case set: what was promised is in it, and each case's operands are what it says they are."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from isoform.conformance.case import CPU_SIZE, Case, Operands, UnknownName, select
from isoform.conformance.dtypes import FORMATS, SHORT_NAMES, Array
from isoform.conformance.evoformer.cases import CASES, scale_of
from isoform.conformance.evoformer.operation import EVOFORMER_ATTENTION, reference
from isoform.conformance.evoformer.values import LAYOUTS, VALUES, draw
from isoform.reference.contract import OPTIONAL_OPERANDS, Shape

BOTH = ("bfloat16", "float32")
THREE = ("bfloat16", "float16", "float32")


def having(tag: str) -> list[Case]:
    return [case for case in CASES.values() if tag in case.tags]


def dtypes_of(cases: list[Case]) -> set[str]:
    return {case.dtype for case in cases}


def values_case(values: str, dtype: str = "fp32") -> Case:
    return CASES[f"evoformer/values/{dtype}/{values}"]


def wide(operands: Operands) -> Operands:
    return {name: x if x.dtype == bool else x.astype(np.float64) for name, x in operands.items()}


def logits(case: Case) -> tuple[Array, Operands]:
    """The logits ``[B, S, H, Q, K]`` of a case without grouped heads, and its operands."""
    operands = wide(draw(case))
    s = case.shape.D**-0.5 * np.einsum("bsqhd,bskhd->bshqk", operands["q"], operands["k"])
    for name in ("mask_bias", "pair_bias"):
        s = s + operands.get(name, 0)
    return s, operands


# Names


def test_there_are_enough_and_each_is_named_for_what_it_is() -> None:
    assert len(CASES) >= 120
    for case_id, case in CASES.items():
        operation, sizes, dtype, variant = case_id.split("/")
        assert case.id == case_id
        assert operation == "evoformer"
        assert sizes
        assert variant
        assert SHORT_NAMES[dtype] == case.dtype
        assert case.operation == EVOFORMER_ATTENTION.name
        assert case.values in VALUES
        assert case.layout in LAYOUTS
        assert case.operands <= set(OPTIONAL_OPERANDS)
        assert case.tags
        assert case.shape.G == 0 or case.shape.H % case.shape.G == 0


def test_no_two_cases_are_the_same_but_for_their_name() -> None:
    described = {repr(replace(case, id="", tags=frozenset(), note="")) for case in CASES.values()}
    twice = len(CASES) - len(described)
    # head dim 16 and the like may well be reached from two sides, but not as a habit
    assert twice <= 0.05 * len(CASES)


def test_quick_cases_are_quick_and_of_every_kind() -> None:
    quick = having("quick")
    assert not any(case.large for case in quick)
    assert sum(case.shape.logits for case in quick) < 1e7
    kinds = {tag for case in quick for tag in case.tags}
    assert kinds >= {"model", "length", "head-dim", "operands", "adversarial", "layout", "empty"}


# What was promised


@pytest.mark.parametrize("length", [1, 2, 3, 17, 31, 33, 63, 65, 127, 250, 257, 333])
def test_odd_lengths(length: int) -> None:
    found = [case for case in having("length") if case.shape.Q == case.shape.K == length]
    assert dtypes_of(found) >= set(BOTH)


def test_lengths_of_queries_and_keys_differ_both_ways() -> None:
    found = having("cross")
    assert dtypes_of(found) >= set(BOTH)
    assert min(case.shape.Q for case in found) == min(case.shape.K for case in found) == 1
    assert {np.sign(case.shape.Q - case.shape.K) for case in found} == {-1, 1}


@pytest.mark.parametrize("D", [1, 2, 3, 8, 16, 24, 32, 40, 48, 64, 96, 128])
def test_head_dims(D: int) -> None:
    found = [case for case in having("head-dim") if case.shape.D == D]
    assert dtypes_of(found) >= set(THREE)


@pytest.mark.parametrize(
    "offered", [set(), {"mask", "pair_bias"}, {"mask"}, set(OPTIONAL_OPERANDS)]
)
def test_kernels_without_some_operand_are_judged_at_every_size_all_the_same(
    offered: set[str],
) -> None:
    sizes = ("length", "cross", "head-dim")
    others = ("grouped-heads", "batch", "empty", "layout") if offered > {"mask"} else ()
    for tag in (*sizes, *others):
        asked = {(case.shape, case.dtype) for case in having(tag)}
        possible = {(case.shape, case.dtype) for case in having(tag) if case.operands <= offered}
        assert possible == asked


def test_kernels_of_a_mask_and_a_pair_bias_are_judged_on_what_is_hard_in_models_too() -> None:
    plain = [case for case in CASES.values() if case.operands == {"mask", "pair_bias"}]
    assert {case.values for case in plain} >= set(VALUES) - {
        *("one-hot", "huge-negative-bias", "closed-gate", "constant-values")
    }
    assert {case.layout for case in plain} == set(LAYOUTS)
    models = [case for case in plain if "model" in case.tags]
    assert {case.shape.D for case in models} == {24, 32, 48}
    assert not any(case.large for case in models)


@pytest.mark.parametrize("dtype", BOTH)
def test_every_combination_of_operands(dtype: str) -> None:
    found = {case.operands for case in having("operands") if case.dtype == dtype}
    assert found == {
        frozenset(present) for n in range(5) for present in combinations(OPTIONAL_OPERANDS, n)
    }


@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize(
    "values",
    [
        *("large-logits", "one-hot", "equal-logits", "spread-values", "minus-inf-bias"),
        *("masked-rows", "all-masked", "first-key-only", "last-key-only", "garbage-in-dropped"),
        *("nan-attended", "inf-attended", "subnormal", "huge-negative-bias"),
    ],
)
def test_adversarial_values(values: str, dtype: str) -> None:
    found = [case for case in having("adversarial") if (case.values, case.dtype) == (values, dtype)]
    assert found
    for case in found:
        assert case.differentiate == (values not in ("nan-attended", "inf-attended"))
        assert not case.large


def test_every_recipe_and_every_layout_is_used() -> None:
    assert {case.values for case in CASES.values()} == set(VALUES)
    assert {case.layout for case in CASES.values()} == set(LAYOUTS)
    for layout in set(LAYOUTS) - {"contiguous"}:
        found = [case for case in having("layout") if case.layout == layout]
        assert dtypes_of(found) >= set(BOTH)


@pytest.mark.parametrize("axis", ["B", "S", "Q", "K", "H"])
def test_empty_axes(axis: str) -> None:
    found = [case for case in having("empty") if getattr(case.shape, axis) == 0]
    assert dtypes_of(found) >= set(BOTH)


def test_grouped_heads_one_and_several() -> None:
    found = having("grouped-heads")
    assert dtypes_of(found) >= set(BOTH)
    assert 1 in {case.shape.G for case in found}
    assert any(1 < case.shape.G < case.shape.H for case in found)


def test_scales_and_double_precision() -> None:
    assert {scale_of(case) for case in having("scale")} >= {1.0, 0.0, -0.5}
    assert dtypes_of(having("double")) == {"float64"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("msa-row-train", Shape(1, 128, 256, 256, 8, 8, 32)),
        ("msa-row-finetune", Shape(1, 512, 384, 384, 8, 8, 32)),
        ("msa-column", Shape(1, 256, 128, 128, 8, 8, 32)),
        ("extra-msa-1024", Shape(1, 1024, 256, 256, 8, 8, 8)),
        ("extra-msa-5120", Shape(1, 5120, 384, 384, 8, 8, 8)),
        ("extra-msa-global-column", Shape(1, 384, 1, 5120, 8, 1, 8)),
        ("template-pointwise", Shape(1, 65536, 1, 4, 4, 4, 16)),
        ("triangle-256", Shape(1, 256, 256, 256, 4, 4, 32)),
        ("triangle-1024", Shape(1, 1024, 1024, 1024, 4, 4, 32)),
        ("af3-pairformer-single", Shape(1, 1, 384, 384, 16, 16, 24)),
        ("af3-diffusion", Shape(1, 48, 768, 768, 16, 16, 48)),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_model_shapes_each_with_a_size_that_a_cpu_runs(name: str, shape: Shape, dtype: str) -> None:
    full = CASES[f"evoformer/{name}/{dtype}/ragged-mask"]
    assert full.shape == shape
    assert "model" in full.tags
    assert "mask" in full.operands
    if not full.large:
        return
    assert "full-size" in full.tags
    small = CASES[f"evoformer/{name}-small/{dtype}/ragged-mask"]
    assert not small.large
    assert (small.operands, small.dtype) == (full.operands, full.dtype)
    assert "full-size" not in small.tags
    assert str(shape) in small.note
    # what the kernel's shape depends on is not cut
    for axis in "HGD":
        assert getattr(small.shape, axis) == getattr(shape, axis)
    assert all(vars(small.shape)[axis] <= size for axis, size in vars(shape).items())


def test_only_full_sizes_are_too_large_for_a_cpu() -> None:
    assert {case.id for case in CASES.values() if case.large} == {
        case.id for case in having("full-size")
    }
    long = Case(
        "x", "evoformer_attention", Shape(1, CPU_SIZE, 1, 1, 1, 1, 2), "float32", frozenset()
    )
    assert long.large  # few logits, but long operands
    assert not replace(long, shape=Shape(1, CPU_SIZE, 1, 1, 1, 1, 1)).large


# Seeds


def digest(operands: Operands) -> str:
    content = hashlib.sha256()
    for name, x in sorted(operands.items()):
        content.update(f"{name} {x.dtype} {x.shape} ".encode())
        content.update(np.ascontiguousarray(x).tobytes())
    return content.hexdigest()[:16]


@pytest.mark.parametrize(
    ("case_id", "known"),
    [
        ("evoformer/length-17/fp32/all-operands", "76d32ba767f7b3d2"),
        ("evoformer/layout/bf16/packed", "15212db43a0b6748"),
        ("evoformer/values/fp16/garbage-in-dropped", "3a817259040fc075"),
    ],
)
def test_operands_are_those_that_they_always_were(case_id: str, known: str) -> None:
    assert digest(draw(CASES[case_id])) == known, (
        f"the operands of {case_id} have changed: if that is meant, CASES_VERSION must grow "
        "(once for a release), the budgets be calibrated again, and the digests here be replaced"
    )


def test_operands_are_drawn_alike_each_time_and_differ_between_cases() -> None:
    one, other = (
        CASES["evoformer/heads-4-2/fp32/all-operands"],
        CASES["evoformer/heads-4-1/fp32/all-operands"],
    )
    assert digest(draw(one)) == digest(draw(one))
    assert (draw(one)["q"] != draw(other)["q"]).all()
    assert (draw(one)["q"] != draw(one)["gate"]).all()


def test_streams_of_random_numbers_are_independent() -> None:
    case = CASES["evoformer/length-17/fp32/all-operands"]
    drawn = {stream: case.rng(stream).random(4).tobytes() for stream in ("", "a", "b")}
    assert len(set(drawn.values())) == 3
    assert drawn["a"] == case.rng("a").random(4).tobytes()
    assert drawn[""] == case.rng().random(4).tobytes()


# Operands


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if not case.large], ids=lambda case: case.id
)
def test_shapes_and_dtypes(case: Case) -> None:
    if case.shape.logits > 1e6:
        case = replace(case, shape=replace(case.shape, S=1, Q=2, K=3))
    operands = draw(case)
    assert operands.keys() == {"q", "k", "v", "dout"} | case.operands
    for name, x in operands.items():
        assert x.shape == case.shape.of(name if name != "dout" else "out")
        assert x.dtype == (bool if name == "mask" else FORMATS[case.dtype].dtype)


def test_ordinary_operands_are_standard_normal_under_a_ragged_mask() -> None:
    operands = wide(draw(CASES["evoformer/length-333/fp32/all-operands"]))
    for name in ("q", "k", "v", "gate", "dout", "pair_bias"):
        assert operands[name].mean() == pytest.approx(0, abs=0.05)
        assert operands[name].std() == pytest.approx(1, abs=0.05)
    mask = operands["mask"]
    assert mask.any(-1).all()
    assert 0.3 < mask.mean() < 0.95
    assert not mask[..., -1].all()  # padding at the end
    assert mask.sum(-1).min() != mask.sum(-1).max()  # not as long in every row


@pytest.mark.parametrize("case_id", [x.id for x in having("length") if "mask" in x.operands])
def test_every_row_of_an_ordinary_mask_keeps_a_key(case_id: str) -> None:
    assert draw(CASES[case_id])["mask"].any(-1).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
class TestValues:
    """Each recipe does what its docstring says, in every dtype."""

    def test_large_logits(self, dtype: str) -> None:
        s, _ = logits(values_case("large-logits", dtype))
        assert 5e3 < s.max() < 6e4
        assert -6e4 < s.min() < -5e3

    def test_one_hot(self, dtype: str) -> None:
        s, operands = logits(values_case("one-hot", dtype))
        p = np.exp(s - s.max(-1, keepdims=True))
        second = np.sort(p, -1)[..., -2]
        assert second.max() < 1e-6
        assert np.median(p) < FORMATS["float32"].smallest
        aimed = s.argmax(-1)
        assert len(np.unique(aimed)) > 32  # at many different keys

    def test_equal_logits(self, dtype: str) -> None:
        s, operands = logits(values_case("equal-logits", dtype))
        assert (s == s[..., :1]).all()
        assert len(np.unique(s[..., 0])) > 1  # which differ from query to query

    def test_spread_values(self, dtype: str) -> None:
        size = np.abs(wide(draw(values_case("spread-values", dtype)))["v"])
        assert size.max() > 1e4
        assert np.quantile(size, 0.1) < 1e-2 < 1e2 < np.quantile(size, 0.9)

    def test_minus_inf_bias(self, dtype: str) -> None:
        case = values_case("minus-inf-bias", dtype)
        s, operands = logits(case)
        assert not np.isnan(s).any()
        dead = (s == -np.inf).all(-1)
        assert dead[..., ::5].all()
        assert not dead.all()
        left = (s == -np.inf)[..., 1::5, :].mean()
        assert 0.25 < left < 0.5  # 0.36 where either is
        kept = operands["mask"][:, :, None, None, :]
        assert ((s == -np.inf) | ~kept).all(-1)[..., 1::5].mean() < 0.01

    def test_masked_rows(self, dtype: str) -> None:
        mask = draw(values_case("masked-rows", dtype))["mask"]
        assert not mask[:, ::2].any()
        assert mask[:, 1::2].any(-1).all()

    def test_all_masked(self, dtype: str) -> None:
        case = values_case("all-masked", dtype)
        operands = draw(case)
        assert not operands["mask"].any()
        assert all(
            (x == 0).all() for name, x in reference(operands, case, True).items() if name != "lse"
        )

    @pytest.mark.parametrize(("values", "place"), [("first-key-only", 0), ("last-key-only", -1)])
    def test_one_key_only(self, dtype: str, values: str, place: int) -> None:
        mask = draw(values_case(values, dtype))["mask"]
        assert mask[..., place].all()
        assert (mask.sum(-1) == 1).all()

    def test_garbage_in_dropped(self, dtype: str) -> None:
        operands = wide(draw(values_case("garbage-in-dropped", dtype)))
        mask = operands["mask"]
        assert not mask[:, 0].any()
        assert mask[:, 1:].any(-1).all()
        for name in ("k", "v"):
            assert np.isfinite(operands[name][mask]).all()
            held = operands[name][:, 1:][~mask[:, 1:]]
            assert not np.isfinite(held).any()
            assert np.isnan(held).any()
            assert (held == np.inf).any()
            assert (held == -np.inf).any()
            assert not np.isfinite(operands[name][:, 0]).all()
        for name in ("q", "gate", "pair_bias", "mask_bias", "dout"):
            assert np.isfinite(operands[name]).all()

    def test_nan_attended(self, dtype: str) -> None:
        case = values_case("nan-attended", dtype)
        operands = wide(draw(case))
        assert np.isnan(operands["k"]).sum() == case.shape.B
        assert operands["mask"][:, 0, 0].all()
        out = reference(draw(case), case, False)["out"]
        assert np.isnan(out[:, 0, :, 0]).all()
        assert np.isfinite(out[:, 1:]).all()
        assert np.isfinite(out[:, :, :, 1:]).all()

    def test_inf_attended(self, dtype: str) -> None:
        case = values_case("inf-attended", dtype)
        out = reference(draw(case), case, False)["out"]
        assert (out[:, 0, :, 0, 0] == np.inf).all()
        assert np.isinf(out).sum() == case.shape.B * case.shape.Q
        assert not np.isnan(out).any()

    def test_subnormal(self, dtype: str) -> None:
        case = values_case("subnormal", dtype)
        size = np.abs(wide(draw(case))["v"])
        info = FORMATS[case.dtype]
        smallest_normal = info.smallest * 2.0 ** (info.digits - 1)
        assert size.max() < smallest_normal
        assert np.median(size) > 4 * info.smallest  # with digits to lose
        out = np.abs(reference(draw(case), case, False)["out"])
        assert info.smallest < np.median(out) < smallest_normal

    def test_huge_negative_bias(self, dtype: str) -> None:
        case = values_case("huge-negative-bias", dtype)
        bias = wide(draw(case))["mask_bias"]
        assert (bias[:, ::2] < -2.9e4).all()
        assert np.isfinite(bias).all()
        some = bias[:, 1::2] < -2.9e4
        assert 0.1 < some.mean() < 0.5
        if dtype != "fp16":
            assert (bias[:, 1::2][some] < -9e8).all()
        assert np.isfinite(reference(draw(case), case, False)["lse"]).all()

    def test_constant_values(self, dtype: str) -> None:
        case = values_case("constant-values", dtype)
        v = draw(case)["v"]
        assert (v == v[:, :, :1]).all()
        found = reference(draw(case), case, True)
        assert np.abs(found["dq"]).max() < 1e-12 < np.abs(found["dv"]).max()

    def test_closed_gate(self, dtype: str) -> None:
        gate = wide(draw(values_case("closed-gate", dtype)))["gate"]
        assert gate.max() > 45
        assert gate.min() < -45


# Layouts


def operands_of(layout: str) -> tuple[Operands, Operands]:
    """The operands of a layout, and the same numbers as drawn."""
    case = CASES[f"evoformer/layout/fp32/{layout}"]
    assert case.layout == layout
    return draw(case), draw(replace(case, layout="contiguous"))


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"contiguous", "broadcast"}))
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    laid_out, plain = operands_of(layout)
    for name, x in laid_out.items():
        np.testing.assert_array_equal(x, plain[name])
        assert plain[name].flags.c_contiguous


def test_heads_first_is_contiguous_with_heads_and_length_exchanged() -> None:
    laid_out, _ = operands_of("heads-first")
    for name in ("q", "k", "v", "gate", "dout"):
        assert not laid_out[name].flags.c_contiguous
        assert laid_out[name].swapaxes(2, 3).flags.c_contiguous
        assert laid_out[name].strides[-1] == 4


def test_sliced_skips_every_other_element_and_hides_nan_there() -> None:
    laid_out, plain = operands_of("sliced")
    for name in ("q", "k", "v", "gate", "dout", "pair_bias"):
        x = laid_out[name]
        assert x.strides[-1] == 4
        assert x.strides[-2] == 2 * 4 * x.shape[-1]
        between = np.lib.stride_tricks.as_strided(
            x,
            (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]),
            (*x.strides[:-2], x.strides[-2] // 2, x.strides[-1]),
        )[..., 1::2, :]
        assert np.isnan(between).all()


def test_strided_last_has_no_contiguous_last_axis() -> None:
    laid_out, _ = operands_of("strided-last")
    for x in laid_out.values():
        assert x.strides[-1] == max(x.strides) > x.itemsize
        assert x.strides[-1] == x.nbytes // x.shape[-1]


def test_packed_starts_off_alignment_within_a_wider_array() -> None:
    laid_out, _ = operands_of("packed")
    for name in ("q", "k", "v", "gate", "dout"):
        x = laid_out[name]
        assert x.strides[-1] == 4
        assert x.strides[-2] == (3 * x.shape[-1] + 1) * 4
        assert x.ctypes.data % 16 == 4


def test_broadcast_has_strides_of_zero() -> None:
    laid_out, plain = operands_of("broadcast")
    for name in ("q", "k", "v", "mask", "mask_bias", "gate"):
        assert laid_out[name].strides[1] == 0
        np.testing.assert_array_equal(laid_out[name], plain[name][:, :1].repeat(3, axis=1))
    assert laid_out["pair_bias"].strides[2] == 0
    np.testing.assert_array_equal(
        laid_out["pair_bias"], plain["pair_bias"][:, :, :1].repeat(2, axis=2)
    )
    assert 0 not in laid_out["dout"].strides


# Selection


def selected(**wanted: list[str]) -> set[str]:
    return {case.id for case in select(CASES, **wanted)}


def test_without_a_wish_all_are_selected_in_order() -> None:
    assert select(CASES) == list(CASES.values())


def test_patterns_are_alternatives() -> None:
    assert selected(patterns=["evoformer/length-17/*"]) == {
        f"evoformer/length-17/{dtype}/{variant}"
        for dtype in ("fp32", "bf16")
        for variant in ("all-operands", "mask+pair-bias", "bare")
    }
    assert selected(patterns=["*/length-17/fp32/all-*", "evoformer/operands/bf16/bare"]) == {
        "evoformer/length-17/fp32/all-operands",
        "evoformer/operands/bf16/bare",
    }


def test_tags_must_all_be_there_and_dtypes_are_alternatives() -> None:
    found = select(CASES, tags=["edge", "quick"], dtypes=["bf16", "float16"])
    assert found
    assert {case.id for case in found} == {
        case.id
        for case in CASES.values()
        if {"edge", "quick"} <= case.tags and case.dtype in ("bfloat16", "float16")
    }
    assert selected(dtypes=["bf16"]) == selected(dtypes=["bfloat16"])
    assert selected(patterns=["*length*"], tags=["empty"]) == set()


def test_generators_serve_as_well_as_lists() -> None:
    assert select(
        CASES, patterns=iter(["*/length-1/*"]), tags=iter(["quick"]), dtypes=iter(["fp32"])
    )


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            {"patterns": ["evoformer/lenght-17/fp32/all-operands"]},
            "no case 'evoformer/lenght-17/fp32/all-operands'. "
            "Did you mean evoformer/length-17/fp32/all-operands",
        ),
        ({"patterns": ["*/no-such/*"]}, "no case '*/no-such/*'"),
        ({"tags": ["adverserial"]}, "no tag 'adverserial'. Did you mean adversarial?"),
        ({"dtypes": ["bfloat"]}, "no dtype 'bfloat'. Did you mean bfloat16"),
        ({"tags": ["xyzzy"]}, "no tag 'xyzzy'."),
    ],
)
def test_what_is_unknown_is_told_with_what_is_near(wanted: dict[str, list[str]], said: str) -> None:
    with pytest.raises(UnknownName) as raised:
        select(CASES, **wanted)
    assert str(raised.value).startswith(said)
    assert ("Did you mean" in str(raised.value)) == ("Did you mean" in said)
