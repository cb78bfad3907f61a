"""The suite in pytest's hands: each run here is a pytest of its own, started as an author would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest

from isoform.conformance.suite.test_suite import settle
from isoform.conformance.verdicts import Outcome, Verdict

CASE = "evoformer/length-3/fp32/all-operands"
SUITE = ("-p", "isoform.conformance.plugin", "--pyargs", "isoform.conformance.suite")

ZEROS = """\
import numpy as np
from isoform.reference.contract import Capabilities
from isoform.reference.numpy import evoformer_attention, evoformer_attention_backward

class Zeros:
    name = "zeros"
    framework = "numpy"
    capabilities = Capabilities("evoformer_attention")
    evoformer_attention_backward = staticmethod(evoformer_attention_backward)

    @staticmethod
    def evoformer_attention(*operands, return_lse=False, **more):
        out, lse = evoformer_attention(*operands, return_lse=True, **more)
        return (0 * out, lse) if return_lse else 0 * out
"""


class Pytest:
    """Starts pytest in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """The exit code and all that was printed."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *arguments],
            cwd=self.folder,
            env=environment | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)


@pytest.fixture
def own_pytest(tmp_path: Path) -> Pytest:
    return Pytest(tmp_path)


def test_what_is_right_passes_and_what_returns_zeros_fails_by_name(own_pytest: Pytest) -> None:
    own_pytest.write("mine.py", ZEROS)
    both = ("--impl", "numpy", "--impl", "mine:Zeros", "--case", CASE, "-k", "not memory", "-v")
    code, printed = own_pytest(*SUITE, *both)
    assert code == 1
    lines = printed.splitlines()
    for test, implementation, said in [
        (f"test_results[{CASE}", "numpy", "PASSED"),
        (f"test_gradients[{CASE}", "numpy", "PASSED"),
        (f"test_precision[{CASE}", "numpy", "PASSED"),
        ("test_invalid_calls[numpy", "", "PASSED"),
        (f"test_results[{CASE}", "zeros", "FAILED"),
        (f"test_gradients[{CASE}", "zeros", "PASSED"),
        ("test_invalid_calls[zeros", "", "PASSED"),
    ]:
        assert any(test in line and implementation in line and said in line for line in lines), test
    assert "out/condition: wrong: out: error" in printed
    assert "the definition says" in printed
    assert "Traceback" not in printed  # the fault is theirs, not ours


def test_groups_cases_and_dtypes_are_chosen(own_pytest: Pytest) -> None:
    code, printed = own_pytest(
        *SUITE,
        *("--impl", "numpy", "--collect-only", "-q", "-m", "gradients"),
        *(
            "--tag",
            "adversarial",
            "--dtype",
            "fp16",
            "--case",
            "evoformer/values/*/one-hot",
            "--case",
            "evoformer/values/*/subnormal",
        ),
    )
    assert code == 0
    collected = [line.partition("::")[2] for line in printed.splitlines() if "::" in line]
    assert collected == [
        f"test_gradients[evoformer/values/fp16/{name}-numpy]" for name in ("one-hot", "subnormal")
    ]


def test_what_cannot_be_judged_is_skipped_with_the_reason(own_pytest: Pytest) -> None:
    code, printed = own_pytest(
        *SUITE,
        *("--impl", "numpy", "-rs", "-k", "not memory and not invalid"),
        *(
            "--case",
            "evoformer/triangle-256/fp32/*",
            "--case",
            "evoformer/values/fp32/nan-attended",
        ),
    )
    assert code == 0
    assert "2 passed, 4 skipped" in printed
    assert "too large for a CPU; --large runs it" in printed
    assert "the gradients are not defined" in printed

    code, printed = own_pytest(*SUITE, "--impl", "numpy", "--device", "cuda", "-rs", "--case", CASE)
    assert code == 0
    assert "5 skipped" in printed
    assert "no device cuda here" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--impl", "numpi"), "no implementation 'numpi'. Did you mean numpy"),
        (("--impl", "no_such_module:X"), "no module 'no_such_module'."),
        (("--impl", "math:pi"), "is no implementation"),
        (("--impl", "numpy", "--tag", "modle"), "no tag 'modle'. Did you mean model"),
        (("--impl", "numpy", "--framework", "jax"), "invalid choice: 'jax'"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, own_pytest: Pytest) -> None:
    for more in ((), ("-n", "2")):
        code, printed = own_pytest(*SUITE, *arguments, *more)
        assert code == pytest.ExitCode.USAGE_ERROR
        assert said in printed
        assert "Traceback" not in printed
        assert "plugin.py" not in printed


def test_somebody_must_be_judged(own_pytest: Pytest) -> None:
    code, printed = own_pytest(*SUITE)
    assert code == pytest.ExitCode.INTERRUPTED
    assert "whom to judge? give --impl NAME or --impl module:OBJECT" in printed
    assert "plugin.py" not in printed  # as a traceback would


def test_tests_run_case_by_case(own_pytest: Pytest) -> None:
    """So that the oracle is asked once for all checks of a case and all implementations."""
    code, printed = own_pytest(
        *SUITE,
        *(
            "--impl",
            "numpy",
            "--impl",
            "numpy-tiled",
            "--case",
            "evoformer/length-[123]/fp32/all-*",
        ),
        *("--collect-only", "-q"),
    )
    assert code == 0
    collected = [line.partition("::")[2] for line in printed.splitlines() if "::" in line]
    assert len(collected) == 4 + 3 * 3 * 2
    cases = [name.partition("[")[2].rpartition("/")[0] for name in collected[4:]]
    assert cases == [f"evoformer/length-{length}/fp32" for length in (1, 2, 3) for _ in range(6)]


def test_parallel_workers_and_a_junit_record(own_pytest: Pytest) -> None:
    own_pytest.write("mine.py", ZEROS)
    code, printed = own_pytest(
        *SUITE,
        *("-n", "2", "--junitxml", "record.xml", "--impl", "mine:Zeros", "-m", "conformance"),
        *("--case", "evoformer/length-[123]/fp32/all-*", "-k", "not memory and not invalid"),
    )
    assert code == 1
    assert "3 failed" in printed
    record = ElementTree.parse(own_pytest.folder / "record.xml").getroot()
    tests = record.findall(".//testcase")
    assert {test.get("name") for test in tests} == {
        f"test_results[evoformer/length-{length}/fp32/all-operands-zeros]" for length in (1, 2, 3)
    }
    for test in tests:
        failure = test.find("failure")
        assert failure is not None
        assert "out/condition" in (failure.get("message") or "")


def test_known_faults_in_a_run(own_pytest: Pytest) -> None:
    own_pytest.write("mine.py", ZEROS)
    own_pytest.write(
        "known.py",
        "from pathlib import Path\n"
        "from isoform.conformance import expected\n"
        "expected.PATH = Path(__file__).with_name('known.toml')\n",
    )
    entry = (
        '[[failure]]\nimplementation = "{}"\ncase = "*"\ncheck = "out/condition"\nreason = "lost"\n'
    )
    own_pytest.write("known.toml", entry.format("zeros") + entry.format("numpy"))
    code, printed = own_pytest(
        *("-p", "known", *SUITE, "-rx", "--impl", "mine:Zeros", "--impl", "numpy"),
        *("--case", CASE, "-m", "conformance", "-k", "test_results"),
    )
    assert code == 1
    [summary] = printed.strip().splitlines()[-1:]
    assert "1 failed" in summary
    assert "1 xfailed" in summary
    assert "passed" not in summary
    assert [line for line in printed.splitlines() if "XFAIL" in line and "zeros" in line]
    assert "out passes, but is expected to fail: lost" in printed


def test_ones_own_tests_can_be_parametrised(own_pytest: Pytest) -> None:
    own_pytest.write(
        "test_mine.py",
        "def test_names(isoform_case, isoform_implementation):\n"
        "    assert isoform_implementation.name == 'numpy'\n"
        f"    assert isoform_case.id == {CASE!r}\n"
        "def test_other():\n"
        "    pass\n",
    )
    plugin = ("-p", "isoform.conformance.plugin")
    code, printed = own_pytest(*plugin, "--impl", "numpy", "--case", CASE, "test_mine.py")
    assert code == 0
    assert "2 passed" in printed


def test_it_stays_away_from_runs_that_do_not_ask_for_it(own_pytest: Pytest) -> None:
    loaded = [entry.value for entry in entry_points(group="pytest11")]
    assert not any(value.startswith("isoform") for value in loaded)
    own_pytest.write("test_mine.py", "def test_mine(): pass\n")
    code, printed = own_pytest("test_mine.py", "--strict-markers")
    assert code == 0
    assert "isoform" not in printed
    code, printed = own_pytest("test_mine.py", "--impl", "numpy")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "unrecognized arguments: --impl" in printed


# What a test of the suite says of its outcomes


MakeOutcome = Callable[..., Outcome]
KnownFaults = Callable[..., None]

ENTRY = {"implementation": "mine", "case": "*", "check": "out/condition", "reason": "a lost tile"}


def test_passes_settle_to_a_pass(make_outcome: MakeOutcome, known_faults: KnownFaults) -> None:
    settle([make_outcome(Verdict.PASS), make_outcome(Verdict.UNSUPPORTED, check="lse")])
    settle([make_outcome(Verdict.UNDECLARED)])


def test_nothing_but_refusals_settle_to_a_skip(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    refused = [make_outcome(Verdict.UNSUPPORTED), make_outcome(Verdict.NOT_RUN, message="no GPU")]
    with pytest.raises(pytest.skip.Exception, match="it is unsupported; no GPU"):
        settle(refused)


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict.fails], ids=str)
def test_any_fault_settles_to_a_failure_that_names_the_check(
    verdict: Verdict, make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"dq: {verdict}: it is {verdict}"):
        settle([make_outcome(Verdict.PASS), make_outcome(verdict, check="dq")])


def test_known_faults_settle_to_an_expected_failure(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    known_faults(ENTRY)
    fault = make_outcome(parts={"condition": False})
    with pytest.raises(pytest.xfail.Exception, match="a lost tile"):
        settle([fault, make_outcome(Verdict.PASS, check="lse")])
    other = make_outcome(check="dq", parts={"condition": False})
    with pytest.raises(pytest.fail.Exception) as raised:
        settle([fault, other])
    assert "dq/condition: wrong" in str(raised.value)
    assert "out/condition" not in str(raised.value)


def test_known_faults_that_are_gone_settle_to_a_failure(
    make_outcome: MakeOutcome, known_faults: KnownFaults
) -> None:
    known_faults(ENTRY)
    gone = make_outcome(Verdict.PASS, parts={"condition": True})
    with pytest.raises(pytest.fail.Exception, match="out passes, but is expected to fail: a lost"):
        settle([gone])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_lists_are_heeded_and_kept_true(own_pytest: Pytest, workers: str) -> None:
    own_pytest.write("mine.py", ZEROS)
    args = (*SUITE, "--impl", "mine:Zeros", "-m", "conformance", "-n", workers)
    args += ("--case", "evoformer/length-[123]/fp32/all-*", "-k", "not memory and not invalid")
    own_pytest.write("skip.txt", "*/length-3/* # later\n")
    own_pytest.write("xfail.txt", "*/length-[12]/* out # all zeros\n")
    lists = ("--skip", "skip.txt", "--xfail", "xfail.txt")
    code, printed = own_pytest(*args, *lists)
    assert "2 xfailed" in printed
    assert "1 skipped" in printed
    assert code == 0

    own_pytest.write("xfail.txt", "*/length-[12]/* out # zeros\n*/length-2/* unmodified # no\n")
    code, printed = own_pytest(*args, *lists)
    assert "xfail.txt:2: */length-2/* unmodified: does not fail any more" in printed
    assert "xfail.txt:1" not in printed
    assert "2 xfailed" in printed
    assert code == 1

    own_pytest.write("skip.txt", "*/lenght-3/* # misspelt\n")
    code, printed = own_pytest(*args, *lists)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "no case (of skip.txt:1) '*/lenght-3/*'" in printed
