"""The CUDA kernels, emulated: right as they are, and caught with any one barrier removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.conformance.case import Operands
from isoform.conformance.implementations import emulated
from isoform.conformance.judge import judge, judge_invalid_calls
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.verdicts import Verdict
from isoform.kernels import plain
from isoform.kernels.emulate import HostCompilerUnavailable, KernelFault, host_compiler
from isoform.kernels.emulate.program import CUDA

try:
    host_compiler()
except HostCompilerUnavailable as missing:
    pytest.skip(f"cuda-emulated: not run: {missing}", allow_module_level=True)

CASE = CASES["evoformer/heads-4-1/fp32/all-operands"]
SOURCE = CUDA / f"{plain.SOURCE}.cu"
BARRIER = "__syncthreads();"


def all_results() -> Operands:
    """Outputs and gradients of one case, in which no tile is whole and heads share keys."""
    operands: dict[str, Any] = OPERATIONS[CASE.operation].draw(CASE)
    dout = operands.pop("dout")
    out, lse = emulated.evoformer_attention(**operands, return_lse=True)
    gradients = emulated.evoformer_attention_backward(dout, **operands)
    return {"out": out, "lse": lse, **gradients._asdict()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_are_right(dtype: str) -> None:
    case = CASES[f"evoformer/heads-4-1/{dtype}/all-operands"]
    outcomes = [*judge(emulated.CUDA_EMULATED, case), *judge_invalid_calls(emulated.CUDA_EMULATED)]
    assert [outcome for outcome in outcomes if outcome.verdict is not Verdict.PASS] == []


@pytest.mark.parametrize("which", range(SOURCE.read_text().count(BARRIER)))
def test_each_barrier_is_needed_and_its_removal_caught(folder: Path, which: int) -> None:
    parts = SOURCE.read_text().split(BARRIER)
    parts[which : which + 2] = ["".join(parts[which : which + 2])]
    (folder / SOURCE.name).write_text(BARRIER.join(parts))
    try:  # where every order reads a tile before any thread has written it, all give NaN alike
        caught = any(np.isnan(result).any() for result in all_results().values())
    except KernelFault as fault:
        caught = "a barrier is missing" in str(fault)
    assert caught


def test_a_store_by_two_threads_is_caught(folder: Path) -> None:
    source = SOURCE.read_text()
    condition = "a.lse.data != nullptr && threadIdx.x == 0"
    assert source.count(condition) == 1
    spoiled = source.replace(condition, "a.lse.data != nullptr").replace(
        "result.top + logf(result.total)", "result.top + logf(result.total) + threadIdx.x"
    )
    (folder / SOURCE.name).write_text(spoiled)
    with pytest.raises(KernelFault, match="lse differ between threads in forward order"):
        all_results()
