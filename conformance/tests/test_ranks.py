"""Implementations over ranks: judged like any other, on threads and on processes alike."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isoform.conformance import ranks
from isoform.conformance.attention.parallel_mutants import MUTANTS
from isoform.conformance.cli import app
from isoform.conformance.implementation import Implementation
from isoform.conformance.implementations.parallel import PARALLEL
from isoform.conformance.judge import judge
from isoform.conformance.operations import CASES, OPERATIONS
from isoform.conformance.ranks import RankError, Ranks, over_ranks
from isoform.conformance.registry import find, registered
from isoform.conformance.verdicts import Verdict

CASE = CASES["attention/ranks-7/fp32/packed-causal"]
HARD = [case for case in CASES.values() if "ranks" in case.tags]
FINE = {Verdict.PASS, Verdict.UNSUPPORTED}

PROGRAM = """
import os, signal, time
from isoform.parallel.attention import attention_vjp

def raises(*operands, comm, **options):
    if comm.rank == comm.size - 1:
        raise ArithmeticError("planted on the last rank")
    return attention_vjp(*operands, comm=comm, strategy="ring", **options)

def sleeps(*operands, comm, **options):
    if comm.rank == 1:
        time.sleep(1000)
    return attention_vjp(*operands, comm=comm, strategy="ring", **options)

def killed(*operands, comm, **options):
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return attention_vjp(*operands, comm=comm, strategy="ring", **options)

