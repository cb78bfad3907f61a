"""An Evoformer block over P ranks is the block on one rank: forward, backward, bytes, overlap."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isoform.parallel import axial, movements
from isoform.parallel.axial import evoformer_block, evoformer_stack
from isoform.parallel.axial_traffic import bytes_sent
from isoform.parallel.communicator import MismatchError
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.movements import Movement
from isoform.parallel.sharding import Sharding
from isoform.reference.numpy import axial as programs_of_one
from isoform.reference.torch.evoformer import evoformer_attention_tiled
from isoform.reference.torch.evoformer_stack import EvoformerBlock

SHARDED = {"msa": "sequences", "pair": "residues", "single": "residues"}
# Largest error, by the largest number. In fewer digits: by the error of one rank in that dtype.
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As launched ranks compute: how many threads share a sum is seen in its last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def errors(found: dict[str, Any], right: dict[str, Any]) -> dict[str, float]:
    """By result: the largest error, relative to the largest number."""
    flat = {**right, **right["parameters"]}
    del flat["parameters"]
    # A gradient that cancels to 0, as that of the bias norm's offset, is held to what others are.
    floor = 1e-2 * max(np.abs(x).max() for x in right["parameters"].values())
    worst = {}
    for name, expected in flat.items():
        scale = max(np.abs(expected).max(initial=0.0), floor if name in right["parameters"] else 0)
        error = np.abs(found[name] - expected).max(initial=0.0)
        assert np.isfinite(found[name]).all()
        worst[name] = float(error / (scale or 1.0))
    return worst


def put_together(case: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole from the shards; of parameters' gradients the first rank's, equal on all."""
    P = len(results)
    lengths = {"sequences": case.S, "residues": case.R}
    whole = {}
    for name in results[0]:
        if name in ("parameters", "forward", "both"):
            continue
        sharding = Sharding.contiguous(lengths[SHARDED[name.split()[0]]], P)
        whole[name] = sharding.unshard([result[name] for result in results])
    for result in results:
        for name, gradient in result["parameters"].items():
            first = results[0]["parameters"][name]
            np.testing.assert_array_equal(gradient, first, err_msg=name)  # bit for bit
    return {**whole, **results[0]["parameters"]}


def check(case: Any, results: list[dict[str, Any]], right: dict[str, Any]) -> None:
    """Every number is right, and a block sends what the formula says."""
    worst = errors(put_together(case, results), right)
    assert max(worst.values()) <= TOLERANCE, (case, worst)
    if case.blocks or not case.inputs_trained:
        return
    P = len(results)
    shardings = Sharding.contiguous(case.S, P), Sharding.contiguous(case.R, P)
    for rank, result in enumerate(results):
        forward, backward = bytes_sent(
            case.module(),
            *shardings,
            rank,
            B=case.B,
            msa_mask=case.msa_mask,
            pair_mask=case.pair_mask,
        )
        both = {name: forward.get(name, 0) + n for name, n in backward.items()}
        for formula, counted in ((forward, result["forward"]), (both, result["both"])):
            sent = {name: n for name, n in counted.items() if name != "agree"}
            assert sent == {name: n for name, n in formula.items() if n}, (case, rank)


def cases(make: Any) -> list[Any]:
    return [
        make(),
        make(S=8, R=8, msa_mask=False, pair_mask=False),
        make(S=1, R=3, pair_mask=False),  # empty shards from P = 2 and P = 4 on
        make(S=9, R=2, B=1, msa_mask=False, extra_msa=True, pieces=1),
        make(S=3, R=5, blocks=2, pieces=2),
        make(S=3, R=5, blocks=2, recompute=True, extra_msa=True),
        make(S=4, R=4, B=1, inputs_trained=False),
    ]


FOUND: dict[tuple[str, int], list[Any]] = {}


@pytest.fixture
def results(axial_programs, run, world) -> list[dict[str, Any]]:
    """By rank, all that the tests on every transport look at; ranks of a world start once."""
    if world not in FOUND:
        FOUND[world] = run(axial_programs.everything, world, cases(axial_programs.Case))
    return FOUND[world]


# --- right on every transport ---


