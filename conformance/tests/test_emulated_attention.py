"""The kernels of attention over a sequence, emulated: right, and caught with a barrier removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isoform.conformance.case import Operands
from isoform.conformance.implementations import emulated_attention as emulated
from isoform.conformance.judge import judge, judge_invalid_calls
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.verdicts import Verdict
from isoform.kernels import attention_plain
from isoform.kernels.emulate import HostCompilerUnavailable, KernelFault, host_compiler
from isoform.kernels.emulate.program import CUDA

try:
    host_compiler()
except HostCompilerUnavailable as missing:
    pytest.skip(f"cuda-emulated: not run: {missing}", allow_module_level=True)

BARRIER = "__syncthreads();"
SOURCE = CUDA / f"{attention_plain.SOURCE}.cu"


def all_results() -> Operands:
    """Outputs and gradients of one case, in which no tile is whole and heads share keys."""
    case = CASES["attention/mask/fp32/causal"]
    operands = OPERATIONS[case.operation].draw(case)
    dout = operands.pop("dout")
    out, lse = emulated.attention(**operands, causal=True, return_lse=True)
    gradients = emulated.attention_backward(dout, **operands, causal=True)
    return {"out": out, "lse": lse, **gradients._asdict()}


@pytest.mark.parametrize(
    "case",
    [
        "attention/heads-4-2/fp32/causal",
        "attention/heads-4-2/bf16/causal",
        "attention/mask/bf16/padded-causal-window",
        "attention/values/fp16/garbage-in-padding",
    ],
)
def test_the_kernels_are_right(case: str) -> None:
    outcomes = judge(emulated.CUDA_EMULATED_ATTENTION, CASES[case])
    assert [outcome for outcome in outcomes if outcome.verdict is not Verdict.PASS] == []


def test_wrong_calls_are_answered() -> None:
    outcomes = judge_invalid_calls(emulated.CUDA_EMULATED_ATTENTION)
    assert [outcome for outcome in outcomes if outcome.verdict is not Verdict.PASS] == []


@pytest.mark.parametrize("which", range(SOURCE.read_text().count(BARRIER)))
def test_each_barrier_is_needed_and_its_removal_caught(folder: Path, which: int) -> None:
    """Of the plain kernel: emulated warps keep step too well to race for a tile of another warp."""
    parts = SOURCE.read_text().split(BARRIER)
    parts[which : which + 2] = ["".join(parts[which : which + 2])]
    (folder / SOURCE.name).write_text(BARRIER.join(parts))
    try:  # where every order reads a tile before any thread has written it, all give NaN alike
        caught = any(np.isnan(result).any() for result in all_results().values())
    except KernelFault as fault:
        caught = "a barrier is missing" in str(fault)
    assert caught


@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        # a window one short on the left; its end on the right one long; documents that meet
        (">= -a.left", "> -a.left", "attention/mask/bf16/shuffled-window"),
        ("<= a.right;", "<= a.right + 1;", "attention/mask/bf16/shuffled"),
        ("query.segment == key.segment &&", "", "attention/mask/bf16/packed-causal"),
    ],
)
def test_a_fault_of_the_mask_is_judged_wrong(
    folder: Path, right: str, wrong: str, case: str
) -> None:
    header = folder / "attention_mask.cuh"
    before, found, after = header.read_text().partition("inline bool attends(")
    assert found and right in after
    header.write_text(before + found + after.replace(right, wrong, 1))
    outcomes = judge(emulated.CUDA_EMULATED_ATTENTION, CASES[case])
    assert any(outcome.verdict is Verdict.WRONG for outcome in outcomes)
