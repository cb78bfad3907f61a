"""Planned memory beside what is measured; what fits; and a record of a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from isoform.parallel.communicator import Communicator
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.training import attending, plan
from isoform.parallel.training.memory import Counted
from isoform.parallel.training.model import build
from isoform.parallel.training.plan import (
    LIMIT_ELEMENTS,
    LIMIT_POSITIONS,
    NAMES,
    Machine,
    Run,
    best,
    compare,
    layouts,
    longest,
    moments,
    of_scheme,
    peak,
    schemes,
)
from isoform.parallel.training.precision import MasterAdamW
from isoform.parallel.training.switches import BASELINE, EVERYTHING, Layout, Switches
from isoform.reference.contract import Unsupported
from isoform.reference.torch.genome_lm import CONFIGURATIONS, Configuration

WITHIN = 0.1
"""How far a plan may be off."""

ROOT = Path(__file__).parents[2]
ALL = EVERYTHING.but(tile=64, head_groups=4)
MODEL = Configuration("four blocks", 4, 64, 4)
ONE_AFTER_THE_OTHER = Configuration("MLP after attention", 3, 64, 4, parallel_residual=False)
TABLE = Configuration("a table", 2, 64, 4, positions="learned", max_length=4096)
WORDS = Configuration("many words", 2, 64, 4, vocabulary=2000)
BROAD = Configuration("more tokens than weights", 2, 128, 8, ffn=32)
WIDE = Configuration("a wide MLP", 2, 64, 4, ffn=1024)
UNEVEN = Configuration("heads of 15", 3, 60, 4, ffn=90)

SWITCHES = {
    "baseline": BASELINE,
    "nothing": Switches(),
    "nothing, stored": Switches(attention="stored"),
    "computed": BASELINE.but(attention="computed"),
    "tiled loss": Switches(loss="tiled", tile=64),
    "tiled MLP": Switches(mlp="tiled", tile=64),
    "blocks": Switches(checkpointing="blocks"),
    "offloaded": Switches(checkpointing="offloaded"),
    "groups of heads": Switches(checkpointing="blocks", head_groups=4),
    "all": ALL,
    "all, some inputs": ALL.but(every=2),
    "all without attention": ALL.but(attention="stored"),
    "all without loss": ALL.but(loss="whole"),
    "all without MLP": ALL.but(mlp="whole"),
    "all without groups of heads": ALL.but(head_groups=1),
    "all without offload": ALL.but(checkpointing="blocks"),
    "all without checkpointing": ALL.but(checkpointing="none", head_groups=1),
}
RUNS = {
    **{name: Run(MODEL, one, 384, "float32", "reference") for name, one in SWITCHES.items()},
    "baseline, bfloat16": Run(MODEL, BASELINE, 384, "bfloat16", "reference"),
    "all, bfloat16": Run(MODEL, ALL, 384, "bfloat16", "reference"),
    "all, float64": Run(MODEL, ALL, 384, "float64", "reference"),
    "in turn, baseline": Run(ONE_AFTER_THE_OTHER, BASELINE, 384, "float32", "reference"),
    "in turn, all": Run(ONE_AFTER_THE_OTHER, ALL, 384, "float32", "reference"),
    "table, baseline": Run(TABLE, BASELINE, 256, "float32", "reference"),
    "table, all": Run(TABLE, ALL, 256, "bfloat16", "reference"),
    "words": Run(WORDS, Switches(), 384, "float32", "reference"),
    "words, tiled": Run(WORDS, ALL, 384, "float32", "reference"),
    "broad": Run(BROAD, ALL.but(head_groups=8), 2048, "float32", "reference"),
    "wide": Run(WIDE, Switches(checkpointing="blocks"), 384, "float32", "reference"),
    "few tokens": Run(MODEL, ALL, 3, "bfloat16", "reference"),
}


class Measured(NamedTuple):
    """Bytes."""

    device: int
    host: int


def measured(run: Run, *, optimizer: bool = True) -> Measured:
    """A step, after one of few tokens that makes moments."""
    with Counted() as count:
        model = build(run.configuration, run.switches, dtype=getattr(torch, run.dtype))
        kind: Any = MasterAdamW if run.dtype == "bfloat16" else torch.optim.AdamW
        adamw = kind(model.parameters(), lr=1e-4)
        for length in (16, run.length):
            count.most, model.offload.most_held = count.now, 0
            tokens = torch.randint(run.configuration.vocabulary, (1, length))
            model(tokens).backward()
            if optimizer or length == 16:
                adamw.step()
            adamw.zero_grad()
    return Measured(count.most, model.offload.most_held)


@pytest.fixture(scope="module")
def found() -> dict[str, Measured]:
    """Every run, once."""
    return {name: measured(run) for name, run in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_plans_are_what_is_measured(found, name):
    planned = peak(RUNS[name])
    assert planned.bytes == pytest.approx(found[name].device, rel=WITHIN), planned
    assert planned.host_bytes == found[name].host  # to the byte
    assert sum(planned.parts().values()) == planned.bytes
    assert {item.name for item in planned.items} <= set(NAMES)


LEFT_OUT = [name for name in NAMES if name not in ("exchange", "tokens", "workspace")]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_seen(found, name):
    """A plan that forgets a part of the breakdown is beyond what it may be off, somewhere."""

    def forgetful(run: Run) -> int:
        return max(sum(x.bytes for x in items if x.name != name) for items in moments(run).values())

    assert any(
        abs(forgetful(run) / found[which].device - 1) > WITHIN for which, run in RUNS.items()
    )


def test_a_technique_that_is_forgotten_is_seen(found):
    """The plan of one is beyond what it may be off for another that should differ."""
    pairs = [
        ("baseline", "all"),
        ("nothing", "blocks"),
        ("nothing", "tiled MLP"),
        ("blocks", "groups of heads"),
        ("nothing, stored", "nothing"),
        ("words", "words, tiled"),
    ]
    for this, other in pairs:
        assert peak(RUNS[this]).bytes > (1 + WITHIN) * found[other].device, (this, other)


# --- a GPU's kernels, played by functions that make what those make ---


class Attention(torch.autograd.Function):
    """Results and gradients in their sizes; with ``summed`` also what a library sums dq in."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, summed: bool) -> Tensor:
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = torch.zeros(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.summed = summed
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, _, lse = ctx.saved_tensors
        delta = torch.zeros_like(lse)
        sums = torch.zeros(q.shape, dtype=torch.float32) if ctx.summed else None
        found = [torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v)]
        del delta, sums
        return *found, None


