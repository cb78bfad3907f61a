"""The CUDA kernels, emulated: right as they are, and caught with any one barrier removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.conformance.case import Operands
from isoform.conformance.implementations import emulated, emulation
from isoform.conformance.judge import judge, judge_invalid_calls
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.verdicts import Verdict
from isoform.kernels import plain, tensor
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


# --- One pass for q and the pair bias -------------------------------------------------------------

# Those that have a gate are done without it here: with one there are two passes.
WHOLE = (
    "heads-4-1/bf16/all-operands",
    *(
        f"values/{dtype}/{name}"
        for dtype, name in (
            ("bf16", "large-logits"),
            ("bf16", "minus-inf-bias"),
            ("bf16", "masked-rows"),
            ("bf16", "garbage-in-dropped"),
            ("bf16", "nan-attended"),
            ("fp16", "inf-attended"),
            ("fp16", "large-logits"),
        )
    ),
)


def compare_passes(operands: Operands, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass gives what two give, up to rounding, and what is not finite exactly."""
    launched: list[str] = []
    original = emulation.launch_all

    def spy(launches: Any, *others: Any) -> None:
        launched.extend(one.kernel for one in launches)
        original(launches, *others)

    given: dict[str, Any] = {name: x for name, x in operands.items() if name != "gate"}
    dout = given.pop("dout")
    two = emulated.evoformer_attention_backward(dout, **given)
    monkeypatch.setattr(emulation, "launch_all", spy)
    with emulated.hopper():
        one = emulated.evoformer_attention_backward(dout, **given)
    assert tensor.WHOLE_SOURCE in launched
    for name, before in two._asdict().items():
        if before is None:
            continue
        x, y = (np.asarray(each, np.float32) for each in (getattr(one, name), before))
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=name)
        largest = np.abs(y[finite]).max(initial=0.0)
        np.testing.assert_allclose(x[finite], y[finite], rtol=0.02, atol=0.004 * largest)


@pytest.mark.parametrize("name", WHOLE)
def test_one_pass_gives_what_two_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[f"evoformer/{name}"]
    compare_passes(OPERATIONS[case.operation].draw(case), monkeypatch)


def test_blocks_share_the_rows_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 rows, two do half each, and the second waits for the first."""
    rng = np.random.default_rng(0)
    draws = {
        name: rng.standard_normal(size).astype(np.float16)
        for name, size in {
            **dict.fromkeys(("q", "dout"), (1, 32, 9, 1, 16)),
            **dict.fromkeys(("k", "v"), (1, 32, 20, 1, 16)),
            "pair_bias": (1, 1, 1, 9, 20),
        }.items()
    }
    compare_passes(draws, monkeypatch)
