"""The oracle in chunks is the oracle: on the CPU, and with arrays that are not NumPy's."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from isoform.conformance import chunks, oracle
from isoform.conformance.attention import condition as attention_condition
from isoform.conformance.attention import operation as attention
from isoform.conformance.attention import twin as attention_twin
from isoform.conformance.attention.cases import window_of
from isoform.conformance.case import Operands
from isoform.conformance.chunks import CPU, GPU, Chunk, Processor
from isoform.conformance.chunks import chunks as split
from isoform.conformance.dtypes import Array, bfloat16_by_bits
from isoform.conformance.evoformer.cases import scale_of, shape_of
from isoform.conformance.evoformer.condition import conditions
from isoform.conformance.evoformer.operation import reference
from isoform.conformance.evoformer.twin import twin
from isoform.conformance.evoformer.values import draw
from isoform.conformance.judge import judge
from isoform.conformance.metrics import errors, pattern_fault
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.rotary import condition as rotary_condition
from isoform.conformance.rotary import operation as rotary
from isoform.conformance.rotary import twin as rotary_twin
from isoform.conformance.rotary.cases import turn_of
from isoform.conformance.trusted import TRUSTED
from isoform.conformance.verdicts import Verdict
from isoform.reference.attention_contract import PLACES
from isoform.reference.contract import Arithmetic, Shape
from isoform.reference.rotary_contract import RotaryShape

CASE_IDS = (
    [
        f"evoformer/{name}"
        for name in (
            "operands/fp32/bare",
            "operands/fp32/mask",
            "operands/bf16/mask+mask-bias+pair-bias+gate",
            "heads-4-1/fp32/all-operands",
            "heads-6-2/bf16/all-operands",
            "batch-3/fp32/all-operands",
            "lengths-5-300/fp32/all-operands",
            "lengths-300-5/fp32/all-operands",
            "layout/fp32/broadcast",
            "layout/bf16/strided-last",
            "values/fp32/minus-inf-bias",
            "values/fp32/masked-rows",
            "values/fp32/all-masked",
            "values/fp32/garbage-in-dropped",
            "values/fp32/nan-attended",
            "values/fp32/inf-attended",
            "empty/fp32/no-batch",
            "empty/fp32/no-rows",
            "empty/fp32/no-queries",
            "empty/fp32/no-keys",
            "empty/fp32/no-heads",
        )
    ]
    + [
        f"attention/{name}"
        for name in (
            "mask/fp32/bare",
            "mask/bf16/per-example",
            "mask/fp32/padded-causal-window",
            "heads-6-2/bf16/causal",
            "ring/fp32/packed-uneven",
            "lengths-300-5/fp32/last-aligned",
            "layout/bf16/strided-last",
            "values/fp32/no-keys-for-some",
            "values/fp32/garbage-in-padding",
            "values/fp32/nan-attended",
            "empty/fp32/no-batch",
            "empty/fp32/no-queries",
            "empty/fp32/no-keys",
            "empty/fp32/no-heads",
        )
    ]
    + [
        f"rotary/{name}"
        for name in (
            "head-dim-66/fp32/half",
            "partial-80-32/bf16/interleaved",
            "positions/fp32/packed-documents",
            "positions/fp16/to-2m",
            "scaling/fp32/yarn",
            "layout/bf16/strided-last",
            "layout/fp32/broadcast",
            "values/fp32/nan-passing",
            "values/fp32/inf-turned",
            "empty/fp32/no-batch",
            "empty/fp32/no-length",
            "empty/fp32/no-heads",
        )
    ]
)

LIMITS = {"examples": 0.5, "rows": 0.2, "queries": 0.01}
"""What a chunk may hold, as a part of the logits: so much that a call is split there."""


class Elsewhere(np.ndarray[Any, Any]):
    """An array that, like CuPy's, mixes with Python's numbers but not with NumPy's arrays."""

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any
    ) -> Any:  # what a reduction does too
        if "initial" in keywords:
            raise TypeError("CuPy's reductions have no initial value")
        return there(getattr(ufunc, method)(*here(inputs), **keywords))

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Any:
        if function is np.asarray:  # asked for by ``like=``, and how NumPy's arrays get there
            return there(function(*args, **keywords))
        return there(function(*here(args), **keywords))


def here(arguments: tuple[Any, ...]) -> list[Any]:
    if any(type(x) is np.ndarray for x in arguments):
        raise TypeError("an array of NumPy's beside one from elsewhere")
    return [x.view(np.ndarray) if isinstance(x, Elsewhere) else x for x in arguments]