class Rotation(torch.autograd.Function):
    """Two tensors turned at once, nothing of which is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q.contiguous() + 0, k.contiguous() + 0

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
        return dq + 0, dk + 0


@pytest.fixture
def kernels(monkeypatch) -> dict[str, bool]:
    """As on a GPU; what cuBLAS would have there is left out."""
    options = {"summed": False}
    monkeypatch.setattr(attending, "_on_kernels", lambda x: True)
    monkeypatch.setattr(plan, "WORKSPACE", 0)
    monkeypatch.setattr(
        import_module("isoform.kernels.attention"),
        "attention",
        lambda q, k, v, **_: Attention.apply(q, k, v, options["summed"]),
    )
    monkeypatch.setattr(
        import_module("isoform.kernels.rotary"),
        "rotary_embedding_qk",
        lambda q, k, positions, **_: Rotation.apply(q, k),
    )
    return options


@pytest.mark.parametrize("model", [MODEL, ONE_AFTER_THE_OTHER, UNEVEN], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "switches",
    [
        ALL,
        ALL.but(checkpointing="blocks"),
        ALL.but(every=3),
        ALL.but(head_groups=1),
        ALL.but(checkpointing="none", head_groups=1),
        Switches(),
    ],
    ids=["all", "without offload", "some inputs", "one group", "no checkpointing", "nothing"],
)
def test_with_a_gpus_kernels(kernels, model, switches):
    for which, summed in (("own", False), ("library", True)):
        kernels["summed"] = summed
        run = Run(model, switches.but(tile=256), 2048, "bfloat16", which)
        real = measured(run, optimizer=False)
        planned = peak(run)
        assert not planned.moment.startswith("optimizer")
        assert planned.bytes == pytest.approx(real.device, rel=WITHIN), planned
        assert planned.host_bytes == real.host


# --- over ranks, and what fits ---


def of_rank(comm: Communicator, run: Run) -> Measured:
    """Forward and backward of a rank that has no optimizer."""
    with Counted() as count:
        model = build(run.configuration, run.switches, comm=comm, dtype=torch.float32)
        sharding = model.sharding(run.length)
        own = sharding.shard(torch.zeros(1, run.length, dtype=torch.int64), comm.rank)
        count.most = count.now
        model(own, sharding=sharding).backward()
    return Measured(count.most, model.offload.most_held)


@pytest.mark.parametrize("model", [MODEL, TABLE], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("strategy", "near", "ranks"),
    [("ring", None, 3), ("ulysses", None, 2), ("all_gather", None, 3), ("hybrid", 2, 4)],
)
def test_over_ranks(model, strategy, near, ranks):
    layout, c = Layout(sequence=ranks), replace(model, max_length=800)
    switches = ALL.but(head_groups=1, strategy=strategy, near=near, layout=layout)
    run = Run(c, switches.but(optimizer="replicated"), 800, "float32", "reference")
    real = simulate(of_rank, ranks, run)
    # states of weights are an item of their own, those of a table are beside its rows
    states = run.weights * run.states + run.table * run.states
    planned = peak(run).bytes - states
    assert planned == pytest.approx(max(one.device for one in real), rel=WITHIN)
    assert peak(run).host_bytes == max(one.host for one in real)
    # what is sent, and tiles, are most of it
    exchanged = peak(run).parts()["exchange"]
    assert exchanged > 2 * WITHIN * planned


def test_what_ranks_share():
    """Each rank has its part; what goes between them is the planner's."""
    one = Run(CONFIGURATIONS["2.5B"], EVERYTHING, 2**18)
    four = replace(one, switches=EVERYTHING.but(layout=Layout(sequence=4), strategy="ulysses"))
    assert four.n == one.n // 4
    whole, part = peak(one), peak(four)
    assert part.host_bytes * 4 == whole.host_bytes
    states = [x.parts()["optimizer states"] for x in (whole, part)]
    assert states[1] == pytest.approx(states[0] / 4 * 8 / 12, rel=1e-3)  # no float32 copy besides
    assert part.parts()["exchange"] > 0 and "exchange" not in whole.parts()
    assert part.bytes < whole.bytes / 2
    by_tensor = peak(replace(one, switches=Switches(layout=Layout(tensor=4))))
    by_stage = peak(replace(one, switches=Switches(layout=Layout(pipeline=4))))
    alone = peak(replace(one, switches=Switches()))
    for shared in (by_tensor, by_stage):
        ratio = shared.parts()["parameters"] / alone.parts()["parameters"]
        assert ratio == pytest.approx(1 / 4, rel=1e-2)
    offloaded = peak(replace(four, switches=four.switches.but(optimizer="offloaded")))
    assert "optimizer states" not in offloaded.parts()
    assert offloaded.host_parts()["optimizer states"] == states[1]


