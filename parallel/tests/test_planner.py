"""The planner: bytes and messages exactly, work exactly, times by hand, and what auto takes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel import traffic
from isoform.parallel.attention import explain
from isoform.parallel.communicator import MismatchError
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.planner import (
    Attended,
    Level,
    Sizes,
    Topology,
    load_topology,
    plan,
    topologies,
)
from isoform.parallel.planner.plan import ways
from isoform.parallel.planner.time import pass_time
from isoform.parallel.planner.work import busy_steps, pairs_by_rank, work
from isoform.parallel.sharding import Sharding
from isoform.parallel.traffic import AllToAll, overhead, pattern, sent, sent_by
from isoform.reference.attention_contract import Mask, resolve_window

same_examples = settings(deadline=None, derandomize=True, max_examples=60)
SHARDINGS = (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3))
ITEMSIZE = {"float16": 2, "float32": 4, "float64": 8}
SIZES = Sizes(1, 4, 2, 8, 4)
LAN = Topology("lan", (Level("wire", 1e3, 0.25),), {"float32": 1e6, "float64": 1e6})


# --- bytes and messages ---


@st.composite
def calls(draw: Any, case: Any) -> tuple[int, Any]:
    """Uneven lengths, fewer positions or heads than ranks, shared heads, empty batches."""
    P = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12]), label="P")
    strategy, near = draw(st.sampled_from([*ways(P)]), label="way")
    kind, block = draw(st.sampled_from(SHARDINGS), label="sharding")
    G = draw(st.sampled_from([1, 2, 3]), label="G")
    return P, case(
        strategy=strategy,
        near=near,
        kind=kind,
        block=block,
        L=draw(st.integers(0, 40), label="L"),
        B=draw(st.integers(0, 2), label="B"),
        G=G,
        H=G * draw(st.integers(1, 5), label="H / G"),
        D=draw(st.integers(1, 3), label="D"),
        dtype=draw(st.sampled_from([*ITEMSIZE]), label="dtype"),
    )


def measured_and_predicted(programs: Any, P: int, case: Any) -> tuple[Any, Any]:
    """By rank, for the forward and for both passes: bytes and messages by operation."""
    results = simulate(programs.attend, P, case)
    sharding = case.sharding(P)
    sizes = Sizes(case.B, case.H, case.G, case.D, ITEMSIZE[case.dtype])
    forward, backward = pattern(case.strategy, sharding, sizes, near=case.near)
    groups = {"ulysses": P, "hybrid": case.near}.get(case.strategy)
    forward += overhead(sharding, near=groups)
    predicted = [
        [sent_by(steps, rank, P) for steps in (forward, forward + backward)] for rank in range(P)
    ]
    measured = [
        [
            tuple(Counter({name: n[which] for name, n in result[of].items()}) for which in (0, 1))
            for of in ("forward", "both")
        ]
        for result in results
    ]
    return measured, predicted


@same_examples
@given(data=st.data())
def test_bytes_and_messages_are_those_measured(programs, data):
    P, case = data.draw(calls(programs.Case))
    measured, predicted = measured_and_predicted(programs, P, case)
    assert measured == predicted


def one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of shared heads as wide as the operands."""
    monkeypatch.setattr(traffic, "shared", lambda parts: False)


def own_block_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys go on to everybody but oneself: right on average, wrong where shards are uneven."""
    rotation = traffic.Rotation
    monkeypatch.setattr(
        traffic, "Rotation", lambda *args, keeps_own: rotation(*args, keeps_own=True)
    )


def empty_blocks_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message to everybody, also to those who hold nothing."""
    within = AllToAll.within

    def changed(self: Any, span: int) -> Any:
        full = replace(self, take=np.ones_like(self.take))
        return within(self, span)._replace(messages=within(full, span).messages)

    monkeypatch.setattr(AllToAll, "within", changed)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        (one_width, {"strategy": "ulysses", "dtype": "float16", "H": 8, "G": 2}),
        (own_block_kept, {"strategy": "ring", "L": 7}),
        (empty_blocks_sent, {"strategy": "all_gather", "L": 3}),
    ],
)
def test_faults_in_the_formulas_are_seen(programs, monkeypatch, fault, change):
    case = programs.Case(**change)
    measured, predicted = measured_and_predicted(programs, 4, case)
    assert measured == predicted
    fault(monkeypatch)
    measured, predicted = measured_and_predicted(programs, 4, case)
    assert measured != predicted