def test_ranks_together_are_one_rank(axial_programs, results):
    asked = cases(axial_programs.Case)
    by_case = zip(*(result["blocks"] for result in results), strict=True)
    for case, found in zip(asked, by_case, strict=True):
        right = axial_programs.one_rank(case)
        if not case.inputs_trained:
            del right["msa gradient"], right["pair gradient"]
        check(case, list(found), right)


@pytest.mark.parametrize(
    "transport", ["simulated", "gloo", pytest.param("mpi", marks=pytest.mark.mpi)]
)
def test_the_transport_does_not_matter(axial_programs, run, transport):
    """Bit for bit the same as with threads, and from run to run."""
    case = axial_programs.Case(dtype="float32", blocks=1)
    here, there = (run(axial_programs.run, (name, 3), case) for name in ("simulated", transport))
    for mine, other in zip(here, there, strict=True):
        assert mine["both"] == other["both"]
        for name in ("msa", "pair", "single", "msa gradient", "pair gradient"):
            np.testing.assert_array_equal(mine[name], other[name])
        for name, gradient in mine["parameters"].items():
            np.testing.assert_array_equal(gradient, other["parameters"][name])


@pytest.mark.parametrize("P", [2, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fewer_digits_cost_no_more_than_on_one_rank(axial_programs, dtype, P):
    """Against float64, each result is as near as one rank's in the same dtype, and no more."""
    case = axial_programs.Case(S=16, R=17, dtype=dtype)
    right, alone = axial_programs.one_rank(case), axial_programs.one_rank(case, dtype)
    found = put_together(case, simulate(axial_programs.run, P, case))
    base = errors({**alone, **alone["parameters"]}, right)
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    for name, error in errors(found, right).items():
        # The offset of the bias's norm adds the same to all logits of a query: a gradient of 0, and
        # what is found of it is noise.
        if name != "msa_row.norm_pair.bias":
            assert error <= 2 * base[name] + 8 * unit, (name, error, base[name])


def test_sums_over_ranks_are_held_in_float32(results):
    """256 + 1 + 1 and so on: in bfloat16 it would stay 256."""
    exact = float(torch.tensor(256.0 + len(results) - 1).to(torch.bfloat16))
    for result in results:
        assert result["sums"] == (exact, exact)


def test_padding_reaches_nothing(axial_programs):
    """NaN where there is no residue: outputs elsewhere are those without it, on any rank."""
    case = axial_programs.Case(S=4, R=6)
    here = torch.arange(6) < 4
    msa_mask = here.expand(2, 4, 6).clone()
    msa_mask[:, 3] = False  # a sequence of padding
    pair_mask = (here[:, None] & here).expand(2, 6, 6).clone()
    whole = case.operands()

    def call(comm: Any, padding: float) -> Any:
        sequences, residues = (Sharding.contiguous(n, comm.size) for n in (4, 6))
        msa = whole["msa"].masked_fill(~msa_mask[..., None], padding)
        pair = whole["pair"].masked_fill(~pair_mask[..., None], padding)
        return evoformer_block(
            case.module(),
            sequences.shard(msa, comm.rank),
            residues.shard(pair, comm.rank),
            sequences.shard(msa_mask, comm.rank),
            residues.shard(pair_mask, comm.rank),
            comm=comm,
            sequences=sequences,
            residues=residues,
        )

    clean, spoilt = (simulate(call, 3, padding) for padding in (0.0, float("nan")))
    for index, mask in enumerate((msa_mask, pair_mask)):
        one, other = (torch.cat([outs[index] for outs in x], 1)[mask] for x in (clean, spoilt))
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_any_attention_function(axial_programs):
    """What the block brings is what is called, with shards of rows and the whole bias."""
    case = axial_programs.Case()
    seen: dict[int, list[Any]] = {0: [], 1: []}

    def call(comm: Any) -> None:
        def tiled(q: Any, k: Any, v: Any, **options: Any) -> Any:
            bias = options.get("pair_bias")
            seen[comm.rank].append((*q.shape[1:4], None if bias is None else tuple(bias.shape)))
            return evoformer_attention_tiled(q, k, v, **options, block_q=2)

        module = case.module()
        for layer in module.modules():
            if hasattr(layer, "attention"):
                layer.attention = tiled
        sequences, residues = Sharding.contiguous(5, 2), Sharding.contiguous(7, 2)
        whole = case.operands()
        msa, pair = (
            sequences.shard(whole["msa"], comm.rank),
            residues.shard(whole["pair"], comm.rank),
        )
        evoformer_block(module, msa, pair, comm=comm, sequences=sequences, residues=residues)

    simulate(call, 2)
    for rank, (S_r, R_r) in enumerate([(3, 4), (2, 3)]):
        row, triangle = (2, 1, 2, 7, 7), (2, 1, 3, 7, 7)
        assert seen[rank] == [
            (S_r, 7, 2, row),
            (R_r, 5, 2, None),
            (R_r, 7, 3, triangle),
            (R_r, 7, 3, triangle),
        ]


# --- the movements ---


def test_adjoints(results):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, summed over ranks, for every movement and every product."""
    for name in results[0]["adjoints"]:
        forward, *backward = np.sum([result["adjoints"][name] for result in results], axis=0)
        assert abs(forward) > 1e-3
        np.testing.assert_allclose(backward, forward, rtol=1e-12, err_msg=name)


def test_movements_are_those_of_the_program_for_one_process(axial_programs, results):
    P = len(results)
    first, second = axial_programs.lengths(P)
    B, S, R, C = axial_programs.SHAPE
    x = [axial_programs.tensors("x", (B, n, R, C), r, False).numpy() for r, n in enumerate(first)]
    whole = [
        axial_programs.tensors("whole", axial_programs.SHAPE, r, False).numpy() for r in range(P)
    ]
    expected = {
        "recut": programs_of_one.recut(x, 1, 2, second),
        "gathered": programs_of_one.gathered(x, 1),
        "gathered_backward": programs_of_one.gathered_backward(whole, 1, first),
    }
    for name, by_rank in expected.items():
        for result, right in zip(results, by_rank, strict=True):
            np.testing.assert_array_equal(result["moved"][name], right)


def test_a_tensor_is_waited_for_once():
    def call(comm: Any) -> None:
        flight = movements.start(movements.gather(comm, axis=0, lengths=[1, 1]), torch.ones(1))
        flight.wait()
        flight.wait()

    with pytest.raises(ValueError, match="this tensor has been waited for already"):
        simulate(call, 2)


def test_the_module_of_the_caller_is_left_alone(axial_programs):
    """Ranks of one process may share it, and its parameters get their gradients."""
    module = axial_programs.Case().module()
    before = dict(module.named_parameters())

    def call(comm: Any) -> Any:
        copy = movements.replicated(module, comm)
        assert copy is not module
        assert not any(p is q for p, q in zip(copy.parameters(), before.values(), strict=False))
        out = copy.msa_transition(torch.full((1, 1, 1, 6), comm.rank + 1.0, dtype=torch.float64))
        return torch.autograd.grad(out.sum(), module.msa_transition.output.bias)[0]

    for gradient in simulate(call, 3):
        assert (gradient == 3).all()
    assert all(p is before[name] for name, p in module.named_parameters())
    assert all(p.grad is None for p in before.values())


def test_frozen_parameters_are_not_summed(axial_programs):
    def call(comm: Any) -> Any:
        module = axial_programs.Case().module().requires_grad_(False)
        assert movements.replicated(module, comm) is module
        module.msa_transition.output.bias.requires_grad_(True)
        copy: Any = movements.replicated(module, comm)
        copy.msa_transition.output.bias.sum().backward()
        return module.msa_transition.output.bias.grad, comm.traffic.bytes_by

    for gradient, sent in simulate(call, 2):
        assert (gradient == 2).all()
        assert sent == {"all_reduce": 2 * 8 * 3}


def test_shared_parameters_are_summed_once_for_each_use():
    def call(comm: Any) -> Any:
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        module[1].weight = module[0].weight
        with torch.no_grad():
            module[0].weight.copy_(torch.eye(2))
        movements.replicated(module, comm)(torch.ones(1, 2)).sum().backward()
        return module[0].weight.grad

    for gradient in simulate(call, 2):
        assert torch.equal(gradient, torch.full((2, 2), 4.0))  # 2 uses on each of 2 ranks


def test_a_loss_of_one_output_on_one_rank(axial_programs):
    """Only the first rank looks at the MSA; what it sends for that, others wait for."""
    case = axial_programs.Case()

    def call(comm: Any) -> Any:
        msa, pair, options = own_shards(case, comm)
        new_msa, new_pair = evoformer_block(case.module(), msa, pair, **options)
        loss = new_msa[:, 0].sum() if comm.rank == 0 else 0 * new_pair.sum()
        return torch.autograd.grad(loss, [msa, pair])

    whole = case.operands()
    msa, pair = whole["msa"].requires_grad_(), whole["pair"].requires_grad_()
    expected = torch.autograd.grad(case.module()(msa, pair)[0][:, 0].sum(), [msa, pair])
    for found, right in zip(zip(*simulate(call, 3), strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(found, 1), right, rtol=1e-11, atol=1e-11)


# --- what is computed while something travels ---


class Noted(torch.autograd.Function):
    """Nothing, but its backward is noted."""

    @staticmethod
    def forward(ctx: Any, x: Any, events: list[str], name: str) -> Any:
        ctx.noted = events, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Any) -> Any:
        events, name = ctx.noted
        events.append(name)
        return dx, None, None


def note_transfers(comm: Any, events: list[str]) -> None:
    """When each transfer of this rank begins, and when it is waited for."""
    begin = comm.exchange
    counts: Counter[str] = Counter()

    def exchange(*args: Any, operation: str) -> Any:
        counts[operation] += 1
        name = f"{operation} {counts[operation]}"
        events.append(f"begin {name}")
        transfer = begin(*args, operation=operation)
        wait = transfer.wait

        def waited() -> Any:
            events.append(f"await {name}")
            return wait()

        transfer.wait = waited
        return transfer

    comm.exchange = exchange


def note_layers(module: Any, events: list[str]) -> None:
    """When some layers are computed, and when gradients come back to them."""
    layers = {
        "row queries": module.msa_row.query,
        "outer product": module.outer_product_mean.output,
        "outgoing": module.multiplication_outgoing.norm_product,
        "incoming gate": module.multiplication_incoming.gate,
        "starting queries": module.triangle_starting.query,
        "ending queries": module.triangle_ending.query,
        "pair transition": module.pair_transition,
    }
    for name, layer in layers.items():

        def hook(_: nn.Module, __: Any, out: Any, name: str = name) -> Any:
            events.append(name)
            return Noted.apply(out, events, name)

        layer.register_forward_hook(hook)


@pytest.fixture
def timelines(axial_programs, monkeypatch) -> list[tuple[list[str], list[str]]]:
    """By rank, forward and backward: transfers, layers and products in the order of events.

    Transfers of one kind are numbered from 1, in the backward again. What travels forward is of
    recuts 1 the MSA to columns, 2 the MSA to rows, 3 the factor of line 7, 4 and 5 the pairs of
    line 9; of gathers 1 the bias of line 2, and 2 to 4 the pieces of the outer product.
    """
    of_thread: dict[int, list[str]] = {}
    einsum = torch.einsum

    def noted_einsum(*args: Any) -> Any:
        of_thread[threading.get_ident()].append("product")
        return einsum(*args)

    monkeypatch.setattr(torch, "einsum", noted_einsum)
    case = axial_programs.Case()

    def call(comm: Any) -> tuple[list[str], list[str]]:
        events = of_thread[threading.get_ident()] = []
        module = case.module()
        note_transfers(comm, events)
        note_layers(module, events)
        msa, pair, options = own_shards(case, comm)
        outs = evoformer_block(module, msa, pair, **options, pieces=3)
        forward = events.copy()
        events.clear()
        torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
        return forward, [renumbered(event, forward) for event in events]

    return simulate(call, 3)


def renumbered(event: str, forward: list[str]) -> str:
    """A transfer of the backward, counted from its beginning."""
    *words, last = event.split()
    if words[:1] not in (["begin"], ["await"]):
        return event
    before = sum(e.rpartition(" ")[0] == f"begin {words[1]}" for e in forward)
    return f"{words[0]} {words[1]} {int(last) - before}"


def meanwhile(events: list[str], transfer: str, *names: str) -> list[str]:
    """Which of the names happened, in order, between beginning and waiting."""
    first, last = events.index(f"begin {transfer}"), events.index(f"await {transfer}")
    return [event for event in events[first:last] if event in names]


def test_the_msa_travels_home_behind_all_that_is_done_to_the_pairs(timelines):
    """Begun before line 5, awaited after line 10; in the backward the other way round."""
    lines = ("outer product", "outgoing", "incoming gate", "starting queries", "ending queries")
    lines += ("pair transition",)
    for forward, backward in timelines:
        assert meanwhile(forward, "recut 2", *lines) == list(lines)
        assert meanwhile(backward, "recut 1", *lines) == list(reversed(lines))


def test_a_bias_travels_behind_projections(timelines):
    for forward, backward in timelines:
        assert meanwhile(forward, "gather 1", "row queries")
        home = max(int(e.split()[2]) for e in backward if e.startswith("begin reduce_scatter"))
        assert meanwhile(backward, f"reduce_scatter {home}", "row queries")  # line 2 comes last


def test_a_factor_is_turned_behind_the_gate(timelines):
    for forward, backward in timelines:
        assert meanwhile(forward, "recut 3", "incoming gate")
        assert meanwhile(backward, "recut 4", "incoming gate")  # after 1, the MSA, and line 9's two


def test_the_next_piece_travels_behind_a_product(timelines):
    """One product while it travels, and never two pieces ahead; in the backward two products."""
    for forward, backward in timelines:
        ours = [e for e in forward if e == "product" or e.endswith(("er 2", "er 3", "er 4"))]
        assert ours[:9] == [
            *("begin gather 2", "await gather 2", "begin gather 3", "product"),
            *("await gather 3", "begin gather 4", "product"),
            *("await gather 4", "product"),
        ]
        pieces = sum(e.startswith("begin gather") for e in backward)
        firsts = (1, 4, 7)  # of line 7, 6 and 5
        assert pieces == 9
        for n in range(1, 10):
            products = meanwhile(backward, f"gather {n}", "product")
            assert len(products) == (0 if n in firsts else 2)
        assert meanwhile(backward, "reduce_scatter 3", "product")  # and home behind products too


# --- faults: each is seen ---


def split_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather's gradient is cut out of the own part, not summed over ranks."""
    gather = movements.gather

    def faulty(comm: Any, *, axis: int, lengths: Any) -> Any:
        def begin_adjoint(dwhole: Any) -> Any:
            return lambda: dwhole.split(list(lengths), axis)[comm.rank].clone()

        return Movement(gather(comm, axis=axis, lengths=lengths).begin, begin_adjoint)

    monkeypatch.setattr(axial, "gather", faulty)


def recut_without_its_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient stays: a rank has that of the piece that did not travel, else zeros."""
    recut = movements.recut

    def faulty(comm: Any, *, joined: int, lengths: Any, cut: int, into: Any) -> Any:
        def begin_adjoint(dy: Any) -> Any:
            parts = list(dy.split(list(lengths), joined))
            stayed = parts[comm.rank]
            shapes = [(*stayed.shape[:cut], n, *stayed.shape[cut + 1 :]) for n in into]
            whole = [stayed.new_zeros(shape) for shape in shapes]
            whole[comm.rank] = stayed
            return lambda: torch.cat(whole, cut)

        right = recut(comm, joined=joined, lengths=lengths, cut=cut, into=into)
        return Movement(right.begin, begin_adjoint)

    monkeypatch.setattr(axial, "recut", faulty)


def as_if_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank sends is cut into chunks as torch makes them: 7 for 3 ranks as 3, 3, 1."""
    split = torch.split

    def faulty(x: Any, lengths: Any, axis: int = 0) -> Any:
        even = -(-sum(lengths) // len(lengths))
        return split(x, even, axis) if len(lengths) == 3 else split(x, lengths, axis)

    monkeypatch.setattr(movements.torch, "split", faulty)


def remainder_on_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole is put together right, and its gradient cut with the longer pieces last."""
    gather = movements.gather

    def faulty(comm: Any, *, axis: int, lengths: Any) -> Any:
        def begin_adjoint(dwhole: Any) -> Any:
            first = sum(sorted(lengths)[: comm.rank])
            wrong = dwhole.roll(lengths[comm.rank] and sum(lengths[: comm.rank]) - first, axis)
            return right.begin_adjoint(wrong)

        right = gather(comm, axis=axis, lengths=lengths)
        return Movement(right.begin, begin_adjoint)

    monkeypatch.setattr(axial, "gather", faulty)


def parameters_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movements, "all_reduce", lambda comm, tensors: list(tensors))


def mask_not_recut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of rows, its numbers as they lie, for columns too."""
    masks = axial._masks

    def faulty(msa_mask: Any, pair_mask: Any, axes: Any) -> Any:
        right = masks(msa_mask, pair_mask, axes)
        needed = right.columns.numel()
        as_it_lies = msa_mask.flatten().repeat(needed)[:needed].reshape(right.columns.shape)
        return replace(right, columns=as_it_lies)

    monkeypatch.setattr(axial, "_masks", faulty)


def pair_mask_not_recut(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = axial._masks

    def faulty(msa_mask: Any, pair_mask: Any, axes: Any) -> Any:
        right = masks(msa_mask, pair_mask, axes)
        return replace(right, ends=pair_mask.transpose(1, 2))  # the right shape, wrong edges

    monkeypatch.setattr(axial, "_masks", faulty)


EVERYTHING = {"msa", "pair", "msa gradient", "pair gradient"}
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "split": (split_not_summed, {"msa gradient", "pair gradient"}),
    "no way back": (recut_without_its_own_backward, {"msa gradient", "pair gradient"}),
    "remainder last": (remainder_on_the_last, {"msa gradient", "pair gradient"}),
    "parameters": (parameters_not_summed, {"msa_row.pair_bias.weight", "msa_row.query.weight"}),
    "mask": (mask_not_recut, EVERYTHING),
    "pair mask": (pair_mask_not_recut, EVERYTHING - {"msa"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(axial_programs, monkeypatch, fault):
    """Forward faults in everything, backward faults in gradients alone."""
    plant, seen = FAULTS[fault]
    case, right = axial_programs.Case(), axial_programs.one_rank(axial_programs.Case())
    check(case, simulate(axial_programs.run, 3, case), right)
    plant(monkeypatch)
    results = simulate(axial_programs.run, 3, case)
    with pytest.raises(AssertionError):
        check(case, results, right)
    for result in results[1:]:  # let the parameters' gradients pass for equal
        result["parameters"] = results[0]["parameters"]
    worst = errors(put_together(case, results), right)
    wrong = {name for name, error in worst.items() if error > 1e-3}
    assert wrong >= seen, worst
    if not seen & {"msa", "pair"}:
        assert not wrong & {"msa", "pair"}


def test_counts_of_another_division_are_seen(axial_programs, monkeypatch):
    as_if_even(monkeypatch)
    with pytest.raises((MismatchError, ValueError)):
        simulate(axial_programs.run, 3, axial_programs.Case())


# --- wrong calls ---


def own_shards(case: Any, comm: Any) -> tuple[Any, Any, dict[str, Any]]:
    """This rank's MSA and pairs, trained, and what says how they are cut."""
    sequences = Sharding.contiguous(case.S, comm.size)
    residues = Sharding.contiguous(case.R, comm.size)
    whole = case.operands()
    msa = sequences.shard(whole["msa"], comm.rank).requires_grad_()
    pair = residues.shard(whole["pair"], comm.rank).requires_grad_()
    return msa, pair, {"comm": comm, "sequences": sequences, "residues": residues}


def other(change: dict[str, Any]) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Options exchanged for others."""
    return lambda msa, pair, options: (msa, pair, {**options, **change})


WRONG: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "a zigzag": (
        other({"residues": Sharding.zigzag(7, 2)}),
        ValueError,
        "the sharding of residues must be contiguous, got zigzag",
    ),
    "other ranks": (
        other({"sequences": Sharding.contiguous(5, 3)}),
        ValueError,
        "the sharding of sequences is for 3 ranks, but there are 2",
    ),
    "no sharding": (other({"residues": 7}), TypeError, "residues must be a Sharding, got int"),
    "no pieces": (other({"pieces": 0}), ValueError, "pieces must be at least 1, got 0"),
    "an array": (
        lambda msa, pair, options: (msa.detach().numpy(), pair, options),
        TypeError,
        "msa must be a PyTorch tensor, got ndarray",
    ),
    "three axes": (
        lambda msa, pair, options: (msa[0], pair, options),
        ValueError,
        "msa must have 4 axes, got shape (",
    ),
    "the whole": (
        lambda msa, pair, options: (msa, pair.new_zeros(2, 7, 7, 7), options),
        ValueError,
        "7, 7) on rank",
    ),
    "a float mask": (
        other({"msa_mask": torch.ones(2, 3, 7)}),
        TypeError,
        "msa_mask must be bool, got float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused(axial_programs, name):
    change, error, message = WRONG[name]

    def call(comm: Any) -> None:
        case = axial_programs.Case()
        msa, pair, options = change(*own_shards(case, comm))
        evoformer_block(case.module(), msa, pair, **options)

    with pytest.raises((error, MismatchError), match=re.escape(message)):
        simulate(call, 2)


DIFFERENT: dict[str, tuple[Callable[..., Any], str]] = {
    "an option": (other({"pieces": 1}), "pieces is 3 on ranks 0, 2, 1 on rank 1"),
    "a mask": (
        other({"pair_mask": torch.ones(2, 2, 7, dtype=torch.bool)}),
        "pair_mask given is false on ranks 0, 2, true on rank 1",
    ),
    "training": (
        lambda msa, pair, options: (msa.detach(), pair, options),
        'msa is "float64 its shard, trained" on ranks 0, 2, '
        '"float64 its shard, not trained" on rank 1',
    ),
    "a dtype": (
        lambda msa, pair, options: (msa, pair.float(), options),
        'float32 its shard, trained" on rank 1',
    ),
    "a wrong call": (
        lambda msa, pair, options: (msa, pair[:, :1], options),
        'error is null on ranks 0, 2, "pair must have shape (2, 2, 7, 7) on rank 1',
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_with_different_calls_are_told_how(axial_programs, name):
    change, message = DIFFERENT[name]

    def call(comm: Any) -> str:
        case = axial_programs.Case()
        operands = own_shards(case, comm)
        msa, pair, options = change(*operands) if comm.rank == 1 else operands
        with pytest.raises((MismatchError, ValueError)) as caught:
            evoformer_block(case.module(), msa, pair, **options)
        return str(caught.value)

    said = simulate(call, 3)
    assert all(message in text for text in (said[0], said[2]))


@pytest.mark.parametrize(("blocks", "S"), [(0, 3), (1, 0)])
def test_a_stack_needs_a_block_and_a_sequence(axial_programs, blocks, S):
    def call(comm: Any) -> None:
        case = axial_programs.Case(S=S, blocks=1)
        msa, pair, options = own_shards(case, comm)
        stack = case.module()
        del stack.blocks[blocks:]
        evoformer_stack(stack, msa, pair, **options)

    message = f"there must be a block and a sequence at least, got {blocks} blocks and S={S}"
    with pytest.raises(ValueError, match=message):
        simulate(call, 1)


# --- memory ---


@pytest.fixture(scope="module")
def benchmark_of_memory() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "axial_memory.py"
    spec = importlib.util.spec_from_file_location("axial_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_benchmark_counts(benchmark_of_memory):
    """What is held at once, views once, and no longer than it is held."""
    with benchmark_of_memory.Peak() as held:
        x = torch.zeros(100)
        y = x[::2] + 1  # 50 new numbers
        del y
        assert held.now == 400
        z = x.clone()
        del x
        z.view(10, 10).add_(1)
    assert (held.most, held.now) == (800, 400)


def test_memory_falls_with_the_ranks(benchmark_of_memory):
    """Of a block with few parameters for its activations, forward and backward."""
    sizes = {"c_triangle": 8, "heads_triangle": 1, "c_outer": 4, "c_multiplication": 64, "n": 2}
    block = EvoformerBlock(32, 32, 8, 1, **sizes, attention=evoformer_attention_tiled)

    def peak(P: int, **options: Any) -> int:
        return benchmark_of_memory.peak(P, 32, 64, block=block, **options)

    alone = peak(1)
    assert alone < 8 * peak(8) < 1.1 * alone
    assert 8 * peak(8, pieces=1) > 1.5 * alone  # a factor that comes at once is seen
