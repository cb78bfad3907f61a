"""Attention over P ranks is attention on one rank: every strategy, sharding, mask and transport."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel import hybrid, local, ring, ulysses
from isoform.parallel.attention import attention
from isoform.parallel.communicator import CommunicationError, Communicator, MismatchError
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.launch import launch
from isoform.parallel.sharding import Sharding
from isoform.parallel.traffic import Sizes, overhead, pattern, sent_by
from isoform.reference.contract import Unsupported
from isoform.reference.numpy.attention import attention as one_rank
from isoform.reference.numpy.attention import attention_backward as one_rank_backward

same_examples = settings(deadline=None, derandomize=True, max_examples=100)
NAMES = ("out", "dq", "dk", "dv")
SHARDINGS = (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3))
# Largest error, by the largest number. Of float64 a few last digits; else the final rounding and
# that of the output before the backward, both to the operands' dtype.
TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}


def ways(P: int) -> list[dict[str, Any]]:
    """Every strategy, and every grid of the hybrid."""
    grids = [near for near in range(1, P + 1) if P % near == 0]
    plain = [{"strategy": name} for name in ("auto", "ring", "ulysses", "all_gather")]
    return [*plain, *({"strategy": "hybrid", "near": near} for near in grids)]


def expected(case: Any) -> dict[str, Any]:
    """In float64, on one rank with the whole sequence."""
    x = {name: array.astype(np.float64) for name, array in case.operands().items()}
    options = {**case.options, "segments": case.segments}
    out = one_rank(x["q"], x["k"], x["v"], **options)
    gradients = one_rank_backward(x["dout"], x["q"], x["k"], x["v"], **options)
    return dict(zip(NAMES, (out, *gradients), strict=True))


def errors(case: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    """By result: the largest error, relative to the largest number."""
    sharding = case.sharding(len(results))
    found = {}
    for name, right in expected(case).items():
        whole = sharding.unshard([np.asarray(result[name], np.float64) for result in results])
        assert np.isfinite(whole).all()
        # operands are about 1; where a query has one key, dq and dk are 0 but for rounding
        largest = np.abs(right).max(initial=0.1)
        found[name] = float(np.abs(whole - right).max(initial=0.0) / largest)
    return found


def check(case: Any, results: list[dict[str, Any]]) -> None:
    """The numbers are right and what was sent is what the formula says."""
    worst = errors(case, results)
    assert max(worst.values()) <= TOLERANCE[case.dtype], (case, worst)
    if case.strategy == "auto":
        return
    itemsize = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    sizes, P = Sizes(case.B, case.H, case.G, case.D, itemsize), len(results)
    forward, backward = pattern(case.strategy, case.sharding(P), sizes, near=case.near)
    forward += overhead(case.sharding(P), places=places(case))
    for rank, result in enumerate(results):
        for formula, counted in ((forward, "forward"), (forward + backward, "both")):
            by_name = sent_by(formula, rank, P)
            expected = {name: (n, by_name[1][name]) for name, n in by_name[0].items()}
            found = {name: n for name, n in result[counted].items() if name != "split"}  # once
            assert expected == found, (case, rank)


def places(case: Any) -> dict[str, tuple[int, int]]:
    """Rows and bytes of what a case says of where its tokens lie."""
    found = case.segments
    return {} if found is None else {"segments": (found[..., :1].size, found.itemsize)}


def cases(programs: Any, P: int) -> list[Any]:
    """Lengths and heads that P divides and that it does not; fewer positions than ranks."""
    masks = [
        {"causal": False},
        {"causal": True},
        {"causal": True, "window": (3, 0), "documents": (4, 0, 5)},
        {"causal": False, "window": 2, "documents": (6, 5), "segments_by_example": True},
    ]
    sizes = [
        {"L": 16, "H": 4, "G": 4},
        {"L": 13, "H": 6, "G": 2},
        {"L": 7, "H": 12, "G": 4},
        {"L": 1, "H": 3, "G": 1},
        {"L": 0, "H": 2, "G": 2},
    ]
    found = []
    for number, (way, size) in enumerate(product(ways(P), sizes)):
        mask = dict(masks[number % len(masks)])
        if sum(mask.get("documents", ())) > size["L"]:
            del mask["documents"]
        kind, block = SHARDINGS[(number // 2) % len(SHARDINGS)]
        found.append(programs.Case(**way, **size, **mask, kind=kind, block=block, seed=number))
    return found


# --- right on every transport ---


def test_all_strategies(programs, run, world):
    asked = cases(programs, world[1])
    results = run(programs.attend_all, world, asked)
    for case, found in zip(asked, zip(*results, strict=True), strict=True):
        check(case, list(found))


@pytest.mark.parametrize(
    "transport", ["simulated", "gloo", pytest.param("mpi", marks=pytest.mark.mpi)]
)
def test_the_transport_does_not_matter(programs, run, transport):
    """Bit for bit the same as with threads."""
    asked = [programs.Case(**way, dtype="float32", documents=(6, 7)) for way in ways(3)]
    here, there = (run(programs.attend_all, (name, 3), asked) for name in ("simulated", transport))
    for mine, others in zip(here, there, strict=True):
        for own, other in zip(mine, others, strict=True):
            assert own["both"] == other["both"]
            assert all(np.array_equal(own[name], other[name]) for name in NAMES)


@st.composite
def _cases(draw: Any, case: Any) -> tuple[int, Any]:
    P = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), label="P")
    way = draw(st.sampled_from(ways(P)), label="way")
    kind, block = draw(st.sampled_from(SHARDINGS), label="sharding")
    L, G = draw(st.integers(0, 25), label="L"), draw(st.integers(1, 3), label="G")
    documents = None
    if draw(st.booleans(), label="packed"):
        ends = sorted(draw(st.lists(st.integers(0, L), max_size=4), label="ends"))
        documents = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    side = st.integers(-1, 6)
    return P, case(
        **way,
        kind=kind,
        block=block,
        L=L,
        B=draw(st.integers(0, 2), label="B"),
        G=G,
        H=G * draw(st.integers(1, 4), label="H / G"),
        D=draw(st.integers(1, 5), label="D"),
        causal=draw(st.booleans(), label="causal"),
        window=draw(st.none() | st.tuples(side, side), label="window"),
        scale=draw(st.sampled_from([None, 2.0, 0.0]), label="scale"),
        documents=documents,
        segments_by_example=draw(st.booleans(), label="by example"),
        seed=draw(st.integers(0, 1000), label="seed"),
    )


@same_examples
@given(data=st.data())
def test_any_case(programs, data):
    P, case = data.draw(_cases(programs.Case))
    check(case, simulate(programs.attend, P, case))


@pytest.mark.parametrize("way", ways(4), ids=str)
@pytest.mark.parametrize("by_example", [False, True])
def test_positions_other_than_the_shardings(programs, way, by_example):
    """As of documents that count from 0 each, or of tokens in no order."""
    case = programs.Case(**way, L=22, H=6, window=(9, 0))
    rng = np.random.default_rng(3)
    rows = np.stack([rng.permutation(40)[:22], np.arange(22) % 11])
    positions = rows if by_example else rows[0]
    sharding = case.sharding(4)
    shards = simulate(programs.attend_at, 4, case, positions)
    x = case.operands()
    options = {**case.options, "positions": positions}
    right = (
        one_rank(x["q"], x["k"], x["v"], **options),
        *one_rank_backward(x["dout"], x["q"], x["k"], x["v"], **options),
    )
    for found, expected_one in zip(zip(*shards, strict=True), right, strict=True):
        np.testing.assert_allclose(sharding.unshard(found), expected_one, atol=1e-13)


# --- dtypes and libraries ---


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(programs, dtype, library):
    for way in ways(4):
        case = programs.Case(**way, dtype=dtype, library=library, L=19, documents=(9, 7), H=6)
        check(case, simulate(programs.attend, 4, case))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "all_gather"])
def test_tensors_on_real_ranks(programs, strategy):
    """Autograd calls the strategy's backward, which talks to the other ranks."""
    case = programs.Case(strategy=strategy, library="torch", dtype="float64", documents=(4, 6))
    check(case, launch(programs.attend, 3, case, transport="gloo"))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "all_gather"])