def there(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(map(there, found))
    return found.view(Elsewhere) if isinstance(found, np.ndarray) else found


def to_elsewhere(x: Array) -> Any:
    return (x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x).view(Elsewhere)


def drawn(case_id: str) -> Operands:
    return OPERATIONS[CASES[case_id].operation].operands(CASES[case_id])


def everything(
    case_id: str, operands: Operands, processor: Processor | None
) -> dict[str, dict[str, Array]]:
    """What the definition, κ, λ and the twin say of a case, twin in float64."""
    case = CASES[case_id]
    wanted = case.differentiate
    more: dict[str, Any] = {"gradients": wanted, "processor": processor}
    if case.operation == "rotary_embedding":
        turn = turn_of(case)
        truth = rotary.reference(operands, case, wanted, processor)
        found = rotary_condition.conditions(operands, turn, **more)
        twins = rotary_twin.twin(operands, turn, "float64", Arithmetic(), **more)
    elif case.operation == "attention":
        scale = scale_of(case)
        window = window_of(case)
        truth = attention.reference(operands, case, wanted, processor)
        found = attention_condition.conditions(operands, scale, window, truth, **more)
        twins = attention_twin.twin(operands, scale, window, "float64", Arithmetic(), **more)
    else:
        scale = scale_of(case)
        truth = reference(operands, case, wanted, processor)
        found = conditions(operands, scale, truth, **more)
        twins = twin(operands, scale, "float64", Arithmetic(), **more)
    return {
        "reference": truth,
        "relative": {name: x.relative for name, x in found.items()},
        "underflow": {name: x.underflow for name, x in found.items()},
        "twin": twins,
    }


def in_double(operands: Operands) -> Operands:
    kept = ("mask", *PLACES)
    return {name: x if name in kept else x.astype(np.float64) for name, x in operands.items()}


def assert_alike(found: dict[str, dict[str, Array]], wanted: dict[str, dict[str, Array]]) -> None:
    for what, results in wanted.items():
        assert found[what].keys() == results.keys()
        for name, x in results.items():
            assert type(found[what][name]) is np.ndarray
            assert found[what][name].shape == x.shape
            assert found[what][name].dtype == x.dtype
            largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
            np.testing.assert_allclose(
                found[what][name], x, rtol=1e-13, atol=1e-13 * largest, err_msg=f"{what} {name}"
            )


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("part", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("case_id", CASE_IDS)
def test_in_chunks_it_is_the_same(case_id: str, part: float) -> None:
    case = CASES[case_id]
    operands = in_double(drawn(case_id))
    size = getattr(case.shape, "logits", case.shape.largest)
    limit = max(1, int(part * size))
    whole = everything(case_id, operands, CPU)
    in_chunks = everything(case_id, operands, replace(CPU, limit=limit))
    assert (len(list(split(case.shape, limit))) > 1) == (size > 0)
    assert_alike(in_chunks, whole)


@pytest.mark.parametrize("case_id", CASE_IDS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_with_arrays_that_are_not_numpys_it_is_the_same(case_id: str) -> None:
    operands = drawn(case_id)
    elsewhere = Processor(1000, put=to_elsewhere, get=lambda x: x.view(np.ndarray))
    found = everything(case_id, operands, elsewhere)
    assert_alike(found, everything(case_id, operands, CPU))


@pytest.mark.skipif(not chunks.gpu_present(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("case_id", CASE_IDS)
def test_on_a_gpu_it_is_the_same(case_id: str) -> None:
    operands = drawn(case_id)
    found = everything(case_id, operands, replace(GPU, limit=1000))
    assert_alike(found, everything(case_id, operands, CPU))


def test_arrays_that_are_not_numpys_do_not_mix() -> None:
    x = to_elsewhere(np.ones(3))
    for mixed in (
        lambda: x + np.ones(3),
        lambda: np.where(x > 0, x, np.zeros(())),
        lambda: np.asarray(x) * x,
    ):
        with pytest.raises(TypeError, match="beside one from elsewhere"):
            mixed()
    with pytest.raises(TypeError, match="initial"):
        x.max(initial=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_errors_are_measured_alike_on_arrays_that_are_not_numpys(dtype: str) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 400))
    actual = (reference * (1 + 2.0**-8 * rng.standard_normal(reference.shape))).astype(dtype)
    reference[0, :3] = np.nan, np.inf, 0
    allowed = np.abs(reference) * 2.0**-8 + 1e-6
    arrays = actual, reference, allowed
    wanted = errors(*arrays, dtype)
    assert errors(*map(to_elsewhere, arrays), dtype) == wanted
    if chunks.gpu_present():
        found = asdict(errors(*map(GPU.put, arrays), dtype))
        for figure, value in asdict(wanted).items():
            assert found[figure] == pytest.approx(value), figure


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, 0.0])
def test_patterns_are_seen_alike_in_arrays_that_are_not_numpys(spoiled: float) -> None:
    reference = np.arange(60.0).reshape(3, 4, 5) + 1
    actual, zeros = reference.astype(np.float32), np.zeros(reference.shape, bool)
    actual[1, 2, 3] = spoiled
    reference[0, 0, 1], zeros[0, 0, 2] = np.nan, True
    arrays = actual, reference, zeros
    wanted = pattern_fault(*arrays, "float32", lse=False)
    assert wanted is not None
    assert pattern_fault(*map(to_elsewhere, arrays), "float32", lse=False) == wanted
    if chunks.gpu_present():
        assert pattern_fault(*map(GPU.put, arrays), "float32", lse=False) == wanted


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_judged_with_arrays_that_are_not_numpys_it_is_the_same(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[f"evoformer/operands/{dtype}/mask+mask-bias+pair-bias+gate"]
    (narrow, *_) = TRUSTED  # the definition in float32
    wanted = judge(narrow, case)
    oracle.expected.cache_clear()
    oracle._twin.cache_clear()
    uploaded: list[Array] = []

    def put(x: Array) -> Any:
        uploaded.append(x)
        return to_elsewhere(x)

    elsewhere = Processor(1000, put=put, get=lambda x: x.view(np.ndarray))
    for module in (chunks, oracle):
        monkeypatch.setattr(module, "CPU", replace(CPU, limit=1000))
        monkeypatch.setattr(module, "GPU", elsewhere)
        monkeypatch.setattr(module, "gpu_present", lambda: True)
        monkeypatch.setattr(module, "gpu_memory", nullcontext)
    found = judge(narrow, case)
    assert uploaded
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.check, one.verdict, one.message) == (other.check, Verdict.PASS, "")
        assert [part.name for part in one.parts] == [part.name for part in other.parts]
        for part, same in zip(one.parts, other.parts, strict=True):
            if part.name == "condition":  # the twin's float32 sums differ with the chunks
                assert part.figure == pytest.approx(same.figure, rel=0.5)


SHAPES = [
    Shape(1, 3, 5, 7, 2, 1, 4),
    Shape(4, 3, 5, 7, 2, 2, 4),
    Shape(2, 6, 1, 40, 4, 1, 3),
    Shape(2, 1, 30, 2, 3, 3, 5),
    Shape(1, 1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_cover_everything_once_and_keep_to_the_limit(shape: Shape) -> None:
    for limit in range(1, 2 * shape.B * shape.S * shape.H * max(shape.Q, shape.D) * shape.K):
        covered = np.zeros((shape.B, shape.S, shape.Q), int)
        found = list(split(shape, limit))
        for chunk in found:
            B, S, Q = (len(range(shape.__dict__[axis])[chunk[axis]]) for axis in "BSQ")
            covered[chunk["B"], chunk["S"], chunk["Q"]] += 1
            size = B * S * shape.H * max(Q * shape.K, Q * shape.D, shape.K * shape.D)
            assert size <= limit or (B, S, Q) == (1, 1, 1) or size == shape.H * shape.K * shape.D
        assert (covered == 1).all()
        assert whole(found) == (len(found) == 1) or shape.B * shape.S * shape.Q == 1


@pytest.mark.parametrize(("B", "L"), [(1, 13), (3, 5), (4, 1)])
def test_chunks_of_tokens_cover_everything_once_and_keep_to_the_limit(B: int, L: int) -> None:
    shape = RotaryShape(B, L, H=2, D=6)
    for limit in range(1, 2 * shape.largest):
        covered = np.zeros((B, L), int)
        found = list(split(shape, limit))
        for chunk in found:
            covered[chunk["B"], chunk["L"]] += 1
            examples, tokens = len(range(B)[chunk["B"]]), len(range(L)[chunk["L"]])
            assert examples * tokens * 2 * 6 <= limit or (examples, tokens) == (1, 1)
        assert (covered == 1).all()
        assert whole(found) == (len(found) == 1)


def whole(found: list[Chunk]) -> bool:
    return all(length == slice(None) for chunk in found for length in chunk.values())


def test_where_chunks_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is one chunk of the CPU stays there; else a GPU is used, if there is one."""
    used: list[Processor] = []
    monkeypatch.setattr(chunks, "_summed", lambda *arguments: used.append(arguments[-1]))
    monkeypatch.setattr(chunks, "gpu_memory", nullcontext)
    operands = draw(CASES["evoformer/operands/fp32/bare"])
    for present, limit in [(False, CPU.limit), (True, CPU.limit), (False, 10), (True, 10)]:
        monkeypatch.setattr(chunks, "gpu_present", lambda present=present: present)
        monkeypatch.setattr(chunks, "CPU", replace(CPU, limit=limit))
        chunks.in_chunks(lambda chunk: {}, operands, shape_of(operands))
    assert [processor is GPU for processor in used] == [False, False, False, True]


def test_there_is_no_gpu_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not chunks.gpu_present()


def test_of_a_large_case_nothing_is_kept_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["evoformer/operands/fp32/bare"]
    oracle.expected(case, True)
    assert oracle.expected.cache_info().currsize >= 1
    monkeypatch.setattr("isoform.conformance.case.CPU_SIZE", 10)
    oracle.expected(CASES["evoformer/operands/fp32/mask"], True)
    assert oracle.expected.cache_info().currsize == 1


def test_bfloat16_by_its_bits_is_that_of_ml_dtypes() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = [upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    for x in (np.concatenate([bits, *ties]).view(np.float32), rng.standard_normal(100_000)):
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = x.astype(ml_dtypes.bfloat16).astype(x.dtype)
            found = bfloat16_by_bits(x)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, wanted)
        number = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(wanted[number]))
