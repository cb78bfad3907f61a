"""The command line: exit codes, what it names, what it writes where."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isoform.conformance import expected, registry
from isoform.conformance.cli import app
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.run import Run
from isoform.conformance.verdicts import Verdict

NUMPY = "isoform.conformance.implementations.numpy:NUMPY"
TILED = "isoform.conformance.implementations.numpy:NUMPY_TILED"
CASE = "evoformer/length-17/fp32/all-operands"
COMMANDS = (
    *("list", "check", "compare", "report", "replay", "demo", "plan", "train-genome"),
    *("calibrate", "version"),
)

# Implementations that are wrong, as someone might hand them in: bare functions for NumPy arrays.
ZEROS = """
import numpy as np

def attention(q, k, v, *, mask=None, mask_bias=None, pair_bias=None, gate=None, scale=None):
    return np.zeros_like(q)

attention.framework = "numpy"
"""
IGNORES_MASK = """
from isoform.reference.numpy import evoformer_attention

def attention(q, k, v, *, mask=None, mask_bias=None, pair_bias=None, gate=None, scale=None):
    return evoformer_attention(
        q, k, v, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate, scale=scale
    )
"""
HALF_PROBABILITIES = """
import torch

def attention(q, k, v, *, mask=None, mask_bias=None, pair_bias=None, gate=None, scale=None):
    s = torch.einsum("bsqhd,bskhd->bshqk", q, k) * (scale or q.shape[-1] ** -0.5)
    for bias in (mask_bias, pair_bias):
        s = s if bias is None else s + bias
    s = s if mask is None else s.masked_fill(~mask[:, :, None, None], -torch.inf)
    p = s.softmax(-1).half().to(q.dtype)
    out = torch.einsum("bshqk,bskhd->bsqhd", p, v)
    return out if gate is None else out * gate.sigmoid()
"""
RIGHT = IGNORES_MASK.replace("q, k, v, mask_bias", "q, k, v, mask=mask, mask_bias")
SUPPORTS_NOTHING = """
from isoform.conformance.implementation import Implementation
from isoform.reference.contract import Capabilities, evoformer_call

CAPABILITIES = Capabilities("evoformer_attention", head_dims=(512, 512), gradients=frozenset())

def attention(q, k, v, *, return_lse=False, **operands):
    CAPABILITIES.require(evoformer_call(q, k, v, **operands, lse=return_lse))

NOTHING = Implementation("nothing", "numpy", CAPABILITIES, attention)
"""
SLOW = """
import pathlib, time
from right import attention as right

calls = 0

def attention(q, k, v, *, mask=None, mask_bias=None, pair_bias=None, gate=None, scale=None):
    global calls
    calls += 1
    if calls > 12:  # more than one case makes
        pathlib.Path("begun").touch()
        time.sleep(0.1)
    return right(
        q, k, v, mask=mask, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate, scale=scale
    )
"""
INTERRUPTED = """
import os, signal
from right import attention as right

calls = 0

def attention(q, k, v, *, mask=None, mask_bias=None, pair_bias=None, gate=None, scale=None):
    global calls
    calls += 1
    if calls > 20:
        os.kill(os.getpid(), signal.SIGINT)
    return right(
        q, k, v, mask=mask, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate, scale=scale
    )
"""
MODULES = {
    "zeros": ZEROS,
    "ignores_mask": IGNORES_MASK,
    "half_probabilities": HALF_PROBABILITIES,
    "right": RIGHT,
    "supports_nothing": SUPPORTS_NOTHING,
    "interrupted": INTERRUPTED,
    "slow": SLOW,
    "broken": "import numpy\nraise RuntimeError('no [licence]')\n",
    "needs_more": "import a_module_that_is_not_there\n",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with those modules, to be in."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(*args: str, width: int = 100) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(args), env={"COLUMNS": str(width), "NO_COLOR": "1"})


def spawn(*args: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a program."""
    return subprocess.run(
        [sys.executable, "-m", "isoform.conformance.cli", *args],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "100"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=listen,
    )


