"""All kinds of parallelism on one mesh: loss, gradients and steps are those of one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from isoform.parallel.launch import Transport, launch
from isoform.parallel.sharding import Sharding
from isoform.parallel.training.engines import AXES, Engine
from isoform.parallel.training.model import build
from isoform.parallel.training.switches import EVERYTHING, Layout, Switches
from isoform.reference.contract import Unsupported

GPUS = torch.cuda.device_count()
TABLE = "position_table.weight"
STEPS, MICROBATCHES = 3, 2
LIMIT = 240.0  # ranks of torch take long to start where cores are few

# Of the loss and gradients, by their largest numbers; and of losses and parameters after steps of
# AdamW, which divides by roots of squares.
TOLERANCE = {"float64": (1e-12, 1e-9), "float32": (2e-5, 2e-3)}


def alone(programs: Any) -> list[tuple[Any, Layout]]:
    """One axis, 2 ranks: whole and packed sequences, states in every way."""
    plain, tied = programs.configuration(), programs.configuration(tied=True)
    learned = programs.configuration(positions="learned", parallel_residual=False)
    again = Switches(checkpointing="blocks")
    everything = EVERYTHING.but(tile=4)
    return [
        (programs.Case(Switches(), tied, B=4), Layout(tensor=2)),
        (programs.Case(again, learned, B=4, documents=(4, 6)), Layout(tensor=2)),
        (programs.Case(Switches(), plain, B=4), Layout(pipeline=2)),
        (
            programs.Case(everything, learned, B=4, documents=(5,), restart=True, by_example=True),
            Layout(pipeline=2),
        ),
        (programs.Case(again.but(optimizer="sharded"), tied, B=4), Layout(data=2)),
        (
            programs.Case(everything.but(optimizer="offloaded"), learned, B=4, dtype="float32"),
            Layout(data=2),
        ),
        (programs.Case(everything, learned, B=4, documents=(4,)), Layout(sequence=2)),
    ]


def pairs(programs: Any) -> list[tuple[Any, Layout]]:
    """Every pair of axes, 4 ranks."""
    rotary = programs.configuration()
    learned = programs.configuration(positions="learned", parallel_residual=False)
    replicated = EVERYTHING.but(tile=4, optimizer="replicated")
    sharded = replicated.but(optimizer="sharded")
    offloaded = replicated.but(optimizer="offloaded", strategy="ring")
    asked = [
        (replicated.but(head_groups=2), rotary, Layout(pipeline=2, sequence=2)),
        (replicated, learned, Layout(data=2, sequence=2)),
        (replicated, learned, Layout(sequence=2, tensor=2)),
        (replicated, learned, Layout(pipeline=2, tensor=2)),
        (replicated, rotary, Layout(data=2, tensor=2)),
        (sharded, learned, Layout(data=2, sequence=2)),
        (sharded, rotary, Layout(sequence=2, tensor=2)),
        (sharded, learned, Layout(pipeline=2, sequence=2)),
        (offloaded, rotary, Layout(pipeline=2, data=2)),
        (offloaded, rotary, Layout(sequence=4)),
    ]
    found = [
        (programs.Case(one, c, B=4, documents=(7,), by_example=bool(number % 2)), layout)
        for number, (one, c, layout) in enumerate(asked)
    ]
    # ranks without a token, and without a row of the embedding and of the head
    few = programs.configuration(vocabulary=2)
    short = programs.Case(sharded.but(sharding="contiguous"), few, B=2, L=3)
    return [*found, (short, Layout(sequence=4)), (short, Layout(pipeline=2, sequence=2))]


def odd(programs: Any) -> list[tuple[Any, Layout]]:
    """3 ranks, by which nothing can be divided."""
    everything = EVERYTHING.but(tile=4)
    learned = programs.configuration(positions="learned")
    return [
        (programs.Case(everything, programs.configuration(layers=4), B=3), Layout(pipeline=3)),
        (programs.Case(everything, B=9, documents=(7,), by_example=True), Layout(data=3)),
        (programs.Case(everything.but(optimizer="offloaded"), learned, B=3), Layout(sequence=3)),
    ]


def reference(case: Any, steps: int = STEPS) -> dict[str, Any]:
    """What one rank does."""
    model = case.reference().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: dict[str, Any] = {"losses": []}
    for step in range(steps):
        loss = model.loss(case.tokens(step), case.labels(step), **case.places())
        loss.backward()
        found["losses"].append(loss.item())
        if step == 0:
            found["gradients"] = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    found["parameters"] = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return found


def joined(case: Any, layout: Layout, results: list[Any], what: str) -> dict[str, np.ndarray]:
    """All stages' parameters, of the first rank that has them."""
    found: dict[str, np.ndarray] = {}
    rows: dict[int, np.ndarray] = {}
    partitioned = case.switches.position_table == "partitioned" and layout.sequence > 1
    for result in results:
        for name, x in result[what].items():
            if name == TABLE and partitioned:
                rows.setdefault(result["where"][2], x)
            else:
                found.setdefault(name, x)
    if rows:
        sharding = Sharding(case.switches.sharding, case.model.max_length, layout.sequence)
        found[TABLE] = sharding.unshard([rows[r] for r in range(layout.sequence)], axis=0)
    return found


