"""The CUDA kernels, emulated: right as they are, and caught with any one barrier removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from isoform.conformance.case import Operands
from isoform.conformance.implementations import emulated, emulation
from isoform.conformance.judge import judge, judge_invalid_calls
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.verdicts import Verdict
from isoform.kernels import geometries, plain, tensor, warpgroup
from isoform.kernels.arguments import EVOFORMER
from isoform.kernels.choice import select
from isoform.kernels.emulate import HostCompilerUnavailable, KernelFault, host_compiler
from isoform.kernels.emulate.program import CUDA
from isoform.kernels.launch import MULTIPROCESSORS, Launch, setting
from isoform.reference.contract import evoformer_call
from isoform.reference.numpy import evoformer_attention_backward

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


def spy_on_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is launched from now on."""
    launched: list[Launch] = []
    original = emulation.launch_all

    def spy(launches: Any, *others: Any) -> None:
        launched.extend(launches)
        original(launches, *others)

    monkeypatch.setattr(emulation, "launch_all", spy)
    return launched


def compare_passes(
    operands: Operands, monkeypatch: pytest.MonkeyPatch, kernel: str = tensor.WHOLE_SOURCE
) -> list[Launch]:
    """A Hopper's kernels, ``kernel`` among them, give what those of other GPUs give, up to
    rounding, and what is not finite exactly. What it launches.
    """
    given: dict[str, Any] = {name: x for name, x in operands.items() if name != "gate"}
    dout = given.pop("dout")
    two = emulated.evoformer_attention_backward(dout, **given)
    launched = spy_on_launches(monkeypatch)
    if kernel == tensor.WHOLE_SOURCE:  # warpgroups would do what it does
        monkeypatch.setattr(warpgroup, "BACKWARD", {})
    with emulated.hopper():
        one = emulated.evoformer_attention_backward(dout, **given)
    assert kernel in {each.kernel for each in launched}
    for name, before in two._asdict().items():
        if before is None:
            continue
        x, y = (np.asarray(each, np.float32) for each in (getattr(one, name), before))
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=name)
        largest = np.abs(y[finite]).max(initial=0.0)
        np.testing.assert_allclose(x[finite], y[finite], rtol=0.02, atol=0.004 * largest)
    return launched


@pytest.mark.parametrize("name", WHOLE)
def test_one_pass_gives_what_two_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[f"evoformer/{name}"]
    compare_passes(OPERATIONS[case.operation].draw(case), monkeypatch)


def drawn(
    rng: np.random.Generator, S: int, Q: int, K: int, H: int, D: int, dtype: Any = np.float16
) -> dict[str, Any]:
    """Operands with one key/value head."""
    return {
        name: rng.standard_normal(size).astype(dtype)
        for name, size in {
            **dict.fromkeys(("q", "dout"), (1, S, Q, H, D)),
            **dict.fromkeys(("k", "v"), (1, S, K, 1, D)),
            "pair_bias": (1, 1, H, Q, K),
        }.items()
    }


