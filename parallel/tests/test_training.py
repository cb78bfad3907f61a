"""The genome model on P ranks is the reference's on one: loss, every gradient, and steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.labels import shift_labels
from isoform.parallel.sharding import Sharding
from isoform.parallel.training import blocks, model, position_table, recompute
from isoform.parallel.training.gradients import sum_gradients
from isoform.parallel.training.model import TrainingLM, build
from isoform.parallel.training.switches import BASELINE, EVERYTHING, Layout, Switches
from isoform.reference.contract import Unsupported
from isoform.reference.torch.genome_lm import initialize

same_examples = settings(deadline=None, derandomize=True, max_examples=40)

# Largest error, by the largest number of a gradient. Of float64 some last digits. Of float32, whose
# unit roundoff is 6e-8, sums of some hundred terms and two blocks deep.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}


def plain(**changes: Any) -> Switches:
    return Switches(**changes)


SETTINGS: dict[str, Switches] = {
    "plain": plain(),
    "contiguous": plain(sharding="contiguous"),
    "ring": plain(strategy="ring"),
    "all_gather": plain(strategy="all_gather"),
    "ulysses, striped": plain(strategy="ulysses", sharding="striped"),
    "table": plain(position_table="partitioned"),
    "loss": plain(loss="tiled", tile=2),
    "mlp": plain(mlp="tiled", tile=3),
    "blocks": plain(checkpointing="blocks"),
    "offloaded": plain(checkpointing="offloaded"),
    "heads": plain(checkpointing="blocks", head_groups=3),
    "some inputs": plain(checkpointing="blocks", every=2),
    "some inputs, offloaded": EVERYTHING.but(tile=4, every=3),
    "everything": EVERYTHING.but(tile=4),
    "everything, heads": EVERYTHING.but(tile=4, head_groups=2, strategy="ring"),
    "baseline": BASELINE,
    "baseline, nothing again": BASELINE.but(checkpointing="none"),
}


def cases(programs: Any, P: int) -> list[Any]:
    """Every setting, with rotary and learned positions, of whole sequences and of documents."""
    packed = [
        {},
        {"documents": (4, 0, 6)},
        {"documents": (4, 6), "restart": True},
        {"documents": (5,), "restart": True, "by_example": True},
    ]
    models = [
        programs.configuration(tied=True),
        programs.configuration(positions="learned", parallel_residual=False),
        programs.configuration(positions="learned", max_length=19),
    ]
    return [
        programs.Case(switches, one, **packed[(number + kind) % len(packed)])
        for number, switches in enumerate(SETTINGS.values())
        for kind, one in enumerate(models)
        if P == 1 or switches.attention == "computed"
    ]


@cache
def expected(case: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Of the reference, in float64, on one rank."""
    reference = case.reference().double()
    loss = reference.loss(case.tokens(), case.labels(), **case.places())
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in reference.named_parameters()}


def whole(case: Any, name: str, by_rank: list[np.ndarray]) -> np.ndarray:
    """A parameter's numbers, of which every rank has all, or of a partitioned table its rows."""
    if case.switches.position_table == "partitioned" and name == "position_table.weight":
        rows = Sharding(case.switches.sharding, case.model.max_length, len(by_rank))
        return rows.unshard(by_rank, axis=0)
    for other in by_rank[1:]:
        np.testing.assert_array_equal(other, by_rank[0])  # bit for bit
    return by_rank[0]


def errors(case: Any, results: list[Any]) -> dict[str, float]:
    """Of the loss and of every gradient, relative to its largest number."""
    loss, gradients = expected(case)
    assert results[0]["gradients"].keys() == gradients.keys()
    found = {"loss": abs(sum(result["loss"] for result in results) - loss) / loss}
    floor = 1e-2 * max(np.abs(right).max() for right in gradients.values())  # some are 0
    for name, right in gradients.items():
        got = whole(case, name, [result["gradients"][name] for result in results])
        found[name] = float(np.abs(got - right).max() / max(np.abs(right).max(), floor))
    return found


def check(case: Any, results: list[Any]) -> None:
    worst = errors(case, results)
    assert max(worst.values()) <= TOLERANCE[case.dtype], (case, worst)


# --- the same numbers ---


