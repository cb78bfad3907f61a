"""Fuzzing: what dies, hangs, writes too far or is wrong is found, kept, and found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from isoform.conformance.cli import app
from isoform.conformance.frameworks import framework
from isoform.conformance.fuzz import CRASH, HANG, INVALID, OUT_OF_BOUNDS, draw, fuzz, spoiled
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.numpy import NUMPY, NUMPY_TILED
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.registry import find
from isoform.conformance.replay import cases

KERNELS = """
import ctypes, os, signal, time
import numpy as np
from isoform.reference.numpy import evoformer_attention as right

def dies(q, k, v, *, mask=None):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(q, k, v, *, mask=None):
    time.sleep(100)

def too_far(q, k, v, *, mask=None):
    out = np.empty(q.shape, q.dtype)
    out[...] = right(q, k, v, mask=mask)
    if out.size:
        ctypes.memset(out.ctypes.data + out.nbytes, 0, 4)
    return out

def wrong(q, k, v, *, mask=None):
    return right(q, k, v)

class Credulous:
    name, framework = "credulous", "numpy"
    from isoform.reference.contract import Capabilities
    capabilities = Capabilities("evoformer_attention", gradients=frozenset(), lse=False)
    @staticmethod
    def evoformer_attention(q, k, v, **given):
        try:
            return right(q, k, v, **given)
        except ValueError:
            return q * 0
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of kernels with faults, in the current directory."""
    monkeypatch.chdir(tmp_path)
    name = f"kernels_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(KERNELS)
    return name


OPTIONS = {"framework": "numpy", "operation": None}


@pytest.mark.parametrize(
    ("function", "kind", "only"),
    [
        ("dies", CRASH, 0),
        ("hangs", HANG, 0),
        ("too_far", OUT_OF_BOUNDS, 0),
        ("wrong", "wrong", None),
        ("Credulous", INVALID, None),
    ],
)
def test_each_kind_is_found_kept_and_found_again(
    function: str, kind: str, only: int | None, kernels: str, tmp_path: Path
) -> None:
    name = f"{kernels}:{function}"
    implementation = find(name, framework="numpy")
    if only is None:  # one that shows it
        only = next(n for n in range(100) if _shows(implementation, n, invalid=kind == INVALID))
    for attempt in range(2):  # the same call both times
        found = fuzz(
            implementation,
            name,
            seconds=60,
            seed=5,
            directory=tmp_path / "found",
            options=OPTIONS,
            limit=2 if kind == HANG else 30,
            only=only,
        )
        assert found.calls == 1
        assert kind in {finding.kind for finding in found.findings}, (attempt, found)
        finding = next(each for each in found.findings if each.kind == kind)
        (case,) = cases(finding.file).values()
        assert finding.case in case.note
        assert case.shape == draw(implementation, 5, only).shape
    if kind == CRASH:
        assert "SIGSEGV" in finding.message and "in dies" in finding.message


def _shows(implementation: Implementation, number: int, *, invalid: bool) -> bool:
    """Whether call ``number`` of seed 5 is a wrong call, or has a mask that drops something."""
    case = draw(implementation, 5, number)
    call = OPERATIONS[case.operation].call_for(case)
    if implementation.capabilities.unsupported_reasons(call):
        return False
    if invalid:
        return number % 4 == 3 and case.shape.largest > 0
    operands = OPERATIONS[case.operation].operands(case)
    drops = "mask" in operands and not operands["mask"].all() and operands["mask"].any()
    return number % 4 != 3 and drops and operands["q"].size > 0


def test_what_is_right_comes_through(tmp_path: Path) -> None:
    found = fuzz(NUMPY_TILED, "numpy-tiled", seconds=3, seed=1, directory=tmp_path)
    assert found.calls > 0
    assert not found.findings and not found.counts, found.findings
    assert not [*tmp_path.iterdir()]


def test_draws_depend_on_seed_and_number_alone() -> None:
    drawn = [draw(NUMPY, 3, number) for number in range(12)]
    assert drawn == [draw(NUMPY, 3, number) for number in range(12)]
    assert len({case.id for case in drawn}) == 12
    assert {case.operation for case in drawn} == {*OPERATIONS} & {
        one.operation for one in NUMPY.offers
    }
    for case in drawn:
        first, again = (OPERATIONS[case.operation].operands(case) for _ in range(2))
        assert all(np.array_equal(first[x], again[x], equal_nan=True) for x in first if x != "mask")


def test_spoiled_calls_are_wrong_somewhere() -> None:
    case = draw(NUMPY_TILED, 3, 1)
    operands = OPERATIONS[case.operation].operands(case)
    library = framework("numpy")
    whats = {spoiled(operands, np.random.default_rng(n), library)[0] for n in range(40)}
    assert any("axis" in what for what in whats) and any("dtype" in what for what in whats)


def test_the_command_line(kernels: str) -> None:
    # of this seed the first call shows it, however slow the machine
    words = ["fuzz", f"{kernels}:wrong", "--framework", "numpy", "--seed", "9", "--minutes", "0.05"]
    shown = CliRunner().invoke(app, [*words, "--json", "found.json"])
    assert shown.exit_code == 1, shown.output
    (run,) = json.loads(Path("found.json").read_text())["runs"]
    assert run["seed"] == 9 and run["findings"]
    assert f"--seed 9 --only {run['findings'][0]['number']}" in shown.output
    assert Path(run["findings"][0]["file"]).exists()
    assert CliRunner().invoke(app, ["fuzz", "nobody"]).exit_code == 2


def test_ctrl_c_ends_it_with_the_summary(kernels: str) -> None:
    # a job in the background begins with SIGINT ignored, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "isoform.conformance.cli", "fuzz", f"{kernels}:wrong"]
    command += ["--framework", "numpy", "--minutes", "5", "--seed", "5", "-q", "-o", "found"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not Path("found").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "findings" in out and "interrupted" in err
    assert "Traceback" not in err