def test_a_partitioned_table_is_shared():
    c = replace(TABLE, max_length=2**20)
    whole, parts = (
        Run(c, ALL.but(layout=Layout(sequence=8), position_table=kind), 2**20)
        for kind in ("whole", "partitioned")
    )
    sizes = [peak(one).parts()["position table"] for one in (whole, parts)]
    assert sizes[0] == 8 * sizes[1] > 2**20 * 64 * 14 - 1


@pytest.mark.parametrize("kernels", ["own", "library"])
@pytest.mark.parametrize("switches", [BASELINE, ALL], ids=["baseline", "all"])
def test_the_longest_fits_and_a_longer_one_does_not(switches, kernels):
    machine = Machine(4 * 2**30, 2**30)
    run = Run(CONFIGURATIONS["25M"], switches, 0, kernels=kernels)
    found = longest(run, machine)
    assert found.limited_by in ("memory", "host memory")
    assert found.peak.bytes <= machine.memory and found.peak.host_bytes <= machine.host
    more = peak(run.at(found.run.length + plan.GRAIN))
    assert more.bytes > machine.memory or more.host_bytes > machine.host


def test_what_else_ends_lengths():
    plenty = Machine(2**50, 2**50)
    narrow, broad = Run(CONFIGURATIONS["25M"], ALL, 0), Run(CONFIGURATIONS["25B"], ALL, 0)
    found = longest(narrow, plenty)
    assert found.run.length == LIMIT_POSITIONS and "positions" in found.limited_by
    found = longest(broad, plenty)
    assert found.run.length == LIMIT_ELEMENTS // 8192 // plan.GRAIN * plan.GRAIN
    assert found.limited_by == "2³¹ numbers"
    nothing = longest(broad, Machine(2**30, 0))
    assert (nothing.fits, nothing.run.length, nothing.limited_by) == (False, 1024, "memory")
    with pytest.raises(ValueError, match="memory must not be negative, got -1"):
        Machine(-1, 0)