def test_autograd_keeps_nothing_alive_and_sees_changes(strategy):
    def call(comm: Any) -> None:
        q, k, v = (torch.ones(1, 3, 2, 4, requires_grad=True) for _ in range(3))
        changed = k * 1
        sharding = Sharding.contiguous(6, 2)
        out = attention(q, changed, v, comm=comm, sharding=sharding, strategy=strategy)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        gone = weakref.ref(out)
        del out
        assert gone() is None  # at once: no cycle waits for the collector

    simulate(call, 2)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_error_does_not_grow_with_ranks(programs, strategy):
    """Sums are held in float32 wherever they travel, so only the last rounding is bfloat16's."""
    case = programs.Case(strategy=strategy, dtype="bfloat16", L=64, H=8, G=4, D=16, causal=False)
    alone, eight = (errors(case, simulate(programs.attend, P, case)) for P in (1, 8))
    for name in NAMES:
        assert eight[name] <= 1.25 * alone[name], (name, alone, eight)


@pytest.mark.parametrize("way", ways(4), ids=str)
def test_the_same_bits_from_run_to_run(programs, way):
    case = programs.Case(**way, dtype="float32", L=29, H=6, documents=(11, 13))
    assert all(simulate(programs.attend_twice, 4, case))


def test_a_query_without_keys_on_any_rank(programs):
    """Padding: out and every gradient exactly zero, on every rank and by every strategy."""
    for way in ways(4):
        case = programs.Case(**way, documents=(5,), L=13)
        results = simulate(programs.attend, 4, case)
        for name in NAMES:
            whole = case.sharding(4).unshard([result[name] for result in results])
            assert not whole[:, 5:].any()
            assert whole[:, :5].any()


