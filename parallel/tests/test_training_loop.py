"""Training: it learns, goes on where it stopped, bit for bit, and says what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from isoform.parallel.launch import LaunchError, launch
from isoform.parallel.training import checkpoint, loop
from isoform.parallel.training.checkpoint import WrongCheckpoint, latest
from isoform.parallel.training.fasta import BadFasta
from isoform.parallel.training.loop import Diverged, Run, train
from isoform.parallel.training.settings import Training, WrongSettings
from isoform.parallel.training.world import World, joined
from isoform.reference.contract import Unsupported

RANKS = {"transport": "gloo", "limit": 300.0}
"""However busy the machine is."""


@pytest.fixture
def programs(loop_programs: ModuleType) -> ModuleType:
    return loop_programs


@pytest.fixture
def fasta(programs: ModuleType, tmp_path: Path) -> Path:
    return programs.genome(tmp_path)


class Stopped(Exception):
    pass


def stopping(after: int):
    def report(event: dict) -> None:
        if event["event"] == "step" and event["step"] == after:
            raise Stopped

    return report


def parameters(folder: Path, told) -> dict[str, torch.Tensor]:
    run = Run(told, folder, comm=None, device="cpu")
    run.resume()
    return {name: x.detach().clone() for name, x in run.model.named_parameters()}


def test_it_learns_and_says_how_it_goes(programs, fasta, tmp_path):
    told = programs.settings(
        fasta, 30, {"training": {"learning_rate": 0.02, "checkpoint_every": 30}}
    )
    seen: list[dict] = []
    found = train(told, tmp_path / "run", report=seen.append)
    assert seen == loop.read_log(tmp_path / "run" / loop.LOG)
    begin, first, *others = seen
    assert begin["event"] == "begin"
    assert (begin["bases"], begin["held_out_bases"]) == (1230, 410)
    assert first["event"] == "held out"
    assert first["loss"] == pytest.approx(math.log(69), abs=0.05)
    assert [x["step"] for x in others if x["event"] == "step"] == [*range(1, 31)]
    assert [x["step"] for x in others if x["event"] == "held out"] == [*range(3, 31, 3)]
    assert found.step == 30
    assert found.bits == others[-1]["bits_per_base"] < 2 - 0.02
    assert found.markov == begin["markov_bits_per_base"]
    assert found.bases == 3 * others[-1]["tokens"]
    for line in others:
        assert line["bits_per_base"] == pytest.approx(line["loss"] / math.log(2) / 3)
        if line["event"] == "step":
            assert line["tokens_per_second"] == pytest.approx(4 * 14 / line["seconds"])
            assert line["peak_bytes"] > 1e7
            assert line["sent_bytes"] == 0
            assert line["learning_rate"] == told.training.rate(line["step"] - 1)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(programs, fasta, tmp_path):
    told = programs.settings(fasta, 7)
    train(told, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(told, tmp_path / "halves", report=stopping(5))
    assert programs.losses(tmp_path / "halves")[-1][1] == 5
    assert latest(tmp_path / "halves" / loop.CHECKPOINTS).name == "step-00000004"
    train(told, tmp_path / "halves")
    assert programs.losses(tmp_path / "halves") == programs.losses(tmp_path / "whole")
    one, two = (parameters(tmp_path / name, told) for name in ("whole", "halves"))
    for name, x in one.items():
        assert torch.equal(x, two[name]), name
    begins = [x for x in loop.read_log(tmp_path / "halves" / loop.LOG) if x["event"] == "begin"]
    assert [x["step"] for x in begins] == [0, 4]
    before = programs.losses(tmp_path / "whole")
    assert train(told, tmp_path / "whole").step == 7  # nothing is left to do
    assert programs.losses(tmp_path / "whole") == before


def test_a_line_that_a_killed_run_has_not_finished(programs, fasta, tmp_path):
    told = programs.settings(fasta, 4)
    with pytest.raises(Stopped):
        train(told, tmp_path / "run", report=stopping(3))
    with (tmp_path / "run" / loop.LOG).open("a") as out:
        out.write('{"event": "ste')
    train(told, tmp_path / "run")
    assert [x[1] for x in programs.losses(tmp_path / "run") if x[0] == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize("model", ["rotary", "learned"])
def test_a_killed_rank_and_other_numbers_of_ranks(programs, fasta, tmp_path, model):
    """Ranks share each sequence. One is killed; the run goes on bit for bit on as many, and to
    rounding on fewer and on more."""
    tables = programs.LEARNED if model == "learned" else {}
    told = programs.settings(fasta, 7, tables)
    launch(programs.whole_run, 2, told, tmp_path / "whole", **RANKS)
    with pytest.raises(LaunchError):
        launch(programs.whole_run, 2, told, tmp_path / "killed", (1, 5), **RANKS)
    assert latest(tmp_path / "killed" / loop.CHECKPOINTS).name == "step-00000004"
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
        for part in (loop.CHECKPOINTS, loop.LOG):
            source = tmp_path / "killed" / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name / part)
    launch(programs.whole_run, 2, told, tmp_path / "killed", **RANKS)
    expected = programs.losses(tmp_path / "whole")
    assert programs.losses(tmp_path / "killed") == expected

    train(told, tmp_path / "one")
    launch(programs.whole_run, 3, told, tmp_path / "three", **RANKS)
    train(told, tmp_path / "alone")
    for name in ("one", "three", "alone"):
        found = programs.losses(tmp_path / name)
        assert [x[:2] for x in found] == [x[:2] for x in expected]
        np.testing.assert_allclose([x[2] for x in found], [x[2] for x in expected], rtol=2e-6)
    sent = [x["sent_bytes"] for x in loop.read_log(tmp_path / "whole" / loop.LOG)
            if x["event"] == "step"]  # fmt: skip
    assert min(sent) > 1000


def test_copies_of_the_model_that_share_sequences(programs, fasta, tmp_path):
    """Two copies of two ranks each, with rows of a table on each rank."""
    told = programs.settings(fasta, 4, programs.LEARNED)
    layout = programs.settings(
        fasta, 4, {**programs.LEARNED, "switches": {"position_table": "partitioned",
                                                    "layout": {"data": 2, "sequence": 2}}}
    )  # fmt: skip
    train(told, tmp_path / "one")
    launch(programs.whole_run, 4, layout, tmp_path / "four", **RANKS)
    one, four = (programs.losses(tmp_path / name) for name in ("one", "four"))
    np.testing.assert_allclose([x[2] for x in four], [x[2] for x in one], rtol=2e-6)
    (tmp_path / "one" / loop.LOG).unlink()
    for path, told_ in ((tmp_path / "one", told), (tmp_path / "four", told)):
        run = Run(told_, path, comm=None, device="cpu")
        assert run.resume() == 4
        weights = run.model.state_dict()
        if path.name == "one":
            expected = weights
    for name, x in weights.items():
        if not name.endswith("key.bias"):  # whose gradient is 0 but for rounding, which Adam scales
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "sharded": ({"data": 2, "sequence": 2}, "sharded", True),
    "tensors": ({"sequence": 2, "tensor": 2}, "replicated", False),
    "offloaded": ({"data": 2, "tensor": 2}, "offloaded", False),
    "stages": ({"pipeline": 2, "sequence": 2}, "replicated", False),
}
"""Degrees, where optimizer states are, and whether positions are a partitioned table."""


def test_engines_train_the_same_model_and_go_on(programs, fasta, tmp_path):
    """Bit for bit on the same ranks, and on one rank to rounding."""

    def told(steps: int, name: str, alone: bool = False):
        layout, states, learned = LAYOUTS[name]
        tables = dict(programs.LEARNED) if learned else {}
        if not alone:
            own = dict(tables.get("switches", {}))
            tables["switches"] = {**own, "layout": layout, "optimizer": states}
        training = {"decay": "constant", "learning_rate": 0.01, "clip": 0.4}
        return programs.settings(fasta, steps, {**tables, "training": training})

    runs = []
    for name in LAYOUTS:
        for folder, steps in (("whole", (6,)), ("halves", (4, 6)), ("half", (4,))):
            runs += [(told(n, name), tmp_path / name / folder) for n in steps]
    launch(programs.whole_runs, 4, runs, **RANKS)
    for name in LAYOUTS:
        for folder in ("half", "one"):
            train(told(6, name, alone=True), tmp_path / name / folder)
        whole, halves, half, one = (
            {(x[0], x[1]): x[2] for x in programs.losses(tmp_path / name / folder)}
            for folder in ("whole", "halves", "half", "one")
        )
        halves.pop(("held out", 4), None)  # the first half ends with an evaluation of its own
        half.pop(("held out", 4), None)
        assert halves == whole, name
        assert half.keys() == one.keys() == whole.keys()
        for found in (whole, half):
            np.testing.assert_allclose([*found.values()], [*one.values()], rtol=5e-6, err_msg=name)
        norms = [
            [e["gradient_norm"] for e in loop.read_log(tmp_path / name / folder / loop.LOG)
             if e["event"] == "step"]
            for folder in ("whole", "one")
        ]  # fmt: skip
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4, err_msg=name)
        assert min(norms[0]) > 0.4  # or nothing was shortened


def test_a_save_that_is_killed_leaves_the_one_before(programs, fasta, tmp_path, monkeypatch):
    told = programs.settings(fasta, 6)
    folder = tmp_path / "run" / loop.CHECKPOINTS
    usual = checkpoint.saver.save

    def killed(state, *, checkpoint_id, **more):
        usual(state, checkpoint_id=checkpoint_id, **more)
        next(checkpoint_id.glob("*.distcp")).write_bytes(b"half of it")
        raise Stopped

    with pytest.raises(Stopped):
        train(told, tmp_path / "run", report=stopping(3))
    monkeypatch.setattr(checkpoint.saver, "save", killed)
    with pytest.raises(Stopped):
        train(told, tmp_path / "run")
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000002",
        "step-00000004.unfinished",
    ]
    assert latest(folder).name == "step-00000002"
    train(told, tmp_path / "run")
    train(told, tmp_path / "whole")
    assert programs.losses(tmp_path / "run") == programs.losses(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_checkpoint_of_another_run_is_refused(programs, fasta, tmp_path):
    train(programs.settings(fasta, 2), tmp_path / "run")
    other = programs.settings(fasta, 2, {"model": {"layers": 3}, "training": {"seed": 5}})
    with pytest.raises(WrongCheckpoint) as caught:
        train(other, tmp_path / "run")
    assert "step-00000002 is of another run: " in str(caught.value)
    assert "model.layers was 2, is 3" in str(caught.value)
    assert "training.seed was 0, is 5" in str(caught.value)
    free = programs.settings(
        fasta, 2, {"data": {"at_once": 1}, "switches": {"loss": "tiled"}, "training": {"keep": 1}}
    )
    assert train(free, tmp_path / "run").step == 2


def test_random_states_come_back(programs, fasta, tmp_path):
    told = programs.settings(fasta, 2)
    run = Run(told, tmp_path / "run", comm=None, device="cpu")
    torch.rand(7)
    run.save(1)
    expected = torch.rand(3)
    again = Run(told, tmp_path / "run", comm=None, device="cpu")
    assert again.resume() == 1
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_no_number_stops_the_run(programs, fasta, tmp_path):
    told = programs.settings(fasta, 6)
    run = Run(told, tmp_path / "run", comm=None, device="cpu")
    run.save(3)
    weights = {name: x.clone() for name, x in run.model.state_dict().items()}
    run.model.head.weight.data[9, 0] = math.nan
    with pytest.raises(Diverged, match=r"step 4: the loss is nan .* is .*step-00000003"):
        run.step(3)
    for name, x in run.model.state_dict().items():
        assert name == "head.weight" or torch.equal(x, weights[name])


def test_gradients_are_shortened_to_the_norm(programs, fasta, tmp_path):
    told = programs.settings(fasta, 2)
    seen = []
    for clip in (1e9, 1e-3):
        one = replace(told, training=replace(told.training, clip=clip))
        run = Run(one, tmp_path / "run", comm=None, device="cpu")

        def step(rate: float, scale: float, run: Run = run) -> None:
            gradients = [p.grad * scale for p in run.model.parameters()]
            seen.append(math.sqrt(sum(float(x.norm()) ** 2 for x in gradients)))

        run.optimizer.step = step
        seen.append(run.step(0)["gradient_norm"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert seen[0] == pytest.approx(seen[3], rel=1e-6)
    assert seen[2] == pytest.approx(1e-3, rel=1e-5)


def test_rates():
    told = Training(steps=101, learning_rate=1.0, warmup=10, floor=0.1)
    rates = [told.rate(step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert Training(warmup=0, decay="constant").rate(500) == Training().learning_rate


def test_bfloat16_goes_on_bit_for_bit_too(programs, fasta, tmp_path):
    told = programs.settings(fasta, 5, {"training": {"dtype": "bfloat16"}})
    train(told, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(told, tmp_path / "halves", report=stopping(3))
    train(told, tmp_path / "halves")
    assert programs.losses(tmp_path / "halves") == programs.losses(tmp_path / "whole")
    run = Run(told, tmp_path / "halves", comm=None, device="cpu")
    assert run.resume() == 5
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    wide = programs.settings(fasta, 5)
    train(wide, tmp_path / "wide")
    found, expected = ([x[2] for x in programs.losses(tmp_path / n)] for n in ("whole", "wide"))
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_bad_records_are_named(programs, tmp_path):
    path = tmp_path / "genome.fa"
    path.write_text(">good\n" + "ACGGTCAATG" * 90 + "\n>bad\nACG1\n>worse\n")
    with pytest.raises(BadFasta, match=r"genome\.fa:4: record bad: '1' stands for no base"):
        train(programs.settings(path, 2), tmp_path / "run")
    told = programs.settings(path, 2, {"data": {"bad_records": "skip"}})
    train(told, tmp_path / "run")
    begin = loop.read_log(tmp_path / "run" / loop.LOG)[0]
    assert [line.partition(": ")[2] for line in begin["skipped"]] == [
        "record bad: '1' stands for no base (3 before it)",
        "record worse: it has no bases",
    ]
    assert json.dumps(begin)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"switches": {"layout": {"sequence": 2}}}, "switches.layout is for 2 ranks, but there a"),
        ({"data": {"at_once": 3}}, "data.at_once=3 must divide the 4 windows"),
        ({"data": {"length": 500}}, "data: a window has length=500 tokens, more than the 4"),
        ({"data": {"held_out": 1e-5}}, "data: the part held out must be more than none"),
        (
            {"model": {"positions": "learned", "max_length": 9}},
            "model.max_length=9 is less than data.length=14",
        ),
    ],
)
def test_settings_that_do_not_fit(programs, fasta, tmp_path, tables, message):
    with pytest.raises(WrongSettings, match=message):
        train(programs.settings(fasta, 2, tables), tmp_path / "run")


def test_what_is_not_for_this_loop(programs, fasta, tmp_path):
    told = programs.settings(fasta, 2, {"switches": {"optimizer": "sharded"}})
    with pytest.raises(Unsupported, match="optimizer=sharded without a process group"):
        train(told, tmp_path / "run")
    with pytest.raises(TypeError, match=r"ranks must be those of torch.distributed, got object"):
        train(told, tmp_path / "run", comm=object())


def test_a_pipeline_needs_a_part_for_each_stage(programs, fasta):
    for at_once, stages in ((0, 2), (2, 4)):
        layout = {"switches": {"layout": {"pipeline": stages}}, "model": {"layers": 4}}
        told = programs.settings(fasta, 2, {"data": {"at_once": at_once}, **layout})
        with pytest.raises(WrongSettings, match=rf"at_once={at_once}: the 4 windows .* {stages}$"):
            loop._switches(told, stages, grouped=True)


def test_one_rank_can_be_a_group(programs, fasta, tmp_path):
    told = programs.settings(fasta, 3, {"switches": {"optimizer": "offloaded"}})
    with joined(World(), group=True) as comm:
        train(told, tmp_path / "group", comm=comm)
    train(programs.settings(fasta, 3), tmp_path / "plain")
    found, expected = (programs.losses(tmp_path / name) for name in ("group", "plain"))
    np.testing.assert_allclose([x[2] for x in found], [x[2] for x in expected], rtol=2e-6)


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ({"tensor": 3}, {}, "switches.layout: tensor=3 must divide the 2 heads"),
        ({"pipeline": 3}, {}, "switches.layout: pipeline=3 stages are more than 2 blocks"),
        (
            {"pipeline": 2},
            {"tied": True},
            "switches.layout: a tied head needs the embedding on its",
        ),
    ],
)
def test_layouts_that_do_not_fit(programs, fasta, layout, model, message):
    """A wrong setting, which the command says in a line, and no traceback."""
    sizes = {"layers": 2, "hidden": 16, "heads": 2, **model}
    told = programs.settings(fasta, 2, {"switches": {"layout": layout}, "model": sizes})
    with pytest.raises(WrongSettings, match=message):
        loop._switches(told, told.switches.layout.ranks, grouped=True)