def other_lengths(q, k, v, *, comm, sharding, **options):
    if comm.rank == 1:
        q, k, v = (x[:, 1:] for x in (q, k, v))
    return attention_vjp(q, k, v, comm=comm, sharding=sharding, strategy="ring", **options)
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's module of programs with faults, in the current directory."""
    (tmp_path / "planted.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    monkeypatch.setattr(ranks, "_job", ranks.cache(ranks._job.__wrapped__))
    import planted

    yield planted
    ranks._job.cache_clear()


def verdict(implementation: Implementation, case: Any = CASE) -> tuple[Verdict, str]:
    """That on the case as a whole."""
    (outcome,) = (o for o in judge(implementation, case, groups=["conformance"]) if not o.parts)
    return outcome.verdict, outcome.message


def whole(name: str, over: Ranks, case: Any) -> tuple[Any, ...]:
    """``out`` and gradients of the whole sequence."""
    operands = dict(OPERATIONS["attention"].operands(case))
    spread = PARALLEL[name].on(over).spread
    assert spread is not None
    places = {key: operands.pop(key) for key in [*operands] if len(operands[key].shape) < 4}
    return spread._call(operands, {**dict(case.options), **places})


# --- right ---


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("name", PARALLEL)
def test_each_is_right_where_dividing_is_hard(name: str, size: int) -> None:
    implementation = PARALLEL[name].on(Ranks(size))
    for case in HARD[size % 3 :: 3]:  # `nox -s mpi` has them all
        said = judge(implementation, case)
        assert {outcome.verdict for outcome in said} <= FINE, (case.id, said)


def test_each_is_registered_by_its_own_name() -> None:
    assert {name for name in registered() if name.startswith("parallel/")} == {*PARALLEL}
    assert find("parallel/ring-zigzag") == PARALLEL["parallel/ring-zigzag"]
    assert len(PARALLEL) == 4 * 3


@pytest.mark.mpi
@pytest.mark.parametrize("case", [HARD[1], HARD[-1]], ids=lambda case: case.id)
@pytest.mark.parametrize("name", [name for name in PARALLEL if name.endswith("zigzag")])
def test_the_same_bits_on_threads_and_on_processes(name: str, case: Any) -> None:
    threads, processes = (whole(name, Ranks(3, kind), case) for kind in ("simulated", "mpi"))
    for one, other in zip(threads, processes, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.mpi
def test_ranks_with_tensors() -> None:
    implementation = PARALLEL["parallel/hybrid-striped"].on(Ranks(2, "torch"))
    for case in HARD[::5]:
        assert {outcome.verdict for outcome in judge(implementation, case)} <= FINE


@pytest.mark.parametrize("name", ["parallel/ring-zigzag", "parallel/all-gather-contiguous"])
def test_error_does_not_grow_with_ranks(name: str) -> None:
    """What bfloat16 loses on eight ranks is what it loses on one."""
    case = CASES["attention/mask/bf16/causal"]

    def errors(size: int) -> dict[str, Any]:
        said = judge(PARALLEL[name].on(Ranks(size)), case, groups=["precision"])
        return {o.check: o.errors for o in said if o.errors is not None}

    one, eight = errors(1), errors(8)
    assert {*one} == {"out", "dq", "dk", "dv"}
    for result in one:
        assert eight[result].mean_abs <= 1.1 * one[result].mean_abs, result
        assert eight[result].max_abs <= 1.25 * one[result].max_abs, result


def test_what_a_sequence_of_its_own_cannot_have_is_declined() -> None:
    for name in ("attention/lengths-33-127/fp32/full", "attention/ring/fp32/past"):
        said = judge(PARALLEL["parallel/ulysses-striped"], CASES[name])
        assert {outcome.verdict for outcome in said} == {Verdict.UNSUPPORTED}


# --- wrong: on which rank ---


def test_a_wrong_number_is_laid_at_the_rank_that_computed_it() -> None:
    mutant = next(m for m in MUTANTS if m.name.endswith("zigzag-positions"))
    wrong = [o for o in judge(mutant.implementation, CASES[mutant.case]) if o.verdict.fails]
    spread = mutant.implementation.spread
    assert wrong
    assert spread is not None
    for outcome in wrong:
        if outcome.group != "precision" and outcome.errors is not None:
            rank = spread.rank_of(outcome.errors.worst[1], 48)
            assert f"at {[*outcome.errors.worst]} (rank {rank} of 4) it is" in outcome.message


def test_a_rank_that_raises_is_named(planted: Any) -> None:
    found = verdict(over_ranks("planted", planted.raises, "zigzag"))
    said = "RankError: rank 3 of 4: ArithmeticError: planted on the last rank"
    assert found == (Verdict.ERROR, said)


def test_a_deadlock_is_named() -> None:
    mutant = next(m for m in MUTANTS if m.name.endswith("no-message"))
    kind, message = verdict(mutant.implementation, CASES[mutant.case])
    assert kind is Verdict.ERROR
    assert "DeadlockError: no rank can go on: " in message
    assert "rank 1 awaits ring float32[2, 18, 2, 16] from rank 0" in message


def test_refusals_are_refusals() -> None:
    refusing = over_ranks("refusing", _refusing, "contiguous")
    assert verdict(refusing) == (
        Verdict.BROKEN_DECLARATION,
        "Unsupported: refusing does not support this call: anything at all",
    )


def _refusing(*operands: Any, **options: Any) -> Any:
    raise ranks.Unsupported(["anything at all"], "refusing")


# --- processes: nothing hangs, nothing is left ---


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("kind", "faults"), [("mpi", ("raises", "killed", "other_lengths")), ("torch", ("raises",))]
)
def test_what_fails_on_processes_ends_them_and_the_next_call_has_new_ones(
    planted: Any, kind: Any, faults: tuple[str, ...]
) -> None:
    over = Ranks(3, kind, limit=20.0)
    began = time.monotonic()
    says = {
        "raises": "rank 2 of 3: ArithmeticError: planted on the last rank",
        "killed": "failed: no result of ranks 0, 1, 2 of 3",
        "other_lengths": "rank . of 3: .*(ValueError|MismatchError)",
    }
    for program, words in ((fault, says[fault]) for fault in faults):
        implementation = over_ranks(program, getattr(planted, program), "zigzag", ranks=over)
        with pytest.raises(RankError, match=words):
            _call(implementation)
    assert time.monotonic() - began < 60
    right = judge(PARALLEL["parallel/ring-zigzag"].on(over), CASE)
    assert {outcome.verdict for outcome in right} <= FINE


@pytest.mark.mpi
def test_the_time_limit_ends_all_ranks_and_says_where_they_were(planted: Any) -> None:
    over = Ranks(2, "mpi", limit=2.0)
    began = time.monotonic()
    with pytest.raises(RankError, match=r"not done after 2 s: .*rank 1 in sleeps"):
        _call(over_ranks("sleeps", planted.sleeps, "zigzag", ranks=over))
    assert time.monotonic() - began < 15


def _call(implementation: Implementation) -> Any:
    q = np.ones((1, 8, 2, 4), np.float32)
    return implementation.forward(q, q, q)


# --- the command line ---


def check(*args: str) -> Any:
    return CliRunner().invoke(app, ["check", *args])


CHOSEN = ("--case", CASE.id, "--json")


def test_ranks_are_started_and_recorded() -> None:
    result = check("parallel/ring-zigzag", "--ranks", "8", *CHOSEN)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["environment"]["ranks"] == "8"
    assert record["environment"]["communicator"] == "simulated"
    declared = record["capabilities"]["parallel/ring-zigzag"]["attention"]
    assert (declared["ranks"], declared["sharding"]) == (8, "zigzag")


@pytest.mark.mpi
def test_ranks_of_mpi_from_the_command_line() -> None:
    over = ("--ranks", "2", "--communicator", "mpi")
    result = check("parallel/hybrid-striped", *over, *CHOSEN)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["environment"]["communicator"] == "mpi"


def test_the_command_that_shows_a_failure_again_has_the_ranks(planted: Any) -> None:
    Path("mine.py").write_text(
        "import planted\n"
        "from isoform.conformance.ranks import over_ranks\n"
        "MINE = over_ranks('mine', planted.raises, 'striped')\n"
    )
    result = check("--impl", "mine:MINE", "--ranks", "2", "--case", CASE.id)
    assert result.exit_code == 1, result.output
    words = " ".join(result.output.split())
    assert "--ranks 2 --communicator simulated" in words
    assert "rank 1 of 2: ArithmeticError" in words


def test_without_names_only_those_over_ranks_are_judged() -> None:
    result = check("--ranks", "2", *CHOSEN)
    assert result.exit_code == 0, result.output
    assert {*json.loads(result.stdout)["capabilities"]} == {*PARALLEL}
    alone = check("numpy", "--ranks", "2", *CHOSEN)
    assert alone.exit_code == 2
    assert "none of numpy runs over ranks" in alone.output


@pytest.mark.parametrize(("kind", "module"), [("mpi", "mpi4py"), ("torch", "torch")])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, module: str) -> None:
    real = ranks.importlib.util.find_spec
    monkeypatch.setattr(
        ranks.importlib.util, "find_spec", lambda name: None if name == module else real(name)
    )
    result = check("parallel/ring-zigzag", "--communicator", kind, *CHOSEN)
    assert result.exit_code == 2
    assert f"ranks of {kind} need {module}" in result.output
    assert f'pip install "isoform[{kind}]"' in " ".join(result.output.split())