def test_blocks_share_the_rows_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 rows, two do half each, and the second waits for the first."""
    compare_passes(drawn(np.random.default_rng(0), 32, 9, 20, 1, 16), monkeypatch)


@pytest.mark.parametrize("rows", [32, 48])
def test_so_do_blocks_of_warpgroups(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three, where rows of the pair bias can be copied 16 bytes at a time."""
    kernel = "evoformer_warpgroup_backward_pair_bias"
    operands = drawn(np.random.default_rng(1), rows, 9, 24, 1, 16)
    launched = compare_passes(operands, monkeypatch, kernel)
    blocks = {each.blocks for each in launched if each.kernel == kernel}
    assert blocks == {rows // 16}


@pytest.mark.parametrize(("S", "K"), [(2, 40), (32, 72), (3, 256)])
def test_one_pass_of_warpgroups_gives_what_two_give(
    S: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tiles that are not full of keys, of logits so far below 0 that a key which is not there
    would have an infinite weight, and of rows that two blocks share.
    """
    operands = drawn(np.random.default_rng(2), S, 9, K, 2, 16, ml_dtypes.bfloat16)
    operands["pair_bias"] -= np.asarray(200, ml_dtypes.bfloat16)
    launched = compare_passes(operands, monkeypatch, f"evoformer_warpgroup_{warpgroup.TOGETHER}")
    assert not any("backward_pair_bias" in each.kernel for each in launched)


# --- The gradient of q by warpgroups --------------------------------------------------------------


def gradient_of_q(operands: Operands) -> Operands:
    """The gradient of q alone, by the kernels that are in use."""
    given: dict[str, Any] = {name: x for name, x in operands.items() if name != "dout"}
    call = replace(evoformer_call(**given), device="cuda", architecture="sm_80")
    kernel = select(call)
    q = operands["q"]
    made = dict.fromkeys(("out", "dq"), (q.shape, q.dtype)) | {
        name: (call.shape.of("lse"), np.dtype(f"u{size}")) for name, size in kernel.saved.items()
    }
    passes = [kernel.forward, kernel.backward_of(["q"])]
    scale = q.shape[-1] ** -0.5
    return emulation.results_of(passes, call, operands, scale, made, EVOFORMER)


@pytest.fixture
def one_block_of_warpgroups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """As on a Hopper that has one multiprocessor, so that a block does work after work; what was
    launched.
    """
    launched = spy_on_launches(monkeypatch)
    with setting(MULTIPROCESSORS, 1), emulated.hopper():
        yield launched


BY_WARPGROUPS = "evoformer_warpgroup_backward_query"


@pytest.mark.parametrize(
    "name",
    [
        "heads-4-1/bf16/all-operands",
        *(f"values/{dtype}/garbage-in-dropped" for dtype in ("bf16", "fp16")),
        "values/bf16/nan-attended",
    ],
)
def test_warpgroups_give_the_gradient_of_q_that_warps_give(
    name: str, one_block_of_warpgroups: list[Launch]
) -> None:
    case = CASES[f"evoformer/{name}"]
    drawn = OPERATIONS[case.operation].draw(case)
    operands = {name: x for name, x in drawn.items() if name != "gate"}
    x = np.asarray(gradient_of_q(operands)["dq"], np.float32)
    assert BY_WARPGROUPS in {one.kernel for one in one_block_of_warpgroups}
    with geometries.instead("backward_query", 16, tensor.GEOMETRIES["backward_query"][16]):
        y = np.asarray(gradient_of_q(operands)["dq"], np.float32)
    assert one_block_of_warpgroups[-1].kernel == "evoformer_tensor_backward_query"
    finite = np.isfinite(y)
    np.testing.assert_array_equal(x[~finite], y[~finite])
    largest = np.abs(y[finite]).max(initial=0.0)
    np.testing.assert_allclose(x[finite], y[finite], rtol=0.02, atol=0.004 * largest)


@pytest.mark.parametrize("D", [16, 24, 48])
def test_the_gradient_of_q_where_queries_take_care(
    D: int, one_block_of_warpgroups: list[Launch]
) -> None:
    """Keys that are dropped hold NaN, and so do queries without a key; logits of others are so
    large that their product with log2 e would be rounded too much.
    """
    rng = np.random.default_rng(D)
    S, K = 4, 136
    draws = drawn(rng, S, 70, K, 2, D)
    mask = rng.random((1, S, K)) < 0.7
    mask[0, 1], mask[0, 2, : K // 2] = False, False
    draws["k"][~mask] = draws["v"][~mask] = np.nan
    draws["q"][0, 1] = draws["dout"][0, 1] = np.nan
    draws["pair_bias"][0, 0, 0, 30:33], draws["dout"][:, :, 30:33, 0] = -np.inf, np.nan
    draws["pair_bias"][0, 0, 1] = draws["pair_bias"][0, 0, 1] * 8 - 30000

    dq = gradient_of_q({**draws, "mask": mask})["dq"].astype(np.float64)
    assert BY_WARPGROUPS in {one.kernel for one in one_block_of_warpgroups}
    exact = {name: x.astype(np.float64) for name, x in draws.items()}
    expected = evoformer_attention_backward(exact.pop("dout"), **exact, mask=mask).dq
    nothing = expected == 0.0
    assert nothing[0, 1].all()
    assert nothing[:, :, 30:33, 0].all()
    np.testing.assert_array_equal(dq[nothing], 0.0)
    error = np.abs(dq - expected).mean(axis=(0, 1, 2, 4))  # of either head
    assert (error < 5e-4 * np.sqrt((expected**2).mean())).all()
