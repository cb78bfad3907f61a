"""The rotary kernel, emulated: right whatever a call asks for, and caught when it is spoiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest

from isoform.conformance.dtypes import Array
from isoform.conformance.implementations import emulated_rotary as emulated
from isoform.conformance.judge import judge, judge_invalid_calls
from isoform.conformance.operations import CASES
from isoform.conformance.verdicts import Verdict
from isoform.kernels.emulate import HostCompilerUnavailable, KernelFault, host_compiler
from isoform.kernels.emulate.program import CUDA
from isoform.kernels.rotary_launch import SOURCE, Turn
from isoform.reference.numpy import rotary_embedding, rotary_embedding_backward, rotary_tables
from isoform.reference.rotary_scaling import YaRN

try:
    host_compiler()
except HostCompilerUnavailable as missing:
    pytest.skip(f"cuda-emulated: not run: {missing}", allow_module_level=True)

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    "case_id",
    [
        "head-dim-128/bf16/interleaved",
        "partial-80-32/bf16/half",
        "partial-127-64/fp32/interleaved",
        "layout/bf16/packed-qkv",
        "positions/fp32/anywhere",
        "scaling/fp32/yarn-attention-factor",
        "values/fp32/nan-passing",
        "empty/fp32/no-heads",
    ],
)
def test_the_kernel_is_right(case_id: str) -> None:
    outcomes = judge(emulated.CUDA_EMULATED_ROTARY, CASES[f"rotary/{case_id}"])
    assert outcomes
    assert [outcome for outcome in outcomes if outcome.verdict is not Verdict.PASS] == []


def test_wrong_calls_are_answered() -> None:
    outcomes = judge_invalid_calls(emulated.CUDA_EMULATED_ROTARY)
    assert [outcome for outcome in outcomes if outcome.verdict is not Verdict.PASS] == []


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_every_cosine_and_sine_is_right_to_float32s_last_bit(base: float, dtype: Any) -> None:
    """Also next to a zero, as at position 1567239, where an angle of float64 is not enough."""
    hard = [0, 1, 2**16, 2**19, 2**20, 2**21 - 1, 2**21, -1, -(2**21), 1567239]
    positions = np.concatenate([hard, RNG.integers(-(2**21), 2**21, 500)]).astype(dtype)
    x = np.zeros((1, len(positions), 1, 128), np.float32)
    x[..., :64] = 1
    found = emulated.rotary_embedding(x, positions, base=base)[0, :, 0]
    wanted = np.concatenate(rotary_tables(positions, 128, base=base, dtype=np.float64), -1)
    last_place = np.spacing(np.abs(wanted).astype(np.float32))
    assert (np.abs(found - wanted) <= 0.75 * last_place).all()
    assert (found == wanted.astype(np.float32)).mean() > 0.97


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_positions_reach_from_the_least_to_the_greatest_of_their_dtype(dtype: str) -> None:
    least_and_greatest = np.iinfo(dtype)
    positions = np.array([least_and_greatest.min, least_and_greatest.max, 1], dtype)
    x = RNG.standard_normal((1, 3, 2, 8)).astype(np.float32)
    found = emulated.rotary_embedding(x, positions)
    wanted = rotary_embedding(x.astype(np.float64), positions.astype(np.int64))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", [2**63, 2**64 - 1, -(2**63), 2**40 + 1, -(2**53) - 1])
def test_any_position_of_64_bits_turns_by_its_angle(position: int) -> None:
    dtype = np.uint64 if position >= 2**63 else np.int64
    x = np.array([1, 0], np.float32).reshape(1, 1, 1, 2)
    found = emulated.rotary_embedding(x, np.array([position], dtype))
    with mpmath.workdps(60):
        wanted = [float(mpmath.cos(position)), float(mpmath.sin(position))]
    # what ω = 1 over 2π lost when it was rounded, 2⁻⁸⁵ of it, counts this often
    np.testing.assert_allclose(found[0, 0, 0], wanted, rtol=1e-7, atol=2.0**-85 * abs(position))


def queries_and_keys(dtype: Any = np.float32) -> tuple[Array, Array, Array]:
    """As views of one projection, and where their tokens are."""
    qkv = RNG.standard_normal((2, 7, 9, 32)).astype(dtype)
    return qkv[:, :, :5], qkv[:, :, 5:7], np.array([5, 4, 0, 2**20, 1, 77, 77])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_both_in_one_launch_are_each_alone(dtype: Any, layout: str, backwards: bool) -> None:
    q, k, positions = queries_and_keys(dtype)
    turn = Turn(24, 1e4, layout, YaRN(8.0, 64), backwards)
    both = emulated.turned(turn, [q, k], positions)
    function = rotary_embedding_backward if backwards else rotary_embedding
    for x, found in zip((q, k), both, strict=True):
        (alone,) = emulated.turned(turn, [x], positions)
        assert found.tobytes() == alone.tobytes()
        how = {"rotary_dim": 24, "layout": layout, "scaling": turn.scaling}
        wanted = function(x.astype(np.float64), positions, **how)
        unit = 2.0**-8 if dtype == ml_dtypes.bfloat16 else 2.0**-22
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=unit, atol=unit)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_in_place_it_is_the_same_and_nothing_else_is_touched(dtype: Any) -> None:
    qkv = RNG.standard_normal((2, 7, 3, 4, 48)).astype(dtype)
    before, positions = qkv.copy(), np.arange(7)
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    turn = Turn(32, 1e4, "half", None, False)
    wanted = emulated.turned(turn, [q, k], positions)
    emulated.launch(turn, {"x": q, "out": q, "other": k, "out_other": k, "positions": positions})
    assert (q.tobytes(), k.tobytes()) == (wanted[0].tobytes(), wanted[1].tobytes())
    assert qkv[:, :, 2].tobytes() == before[:, :, 2].tobytes()
    assert q[..., 32:].tobytes() == before[:, :, 0, :, 32:].tobytes()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_vectors_of_any_width_give_the_same_bits(dtype: Any, layout: str) -> None:
    positions = np.arange(6) + 2**19
    x = RNG.standard_normal((1, 6, 3, 64)).astype(dtype)
    results = []
    for offset in (0, 1, 2, 4, 8):  # elements off alignment
        wide = np.zeros((1, 6, 3, 80), dtype)
        view = wide[..., offset : offset + 64]
        view[...] = x
        results.append(emulated.rotary_embedding(view, positions, layout=layout).tobytes())
    assert len(set(results)) == 1


BARRIER = "__syncthreads();"
TEXT = (CUDA / f"{SOURCE}.cu").read_text()


def spoiled(folder: Path, text: str) -> bool:
    """Whether the kernel of this source is caught on one call."""
    (folder / f"{SOURCE}.cu").write_text(text)
    q, _, positions = queries_and_keys()
    try:
        found = emulated.rotary_embedding(q, positions)
    except KernelFault as fault:
        return "a barrier is missing" in str(fault)
    return not np.allclose(found, rotary_embedding(q, positions), atol=1e-5)


def test_as_it_is_it_is_not_caught(folder: Path) -> None:
    assert not spoiled(folder, TEXT)


@pytest.mark.parametrize("which", range(TEXT.count(BARRIER)))
def test_each_barrier_is_needed_and_its_removal_caught(folder: Path, which: int) -> None:
    parts = TEXT.split(BARRIER)
    parts[which : which + 2] = ["".join(parts[which : which + 2])]
    assert spoiled(folder, BARRIER.join(parts))


def test_a_row_that_two_threads_write_is_caught(folder: Path) -> None:
    place = "int n = static_cast<int>(threadIdx.y) - t * all_heads;"
    assert TEXT.count(place) == 1
    # all threads start at the first head, and each writes something else to it
    text = TEXT.replace(place, "int n = 0;").replace(
        "x1 * c.at[i] - x2 * s.at[i]", "x1 * c.at[i] - x2 * s.at[i] + threadIdx.y"
    )
    (folder / f"{SOURCE}.cu").write_text(text)
    q, _, positions = queries_and_keys()
    with pytest.raises(KernelFault, match="out differ between threads in forward order"):
        emulated.rotary_embedding(q, positions)