def test_wrong_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        Ranks(0)
    with pytest.raises(ValueError, match="communicator must be one of simulated, mpi, torch"):
        Ranks(1, "pigeons")  # type: ignore[arg-type]


@pytest.mark.parametrize("communicator", ["torch-nccl", "cupy-nccl"])
def test_ranks_of_nccl_work_on_a_gpu_and_declare_what_its_kernels_round(communicator):
    ranks = Ranks(2, communicator)
    assert (ranks.library, ranks.device, ranks.in_process) == ("torch", "cuda", False)
    there = PARALLEL["parallel/ring-zigzag"].on(ranks).capabilities.arithmetic
    assert there.sums == "truncated"
    assert there.probabilities == "operand"
    here = PARALLEL["parallel/ring-zigzag"].on(Ranks(2, "torch")).capabilities.arithmetic
    assert here.sums == "nearest"


# --- ranks with a GPU each, on a machine that has none: told apart, and refused with the reason ---


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, nccl: bool = True) -> None:
    """Let PyTorch see ``count`` GPUs."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)


class Threads:
    """Ranks that are said to have a GPU each, and are threads."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, function: Any, *args: Any, limit: float) -> list[Any]:
        return ranks.simulate(function, self.size, *args)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, on which whatever is put lies in the host's memory."""
    from isoform.conformance.frameworks import framework

    class Here:
        def __init__(self, name: str) -> None:
            self.library = framework(name)

        def upload(self, operands: Any, device: str) -> Any:
            assert device == "cuda"
            return self.library.upload(operands, "cpu")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.library, name)

    gpus(monkeypatch, 2)
    monkeypatch.setattr(ranks, "framework", Here)
    monkeypatch.setattr(ranks, "_job", lambda size, communicator: Threads(size))