def differing(case: Any, layout: Layout, results: list[Any], what: str) -> set[str]:
    """Parameters of which ranks should have the same, but have not, to the last bit."""
    own: dict[tuple[str, int], np.ndarray] = {}
    found = set()
    partitioned = case.switches.position_table == "partitioned"
    for result in results:
        for name, x in result[what].items():
            which = result["where"][2] if name == TABLE and partitioned else 0
            if not np.array_equal(own.setdefault((name, which), x), x):
                found.add(name)
    return found


def errors(case: Any, layout: Layout, results: list[Any]) -> dict[str, float]:
    """Of every figure, by its bound: 1 is as much as may be."""
    right, (first, later) = reference(case, len(results[0]["losses"])), TOLERANCE[case.dtype]
    found: dict[str, float] = {}
    for step, loss in enumerate(right["losses"]):
        worst = max(abs(result["losses"][step] - loss) for result in results) / loss
        found[f"loss {step}"] = worst / (later if step else first)
    summed = sum(result["summed"] for result in results) / layout.tensor
    labelled = int((case.labels() != -100).sum())
    found["summed"] = abs(summed / labelled - right["losses"][0]) / right["losses"][0] / first
    for what in ("gradients", "parameters"):
        for name in differing(case, layout, results, what):
            found[f"{name} of ranks"] = np.inf
    gradients = joined(case, layout, results, "gradients")
    assert gradients.keys() == right["gradients"].keys()
    floor = 1e-2 * max(np.abs(x).max() for x in right["gradients"].values())  # some are 0
    for name, x in right["gradients"].items():
        error = np.abs(gradients[name] - x).max() / max(np.abs(x).max(), floor)
        found[f"gradient of {name}"] = float(error / first)
    for name, got in joined(case, layout, results, "parameters").items():
        if not name.endswith("key.bias"):  # AdamW makes steps of its gradient's rounding
            error = np.abs(got - right["parameters"][name]).max()
            found[name] = float(error / later)
    return found


def trained(
    programs: Any,
    asked: list[tuple[Any, Layout]],
    steps: int = STEPS,
    transport: Transport = "gloo",
) -> list[list[Any]]:
    """What each rank has come to, by case; right in all of them."""
    ranks = asked[0][1].ranks
    given = (asked, steps, max(MICROBATCHES, asked[0][1].pipeline))
    by_rank = launch(programs.train, ranks, *given, transport=transport, limit=LIMIT)
    found = [list(results) for results in zip(*by_rank, strict=True)]
    for (case, layout), results in zip(asked, found, strict=True):
        places = np.ndindex(*(getattr(layout, axis) for axis in AXES))
        assert [result["where"] for result in results] == list(places)
        worst = errors(case, layout, results)
        assert max(worst.values()) <= 1, (case, layout, worst)
        if case.switches.optimizer != "replicated":
            check_sharded(case, layout, results)
    return found


