"""The benchmark of training runs on a processor by the path that a GPU takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from isoform.parallel.benchmark import genome
from isoform.parallel.benchmark.genome import (
    SCHEMES,
    Limits,
    Machine,
    Search,
    Step,
    main,
    model_flops,
)
from isoform.parallel.training.model import build
from isoform.parallel.training.plan import compare
from isoform.parallel.training.switches import Switches
from isoform.reference.torch.genome_lm import CONFIGURATIONS

TINY = ["--device", "cpu", "--models", "tiny", "--memory-gb", "0.002", "--host-gb", "0.01"]


def lines(tmp_path: Any, *more: str, code: int = 0) -> list[dict[str, Any]]:
    record = tmp_path / "record.jsonl"
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--start", "32", "--lengths", "64", "--record", str(record), *more])
    assert ended.value.code == code
    return [json.loads(line) for line in record.read_text().splitlines()]


def test_both_schemes_are_measured(tmp_path, capsys):
    found = lines(tmp_path, "--quick", "--part", "models", "--commit", "abc")
    assert found[0]["kind"] == "surroundings" and found[0]["commit"] == "abc"
    by_kind = {kind: [x for x in found if x["kind"] == kind] for kind in {x["kind"] for x in found}}
    baseline, new = by_kind["longest"]
    assert (baseline["scheme"], new["scheme"]) == ("baseline", "new")
    (gain,) = by_kind["gain"]
    assert gain["longest"]["ratio"] == new["length"] / baseline["length"] > 2
    assert gain["peak_bytes"]["ratio"] > 1.5
    for one in (baseline, new):
        assert one["peak_bytes"] <= 0.002 * 2**30
        assert one["does_not_fit"] > one["length"] and one["limited_by"] == "memory"
    # a window changes no size
    without, within = by_kind["window"]
    assert within["peak_bytes"] == pytest.approx(without["peak_bytes"], rel=0.01)
    assert new["host_bytes"] == new["length"] * 32 * 2  # the first block's input, of two
    for one in by_kind["time"]:
        assert one["seconds"] == pytest.approx(sum(one["parts"]))
        assert one["tokens_per_s"] == pytest.approx(one["length"] / one["seconds"])
        assert 3 < one["loss"] < 6  # ln 68 is 4.2
    assert "tokens/s" in capsys.readouterr().out


def test_a_step_says_how_far_it_is(tmp_path):
    found = lines(tmp_path, "--part", "step", "--length", "128")
    progress = [x for x in found if x["kind"] == "progress"]
    said = [{k: v for k, v in x.items() if k not in ("kind", "seconds")} for x in progress]
    after = "backward of all after"
    assert said == [{"forward": 0}, {"forward": 1}, {after: 1}, {after: 0}]
    assert found[-1]["kind"] == "step" and found[-1]["length"] == 128


def test_a_sequence_is_shared_by_ranks_up_to_what_does_not_fit(tmp_path):
    more = ["--part", "shared", "--ranks", "2", "--lengths", "64", "1024", "2048"]
    _, around, fits, refused = lines(tmp_path, *more)
    assert around["schemes"]["new"]["layout"]["sequence"] == 2
    assert (fits["kind"], fits["length"], fits["ranks"]) == ("shared", 64, 2)
    assert fits["host_bytes"] == 32 * 32 * 2  # the first block's input, of two; half the tokens
    assert 3 < fits["loss"] < 6 and fits["seconds"] == pytest.approx(sum(fits["parts"]))
    assert (refused["kind"], refused["length"]) == ("does not fit", 1024)
    (planned,) = compare([around, fits])
    assert abs(planned.error) < 0.1


def test_each_technique_is_switched_back(tmp_path):
    found = lines(tmp_path, "--part", "switches", "--lengths", "192", "--memory-gb", "1")
    names = ["nothing", "attention", "loss", "mlp", "groups of heads", "offload", "checkpointing"]
    assert [x.get("without") for x in found[1:]] == names
    peaks = {x["without"]: x["peak_bytes"] for x in found[1:] if "peak_bytes" in x}
    assert peaks["nothing"] <= peaks["offload"] < peaks["checkpointing"]


def test_what_there_is_no_time_for_is_said(tmp_path):
    found = lines(tmp_path, "--minutes", "0")
    assert [(x["kind"], x.get("what")) for x in found[1:]] == [
        ("left out", "tiny"),
        ("left out", "switches"),
    ]


def test_a_part_that_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("as a GPU would")

    monkeypatch.setattr(genome.Benchmark, "model", broken)
    found = lines(tmp_path, "--part", "models", "step", "--length", "64", code=1)
    assert found[1]["kind"] == "failed" and "as a GPU would" in found[1]["why"]
    assert found[-1]["kind"] == "step"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_is_no_time(tmp_path, monkeypatch, loss):
    def step(trainer: Any, length: int, *_: Any) -> Step:
        return Step(length, 1.0, (0.0, 0.0, 1.0), 0, 0, loss)

    monkeypatch.setattr(genome.Trainer, "step", step)
    found = lines(tmp_path, "--part", "step", "--length", "64", code=1)
    assert found[-1]["kind"] == "failed"
    assert f"FloatingPointError: tiny, 64 tokens: the loss is {loss}" in found[-1]["why"]
    assert not any("tokens_per_s" in one for one in found)


def test_a_trainer_leaves_nothing():
    """Even where its name still stands: the next one has all the memory."""
    machine = Machine("cpu", 2**30)
    bench = genome.Benchmark(machine, Limits(2**30, 2**30, 0.0), lambda line: None, True)
    with bench.trainer(CONFIGURATIONS["tiny"], SCHEMES["new"]) as one:
        one.step(64)
        assert machine._counted.now == 14 * CONFIGURATIONS["tiny"].parameters  # no gradients now
    assert machine._counted.now < 1000, one


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    fixed=st.integers(0, 900),
    slope=st.integers(1, 50),
    curve=st.sampled_from([0.0, 0.01, 0.3]),
    grain=st.sampled_from([1, 8, 64]),
    ceiling=st.integers(100, 10**6),
    noise=st.integers(0, 30),
)
def test_the_longest_is_found(fixed, slope, curve, grain, ceiling, noise):
    memory = 1_000_000

    def peak(length: int) -> int:
        return int(fixed + slope * length + curve * length**2 + (length * 7919) % (noise + 1))

    def fits(length: int) -> Step | None:
        assert length <= ceiling
        if peak(length) > memory:
            return None
        return Step(length, 1.0, (0.0, 0.0, 1.0), peak(length), 0, 0.0)

    search = Search(fits, memory, grain, ceiling)
    found = search.run(64)
    assert peak(found) <= memory
    if search.bad is None:
        assert found >= ceiling // search.grain * search.grain
    else:
        assert search.bad - found <= max(search.grain, 0.05 * found + 1)
    assert len(search.tried) <= 11


def test_operations_are_those_that_are_counted():
    """Of the dense layers; those of attention are half of all pairs."""
    c = CONFIGURATIONS["tiny"]
    one = build(c, Switches(attention="stored"))
    tokens = torch.randint(c.vocabulary, (1, 64))
    with FlopCounterMode(display=False) as counter:
        one(tokens).backward()
    attention = 6 * c.layers * 64**2 * c.hidden
    assert model_flops(c, 64) + attention == counter.get_total_flops()


def test_a_machine_knows_its_limit():
    machine = Machine("cpu", 1000)
    with machine.counting(), pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000)
    assert machine.peak_rate is None
    assert Limits(1, 2, 3.0).host == 2
    assert SCHEMES["baseline"].attention == "stored"