@pytest.mark.parametrize("span", [1, 2, 3, 4, 5, 12, 100])
def test_what_is_sent_within_a_span_counted_one_by_one(span):
    rng = np.random.default_rng(0)
    give, take = rng.integers(0, 4, (2, 12))
    step = AllToAll("x", 4, give, take, 3, 2)
    bytes_, messages = np.zeros((2, 12), np.int64)
    for r in range(12):
        for j in range(12):
            if r != j and r // 4 == j // 4 and r // span == j // span:
                bytes_[r] += 2 * 3 * give[r] * take[j]
                messages[r] += 2 * (give[r] * take[j] > 0)
    found = step.within(span)
    assert (found.bytes == bytes_).all()
    assert (found.messages == messages).all()
    assert step.received.within(12).bytes.sum() == step.within(12).bytes.sum()


def test_a_strategy_that_is_not_there_is_named():
    sharding, sizes = Sharding.zigzag(8, 4), Sizes(1, 4, 4, 2, 4)
    with pytest.raises(ValueError, match="one of all_gather, ring, ulysses, hybrid, got 'tree'"):
        pattern("tree", sharding, sizes)
    with pytest.raises(ValueError, match="near is what the hybrid strategy needs, and no other"):
        pattern("ring", sharding, sizes, near=2)
    with pytest.raises(ValueError, match="near must divide the 4 ranks, got near=3"):
        pattern("hybrid", sharding, sizes, near=3)


# --- work ---


@st.composite
def masks(draw: Any) -> tuple[Sharding, Attended]:
    kind, block = draw(st.sampled_from(SHARDINGS))
    L = draw(st.integers(0, 40))
    documents = None
    if draw(st.booleans()):
        ends = sorted(draw(st.lists(st.integers(0, L), max_size=4)))
        documents = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    side = st.integers(-1, 9)
    return (
        Sharding(kind, L, draw(st.integers(1, 6)), block),
        Attended(draw(st.booleans()), draw(st.none() | st.tuples(side, side)), documents),
    )


def pairs(sharding: Sharding, attended: Attended) -> np.ndarray:
    """Who attends to whom, bool ``[L, L]``, by the rule of the contract."""
    places = np.arange(sharding.length)[None]
    segments = None
    if attended.documents is not None:
        segments = np.full(sharding.length, -1)
        numbers = np.repeat(range(len(attended.documents)), attended.documents)
        segments[: len(numbers)] = numbers
        segments = segments[None]
    sides = resolve_window(attended.window, attended.causal)
    return Mask(places, places, segments, segments, *sides).pairs()[0, 0]


@same_examples
@given(masks())
def test_pairs_are_those_of_the_mask(found):
    sharding, attended = found
    seen = pairs(sharding, attended)
    by_rank = [int(seen[sharding.positions(r)].sum()) for r in range(sharding.ranks)]
    assert pairs_by_rank(sharding, attended).tolist() == by_rank


def test_work_is_pairs_times_heads_of_the_group():
    sharding, sizes = Sharding.contiguous(8, 4), Sizes(1, 3, 1, 2, 4)
    causal = Attended(causal=True)
    assert work(sharding, sizes, causal, near=1).tolist() == [3 * n for n in (3, 7, 11, 15)]
    assert work(sharding, sizes, causal, near=2).tolist() == [20, 10, 52, 26]
    assert work(sharding, sizes, causal, near=4).tolist() == [36, 36, 36, 0]


@pytest.mark.parametrize("kind", ["zigzag", "striped"])
@pytest.mark.parametrize("P", [2, 3, 7, 8])
def test_zigzag_and_striped_are_balanced_under_a_causal_mask(kind, P):
    (found,) = {
        candidate.balance
        for candidate in plan([Sharding(kind, 16381, P)], SIZES, attended=Attended(True)).candidates
        if candidate.strategy == "ring"
    }
    assert 1 <= found < 1.01
    contiguous = plan([Sharding.contiguous(16381, P)], SIZES, attended=Attended(True))
    ring = next(c for c in contiguous.candidates if c.strategy == "ring")
    assert ring.balance == pytest.approx(2 - 1 / P, rel=1e-3)