def check_sharded(case: Any, layout: Layout, results: list[Any]) -> None:
    """Of each parameter and its state, a rank has its part alone, where it is meant to be."""
    sharers = layout.data * layout.sequence
    policy = {"sharded": "OffloadPolicy", "offloaded": "CPUOffloadPolicy"}
    for result in results:
        assert set(result["policies"]) == {policy[case.switches.optimizer]}
        for name, x in result["parameters"].items():
            if name != TABLE:
                most = -(-len(x) // sharers) * (x.size // len(x))
                assert result["held"][name] == result["states"][name] <= most, name


def test_one_axis(training_programs, engine_programs):
    tensors = trained(engine_programs, alone(training_programs))[0]
    for found in tensors:  # half of what blocks multiply with, and all of the rest
        for what in ("held", "states"):
            assert found[what]["blocks.1.attention.query.weight"] == 40 * 40 // 2
            assert found[what]["blocks.1.mlp.down.weight"] == 40 * 28 // 2
            assert found[what]["embedding.weight"] == 40 * 11


def test_first_values_do_not_depend_on_the_layout(training_programs, engine_programs):
    c = training_programs.configuration()
    alone = {
        name: x.detach().numpy() for name, x in build(c, Switches(), seed=3).named_parameters()
    }
    layouts = [(Layout(tensor=2), "sharded"), (Layout(pipeline=2), "replicated")]
    layouts += [(Layout(data=2), "offloaded")]
    asked = [Switches(layout=layout, optimizer=states) for layout, states in layouts]
    by_rank = launch(engine_programs.first_values, 2, c, asked, transport="gloo", limit=LIMIT)
    for results in zip(*by_rank, strict=True):
        assert set().union(*results) == alone.keys()
        for result in results:
            for name, x in result.items():
                np.testing.assert_array_equal(x, alone[name])


def test_four_sums_in_a_block_however_often_it_is_computed(training_programs, engine_programs):
    case = training_programs.Case(dtype="float32")
    asked = [Switches(), Switches(checkpointing="blocks"), EVERYTHING.but(optimizer="replicated")]
    for found in launch(
        *(engine_programs.sums_over_tensors, 2, case, asked), transport="gloo", limit=LIMIT
    ):
        assert found == [4 * case.model.layers] * 3


def test_every_pair_of_axes(training_programs, engine_programs):
    trained(engine_programs, pairs(training_programs))


def test_three_axes(training_programs, engine_programs):
    switches = EVERYTHING.but(tile=4)
    case = training_programs.Case(switches, B=2, documents=(7,), by_example=True)
    trained(engine_programs, [(case, Layout(pipeline=2, sequence=2, tensor=2))])


def test_three_ranks(training_programs, engine_programs):
    trained(engine_programs, odd(training_programs))


def test_fifty_steps_stay_together(training_programs, engine_programs):
    c = training_programs.configuration(hidden=24, ffn=16)
    case = training_programs.Case(EVERYTHING.but(tile=4), c, L=12)
    layouts = [Layout(sequence=2, tensor=2), Layout(pipeline=2, sequence=2)]
    trained(engine_programs, [(case, layout) for layout in layouts], 50)


@pytest.mark.skipif(GPUS < 2, reason="there are not two NVIDIA GPUs here")
def test_one_axis_on_gpus(training_programs, engine_programs):
    asked = alone(training_programs)
    found = trained(engine_programs, asked, transport="torch-nccl")
    for (case, _), results in zip(asked, found, strict=True):
        there = "cpu" if case.switches.optimizer == "offloaded" else "cuda"
        assert all(there in result["devices"] for result in results), case


@pytest.mark.skipif(GPUS < 4, reason="there are not four NVIDIA GPUs here")
def test_every_pair_of_axes_on_gpus(training_programs, engine_programs):
    trained(engine_programs, pairs(training_programs), transport="torch-nccl")


def test_states_of_float32_and_sums_of_bfloat16(training_programs, engine_programs):
    learned = training_programs.configuration(positions="learned")
    case = training_programs.Case(EVERYTHING.but(tile=4), learned, B=4, dtype="float32")
    right = reference(case, 1)["losses"][0]
    asked = [Layout(pipeline=2), Layout(data=2), Layout(sequence=2)]
    for results in launch(engine_programs.mixed, 2, case, asked, transport="gloo", limit=LIMIT):
        for loss, parameters, gradients, between in results:
            assert loss == pytest.approx(right, rel=2e-2)
            assert parameters == gradients == {torch.float32}
            assert between == {torch.bfloat16}


# --- faults ---


def test_faults_are_seen(training_programs, engine_programs):
    """Each, by what it makes wrong; without it these cases are right."""
    learned = training_programs.configuration(positions="learned")
    case = training_programs.Case(
        EVERYTHING.but(tile=4, optimizer="replicated"),
        learned,
        B=4,
        documents=(5,),
        by_example=True,
    )
    sharded = replace(case, switches=EVERYTHING.but(tile=4))
    stages, tensors, copies = Layout(pipeline=2), Layout(tensor=2), Layout(data=2)
    faults: dict[str, tuple[Any, Layout, set[str]]] = {
        "heads": (
            case,
            tensors,
            {"gradient of blocks.0.norm1.weight", "embedding.weight of ranks"},
        ),
        "twice": (case, tensors, {"gradient of head.weight", "gradient of blocks.1.mlp.up.weight"}),
        "averaged": (
            sharded,
            copies,
            {"gradient of head.weight", "gradient of blocks.0.norm1.bias"},
        ),
        "microbatches": (case, stages, {"gradient of head.weight", "gradient of embedding.weight"}),
        "means": (case, stages, {"loss 0", "gradient of embedding.weight"}),
        "segments": (case, stages, {"loss 0", "summed", "gradient of embedding.weight"}),
    }
    asked = [(fault, case, layout) for fault, (case, layout, _) in faults.items()]
    by_rank = launch(
        *(engine_programs.train_with_faults, 2, asked, MICROBATCHES),
        transport="gloo",
        limit=LIMIT,
    )
    for (fault, one, layout), results in zip(asked, zip(*by_rank, strict=True), strict=True):
        wrong = {n for n, e in errors(one, layout, list(results)).items() if e > 1e6}
        assert wrong >= faults[fault][2], (fault, wrong)


# --- wrong calls ---


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (Layout(tensor=3), {}, "tensor=3 must divide the 4 heads"),
        (Layout(tensor=4), {"ffn": 30}, "tensor=4 must divide the 30 channels of the MLP"),
        (Layout(pipeline=3), {}, "pipeline=3 stages are more than 2 blocks"),
        (Layout(pipeline=2), {"tied": True}, "a tied head needs the embedding on its stage"),
    ],
)
def test_what_cannot_be_cut_is_refused(training_programs, layout, change, message):
    c = training_programs.configuration(**change)
    with pytest.raises(ValueError, match=message):
        Engine(c, Switches(layout=layout))


def test_ranks_must_have_met(training_programs):
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group before this"):
        Engine(training_programs.configuration(), Switches(layout=Layout(tensor=2)))
    groups = Switches(layout=Layout(tensor=2), head_groups=2, checkpointing="blocks")
    with pytest.raises(Unsupported, match="groups of heads with tensor parallelism"):
        Engine(training_programs.configuration(), groups)


def test_wrong_calls_are_refused(training_programs, engine_programs):
    case = training_programs.Case(EVERYTHING)
    for said in launch(engine_programs.refused, 2, case, transport="gloo", limit=LIMIT):
        assert said[0] == "the layout is for 3 ranks, but there are 2"
        assert said[1] == "microbatches=3 must divide the batch of 2"
        assert said[2] == "microbatches=1 must be at least the 2 stages of the pipeline"
        assert said[3].startswith("compute is for sharded states")