# --- what is sent ---


def test_a_larger_case_sends_what_is_predicted(programs):
    """Heads 12 on 8 ranks, key/value heads shared by ranks, an uneven length, bfloat16."""
    for way in ways(8):
        case = programs.Case(**way, dtype="bfloat16", L=67, H=12, G=3, D=8)
        check(case, simulate(programs.attend, 8, case))


# --- faults: each is seen ---


def misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions as if shards were contiguous."""

    def places(self: Any, ranks: Any) -> Any:
        plain = Sharding.contiguous(self.sharding.length, self.sharding.ranks)
        return np.concatenate([plain.positions(rank) for rank in ranks])

    monkeypatch.setattr(local.Mask, "_places", places)


def merged_without_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> Any:
        return (out_a + out_b) / 2, np.logaddexp(lse_a, lse_b)

    monkeypatch.setattr(local, "merge", merge)


def base_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """lse to the base 2."""
    attend = local.attend

    def changed(*operands: Any) -> Any:
        out, lse = attend(*operands)
        return out, lse / np.log(2)

    monkeypatch.setattr(local, "attend", changed)


def last_block_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys with the last position are never attended to."""
    attend = local.attend

    def changed(q: Any, k: Any, v: Any, options: Any) -> Any:
        out, lse = attend(q, k, v, options)
        if options["key_positions"].max(initial=0) == 17:
            return np.zeros_like(out), np.full_like(lse, -np.inf)
        return out, lse

    monkeypatch.setattr(local, "attend", changed)


def merged_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    import ml_dtypes

    merge = local.merge

    def changed(*operands: Any) -> Any:
        out, lse = merge(*operands)
        return out.astype(ml_dtypes.bfloat16).astype(out.dtype), lse

    monkeypatch.setattr(local, "merge", changed)