def listen() -> None:
    """Let Ctrl-C through: a shell's background job starts programs that ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The exit codes, of the real program.


def test_a_right_implementation_exits_0(here: Path) -> None:
    done = spawn("check", NUMPY, "--case", CASE, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"numpy +pass +\d+", done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("module", "framework", "check"),
    [
        ("zeros", "numpy", "out/condition"),
        ("ignores_mask", "numpy", "out/condition"),
        ("half_probabilities", "torch", "out/condition"),
    ],
)
def test_a_wrong_implementation_exits_1_and_names_the_check(
    here: Path, module: str, framework: str, check: str
) -> None:
    args = ("--impl", f"{module}:attention", "--framework", framework, "--case", CASE)
    done = spawn("check", *args, cwd=here)
    assert done.returncode == 1, done.stdout + done.stderr
    assert check in done.stdout
    assert CASE in done.stdout
    assert "FAIL" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("check", "nunpy"), "no implementation 'nunpy'"),
        (("check", NUMPY, "--case", CASE.replace("length", "lenght")), f"Did you mean {CASE}"),
        (("check", NUMPY, "--tag", "quik"), "no tag 'quik'. Did you mean quick"),
        (("check", NUMPY, "--dtype", "fp23"), "Did you mean fp32"),
        (("check", "no_such_module:attention"), "no module 'no_such_module'"),
        (("check", "zeros:attentoin"), "Did you mean attention"),
        (("check", "zeros.py:attention"), "name the module, not its file: zeros:attention"),
        (("check", "zeros:__name__"), "is no implementation"),
        (("check", "broken:attention"), "broken.py:2: RuntimeError: no [licence]"),
        (("list", "broken:attention"), "broken:attention cannot be loaded"),
        (("compare", NUMPY, "nunpy"), "no implementation 'nunpy'"),
        (("check", "needs_more:attention"), "pip install a_module_that_is_not_there"),
        (("check", NUMPY, "--group", "speed"), "'speed'"),
        (("chekc",), "Did you mean 'check'"),
        (("compare", NUMPY), "Missing argument 'B'"),
        (("report", "zeros.py"), "no record of a run"),
        (("report", "missing.json"), "does not exist"),
        (("replay", "zeros.py"), "no"),
    ],
)
def test_wrong_usage_exits_2_and_helps(here: Path, args: tuple[str, ...], said: str) -> None:
    result = run(*args, width=200)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stdout == ""


def test_wrong_usage_exits_2_as_a_program(here: Path) -> None:
    done = spawn("check", NUMPY, "--tag", "quik", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean quick?" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        (NUMPY, "--tag", "scale", "--dtype", "bf16"),  # no such case
        ("supports_nothing:NOTHING", "--case", CASE),  # declined
        (NUMPY, "--case", "evoformer/triangle-1024/*"),  # too large
    ],
)
def test_nothing_ran_exits_3(here: Path, args: tuple[str, ...]) -> None:
    result = run("check", *args)
    assert result.exit_code == 3, result.output
    assert "nothing ran" in result.stderr


def test_nothing_ran_exits_3_as_a_program(here: Path) -> None:
    done = spawn("check", NUMPY, "--tag", "scale", "--dtype", "bf16", cwd=here)
    assert (done.returncode, done.stdout) == (3, "")


def test_why_nothing_ran_is_said(here: Path) -> None:
    large = run("check", NUMPY, "--case", "evoformer/triangle-1024/*").stdout
    assert "too large for a CPU" in large
    declined = run("check", "supports_nothing:NOTHING", "--case", CASE).stdout
    assert "unsupported: head dim D=… (512 to 512 only)" in declined


def test_interrupted_it_shows_what_was_judged_and_exits_130(here: Path) -> None:
    args = ("--impl", "interrupted:attention", "--framework", "numpy", "--tag", "operands")
    done = spawn("check", *args, "--json", "run.json", cwd=here)
    assert done.returncode == 130, done.stdout + done.stderr
    assert "interrupted" in done.stderr
    assert re.search(r"attention +pass +\d+", done.stdout)
    judged = Run.from_json((here / "run.json").read_text())
    assert 0 < len({outcome.case for outcome in judged.outcomes}) < 32


def test_control_c_from_outside(here: Path) -> None:
    command = [sys.executable, "-m", "isoform.conformance.cli", "check", "--impl", "slow:attention"]
    pipe = subprocess.PIPE
    options = ("--framework", "numpy", "--json", "-")
    with subprocess.Popen(
        [*command, *options], cwd=here, stdout=pipe, stderr=pipe, preexec_fn=listen
    ) as it:
        deadline = time.monotonic() + 60
        while not (here / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        it.send_signal(signal.SIGINT)
        out, said = it.communicate(timeout=60)
    assert it.returncode == 130, said.decode()
    assert Run.from_json(out.decode()).implementations == ("attention",)


# What a failure says.


def test_the_command_of_a_failure_shows_it_again(here: Path) -> None:
    first = run("check", "zeros:attention", "--framework", "numpy", "--tag", "scale")
    command = re.search(r"\$ isoform (check --impl .*)", first.stdout)
    assert command is not None
    again = run(*command[1].split())
    assert again.exit_code == 1
    assert "out/condition" in again.stdout


def test_lists_of_what_to_skip_and_of_what_is_known_to_fail(here: Path) -> None:
    cases = ("evoformer/length-[123]/fp32/all-*", "evoformer/length-1/fp32/bare")
    args = ("check", "zeros:attention", *(x for case in cases for x in ("--case", case)))
    (here / "skip.txt").write_text("evoformer/length-[23]/* # later\n")
    (here / "xfail.txt").write_text("*/length-1/fp32/* out/condition # all zeros\n")
    lists = ("--skip", "skip.txt", "--xfail", "xfail.txt")
    result = run(*args, *lists, "--json", "r.json", "--junit", "r.xml", "--html", "r.html")
    assert result.exit_code == 0, result.output
    record = Run.from_json((here / "r.json").read_text())
    skipped = [outcome for outcome in record.outcomes if "later" in outcome.message]
    assert [outcome.case.split("/")[1] for outcome in skipped] == ["length-2", "length-3"]
    assert {outcome.excused for outcome in record.outcomes if outcome.verdict.fails} == {
        "all zeros"
    }
    assert "expected failure: all zeros" in (here / "r.xml").read_text()
    assert "all zeros" in (here / "r.html").read_text()

    assert run(*args).exit_code == 1  # without the lists
    (here / "xfail.txt").write_text("*/length-1/fp32/* # all zeros\n*/fp32/bare unmodified # no\n")
    stale = run(*args, *lists)
    assert stale.exit_code == 1
    assert "xfail.txt:2: */fp32/bare unmodified: does not fail any more" in stale.stderr
    assert "xfail.txt:1" not in stale.stderr

    (here / "skip.txt").write_text("evoformer/lenght-2/* # misspelt\n")
    misspelt = run(*args, *lists)
    assert misspelt.exit_code == 2
    assert "skip.txt:1" in misspelt.stderr
    assert run(*args, "--xfail", "none.txt").exit_code == 2


def test_what_comes_with_isoform_as_known_to_fail_must_fail(
    here: Path, known_faults: Callable[..., None]
) -> None:
    known_faults({"implementation": "numpy", "case": CASE, "check": "out/*", "reason": "once"})
    assert run("check", "numpy", "--case", CASE).exit_code == 1
    elsewhere = {"implementation": "numpy", "case": CASE, "check": "out/*", "device": "cuda"}
    known_faults(elsewhere | {"reason": "there alone"})
    assert run("check", "numpy", "--case", CASE).exit_code == 0


def test_the_smallest_case_comes_first_and_the_rest_is_counted(here: Path) -> None:
    args = ("zeros:attention", "--framework", "numpy", "--case", "evoformer/length-?/fp32/all-*")
    result = run("check", *args, "--failures", "1")
    assert "✗ evoformer/length-1/fp32/all-operands" in result.stdout
    assert "✗ evoformer/length-2" not in result.stdout
    assert "and 2 more cases; --failures 3 shows all" in result.stdout


def test_quiet_says_only_what_failed(here: Path) -> None:
    assert run("check", NUMPY, "--case", CASE, "-q").output == ""
    wrong = run("check", "zeros:attention", "--framework", "numpy", "--case", CASE, "-q")
    assert wrong.stdout.splitlines() == [
        f"attention {CASE}: out/condition, out/twin_max, out/twin_mean, out/bias"
    ]


def test_failures_that_are_known_are_shown_with_their_reason_and_do_not_fail(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint("zeros", "zeros:attention", registry.GROUP)
    monkeypatch.setattr(registry, "registered", lambda: {"zeros": entry})
    known = expected.ExpectedFailure("zeros", "*", "out/*", "zeros [sic] are what it returns")
    monkeypatch.setattr(expected, "expected_failures", lambda: (known,))
    args = ("--framework", "numpy", "--case", CASE, "--junit", "junit.xml")

    excused = run("check", "zeros", *args)
    assert excused.exit_code == 0, excused.output
    assert "failed as expected: zeros [sic] are what it returns" in excused.stdout
    assert "known" in excused.stdout
    suite = ET.parse(here / "junit.xml").getroot()
    assert suite.get("failures") == "0"
    assert "zeros [sic]" in ET.tostring(suite, encoding="unicode")

    (here / "impostor.py").write_text(f"{ZEROS}\nattention.__name__ = 'zeros'\n")
    assert run("check", "--impl", "impostor:attention", *args).exit_code == 1


def test_known_failures_that_have_gone_are_said(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint("right", NUMPY, registry.GROUP)
    monkeypatch.setattr(registry, "registered", lambda: {"right": entry})
    known = expected.ExpectedFailure("right", "*", "out/condition", "it was wrong")
    monkeypatch.setattr(expected, "expected_failures", lambda: (known,))
    result = run("check", "right", "--case", CASE)
    assert result.exit_code == 1
    assert "right: 1 check passed, though expected to fail: it was wrong" in result.stdout


def test_two_of_the_same_name_are_told_apart(here: Path) -> None:
    result = run(
        *("check", "--impl", "zeros:attention", "--impl", "right:attention"),
        *("--framework", "numpy", "--case", CASE, "--json", "run.json"),
    )
    assert result.exit_code == 1
    judged = Run.from_json((here / "run.json").read_text())
    assert judged.implementations == ("zeros:attention", "right:attention")
    assert judged.counts("right:attention").get(Verdict.WRONG, 0) == 0


# Checks that belong to no case of the list.


def test_one_case_is_all_that_is_run_when_one_is_asked_for(here: Path) -> None:
    run("check", NUMPY, "--case", CASE, "--json", "run.json")
    assert {x.case for x in Run.from_json((here / "run.json").read_text()).outcomes} == {CASE}


def test_wrong_calls_can_be_asked_for_alone(here: Path) -> None:
    run("check", NUMPY, "--case", "evoformer/invalid/*", "--json", "run.json")
    outcomes = Run.from_json((here / "run.json").read_text()).outcomes
    assert len(outcomes) > 10
    assert all(outcome.check.startswith("invalid/") for outcome in outcomes)


def test_without_patterns_wrong_calls_and_memory_are_judged_too(here: Path) -> None:
    args = ("--tag", "empty", "--dtype", "fp32", "--group", "conformance", "--json", "run.json")
    assert run("check", NUMPY, *args).exit_code == 0
    checks = {
        x.check.split("/")[0] for x in Run.from_json((here / "run.json").read_text()).outcomes
    }
    assert {"out", "lse", "invalid", "memory"} <= checks


def test_groups(here: Path) -> None:
    run("check", NUMPY, "--case", CASE, "--group", "gradients", "--json", "run.json")
    outcomes = Run.from_json((here / "run.json").read_text()).outcomes
    assert {outcome.group for outcome in outcomes} == {"gradients"}


# What it writes.


@pytest.mark.parametrize("args", [("--json", "-"), ("--json",), ("--json", "-", "--quiet")])
def test_json_has_the_standard_output_for_itself(here: Path, args: tuple[str, ...]) -> None:
    result = run("check", NUMPY, "--case", CASE, *args)
    assert result.exit_code == 0, result.output
    assert Run.from_json(result.stdout).implementations == ("numpy",)
    assert ("pass" in result.stderr) == ("--quiet" not in args)


def test_junit_counts_and_shows_failures(here: Path) -> None:
    result = run(
        *("check", "zeros:attention", "supports_nothing:NOTHING", "--framework", "numpy"),
        *("--case", CASE, "--junit", "results/junit.xml", "--json", "run.json"),
    )
    assert result.exit_code == 1
    root = ET.parse(here / "results" / "junit.xml").getroot()
    judged = Run.from_json((here / "run.json").read_text())
    assert root.tag == "testsuites"
    assert [suite.get("name") for suite in root] == ["attention", "nothing"]
    assert root.get("tests") == str(len(judged.outcomes)) == str(len(root.findall(".//testcase")))
    assert root.get("failures") == str(len(judged.failures)) == str(len(root.findall(".//failure")))
    skipped = sum(x.verdict is Verdict.UNSUPPORTED for x in judged.outcomes)
    assert root.get("skipped") == str(skipped) == str(len(root.findall(".//skipped")))
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.text is not None
    assert "isoform check --impl zeros:attention" in failure.text
    assert "out/condition" in failure.text


def test_html_and_report_write_the_same_page(here: Path) -> None:
    run("check", NUMPY, "--case", CASE, "--json", "run.json", "--html", "one.html")
    result = run("report", "run.json", "-o", "two.html")
    assert (result.exit_code, result.stdout.strip()) == (0, "two.html")
    assert (here / "one.html").read_text() == (here / "two.html").read_text()
    assert run("report", "run.json").stdout.strip() == "run.html"


def test_a_file_that_cannot_be_written_is_named(here: Path) -> None:
    result = run("check", NUMPY, "--case", CASE, "--json", "zeros.py/run.json", "-q")
    assert result.exit_code == 2
    assert "cannot write zeros.py/run.json" in result.stderr


def test_devices_are_written_to_not_replaced(here: Path) -> None:
    done = spawn("check", NUMPY, "--case", CASE, "-q", "--json", "/dev/stdout", cwd=here)
    assert done.returncode == 0, done.stderr
    assert Run.from_json(done.stdout).implementations == ("numpy",)
    run("check", NUMPY, "--case", CASE, "-q", "--html", os.devnull)
    assert not Path(os.devnull).is_file()


# What it looks like.


def test_narrow_terminals_and_no_colour(here: Path) -> None:
    args = ("check", "zeros:attention", NUMPY, "--framework", "numpy", "--tag", "scale")
    done = spawn(*args, cwd=here, COLUMNS="60", NO_COLOR="1", TERM="xterm-256color")
    assert "\x1b" not in done.stdout
    long = [line for line in done.stdout.splitlines() if len(line.rstrip()) > 60]
    assert all("$ isoform" in line or "✗ evoformer" in line for line in long), long


def test_a_progress_bar_is_only_for_terminals(here: Path) -> None:
    assert spawn("check", NUMPY, "--case", CASE, cwd=here).stderr == ""


def test_brackets_in_messages_are_not_markup(here: Path) -> None:
    result = run("check", "zeros:attention", "--framework", "numpy", "--case", CASE)
    assert re.search(r"at \[\d+, \d+, \d+, \d+, \d+\]\s+it\s+is\s+0", result.stdout)


# The other commands.


def test_list_shows_what_is_there_and_what_is_missing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {
        "here": EntryPoint("here", NUMPY, registry.GROUP),
        "absent": EntryPoint("absent", "needs_more:X", registry.GROUP),
        "broken": EntryPoint("broken", "broken:X", registry.GROUP),
    }
    monkeypatch.setattr(registry, "registered", lambda: entries)
    result = run("list")
    assert result.exit_code == 0
    assert re.search(r"✓ here", result.stdout)
    assert re.search(r"✗ absent +needs a_module_that_is_not_there: install it with", result.stdout)

    found = json.loads(run("list", "--json").stdout)
    assert found["here"]["capabilities"]["evoformer_attention"]["dtypes"] == [
        "bfloat16",
        "float16",
        "float32",
        "float64",
    ]
    assert found["absent"]["available"] is found["broken"]["available"] is False

    judged = run("check", "--case", CASE)
    assert judged.exit_code == 0
    assert "not judged: absent needs a_module_that_is_not_there" in judged.stderr

    unavailable = run("check", "absent", "--case", CASE)
    assert unavailable.exit_code == 2
    assert "pip install a_module_that_is_not_there" in unavailable.stderr


def test_list_cases() -> None:
    result = run("list", "--cases")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(CASES)
    model = run("list", "--tag", "model", "--dtype", "bf16", "--json")
    found = json.loads(model.stdout)
    assert found
    assert all("model" in case["tags"] and case["dtype"] == "bfloat16" for case in found)
    assert found[0]["shape"]["D"] > 0


def test_list_capabilities() -> None:
    result = run("list", NUMPY, "--capabilities")
    assert "memory" in result.stdout
    assert "q, k, v, mask_bias, pair_bias, gate" in " ".join(result.stdout.split())


def test_list_shows_each_operation() -> None:
    words = " ".join(run("list", NUMPY).stdout.split())
    assert "evoformer_attention" in words
    assert "rotary_embedding" in words
    declared = " ".join(run("list", NUMPY, "--capabilities").stdout.split())
    assert "scaling=yarn" in declared
    found = json.loads(run("list", NUMPY, "--json").stdout)
    (entry,) = found.values()
    assert entry["capabilities"].keys() >= {"evoformer_attention", "rotary_embedding"}


def test_the_arguments_of_cases_are_listed() -> None:
    found = json.loads(run("list", "--case", "rotary/scaling/fp32/yarn", "--json").stdout)
    (case,) = found
    assert case["options"]["scaling"].startswith("YaRN(factor=16.0, original_length=4096")
    assert case["shape"] == {"B": 2, "L": 96, "H": 2, "D": 64}


def test_checks_of_one_operation(here: Path) -> None:
    result = run("check", NUMPY, "--case", "rotary/length-*", "--json")
    assert result.exit_code == 0, result.output
    outcomes = json.loads(result.stdout)["outcomes"]
    assert {outcome["case"].split("/")[0] for outcome in outcomes} == {"rotary"}
    wrong = run("check", NUMPY, "--case", "rotary/invalid/fp32/probe", "--json")
    outcomes = json.loads(wrong.stdout)["outcomes"]
    assert {outcome["case"] for outcome in outcomes} == {"rotary/invalid/fp32/probe"}
    assert any(outcome["check"].startswith("invalid/positions") for outcome in outcomes)


def test_which_operation_a_function_is_can_be_said(here: Path) -> None:
    """The command that shows a failure again says it too."""
    (here / "flat.py").write_text("def attention(q, k, v, *, causal=False):\n    return q * 0\n")
    chosen = ("check", "--impl", "flat:attention", "--framework", "numpy", "--json", "run.json")
    wrong = run(*chosen, "--operation", "attention", "--case", "attention/length-1/fp32/causal")
    assert wrong.exit_code == 1, wrong.output
    assert "--operation attention" in " ".join(wrong.output.split())
    (declared,) = json.loads((here / "run.json").read_text())["capabilities"].values()
    assert declared["attention"]["operands"] == ["causal"]

    unknown = run(*chosen, "--operation", "attn")
    assert unknown.exit_code == 2
    assert "no operation 'attn'. Did you mean attention?" in unknown.stderr


def test_a_function_that_turns_is_known_by_its_operands(here: Path) -> None:
    (here / "turns.py").write_text(
        "from isoform.reference.numpy import rotary_embedding\n"
        "def turn(x, positions, *, base=10000.0):\n"
        "    return rotary_embedding(x, positions, base=base)\n"
    )
    chosen = ("--impl", "turns:turn", "--framework", "numpy", "--group", "conformance")
    found = run("check", *chosen, "--case", "rotary/length-1/fp32/*", "--json")
    assert found.exit_code == 0, found.output
    verdicts = {x["case"]: x["verdict"] for x in json.loads(found.stdout)["outcomes"]}
    assert verdicts["rotary/length-1/fp32/half"] == "pass"
    assert verdicts["rotary/length-1/fp32/interleaved"] == "unsupported"


def test_registered_names_are_taken(here: Path) -> None:
    result = run("list")
    names = [line.split()[1] for line in result.stdout.splitlines() if line[0] in "✓✗"]
    assert names == list(registry.registered())


def test_compare(here: Path) -> None:
    alike = run("compare", NUMPY, TILED, "--case", CASE)
    assert alike.exit_code == 0, alike.output
    assert "both within budget" in alike.stdout
    assert "dpair_bias" in alike.stdout

    wrong = run(
        "compare", NUMPY, "zeros:attention", "--framework", "numpy", "--case", CASE, "--json"
    )
    assert wrong.exit_code == 1
    found = json.loads(wrong.stdout)
    assert found["within"] is False
    assert [x["result"] for x in found["differences"]] == ["out"]
    assert "definition" in wrong.stderr

    nothing = run("compare", NUMPY, "supports_nothing:NOTHING", "--case", CASE)
    assert nothing.exit_code == 3
    assert "head dim" in nothing.stdout


def test_compare_with_itself_and_several_cases(here: Path) -> None:
    result = run("compare", NUMPY, NUMPY, "--tag", "scale", width=60)
    assert result.exit_code == 0
    assert "again" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 60
    every = run("compare", NUMPY, TILED, "--tag", "scale", "--every")
    assert all(case_id in every.stdout for case_id in CASES if "/scale/" in case_id)


def test_replay(here: Path) -> None:
    import torch

    from isoform.conformance.capture import capture

    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    with capture("step.safetensors"):
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    judged = run(
        *("replay", "step.safetensors", "--impl", NUMPY, "--impl", "zeros:attention"),
        *("--json", "run.json", "--html", "run.html", "--junit", "junit.xml"),
    )
    assert judged.exit_code == 1, judged.output
    command = re.search(r"\$ isoform (replay step.safetensors .*)", judged.stdout)
    assert command is not None
    assert "--impl zeros:attention" in command[1]
    assert run(*command[1].split()).exit_code == 1
    assert Run.from_json((here / "run.json").read_text()).implementations == ("numpy", "attention")
    assert (here / "run.html").stat().st_size > (here / "junit.xml").stat().st_size > 0
    assert run("replay", "step.safetensors", "--impl", NUMPY).exit_code == 0
    missing = run("replay", "step.safetensors", "--impl", NUMPY, "--call", "call-0009")
    assert missing.exit_code == 2
    assert "call-0009" in missing.stderr


def test_demo_shows_where_the_report_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isoform.conformance import demo
    from isoform.conformance.implementations.numpy import NUMPY as IMPLEMENTATION
    from isoform.conformance.run import run as judge

    def shown(output: Path, **_: object) -> Run:
        return judge([IMPLEMENTATION], [CASES[CASE]], invalid_calls=(), memory=())

    monkeypatch.setattr(demo, "demo", shown)
    result = run("demo", "-o", "there")
    assert result.exit_code == 0, result.output
    assert f"report: {Path('there') / demo.REPORT}" in result.stderr
    assert Run.from_json(run("demo", "--json").stdout).implementations == ("numpy",)


def test_calibrate_records_what_it_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isoform.conformance import calibrate

    def measured(operation: str, device: str, jobs: int, progress: object) -> dict[str, str]:
        if device != "cpu":
            raise RuntimeError(f"no device {device} here")
        return {"of": operation}

    saved: list[object] = []
    monkeypatch.setattr(calibrate, "calibrate", measured)
    monkeypatch.setattr(calibrate, "save", saved.append)
    result = run("calibrate")
    assert (result.exit_code, result.stdout) == (0, "")
    assert saved == [{"of": operation} for operation in OPERATIONS]
    saved.clear()
    result = run("calibrate", "rotary_embedding", "evoformer_attention")
    assert saved == [{"of": "rotary_embedding"}, {"of": "evoformer_attention"}]
    elsewhere = run("calibrate", "--device", "cuda")
    assert (elsewhere.exit_code, len(saved)) == (2, 2)
    assert "no device cuda here" in elsewhere.stderr
    assert "recorded in" in result.stderr
    assert "Did you mean evoformer_attention" in run("calibrate", "evoformer").stderr


def test_version(here: Path) -> None:
    for args in (("--version",), ("version",)):
        result = run(*args)
        assert result.exit_code == 0
        assert result.stdout.startswith("isoform")


def test_every_command_and_option_is_explained() -> None:
    overview = run("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"│ {name} +\S", overview), name
        result = run(name, "--help", width=200)
        assert result.exit_code == 0
        assert name == "version" or "Examples" in result.stdout
        for line in result.stdout.splitlines():
            if re.match(r"│ +(\*? +)?(-|[A-Z])", line):
                assert re.search(r"\w.*  \S+ \S+", line), f"{name}: {line}"


def test_help_flows_in_narrow_terminals() -> None:
    for name in COMMANDS:
        lines = run(name, "--help", width=60).stdout.splitlines()
        assert max(len(line.rstrip()) for line in lines) <= 60


def test_help_imports_nothing_heavy(here: Path) -> None:
    program = (
        "import sys; from isoform.conformance.cli import app\n"
        "try: app(['check', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'matplotlib', 'jinja2', 'ml_dtypes'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_without_torch_the_remedy_is_named(here: Path) -> None:
    (here / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    for args in (("check", "right:attention"), ("demo",), ("calibrate",), ("train-genome",)):
        done = spawn(*args, cwd=here, PYTHONPATH=path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "'pip install \"isoform[torch]\"'" in done.stderr
    assert spawn("check", NUMPY, "--case", CASE, cwd=here).returncode == 0


@pytest.mark.parametrize("module", ["typer", "rich", "ml_dtypes"])
def test_without_the_extra_the_remedy_is_named(here: Path, module: str) -> None:
    """As after ``pip install isoform``: no traceback."""
    (here / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "isoform.conformance", "check", NUMPY, "--case", CASE],
        env=os.environ | {"PYTHONPATH": path},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"isoform: {module} is not installed, and the command line needs it: "
        "'pip install \"isoform[conformance]\"'\n"
    )


def test_the_extra_brings_what_the_command_line_needs() -> None:
    import tomllib

    from isoform.conformance.__main__ import NEEDS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["conformance"]
    assert [requirement.partition(">=")[0] for requirement in extra] == [*NEEDS]
    assert project["scripts"] == {"isoform": "isoform.conformance.__main__:main"}


def test_torch_is_imported_only_for_those_who_need_it(here: Path) -> None:
    program = (
        "import sys; from isoform.conformance.cli import app\n"
        f"try: app(['check', '{NUMPY}', '--case', '{CASE}', '--html', 'r.html'])\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=here, timeout=60)