@same_examples
@given(masks(), st.integers(1, 4))
def test_busy_steps_are_right_but_for_the_borders(found, chunks):
    """Where chunks are whole: never fewer than there are, and two too many at most."""
    sharding, attended = found
    count = sharding.ranks * sharding.block * (2 if sharding.kind == "zigzag" else 1)
    sharding = replace(sharding, length=count * chunks)
    attended = replace(attended, documents=attended.documents and (count, count * (chunks - 1)))
    queries, keys = np.nonzero(pairs(sharding, attended))
    owners = sharding.owners(np.arange(sharding.length))
    for near in (n for n in range(1, sharding.ranks + 1) if sharding.ranks % n == 0):
        members = sharding.ranks // near
        steps = {*((owners[queries] // near - owners[keys] // near) % members).tolist()}
        assert len(steps) <= busy_steps(sharding, attended, near) <= min(len(steps) + 2, members)


# --- time ---


def test_times_by_hand():
    """Two ranks, a wire of 1000 bytes a second, a quarter of a second a message."""
    sharding, sizes = Sharding.contiguous(8, 2), Sizes(1, 2, 2, 5, 4)
    found = {c.name: c for c in plan([sharding], sizes, dtype="float32", topology=LAN).candidates}

    # k and v: 4 positions of 2 heads of 5 numbers of 4 bytes each; 4 · 5 · 32 · 2 operations.
    hop = 2 * 0.160 + 2 * 0.25
    compute = 4 * 5 * (4 * 8 * 2) / 1e6
    ring = found["ring"].forward.time
    assert ring.compute == pytest.approx(compute)
    assert ring.communication == pytest.approx(hop)
    assert ring.exposed == pytest.approx(hop - compute / 2)  # one of two blocks hides it
    gathered = found["all_gather"].forward.time
    assert gathered.exposed == gathered.communication == pytest.approx(hop)

    backward = found["ring"].backward.time
    assert backward.compute == pytest.approx(2.5 * compute)
    # keys again, the gradients beside them, and the gradients' last hop
    assert backward.communication == pytest.approx(3 * hop)
    # q, k, v to heads; out back: 4 positions, 1 head away
    ulysses = found["ulysses"].forward.time
    assert ulysses.exposed == pytest.approx(4 * (0.080 + 0.25))


def test_what_computing_hides():
    """A ring waits for nothing where a block takes longer than its way; ends with one hop."""
    slow = replace(LAN, flops={"float32": 1e3})
    (ring,) = (
        c
        for c in plan([Sharding.zigzag(64, 4)], SIZES, dtype="float32", topology=slow).candidates
        if c.name == "ring"
    )
    assert ring.forward.time.exposed == 0
    assert ring.forward.time.communication > 0
    hop = 2 * (16 * 2 * 8 * 4 / 1e3 + 0.25)
    assert ring.backward.time.exposed == pytest.approx(hop)


def test_near_links_and_far_ones():
    """Of four ranks two by two, an all-gather's busiest sends one block near and two far."""
    two = Topology("two", (Level("near", 1e6, 0, 2), Level("far", 1e3, 0)), {"float32": 1e12})
    steps = pattern("all_gather", Sharding.contiguous(16, 4), SIZES).forward
    block = 2 * 4 * 2 * 8 * 4
    found = pass_time(steps, 0.0, two, 4, 4)
    assert found.exposed == pytest.approx(block / 1e6 + 2 * block / 1e3)
    around = pattern("hybrid", Sharding.contiguous(16, 4), SIZES, near=2).forward
    assert pass_time(around, 0.0, two, 4, 2).exposed < found.exposed


def test_receiving_takes_time_too():
    """One head for four ranks: three send a little, one receives all of it."""
    sizes = Sizes(1, 1, 1, 8, 4)
    steps = pattern("ulysses", Sharding.contiguous(16, 4), sizes).forward
    to_heads = pass_time(steps[:1], 0.0, replace(LAN, levels=(Level("w", 1e3, 0),)), 4, 1)
    assert to_heads.exposed == pytest.approx(3 * 4 * 8 * 4 / 1e3)


@same_examples
@given(st.data())
def test_times_are_consistent(data):
    P = data.draw(st.integers(1, 12), label="P")
    sharding = Sharding("zigzag", data.draw(st.integers(0, 100), label="L"), P)
    attended = Attended(True, data.draw(st.none() | st.integers(0, 50), label="window"))
    options = {"dtype": "float32", "attended": attended}
    found = plan([sharding], SIZES, topology=LAN, **options)
    faster = plan(
        [sharding], SIZES, topology=replace(LAN, levels=(Level("w", 1e6, 0.1),)), **options
    )
    for slow, fast in zip(found.candidates, faster.candidates, strict=True):
        for time, less in ((slow.forward.time, fast.forward.time), (slow.time, fast.time)):
            assert 0 <= time.exposed <= time.communication * (1 + 1e-12)
            assert less.total <= time.total
            assert (time.communication == 0) == (P == 1 or sharding.length == 0)


# --- topologies ---


def test_topologies_that_come_along():
    found = topologies()
    assert {"h100", "laptops"} <= found.keys()
    h100 = load_topology("h100")
    assert h100 == found["h100"]
    assert [(span, level.name) for span, level in h100.spans(64)] == [
        (8, "NVLink"),
        (64, "InfiniBand"),
    ]
    assert h100.spans(4)[0][0] == 4


def test_a_topology_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nflops = {bfloat16 = 1e12}\n'
        '[[levels]]\nname = "bus"\nranks = 4\nbandwidth = 1e9\nlatency = 1e-6\n'
    )
    mine = load_topology(str(path))
    assert mine == Topology("mine", (Level("bus", 1e9, 1e-6, 4),), {"bfloat16": 1e12})
    with pytest.raises(ValueError, match="mine joins 4 ranks by bus, asked for 8"):
        mine.spans(8)
    with pytest.raises(ValueError, match="mine has no flops for float32, only for: bfloat16"):
        mine.rate("float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "mine.toml is no topology: "),
        ('name = "a"\nflops = {}', "there must be at least one level"),
        ('name = "a"\n[[levels]]\nname = "x"', "a level needs bandwidth, latency"),
        ('name = "a"\nspeed = 1', "a topology has no speed; it has name, levels, flops, memory"),
        ("flops = {}", "a topology needs name"),
        (
            'name = "a"\nflops = {}\n[[levels]]\nname = "x"\nbandwidth = 0\nlatency = 0',
            "x: bandwidth must be positive, got 0",
        ),
        (
            'name = "a"\nflops = {}\n'
            + '[[levels]]\nname = "x"\nbandwidth = 1\nlatency = 0\nranks = 4\n' * 2,
            "a: x must join more ranks than x",
        ),
        (
            'name = "a"\nflops = {}\n' + '[[levels]]\nname = "x"\nbandwidth = 1\nlatency = 0\n' * 2,
            "a: only the last level joins all, not x",
        ),
        (
            'name = "a"\nflops = {float32 = -1}\n'
            '[[levels]]\nname = "x"\nbandwidth = 1\nlatency = 0\n',
            "a: flops of float32 must be positive, got -1",
        ),
    ],
)
def test_wrong_topologies_are_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_topology(str(path))


def test_topologies_that_are_not_there():
    with pytest.raises(ValueError, match="no topology is called h200; there are h100, laptops"):
        load_topology("h200")
    with pytest.raises(ValueError, match=r"cannot read nowhere\.toml: No such file"):
        load_topology("nowhere.toml")


# --- choosing ---


def test_what_is_weighed():
    def chosen(P: int, H: int, G: int) -> tuple[str, int | None]:
        found = plan([Sharding.zigzag(4096, P)], Sizes(1, H, G, 64, 2))
        assert found.best.bytes == min(c.bytes for c in found.candidates if not c.declined)
        return found.best.strategy, found.best.near

    assert chosen(8, 32, 32) == ("ulysses", None)
    assert chosen(64, 8, 8)[0] == "hybrid"  # fewer heads than ranks
    assert chosen(8, 1, 1) == ("ring", None)  # a tie with all_gather, which needs more memory
    assert chosen(1, 1, 1) == ("ulysses", None)  # nothing is sent at all


def test_the_busiest_rank_counts():
    """The sum over both passes of one rank, not of the busiest of each."""
    sharding, sizes = Sharding.striped(7, 4, 3), Sizes(1, 4, 2, 8, 2)
    for candidate in plan([sharding], sizes).candidates:
        passes = pattern(candidate.strategy, sharding, sizes, near=candidate.near)
        both = sent(passes.forward + passes.backward, 4)
        assert candidate.bytes == both.bytes.max()
        assert candidate.messages == both.messages.max()
        assert candidate.bytes <= candidate.forward.bytes + candidate.backward.bytes


def test_reasons_to_decline():
    found = plan([Sharding.zigzag(64, 4)], Sizes(1, 2, 2, 8, 4), memory=1e4)
    refused = {c.name: c.declined for c in found.candidates}
    assert refused["ulysses"][0] == "4 ranks share 2 query heads, some would have none"
    assert all("a rank, which has 1e-05" in reasons[-1] for reasons in refused.values())
    with pytest.raises(ValueError, match="no strategy will do: ulysses \\(4 ranks share 2"):
        _ = found.best


def test_time_counts_where_a_topology_is_given():
    """A ring sends more, but hides it."""
    sharding, sizes = Sharding.zigzag(2**17, 16), Sizes(1, 16, 16, 128, 2)
    h100 = load_topology("h100")
    by_bytes = plan([sharding], sizes)
    by_time = plan([sharding], sizes, dtype="bfloat16", topology=h100)
    assert by_bytes.best.strategy == "ulysses"
    assert by_time.best.strategy != "ulysses"
    assert by_time.best.time.total == min(
        c.time.total for c in by_time.candidates if not c.declined
    )
    assert str(by_time).startswith(f"{by_time.best.name}: on {h100.name} it takes (ms) ulysses ")


def test_auto_takes_the_best_and_says_so(programs, caplog):
    caplog.set_level(logging.INFO, "isoform.parallel")
    case = programs.Case(strategy="auto", H=8, G=8, L=32)
    results = simulate(programs.attend, 4, case)
    x = np.zeros((case.B, 8, 8, case.D))
    found = explain(x, x, sharding=case.sharding(4), causal=True)
    assert found.best.strategy == "ulysses"
    assert caplog.messages == [str(found)]  # of one rank
    assert str(found).startswith("ulysses: a rank sends at most (bytes) ulysses ")
    uncounted = ("agree", "split")
    sums = [
        sum(n for name, (n, _) in result["both"].items() if name not in uncounted)
        for result in results
    ]
    assert max(sums) == found.best.bytes


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_auto_goes_by_the_topology(programs, caplog, rate):
    """Where computing is slow a ring hides everything, where it takes no time fewest bytes win."""
    caplog.set_level(logging.INFO, "isoform.parallel")
    wire = Topology("wire", (Level("wire", 1e3, 0),), {"float64": rate})
    case = programs.Case(strategy="auto", H=8, G=8, L=32, topology=wire)
    simulate(programs.attend, 4, case)
    (said,) = caplog.messages
    assert said.startswith(f"{'ulysses' if rate > 1 else 'ring'}: on wire it takes (ms) ulysses ")


def test_ranks_with_other_topologies_are_told(programs):
    case = programs.Case(strategy="auto", H=8, G=8, L=32)
    slow = Topology("slow", (Level("wire", 1e3, 0),), {"float64": 1.0})
    with pytest.raises(MismatchError, match='chosen is "ulysses" on ranks 0, 2, "ring" on rank 1'):
        simulate(programs.wrong_on_one, 3, case, {"topology": slow})


def test_a_topology_that_cannot_be_used_is_named_on_all_ranks(programs):
    small = Topology("small", (Level("bus", 1e3, 0, 2),), {"float64": 1.0})
    case = programs.Case(strategy="auto", topology=small)
    with pytest.raises(ValueError, match="small joins 2 ranks by bus, asked for 3"):
        simulate(programs.attend, 3, case)


def test_all_ranks_plan_alike(programs):
    """Whatever they hold: from the sharding and the sizes alone."""
    sharding = Sharding.striped(7, 4, 3)

    def line(comm: Any) -> str:
        x = np.zeros((1, sharding.lengths[comm.rank], 4, 2), np.float32)
        return str(explain(x, x, sharding=sharding, topology=LAN))

    assert len(set(simulate(line, 4))) == 1
