"""The cases of rotary embedding: that each is what its name says, and that together they cover."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, SHORT_NAMES, Array
from isoform.conformance.rotary.cases import (
    CASES,
    MODELS,
    POSITIONS,
    POSITIONS_BY_EXAMPLE,
    SCALINGS,
    Turn,
    turn_of,
)
from isoform.conformance.rotary.operation import (
    INVALID_CALLS,
    ROTARY_EMBEDDING,
    call_for,
    reference,
    zeros,
)
from isoform.conformance.rotary.values import LAYOUTS, RANK, RANKS, VALUES, draw
from isoform.reference import rotary_scaling
from isoform.reference.numpy.rotary import pairs
from isoform.reference.rotary_contract import ALL_FEATURES, rotary_call
from isoform.reference.rotary_contract import LAYOUTS as PAIRINGS

SMALL = [case for case in CASES.values() if not case.large]


def having(*tags: str) -> list[Case]:
    return [case for case in CASES.values() if case.tags.issuperset(tags)]


def positions_of(values: str) -> Array:
    return draw(CASES[f"rotary/positions/fp32/{values}"])["positions"]


def digest(operands: Operands) -> str:
    content = hashlib.sha256()
    for name, x in sorted(operands.items()):
        content.update(f"{name} {x.dtype} {x.shape} ".encode())
        content.update(np.ascontiguousarray(x).tobytes())
    return content.hexdigest()[:16]


def test_each_is_named_for_what_it_is() -> None:
    assert len(CASES) >= 250
    for case_id, case in CASES.items():
        operation, sizes, dtype, variant = case_id.split("/")
        assert (case.id, operation) == (case_id, ROTARY_EMBEDDING.short)
        assert sizes
        assert variant
        assert SHORT_NAMES[dtype] == case.dtype
        assert case.operation == ROTARY_EMBEDDING.name
        assert case.values in VALUES
        assert case.layout in LAYOUTS
        assert case.operands <= ALL_FEATURES
        assert case.tags
        hash(case)  # the oracle keeps what it found by case


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_operands_make_the_call_that_the_case_says(case: Case) -> None:
    operands = draw(case)
    assert operands.keys() == {"x", "positions", "dout"}
    call = rotary_call(operands["x"], operands["positions"], **dict(case.options))
    assert call == call_for(case)
    assert operands["dout"].shape == operands["x"].shape
    assert operands["dout"].dtype == FORMATS[case.dtype].dtype
    assert operands["positions"].dtype.kind in "iu"
    assert np.isfinite(operands["dout"].astype(np.float64)).all()


def test_no_two_cases_are_the_same_but_for_their_name() -> None:
    described = {repr(replace(case, id="", tags=frozenset(), note="")) for case in CASES.values()}
    assert len(CASES) - len(described) <= 0.05 * len(CASES)


def test_quick_cases_are_quick_and_of_every_kind() -> None:
    quick = having("quick")
    assert sum(case.shape.largest for case in quick) < 5e6
    kinds = {tag for case in quick for tag in case.tags}
    assert kinds >= {"model", "length", "head-dim", "partial", "positions", "scaling", "double"}
    assert kinds >= {"adversarial", "layout", "empty"}


def test_all_that_can_be_asked_for_is_asked_for() -> None:
    asked = frozenset().union(*(case.operands for case in SMALL))
    assert asked == ALL_FEATURES
    for layout in PAIRINGS:
        of_layout = [case for case in SMALL if f"layout={layout}" in case.operands]
        assert {case.dtype for case in of_layout} == FORMATS.keys()
        assert any("rotary_dim<D" in case.operands for case in of_layout)
        assert any(turn_of(case).scaling is not None for case in of_layout)


def test_every_scaling_at_far_positions_in_every_short_dtype() -> None:
    assert {turn.scaling.name for turn in SCALINGS.values() if turn.scaling} == {
        *rotary_scaling.SCALINGS
    }
    found = {(case.dtype, turn_of(case)) for case in having("scaling") if case.values == "to-2m"}
    assert found >= {
        (dtype, turn) for dtype in ("float32", "bfloat16", "float16") for turn in SCALINGS.values()
    }


def test_models_are_there_in_full_and_cut_to_what_a_cpu_can_do() -> None:
    for name, (full, turn, values, cut) in MODELS.items():
        for dtype in ("bf16", "fp32", "fp16"):
            case = CASES[f"rotary/{name}/{dtype}/{values}"]
            small = CASES[f"rotary/{name}-small/{dtype}/{values}"]
            assert case.shape == full
            assert small.shape == replace(full, **cut)
            assert not small.large
            assert turn_of(case) == turn_of(small) == turn
            assert ("full-size" in case.tags) == case.large
    assert {full.D for full, *_ in MODELS.values()} >= {64, 80, 128}


def test_operands_are_those_that_they_always_were() -> None:
    known = {
        "rotary/length-65/fp32/half": "a99d558be3d29e09",
        "rotary/positions/bf16/packed-documents": "254ad0e0e1ee35e9",
        "rotary/layout/bf16/packed-qkv": "4eef60472eb32328",
    }
    assert {case_id: digest(draw(CASES[case_id])) for case_id in known} == known, (
        "operands have changed: if that is meant, CASES_VERSION must grow (once for a release), "
        "the budgets be calibrated again, and the digests here be replaced"
    )


# Positions


def test_positions_far_out() -> None:
    assert positions_of("from-512k").min() == 2**19
    assert positions_of("from-1m").min() == 2**20
    assert positions_of("to-2m").max() == 2**21 - 1
    anywhere = positions_of("anywhere")
    assert anywhere.max() > 2**20
    assert anywhere.max() < 2**21
    assert (np.diff(anywhere) < 0).any()


def test_shards_make_up_the_whole() -> None:
    """What the eight ranks have is each position of the sequence once."""
    L = CASES["rotary/positions/fp32/shard-zigzag"].shape.L
    chunk = L // 2
    assert positions_of("shard-contiguous").tolist() == list(range(RANK * L, (RANK + 1) * L))
    assert positions_of("shard-striped").tolist() == list(range(RANK, RANKS * L, RANKS))
    last = (2 * RANKS - 1 - RANK) * chunk
    assert positions_of("shard-zigzag").tolist() == [
        *range(RANK * chunk, (RANK + 1) * chunk),
        *range(last, last + chunk),
    ]


def test_packed_documents_restart_where_each_example_has_them() -> None:
    positions = positions_of("packed-documents")
    B, L = positions.shape
    restarts = positions == 0
    assert restarts[:, 0].all()
    assert (restarts.sum(1) > 2).all()
    assert len({row.tobytes() for row in restarts}) == B
    assert ((np.diff(positions) == 1) | restarts[:, 1:]).all()


def test_the_other_positions() -> None:
    L = CASES["rotary/positions/fp32/backwards"].shape.L
    assert positions_of("backwards").tolist() == list(range(L))[::-1]
    shuffled = positions_of("shuffled")
    assert sorted(shuffled) == list(range(L))
    assert shuffled.tolist() != list(range(L))
    assert set(positions_of("all-equal")) == {1234}
    assert set(positions_of("all-zero")) == {0}
    negative = positions_of("negative")
    assert negative.min() < -(2**19)
    assert negative.max() > 0
    by_example = positions_of("by-example")
    assert (np.diff(by_example) == 1).all()
    assert len(set(by_example[:, 0])) > 1
    assert positions_of("int32").dtype == np.int32
    assert positions_of("uint8").dtype == np.uint8


@pytest.mark.parametrize("values", POSITIONS)
def test_which_recipes_give_positions_by_example(values: str) -> None:
    assert (positions_of(values).ndim == 2) == (values in POSITIONS_BY_EXAMPLE)


# Values


def values_case(values: str, dtype: str) -> Case:
    return CASES[f"rotary/values/{dtype}/{values}"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
class TestValues:
    """Each recipe does what its docstring says, in every dtype."""

    def test_spread_values(self, dtype: str) -> None:
        size = np.abs(draw(values_case("spread-values", dtype))["x"].astype(np.float64))
        assert size.max() > 3e3
        assert np.quantile(size, 0.1) < 1e-2 < 1e2 < np.quantile(size, 0.9)

    def test_huge(self, dtype: str) -> None:
        case = values_case("huge", dtype)
        operands = draw(case)
        limit = FORMATS[case.dtype].largest
        assert np.isfinite(operands["x"].astype(np.float64)).all()
        size = np.abs(reference(operands, case, False)["out"])
        assert (size > limit).any()
        assert (size < limit).mean() > 0.8

    def test_subnormal(self, dtype: str) -> None:
        case = values_case("subnormal", dtype)
        size = np.abs(draw(case)["x"].astype(np.float64))
        info = FORMATS[case.dtype]
        assert size.max() < info.smallest * 2.0 ** (info.digits - 1)
        assert np.median(size) > 4 * info.smallest

    def test_padding(self, dtype: str) -> None:
        case = values_case("padding", dtype)
        operands = draw(case)
        fixed = zeros(operands, {"out": operands["x"]}, turn_of(case))["out"]
        assert fixed[:, case.shape.L // 2 :].all()
        assert not fixed[:, : case.shape.L // 2].any()
        assert (reference(operands, case, False)["out"][fixed] == 0).all()

    def test_nan_passing(self, dtype: str) -> None:
        case = values_case("nan-passing", dtype)
        operands = draw(case)
        d = turn_of(case).rotary_dim
        out = reference(operands, case, False)["out"]
        assert np.isnan(out[..., d:]).any()
        assert np.isinf(out[..., d:]).any()
        assert not np.isfinite(out[..., d:]).any()
        assert np.isfinite(out[..., :d]).all()

    @pytest.mark.parametrize(
        ("values", "found"), [("nan-turned", np.isnan), ("inf-turned", np.isinf)]
    )
    def test_one_pair_is_not_finite(self, dtype: str, values: str, found: np.ufunc) -> None:
        case = values_case(values, dtype)
        operands = draw(case)
        out = reference(operands, case, False)["out"]
        reached = found(out)
        first, second = pairs(reached[..., : turn_of(case).rotary_dim], turn_of(case).layout)
        assert reached.sum() == 2 * case.shape.B
        assert (first == second).all()
        assert (~np.isfinite(out) == reached).all()


# Layouts


@pytest.mark.parametrize("layout", sorted({*LAYOUTS} - {"contiguous", "broadcast"}))
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    case = CASES[f"rotary/layout/fp32/{layout}"]
    laid_out, plain = draw(case), draw(replace(case, layout="contiguous"))
    for name, x in laid_out.items():
        np.testing.assert_array_equal(x, plain[name])
        assert plain[name].flags.c_contiguous
    assert not laid_out["x"].flags.c_contiguous


def test_a_packed_projection_has_the_strides_of_one() -> None:
    case = CASES["rotary/layout/fp32/packed-qkv"]
    x = draw(case)["x"]
    B, L, H, D = x.shape
    assert [stride // 4 for stride in x.strides] == [L * 3 * H * D, 3 * H * D, D, 1]


def test_sliced_hides_what_must_not_be_read() -> None:
    operands = draw(CASES["rotary/layout/fp32/sliced"])
    x, positions = operands["x"], operands["positions"]
    between = np.lib.stride_tricks.as_strided(
        x,
        (x.shape[0], 2 * x.shape[1], *x.shape[2:]),
        (x.strides[0], x.strides[1] // 2, *x.strides[2:]),
    )[:, 1::2]
    assert np.isnan(between).all()
    assert positions.strides == (16,)


def test_strided_last_offset_and_broadcast() -> None:
    x = draw(CASES["rotary/layout/fp32/strided-last"])["x"]
    assert x.strides[-1] == max(x.strides) > x.itemsize
    x = draw(CASES["rotary/layout/fp32/offset"])["x"]
    assert x.ctypes.data % 16 == 4
    assert x.strides[2] == 4 * (x.shape[3] + 3)
    x = draw(CASES["rotary/layout/fp32/broadcast"])["x"]
    assert x.strides[2] == 0
    np.testing.assert_array_equal(x, x[:, :, :1].repeat(x.shape[2], axis=2))


# The operation


def test_the_reference_is_had_in_float64_and_the_backward_from_dout_alone() -> None:
    case = CASES["rotary/scaling/bf16/yarn"]
    operands = draw(case)
    found = reference(operands, case, True)
    assert found.keys() == {"out", "dx"}
    assert {x.dtype for x in found.values()} == {np.dtype(np.float64)}
    other = reference(operands | {"x": np.zeros_like(operands["x"])}, case, True)
    np.testing.assert_array_equal(other["dx"], found["dx"])
    assert reference(operands, case, False).keys() == {"out"}


def test_zeros_are_fixed_for_pairs_and_for_what_passes_through() -> None:
    x = np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 5.0]]).reshape(1, 1, 1, 7)
    operands = {"x": x, "dout": np.ones_like(x), "positions": np.arange(1)}
    turn = Turn(rotary_dim=4)
    fixed = zeros(operands, {"out": x, "dx": x}, turn)
    assert fixed["out"].ravel().tolist() == [False, True, False, True, True, True, False]
    assert not fixed["dx"].any()


def test_every_argument_has_its_wrong_calls() -> None:
    assert {invalid.about for invalid in INVALID_CALLS} == {
        *("x", "positions", "base", "rotary_dim", "layout", "scaling")
    }
    assert len({invalid.name for invalid in INVALID_CALLS}) == len(INVALID_CALLS)