@pytest.mark.parametrize(("count", "nccl"), [(0, True), (1, True), (2, False), (2, True)])
def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, count: int, nccl: bool) -> None:
    gpus(monkeypatch, count, nccl)
    why = Ranks(2, "torch-nccl").lacking()
    if count < 2:
        wanted = "needs 2 GPUs, one for each rank, joined by NCCL: PyTorch sees"
        assert why == f"{wanted} {count} here"
    else:
        assert bool(why) != nccl
    assert Ranks(2, "torch").lacking() == ""
    if why:
        with pytest.raises(RankError, match="torch-nccl needs"):
            Ranks(2, "torch-nccl").require()


def test_pytorchs_ranks_on_gpus_are_joined_by_nccl() -> None:
    assert Ranks(2, "torch").on("cuda") == Ranks(2, "torch-nccl")
    assert Ranks(2, "torch").on("cpu") == Ranks(2, "torch")
    assert Ranks(2, "mpi").on("cuda") == Ranks(2, "mpi")


def test_where_ranks_compute_is_where_they_are_judged(pretended: None) -> None:
    """Shards go to the ranks' GPUs from the host's memory, and the call is one on a GPU."""
    there = PARALLEL["parallel/ring-zigzag"].on(Ranks(2, "torch-nccl"))
    assert there.capabilities.devices == {"cuda"}
    said = judge(there, CASE, device="cuda", architecture="sm_90")
    assert {outcome.verdict for outcome in said} == {Verdict.PASS, Verdict.UNSUPPORTED}
    (absent,) = judge(there, CASE)
    assert absent.verdict is Verdict.NOT_RUN
    assert absent.message == "its ranks (torch-nccl) are on cuda, not on cpu"
    (absent,) = judge(PARALLEL["parallel/ring-zigzag"], CASE, device="cuda")
    assert absent.message == "its ranks (simulated) are on cpu, not on cuda"


def test_what_equal_shards_cannot_hold_is_declined(pretended: None) -> None:
    vjp = PARALLEL["parallel/ring-zigzag"].spread.vjp  # type: ignore[union-attr]
    even = over_ranks("even", vjp, "zigzag", ranks=Ranks(2), parts=2)
    assert even.capabilities.length_multiple == 4
    assert even.on(Ranks(3)).capabilities.length_multiple == 6
    said = judge(even, CASES["attention/length-17/fp32/causal"])
    assert [outcome.verdict for outcome in said] == [Verdict.UNSUPPORTED]
    assert "lengths Q=17, K=17 (multiples of 4 only)" in said[0].message
    alone = judge(even, CASES["attention/mask/fp32/causal"])
    assert {outcome.verdict for outcome in alone} == {Verdict.UNSUPPORTED}


def test_gradients_that_are_not_declared_are_declined() -> None:
    spread = PARALLEL["parallel/ring-zigzag"].spread
    assert spread is not None
    declared = ranks.replace(spread.capabilities, gradients=frozenset())
    forward = over_ranks("forward", spread.vjp, "zigzag", capabilities=declared)
    said = judge(forward, CASE)
    assert {outcome.verdict for outcome in said} == {Verdict.PASS, Verdict.UNSUPPORTED}
    assert any(outcome.check == "gradients" for outcome in said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--communicator", "mpi"), "ranks of mpi compute on processors"),
        (("--communicator", "torch"), "torch-nccl needs 2 GPUs"),
        ((), "torch-nccl needs 2 GPUs"),
    ],
)
def test_a_gpu_to_a_rank_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], said: str
) -> None:
    gpus(monkeypatch, 1)
    over = ("--ranks", "2", "--device", "cuda", *asked)
    result = check("parallel/ring-zigzag", *over, *CHOSEN)
    assert said in " ".join(result.output.split())
    assert result.exit_code == (2 if "mpi" in asked else 3)


def test_a_run_on_gpus_is_recorded_as_one(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the device is said, or the communicator that has one alone."""
    from isoform.conformance import cli

    monkeypatch.setattr(cli, "_architecture", lambda device: "sm_90" if device == "cuda" else "")
    for asked in (("torch", "--device", "cuda"), ("torch-nccl",)):
        result = check("parallel/ring-zigzag", "--ranks", "2", "--communicator", *asked, *CHOSEN)
        assert result.exit_code == 0, result.output
        around = json.loads(result.stdout)["environment"]
        assert (around["device"], around["ranks"]) == ("cuda", "2")
        assert around["communicator"] == "torch-nccl"
        assert "torch" in around