def test_a_learned_table_is_as_long_as_the_sequence():
    found = longest(Run(TABLE, ALL, 0), Machine(2**30, 2**30))
    assert found.run.configuration.max_length == found.run.length


def test_layouts():
    c = CONFIGURATIONS["25B"]
    found = layouts(Run(c, BASELINE, 0), 8)
    assert {(x.pipeline, x.tensor) for x in found} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert all(one.ranks == 8 and one.sequence == 1 for one in found)
    assert Layout(sequence=8) in layouts(Run(c, ALL, 0), 8)
    assert best(Run(c, BASELINE, 0), [], Machine(1, 1)) is None
    one = best(Run(c, BASELINE, 0), found, Machine(80 * 10**9, 0))
    assert one is not None
    for layout in found:
        run = Run(c, BASELINE.but(layout=layout), 0)
        assert longest(run, Machine(80 * 10**9, 0)).run.length <= one.run.length


def test_schemes():
    c, machine = CONFIGURATIONS["2.5B"], Machine(40 * 10**9, 64 * 10**9)
    run = Run(c, Switches(), 0)
    found = {name: of_scheme(one, run, 8, machine) for name, one in schemes(c).items()}
    lengths = {name: one.run.length for name, one in found.items() if one is not None}
    assert len(lengths) == len(found) == 11
    assert lengths["everything"] > 13 * lengths["baseline"]
    more_than_all = "… with states on the host"
    assert all(n <= lengths["everything"] for name, n in lengths.items() if name != more_than_all)
    for name in ("… with scores stored", "… without checkpoints", "… on one rank each"):
        assert lengths[name] < lengths["everything"] / 2, name
    assert found["baseline"].run.switches.layout.sequence == 1
    one = Layout(sequence=4, pipeline=2)
    only = of_scheme(schemes(c)["everything"], run, 8, machine, among=[one])
    assert only.run.switches.layout == one
    short = of_scheme(schemes(c)["baseline"], run, 8, machine, length=4096)
    assert short.fits and short.run.length == 4096 and not short.limited_by
    too_long = of_scheme(schemes(c)["baseline"], run, 8, machine, length=2**18)
    assert not too_long.fits and too_long.limited_by == "memory"
    assert too_long.peak.bytes > machine.memory
    assert "… with a whole table" in schemes(TABLE)


def test_what_does_not_go_together():
    with pytest.raises(Unsupported, match="attention stored with a sequence over several ranks"):
        peak(Run(MODEL, BASELINE.but(layout=Layout(sequence=2)), 64))


# --- beside records ---


def test_a_record_is_compared(tmp_path):
    from isoform.parallel.benchmark.genome import main

    record = tmp_path / "record.jsonl"
    limits = ["--memory-gb", "0.002", "--host-gb", "0.01", "--start", "32", "--lengths", "64"]
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--models", "tiny", *limits, "--quick", "--record", str(record)])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    found = compare(lines)
    assert len(found) >= 15
    for one in found:
        assert abs(one.error) < WITHIN, (one.what, one.error)
    # one that is off is seen, on the device and on the host
    step = next(x for x in lines if x.get("host_bytes"))
    for name in ("peak_bytes", "host_bytes"):
        (off,) = compare([lines[0], step | {name: 2 * step[name]}])
        assert off.error == pytest.approx(-0.5, abs=WITHIN)
    for wrong, message in (
        ([step], "no line before says what the scheme 'new' is"),
        ([lines[0], step | {"model": "9B"}], "no model is called '9B'"),
        ([lines[0], step | {"without": "luck"}], "no technique is called 'luck'"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(wrong)


RECORD = ROOT / "ci/results/training_benchmarks.jsonl"


@pytest.mark.skipif(not RECORD.exists(), reason="no GPU has been measured")
def test_a_gpus_record_is_as_planned():
    found = compare(map(json.loads, RECORD.read_text().splitlines()))
    assert found
    off = {one.what: round(one.error, 3) for one in found if abs(one.error) > WITHIN}
    assert not off