def test_every_switch_on_every_transport(training_programs, run, world):
    asked = cases(training_programs, world[1])
    results = run(training_programs.differentiate_all, world, asked)
    for case, found in zip(asked, zip(*results, strict=True), strict=True):
        check(case, list(found))


@pytest.mark.parametrize(
    ("name", "P"),
    [
        (name, P)
        for name, setting in SETTINGS.items()
        for P in ((1,) if setting.attention == "stored" else (1, 3))
    ],
)
def test_in_float32(training_programs, name, P):
    case = training_programs.Case(SETTINGS[name], dtype="float32")
    check(case, simulate(training_programs.differentiate, P, case))


@same_examples
@given(data=st.data())
def test_any_combination(training_programs, data):
    P = data.draw(st.integers(1, 5), label="P")
    again = data.draw(st.sampled_from(["none", "blocks", "offloaded"]), label="checkpointing")
    switches = Switches(
        strategy=data.draw(st.sampled_from(["auto", "ring", "ulysses", "all_gather"])),
        sharding=data.draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        position_table=data.draw(st.sampled_from(["whole", "partitioned"])),
        loss=data.draw(st.sampled_from(["whole", "tiled"])),
        mlp=data.draw(st.sampled_from(["whole", "tiled"])),
        tile=data.draw(st.integers(1, 9)),
        checkpointing=again,
        head_groups=1 if again == "none" else data.draw(st.integers(1, 4)),
        every=1 if again == "none" else data.draw(st.integers(1, 4)),
    )
    small = training_programs.configuration(
        layers=data.draw(st.sampled_from([1, 1, 3])),
        positions=data.draw(st.sampled_from(["rotary", "learned"])),
        tied=data.draw(st.booleans()),
        parallel_residual=data.draw(st.booleans()),
    )
    L = data.draw(st.integers(2, 23), label="L")  # ranks may be without a token
    case = training_programs.Case(switches, small, L=L, B=data.draw(st.integers(1, 2)))
    check(case, simulate(training_programs.differentiate, P, case))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_fifty_steps_stay_together(training_programs, positions):
    """AdamW, every technique, on 1 to 4 ranks: losses and parameters are the reference's."""
    sizes = {"positions": positions, "layers": 1, "hidden": 24, "ffn": 16}
    case = training_programs.Case(
        EVERYTHING.but(tile=4, head_groups=2), training_programs.configuration(**sizes), L=12
    )
    reference = case.reference()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        loss = reference.loss(case.tokens(step), case.labels(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for P in (1, 2, 3, 4):
        results = simulate(training_programs.train, P, case, 50)
        parts = np.array([result[0] for result in results])
        np.testing.assert_allclose(parts.sum(0), losses, rtol=1e-10)
        for name, p in reference.named_parameters():
            if name.endswith("key.bias"):
                continue  # its gradient is 0 but for rounding, which AdamW makes steps of
            got = whole(case, name, [result[1][name] for result in results])
            np.testing.assert_allclose(got, p.detach().numpy(), rtol=0, atol=1e-9)


def test_a_rank_without_tokens(training_programs):
    case = training_programs.Case(EVERYTHING.but(sharding="contiguous"), L=2, B=1)
    check(case, simulate(training_programs.differentiate, 4, case))


def test_without_gradients_the_loss_is_the_same(training_programs):
    case = training_programs.Case(EVERYTHING.but(tile=4, head_groups=2))

    @torch.no_grad()
    def evaluate(comm: Any) -> tuple[float, int]:
        one = case.built(comm)
        return case.loss(comm, one).item(), one.offload.most_held

    results = simulate(evaluate, 3)
    assert sum(loss for loss, _ in results) == pytest.approx(expected(case)[0], rel=1e-12)
    assert all(held == 0 for _, held in results)


def test_losses_of_copies_add_up(training_programs):
    """With the count of all copies, as data parallelism wants it: a sum, no mean of means."""
    case = training_programs.Case(EVERYTHING.but(tile=4), documents=(4,), B=3)
    tokens, labels = case.tokens(), case.labels()
    labels[0, 3:] = -100  # so that examples have different counts
    reference = case.reference()
    right = reference.loss(tokens, labels)
    one = build(case.model, case.switches, dtype=torch.float64, weights=case.weights())
    count = int((labels != -100).sum())
    parts = [one(tokens[b : b + 1], labels[b : b + 1], count=count) for b in range(3)]
    assert sum(x.item() for x in parts) == pytest.approx(right.item(), rel=1e-12)


def test_stages_in_a_row_are_the_model(training_programs):
    case = training_programs.Case(EVERYTHING.but(tile=4), training_programs.configuration(layers=5))
    options = {"dtype": torch.float64, "weights": case.weights()}
    stages = [build(case.model, case.switches, stage=(i, 3), **options) for i in range(3)]
    x = stages[0](case.tokens())
    loss = stages[2](stages[1](x), case.labels())
    loss.backward()
    right, gradients = expected(case)
    assert loss.item() == pytest.approx(right, rel=1e-12)
    found = {n: p.grad.numpy() for stage in stages for n, p in stage.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, g in gradients.items():
        np.testing.assert_allclose(found[name], g, rtol=0, atol=1e-13)


# --- first values ---


def test_first_values_do_not_depend_on_the_layout(training_programs):
    c = training_programs.configuration(positions="learned", layers=3)

    def values(comm: Any) -> dict[str, np.ndarray]:
        switches = EVERYTHING.but(layout=Layout(sequence=comm.size))
        made = build(c, switches, comm=comm, seed=3)
        return {name: p.detach().numpy() for name, p in made.named_parameters()}

    (alone,) = simulate(values, 1)
    case = training_programs.Case(EVERYTHING, c)
    for P in (2, 3):
        results = simulate(values, P)
        for name, x in alone.items():
            np.testing.assert_array_equal(whole(case, name, [r[name] for r in results]), x)
    stages = [build(c, EVERYTHING, stage=(i, 3), seed=3) for i in range(3)]
    for stage in stages:
        for name, p in stage.named_parameters():
            np.testing.assert_array_equal(p.detach().numpy(), alone[name])
    assert not np.array_equal(alone["blocks.0.mlp.up.weight"], alone["blocks.1.mlp.up.weight"])
    (other,) = simulate(lambda comm: build(c, EVERYTHING, seed=4).head.weight.detach().numpy(), 1)
    assert not np.array_equal(other, alone["head.weight"])
    assert alone["position_table.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_weights_go_back_to_the_reference(training_programs):
    case = training_programs.Case(EVERYTHING, training_programs.configuration(tied=True))
    made = build(case.model, case.switches, dtype=torch.float64, seed=1)
    reference = case.reference()
    reference.load_state_dict(made.state_dict())
    tokens, labels = case.tokens(), case.labels()
    assert made(tokens).item() == pytest.approx(reference.loss(tokens, labels).item(), rel=1e-12)


def test_initialize_leaves_nothing_as_it_was(training_programs):
    reference = training_programs.Case().reference()
    for p in reference.parameters():
        torch.nn.init.constant_(p, 7.0)
    initialize(reference)
    assert not any((p == 7.0).any() for p in reference.parameters())


# --- what is in memory ---


class Largest(TorchDispatchMode):
    """The shapes of all tensors that this thread makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out

    def made(self, *axes: int) -> bool:
        """Whether some tensor has all of these axes."""
        return any(all(shape.count(n) >= axes.count(n) for n in axes) for shape in self.shapes)


def test_what_is_switched_off_does_not_exist(training_programs):
    """No mask or scores [L, L], no logits [L, V], no channels [L, F]; the baseline has them all."""
    case = training_programs.Case(L=397, B=1)
    axes = {"attention": (397, 397), "loss": (397, 11), "mlp": (397, 28)}
    settings = {
        "baseline": (BASELINE, {"attention", "loss", "mlp"}),
        "attention": (BASELINE.but(attention="computed"), {"loss", "mlp"}),
        "loss": (BASELINE.but(loss="tiled", tile=8), {"attention", "mlp"}),
        "mlp": (BASELINE.but(mlp="tiled", tile=8), {"attention", "loss"}),
        "everything": (EVERYTHING.but(tile=8), set()),
    }
    for name, (switches, there) in settings.items():
        one = build(case.model, switches, dtype=torch.float64, weights=case.weights())
        with Largest() as seen:
            one(case.tokens(), case.labels(), count=396).backward()
        # loss and mlp alike are [B, L, n] or [L, n]
        assert {what for what in axes if seen.made(*axes[what])} == there, name


def test_heads_in_groups_do_not_exist_at_once(training_programs):
    for groups, wide in ((1, True), (2, False)):
        switches = EVERYTHING.but(tile=8, head_groups=groups)
        case = training_programs.Case(switches, L=397, B=1)
        one = build(case.model, switches, dtype=torch.float64, weights=case.weights())
        with Largest() as seen:
            one(case.tokens(), case.labels(), count=396).backward()
        assert seen.made(397, 4, 10) == wide  # [B, L, H, D]


def test_rows_of_a_table_and_their_gradient_are_the_ranks_alone(training_programs):
    """And where the sequence is as long as the table nothing is sent for it."""

    def rank(comm: Any, L: int) -> tuple[list[tuple[int, ...]], int]:
        c = training_programs.configuration(positions="learned", max_length=19)
        case = training_programs.Case(EVERYTHING, c, L=L)
        one = case.built(comm)
        with Largest() as seen:
            case.loss(comm, one).backward()
        assert not seen.made(19, 40)
        table = one.position_table.weight
        return [tuple(table.shape), tuple(table.grad.shape)], comm.traffic.bytes_by["rows"]

    for L, sent in ((19, False), (18, True)):
        results = simulate(rank, 3, L)
        assert sum(shapes[0][0] for shapes, _ in results) == 19
        assert all(shapes[0] == shapes[1] for shapes, _ in results)
        assert (sum(count for _, count in results) > 0) == sent


def test_the_host_has_one_tensor_of_each_block(training_programs):
    """The input, once, for both branches of a parallel residual; two where they are in a row."""
    for parallel, each in ((True, 1), (False, 2)):
        c = training_programs.configuration(layers=3, parallel_residual=parallel)
        case = training_programs.Case(EVERYTHING, c)
        one = build(case.model, case.switches, dtype=torch.float64, weights=case.weights())
        loss = one(case.tokens())
        tensors = each * (c.layers - 1)  # not of the last block, which is wanted at once
        assert one.offload.bytes_held == tensors * case.tokens().numel() * c.hidden * 8
        loss.backward()
        assert one.offload.bytes_held == 0


def test_of_some_blocks_in_a_row_one_input_is_kept(training_programs):
    """Of 8 blocks, 3 in a row: two inputs, and not that of the last two blocks."""
    c = training_programs.configuration(layers=8)
    case = training_programs.Case(EVERYTHING.but(every=3), c)
    one = build(case.model, case.switches, dtype=torch.float64, weights=case.weights())
    loss = one(case.tokens())
    each = case.tokens().numel() * c.hidden * 8
    assert one.offload.bytes_held == 2 * each
    loss.backward()
    assert one.offload.bytes_held == 0
    assert one.offload.most_held <= 3 * each  # and within three, that of the second
    check(case, simulate(training_programs.differentiate, 2, case))


def test_sums_over_tiles_are_not_of_bfloat16(training_programs, monkeypatch):
    """1024 tiles of one token each: the gradient is as good as in one piece."""
    c = training_programs.configuration(layers=1)
    case = training_programs.Case(EVERYTHING.but(tile=1), c, L=1024, B=1, dtype="bfloat16")
    _, right = expected(case)

    def worst(switches: Switches) -> float:
        one = build(c, switches, dtype=torch.bfloat16, weights=case.weights())
        one(case.tokens()).backward()
        found = {name: p.grad.double().numpy() for name, p in one.named_parameters()}
        return max(
            np.linalg.norm(found[name] - right[name]) / np.linalg.norm(right[name])
            for name in ("blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight", "head.weight")
        )

    in_one_piece = worst(Switches())
    assert worst(case.switches) < 1.5 * in_one_piece
    monkeypatch.setattr(recompute, "wide", lambda x: x.clone())  # the fault
    assert worst(case.switches) > 3 * in_one_piece


# --- faults ---


def labels_within_the_shard(patch: pytest.MonkeyPatch) -> None:
    def within(tokens: Tensor, **_: Any) -> Tensor:
        found = tokens.roll(-1, 1)
        found[:, -1:] = -100
        return found

    patch.setattr(model, "shift_labels", within)


def positions_within_the_shard(patch: pytest.MonkeyPatch) -> None:
    """Rotations by 0, 1, 2 … on every rank."""
    turn = blocks.rotate
    patch.setattr(blocks, "rotate", lambda c, q, k, at: turn(c, q, k, torch.arange(q.shape[1])))


def gradients_not_summed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("training_programs.sum_gradients", lambda *_: None)


def losses_as_means_of_ranks(patch: pytest.MonkeyPatch) -> None:
    def own(self: TrainingLM, labels: Tensor) -> int:
        return 3 * int((labels != -100).sum())

    patch.setattr(TrainingLM, "count", own)


def bias_of_every_group(patch: pytest.MonkeyPatch) -> None:
    class Always(blocks.TrainingBlock):
        def _output(self, channels: Any) -> tuple[Tensor, Tensor]:
            return super()._output(channels)[0], self.attention.output.bias

    patch.setattr(model, "TrainingBlock", Always)


def last_tile_lost(patch: pytest.MonkeyPatch) -> None:
    cut = recompute.tiles
    patch.setattr(
        recompute, "tiles", lambda length, tile: cut(length, tile)[:-1] or cut(length, tile)
    )


def gradients_of_one_tile(patch: pytest.MonkeyPatch) -> None:
    """The last tile's overwrites the others'."""

    def overwrite(self: Any, gradients: Any) -> None:
        self.totals = list(gradients)

    patch.setattr(recompute._Sums, "add", overwrite)


def rows_kept_from_their_owners(patch: pytest.MonkeyPatch) -> None:
    """Gradients of rows are not sent back."""

    def backward(ctx: Any, dfound: Tensor) -> Any:
        total = dfound.new_zeros(ctx.shape)
        own = ctx.comm.rank
        return total.index_add_(0, ctx.given[own], dfound[ctx.lie[own]]), None, None, None

    patch.setattr(position_table._Rows, "backward", staticmethod(backward))


def another_input_from_the_host(patch: pytest.MonkeyPatch) -> None:
    """The input of the block before comes back."""
    from isoform.parallel.training import offload

    get = offload._Kept.get

    def wrong(self: Any) -> Tensor:
        before = self.before and self.before()
        return get(before or self)

    patch.setattr(offload._Kept, "get", wrong)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], set[str]]] = {
    "labels": (labels_within_the_shard, {}, {"loss", "head.weight"}),
    "positions": (positions_within_the_shard, {}, {"loss"}),
    "not summed": (gradients_not_summed, {}, {"head.weight"}),
    "means of ranks": (losses_as_means_of_ranks, {"L": 20}, {"loss"}),
    "bias": (bias_of_every_group, {"head_groups": 3}, {"loss"}),
    "last tile": (last_tile_lost, {}, {"loss"}),
    "one tile": (gradients_of_one_tile, {}, {"head.weight", "blocks.0.mlp.up.weight"}),
    "rows": (rows_kept_from_their_owners, {"positions": "learned"}, {"position_table.weight"}),
    "host": (another_input_from_the_host, {"layers": 3}, {"blocks.1.mlp.up.weight"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(training_programs, monkeypatch, fault):
    plant, change, seen = FAULTS[fault]
    switches = EVERYTHING.but(tile=2, head_groups=change.get("head_groups", 1))
    sizes = {"positions": change.get("positions", "rotary"), "layers": change.get("layers", 2)}
    case = training_programs.Case(
        switches, training_programs.configuration(**sizes), L=change.get("L", 19)
    )

    def worst() -> dict[str, float]:
        results = simulate(training_programs.differentiate, 3, case)
        for result in results[1:] if fault == "not summed" else ():
            result["gradients"] |= results[0]["gradients"]  # or else they would differ
        return errors(case, results)

    assert max(worst().values()) <= TOLERANCE["float64"]
    plant(monkeypatch)
    found = worst()
    assert {name for name, error in found.items() if error > 1e-4} >= seen, found


def test_labels_of_one_rank_are_those_of_many(training_programs):
    case = training_programs.Case(documents=(4, 6))
    one = build(case.model, Switches(), dtype=torch.float64, weights=case.weights())
    segments = case.places()["segments"]
    assert torch.equal(one.labels(case.tokens(), segments=segments), case.labels())
    sharding = Sharding.contiguous(case.L, 1)
    (found,) = simulate(
        lambda comm: shift_labels(case.tokens(), comm=comm, sharding=sharding, segments=segments), 1
    )
    assert torch.equal(found, case.labels())


# --- wrong calls ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "none"}, "loss must be one of whole, tiled, got 'none'"),
        ({"strategy": "tree"}, "strategy must be one of auto, ring"),
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"head_groups": 0}, "head_groups must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_wrong_switches_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Switches(**change)


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="tensor must be at least 1, got 0"):
        Layout(tensor=0)
    with pytest.raises(TypeError, match="data must be an integer, got float"):
        Layout(data=2.0)  # type: ignore[arg-type]
    assert Layout(2, 3, 4, 5).ranks == 120


def test_all_that_does_not_go_together_is_said(training_programs):
    switches = Switches(
        layout=Layout(pipeline=2, sequence=2, tensor=2),
        attention="stored",
        head_groups=5,
        every=2,
    )
    with pytest.raises(Unsupported) as caught:
        switches.check(training_programs.configuration())
    assert len(caught.value.reasons) == 5, caught.value.reasons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": Sharding.zigzag(6, 2)}, "the sharding is for 2 ranks, but there are 1"),
        ({"sharding": Sharding.zigzag(7, 1)}, "tokens must have the 7 positions of rank 0"),
        ({"positions": torch.arange(20, 26)}, "positions must be 0 to 22, the rows of the table"),
    ],
)
def test_wrong_calls_are_refused(training_programs, options, message):
    c = training_programs.configuration(positions="learned")
    one = build(c, Switches())
    with pytest.raises(ValueError, match=re.escape(message)):
        one(torch.zeros(1, 6, dtype=torch.int64), **options)


def test_ranks_must_be_those_of_the_layout(training_programs):
    c = training_programs.configuration()
    with pytest.raises(ValueError, match="over 2 ranks, but there are 1"):
        build(c, Switches(layout=Layout(sequence=2)))
    with pytest.raises(ValueError, match="there is no stage 2 of 2 with 2 blocks"):
        build(c, Switches(), stage=(2, 2))
    tied = training_programs.configuration(tied=True)
    with pytest.raises(ValueError, match="a tied head needs the embedding on its stage"):
        build(tied, Switches(), stage=(1, 2))
    one = build(c, Switches(), stage=(1, 2))
    with pytest.raises(ValueError, match="does not see tokens: give it labels"):
        one(torch.zeros(1, 6, 40))

    def without(comm: Any) -> None:
        two = build(c, Switches(layout=Layout(sequence=2)), comm=comm)
        two(torch.zeros(1, 6, dtype=torch.int64))

    with pytest.raises(ValueError, match="2 ranks share a sequence: say which positions"):
        simulate(without, 2)


def test_gradients_in_several_buckets(training_programs, monkeypatch):
    from isoform.parallel.training import gradients

    monkeypatch.setattr(gradients, "BUCKET", 100)
    case = training_programs.Case(EVERYTHING)
    check(case, simulate(training_programs.differentiate, 3, case))
    assert sum_gradients is gradients.sum_gradients


@pytest.mark.parametrize("name", ["everything, heads", "baseline", "plain"])
def test_what_kernels_are_given(training_programs, monkeypatch, name):
    """As on a GPU: heads padded to what is read at once, the scale that of the true D; positions
    are not said where they count up. The kernels are played by the reference.
    """
    from isoform.parallel.training import attending
    from isoform.reference.torch.attention import attention as plain_attention
    from isoform.reference.torch.rotary import rotary_embedding

    asked: list[dict[str, Any]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, kernel: Any, **options: Any) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16 and kernel is None
        asked.append(options)
        return plain_attention(q, k, v, **options)

    def turn(q: Tensor, k: Tensor, at: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return rotary_embedding(q, at, **options), rotary_embedding(k, at, **options)

    monkeypatch.setattr(attending, "_on_kernels", lambda x: True)
    for module, one in (("attention", attend), ("rotary", turn)):
        name_there = {"attention": "attention", "rotary": "rotary_embedding_qk"}[module]
        monkeypatch.setattr(import_module(f"isoform.kernels.{module}"), name_there, one)
    case = training_programs.Case(SETTINGS[name])  # D is 10
    check(case, simulate(training_programs.differentiate, 1, case))
    assert bool(asked) == (name != "baseline")
    for options in asked:
        assert options.pop("scale") == 10**-0.5
        assert options == {"causal": True, "segments": None, "positions": None}