def stale_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward every rank uses its own keys and values again, whosever turn it is."""
    backward, visits = ring.backward, ring._visits

    def stale(k: Any, v: Any, *rest: Any) -> Any:
        return ((owner, k, v) for owner, *_ in visits(k, v, *rest))

    def changed(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(ring, "_visits", stale)
        return backward(*args, **kwargs)

    monkeypatch.setattr(ring, "backward", changed)


def gradients_of_one_head_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """dk and dv are those of one query head, not summed over all that share a key/value head."""

    def first_only(dx: Any, shard: Any) -> Any:
        if shard.copies is None:
            return dx
        places = [int(np.argmax(shard.copies == g)) for g in range(len(shard.groups))]
        return dx[:, :, places]

    monkeypatch.setattr(hybrid, "summed_copies", first_only)


def gradients_of_one_rank_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share a key/value head, the last one's gradients overwrite the others'."""
    zeros = ulysses.zeros

    class Overwritten(np.ndarray):
        def __getitem__(self, index: Any) -> Any:
            return np.zeros_like(np.asarray(super().__getitem__(index)))

    monkeypatch.setattr(ulysses, "zeros", lambda shape, x: zeros(shape, x).view(Overwritten))


def split_instead_of_reduce_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Communicator, "reduce_scatter", lambda self, parts, **_: parts[self.rank].copy()
    )


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], set[str]]] = {
    "wrong positions": (misplaced, {"strategy": "ring"}, {"out", "dq", "dk", "dv"}),
    "wrong positions, gathered": (misplaced, {"strategy": "all_gather"}, {"out", "dq", "dk", "dv"}),
    "no rescaling": (merged_without_rescaling, {"strategy": "ring"}, {"out", "dq"}),
    "base 2": (base_two, {"strategy": "ring"}, {"out", "dq", "dk", "dv"}),
    "last block": (last_block_dropped, {"strategy": "ring"}, {"out", "dq", "dk", "dv"}),
    "bfloat16 sums": (merged_in_bfloat16, {"strategy": "ring", "dtype": "float32"}, {"out"}),
    "stale keys": (stale_in_backward, {"strategy": "ring"}, {"dq", "dk", "dv"}),
    "one head": (gradients_of_one_head_of_a_group, {"strategy": "ulysses"}, {"dk", "dv"}),
    "one rank": (gradients_of_one_rank_of_a_group, {"strategy": "ulysses"}, {"dk", "dv"}),
    "split": (split_instead_of_reduce_scatter, {"strategy": "all_gather"}, {"dk", "dv"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(programs, monkeypatch, fault):
    """On 3 ranks with 8 query heads and 2 key/value heads, which the ranks must share."""
    plant, change, seen = FAULTS[fault]
    case = programs.Case(**change, L=18, H=8, G=2)
    check(case, simulate(programs.attend, 3, case))
    plant(monkeypatch)
    worst = errors(case, simulate(programs.attend, 3, case))
    wrong = {name for name, error in worst.items() if error > 10 * TOLERANCE[case.dtype]}
    assert wrong >= seen, worst
    if "out" not in seen:
        assert "out" not in wrong
    with pytest.raises(AssertionError):
        check(case, simulate(programs.attend, 3, case))


# --- wrong calls ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "ulysses"}, 'strategy is "ring" on ranks 0, 2, "ulysses" on rank 1'),
        ({"dtype": "float32"}, 'dtype is "float64" on ranks 0, 2, "float32" on rank 1'),
        ({"L": 14}, "length=13"),
        ({"H": 8}, "H is 4 on ranks 0, 2, 8 on rank 1"),
        ({"causal": False}, 'causal is "True" on ranks 0, 2, "False" on rank 1'),
        ({"documents": (4, 9)}, 'segments is "none" on ranks 0, 2, "int64 with 1 axes" on rank 1'),
        ({"library": "torch"}, 'library is "numpy" on ranks 0, 2, "torch" on rank 1'),
        ({"G": 3}, "key/value heads must divide query heads, got G=3 and H=4"),
    ],
    ids=str,
)
def test_ranks_with_different_calls_are_told_how(programs, run, change, message):
    with pytest.raises((MismatchError, ValueError), match=re.escape(message)):
        simulate(programs.wrong_on_one, 3, programs.Case(), change)


def test_a_call_that_is_wrong_on_one_rank_raises_on_all(programs):
    """On each in its own words; nobody waits for the one that has raised."""
    first, wrong, last = simulate(programs.told, 3, programs.Case(), {"G": 3})
    assert wrong == "ValueError: key/value heads must divide query heads, got G=3 and H=4"
    for other in (first, last):
        assert other.startswith("MismatchError: ranks have come with different calls: error is")
        assert 'null on ranks 0, 2, "key/value heads must divide' in other


@pytest.mark.mpi
def test_ranks_with_different_calls_do_not_wait_for_ever(programs):
    with pytest.raises(CommunicationError, match='strategy is "ring" on ranks 0, 2, "ulysses"'):
        launch(programs.wrong_on_one, 3, programs.Case(), {"strategy": "ulysses"}, limit=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "tree"}, "strategy must be one of auto, ring, ulysses, all_gather, hybrid"),
        ({"strategy": "hybrid"}, "near is what the hybrid strategy needs"),
        ({"strategy": "ring", "near": 1}, "near is what the hybrid strategy needs, and no other"),
        ({"strategy": "hybrid", "near": 2}, "near must divide the 1 ranks, got near=2"),
        ({"sharding": Sharding.zigzag(5, 2)}, "the sharding is for 2 ranks, but there are 1"),
        ({"sharding": Sharding.zigzag(6, 1)}, "q must have the 6 positions of rank 0 on axis 1"),
        ({"window": (-2, 0)}, "window must not be below -1"),
    ],
)
def test_wrong_calls_are_refused(options, message):
    x = np.zeros((1, 5, 2, 3))
    given_options = {"sharding": Sharding.zigzag(5, 1), **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        simulate(lambda comm: attention(x, x, x, comm=comm, **given_options), 1)


def test_what_is_no_array_of_one_library_is_refused():
    x = np.zeros((1, 5, 2, 3))
    elsewhere = torch.zeros(x.shape, device="meta")

    def call(*operands: Any) -> Any:
        return simulate(lambda c: attention(*operands, comm=c, sharding=Sharding.zigzag(5, 1)), 1)

    with pytest.raises(TypeError, match="k must be of the library of q, got Tensor"):
        call(x, torch.from_numpy(x), x)
    with pytest.raises(Unsupported, match=r"device meta \(cpu, cuda only\)"):
        call(elsewhere, elsewhere, elsewhere)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_nothing_is_recorded_for_autograd_where_the_backward_is_taken_by_hand(strategy: str):
    from isoform.parallel.attention import attention_vjp

    torch = pytest.importorskip("torch")

    def call(comm: Any) -> list[bool]:
        q, k, v, dout = (torch.ones(1, 4, 2, 3, requires_grad=True) for _ in range(4))
        sharding = Sharding.contiguous(8, 2)
        out, back = attention_vjp(q, k, v, comm=comm, sharding=sharding, strategy=strategy)
        return [x.requires_grad for x in (out, *back(dout))]

    assert simulate(call, 2) == [[False] * 4] * 2


def test_a_wrong_cotangent_is_refused():
    from isoform.parallel.attention import attention_vjp

    x = np.zeros((1, 5, 2, 3))

    def call(comm: Any) -> None:
        _, back = attention_vjp(x, x, x, comm=comm, sharding=Sharding.zigzag(5, 1))
        back(x[:, :4])

    with pytest.raises(ValueError, match=r"dout must be like out, float64 \(1, 5, 2, 3\)"):
        simulate(call, 1)
