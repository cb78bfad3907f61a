"""Shrinking: planted faults are cut down to the calls that they can be seen in, and no further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isoform.conformance.cli import app
from isoform.conformance.evoformer.mutants import MUTANTS
from isoform.conformance.implementation import adopt
from isoform.conformance.implementations.numpy import NUMPY
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.replay import cases as recorded
from isoform.conformance.replay import replay, write
from isoform.conformance.rotary.mutants import MUTANTS as ROTARY_MUTANTS
from isoform.conformance.shrink import Passes, save, shrink
from isoform.reference.numpy import evoformer_attention

ALL = CASES["evoformer/length-65/fp32/all-operands"]


def tail_lost(q: Any, k: Any, v: Any, *, mask: Any = None, pair_bias: Any = None) -> Any:
    """Keys beyond the last whole 16 are lost."""
    kept = k.shape[2] - k.shape[2] % 16 or k.shape[2]
    mask, pair_bias = (x if x is None else x[..., :kept] for x in (mask, pair_bias))
    return evoformer_attention(q, k[:, :, :kept], v[:, :, :kept], mask=mask, pair_bias=pair_bias)


def mask_ignored(q: Any, k: Any, v: Any, *, mask: Any = None, gate: Any = None) -> Any:
    return evoformer_attention(q, k, v, gate=gate)


def unsummed_layout(q: Any, k: Any, v: Any, *, scale: Any = None) -> Any:
    """Wrong where q is not contiguous."""
    out = evoformer_attention(q, k, v, scale=scale)
    return out if q.flags.c_contiguous else out * np.float32(1.1)


def test_a_lost_tail_shows_in_one_query_and_seventeen_keys() -> None:
    case = CASES["evoformer/operands/fp32/pair-bias"]
    found = shrink(adopt(tail_lost, framework="numpy"), case)
    assert found.check == "out/condition"
    assert vars(found.case.shape) == {"B": 1, "S": 1, "Q": 1, "K": 17, "H": 1, "G": 1, "D": 1}
    assert not found.case.operands  # the bias has nothing to do with it
    assert found.contents["q"] == found.contents["k"] == "zeros"
    assert found.contents["v"] in ("integers", "its own numbers")
    assert found.ended and found.outcome.verdict.fails


def test_an_ignored_mask_shows_in_one_dropped_key() -> None:
    case = CASES["evoformer/operands/bf16/mask+gate"]
    found = shrink(adopt(mask_ignored, framework="numpy"), case)
    assert vars(found.case.shape) == {"B": 1, "S": 1, "Q": 1, "K": 1, "H": 1, "G": 1, "D": 1}
    assert found.case.operands == {"mask"}
    assert found.case.dtype == "bfloat16"
    assert found.contents["mask"] == "its own numbers"


def test_what_is_left_is_kept_with_its_layout_and_fails_again(tmp_path: Path) -> None:
    implementation = adopt(unsummed_layout, framework="numpy")
    case = CASES["evoformer/operands/fp32/bare"]
    assert not [x for x in replay_of(tmp_path, implementation, case) if x.verdict.fails]
    sliced = CASES["evoformer/layout/fp32/sliced"]
    bare = type(sliced)(**vars(sliced) | {"operands": frozenset(), "id": "evoformer/a/fp32/sliced"})
    found = shrink(implementation, bare)
    path = tmp_path / "shrunk.safetensors"
    kept = save(found, path)
    assert "shrunk from" in kept.note
    run = replay(path, [implementation])
    assert {check for x in run.failures for check in x.failed_checks} >= {"out/condition"}


def replay_of(folder: Path, implementation: Any, case: Any) -> Any:
    write(folder / "as-it-is.safetensors", case, OPERATIONS[case.operation].operands(case))
    return replay(folder / "as-it-is.safetensors", [implementation]).outcomes


@pytest.mark.parametrize("name", ["rotary/scaling/fp32/yarn", "rotary/partial-80-32/bf16/half"])
def test_other_operations_and_their_options_are_kept_too(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "call.safetensors"
    write(path, case, OPERATIONS[case.operation].operands(case))
    (kept,) = recorded(path).values()
    assert kept.operation == "rotary_embedding"
    assert dict(kept.options) == dict(case.options)
    assert kept.operands == case.operands
    assert not replay(path, [NUMPY]).failures


def test_a_fault_of_another_operation_is_shrunk() -> None:
    mutant = next(each for each in ROTARY_MUTANTS if each.killed_by == "out/condition")
    found = shrink(mutant.implementation, CASES[mutant.case], seconds=20)
    smaller = sum(vars(found.case.shape).values())
    assert smaller < sum(vars(CASES[mutant.case].shape).values())


@pytest.mark.parametrize("check", ["dpair_bias/condition", "unmodified", "out/twin_mean"])
def test_the_check_that_fails_is_the_one_that_is_kept(check: str) -> None:
    mutant = next(each for each in MUTANTS if each.killed_by == check)
    found = shrink(mutant.implementation, CASES[mutant.case], check=check, seconds=20)
    assert found.check == check
    assert check in found.outcome.failed_checks


def test_what_passes_is_not_shrunk() -> None:
    with pytest.raises(Passes, match="passes"):
        shrink(NUMPY, ALL)
    wrong = adopt(tail_lost, framework="numpy")
    with pytest.raises(Passes, match=r"does not do .* operand gate"):
        shrink(wrong, ALL)
    with pytest.raises(Passes, match="it fails out/condition"):
        shrink(wrong, CASES["evoformer/operands/fp32/bare"], check="lse/pattern")


def test_time_ends_the_search_with_what_was_found() -> None:
    found = shrink(adopt(mask_ignored, framework="numpy"), ALL_MASKED, seconds=0.0)
    assert not found.ended
    assert found.outcome.verdict.fails


ALL_MASKED = CASES["evoformer/operands/fp32/mask"]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong_kernel.py").write_text(
        "from isoform.reference.numpy import evoformer_attention\n"
        "def attention(q, k, v, *, mask=None):\n    return evoformer_attention(q, k, v)\n"
    )
    words = ["shrink", "wrong_kernel:attention", "--framework", "numpy", "--json", "found.json"]
    shown = CliRunner().invoke(app, [*words, "--case", "evoformer/operands/fp32/mask"])
    assert shown.exit_code == 1, shown.output
    found = json.loads(Path("found.json").read_text())
    assert found["shape"]["K"] == 1
    assert found["command"] in shown.output.replace("\n", " ")
    again = CliRunner().invoke(app, found["command"].split()[1:])
    assert again.exit_code == 1, again.output
    assert CliRunner().invoke(app, words).exit_code == 2  # which call?
    right = ["shrink", "numpy", "--case", "evoformer/operands/fp32/mask"]
    assert CliRunner().invoke(app, right).exit_code == 3
