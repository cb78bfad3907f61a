"""Each strategy over a list of shards is attention on one rank, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.reference.numpy import sequence_parallel as parallel
from isoform.reference.numpy.attention import attention, attention_backward

same_examples = settings(deadline=None, derandomize=True, max_examples=150)
RESULTS = ("out", "dq", "dk", "dv")
STRATEGIES = ("all_gather", "ring", "ulysses", "hybrid")


class Problem(NamedTuple):
    """A sequence cut into P shards: any positions on any rank, in any order."""

    operands: dict[str, Any]  # q, k, v, dout
    shards: list[Any]  # by rank: the positions it has
    segments: Any
    options: dict[str, Any]

    def cut(self, x: Any, axis: int = 1) -> list[Any]:
        return [np.take(x, own, axis) for own in self.shards]

    def joined(self, x: list[Any]) -> Any:
        return np.concatenate(x, 1)[:, np.argsort(np.concatenate(self.shards))]


def draw_problem(
    P: int,
    L: int,
    H: int,
    G: int,
    *,
    B: int = 2,
    D: int = 3,
    segments: Any = None,
    even: bool = False,
    seed: int = 0,
    dtype: Any = np.float64,
    **options: Any,
) -> Problem:
    rng = np.random.default_rng(seed)
    heads = {"q": H, "k": G, "v": G, "dout": H}
    operands = {name: rng.standard_normal((B, L, n, D)).astype(dtype) for name, n in heads.items()}
    order = rng.permutation(L)
    ends = np.arange(1, P) * L // P if even else np.sort(rng.integers(0, L + 1, P - 1))
    return Problem(operands, np.split(order, ends), segments, options)


@st.composite
def problems(draw: Any) -> tuple[Problem, str, dict[str, int]]:
    P, L = draw(st.integers(1, 6), label="P"), draw(st.integers(0, 12), label="L")
    G = draw(st.integers(1, 3), label="G")
    seed = draw(st.integers(0, 10**6), label="seed")
    rng = np.random.default_rng(seed)
    segments = None
    if draw(st.booleans(), label="packed"):  # −1: padding
        segments = rng.integers(-1, 2, (2, L) if draw(st.booleans(), label="by example") else L)
    side = st.integers(-1, 5)
    problem = draw_problem(
        P,
        L,
        G * draw(st.integers(1, 3), label="H / G"),
        G,
        segments=segments,
        seed=seed,
        causal=draw(st.booleans(), label="causal"),
        window=draw(st.none() | st.tuples(side, side), label="window"),
        scale=draw(st.sampled_from([None, 0.7]), label="scale"),
    )
    strategy = draw(st.sampled_from(STRATEGIES), label="strategy")
    more = {}
    if strategy == "hybrid":
        more["near"] = draw(st.sampled_from([n for n in range(1, P + 1) if P % n == 0]))
    return problem, strategy, more


def run(problem: Problem, strategy: str, **more: int) -> dict[str, list[Any]]:
    """Every result of one strategy, by rank."""
    q, k, v, dout = (problem.cut(problem.operands[name]) for name in ("q", "k", "v", "dout"))
    places = [problem.shards]
    if problem.segments is not None:
        places.append(problem.cut(problem.segments, -1))
    options = {**problem.options, **more}
    out = getattr(parallel, strategy)(q, k, v, *places, **options)
    backward = getattr(parallel, f"{strategy}_backward")
    gradients = backward(dout, q, k, v, *places, **options)
    return dict(zip(RESULTS, (out, *gradients), strict=True))


def on_one_rank(problem: Problem) -> dict[str, Any]:
    q, k, v, dout = (problem.operands[name].astype(float) for name in ("q", "k", "v", "dout"))
    options = {**problem.options, "segments": problem.segments}
    out = attention(q, k, v, **options)
    return dict(zip(RESULTS, (out, *attention_backward(dout, q, k, v, **options)), strict=True))


def worst_error(problem: Problem, strategy: str, **more: int) -> dict[str, float]:
    found, expected = run(problem, strategy, **more), on_one_rank(problem)
    errors = {}
    for name in RESULTS:
        whole = problem.joined(found[name])
        assert whole.dtype == problem.operands["q"].dtype
        # operands are about 1; where a query has one key, dq and dk are 0 but for rounding
        scale = np.abs(expected[name]).max(initial=0.1)
        errors[name] = float(np.abs(whole - expected[name]).max(initial=0) / scale)
    return errors


@same_examples
@given(problems())
def test_every_strategy_is_attention(drawn):
    problem, strategy, more = drawn
    assert max(worst_error(problem, strategy, **more).values()) < 1e-13


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_than_positions_and_than_heads(strategy):
    problem = draw_problem(8, 7, 3, 1, causal=True)
    more = {"near": 4} if strategy == "hybrid" else {}
    assert max(worst_error(problem, strategy, **more).values()) < 1e-13


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_rounded_once(strategy):
    """In float16 all strategies give the same bits: what is computed is float64 for all."""
    problem = draw_problem(4, 12, 4, 2, causal=True, dtype=np.float16)
    more = {"near": 2} if strategy == "hybrid" else {}
    found, expected = run(problem, strategy, **more), on_one_rank(problem)
    for name in RESULTS:
        whole = problem.joined(found[name])
        assert whole.dtype == np.float16
        np.testing.assert_array_equal(whole, expected[name].astype(np.float16))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_are_not_modified(strategy):
    problem = draw_problem(3, 9, 4, 2, causal=True)
    q, k, v, dout = (problem.cut(problem.operands[n]) for n in ("q", "k", "v", "dout"))
    kept = [x.copy() for shards in (q, k, v, dout) for x in shards]
    more = {"near": 3} if strategy == "hybrid" else {}
    getattr(parallel, f"{strategy}_backward")(dout, q, k, v, problem.shards, causal=True, **more)
    for x, before in zip((x for shards in (q, k, v, dout) for x in shards), kept, strict=True):
        np.testing.assert_array_equal(x, before)


def test_hybrid_is_a_ring_or_ulysses_at_its_ends():
    problem = draw_problem(4, 13, 4, 2, causal=True)
    for near, same in ((1, "ring"), (4, "ulysses")):
        hybrid, plain = run(problem, "hybrid", near=near), run(problem, same)
        for name in RESULTS:
            for mine, other in zip(hybrid[name], plain[name], strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-14)


# --- the exchange of positions for heads ---


def test_head_shards():
    """Six query heads on three key/value heads, for four ranks: two of them share a head."""
    heads, sources = parallel.head_shards(6, 3, 4)
    assert [x.tolist() for x in heads] == [[0, 1], [2, 3], [4], [5]]
    assert [x.tolist() for x in sources] == [[0, 0], [1, 1], [2], [2]]
    assert [len(x) for x in parallel.head_shards(2, 1, 3)[0]] == [1, 1, 0]


@pytest.mark.parametrize(("H", "G", "P"), [(4, 4, 2), (6, 3, 4), (5, 1, 3), (2, 2, 5)])
def test_the_exchanges_are_adjoint(H, G, P):
    """⟨to_heads x, y⟩ = ⟨x, to_positions y⟩, where heads are shared too."""
    rng = np.random.default_rng(0)
    _, sources = parallel.head_shards(H, G, P)
    x = [rng.standard_normal((2, length, G, 3)) for length in (3, 0, 4, 1, 2)[:P]]
    there = parallel.to_heads(x, sources)
    y = [rng.standard_normal(part.shape) for part in there]
    back = parallel.to_positions(y, sources, x)
    pairs = ((there, y), (x, back))
    left, right = (sum((a * b).sum() for a, b in zip(*both, strict=True)) for both in pairs)
    np.testing.assert_allclose(left, right, rtol=1e-12)


# --- wrong calls ---


@pytest.mark.parametrize("near", [0, 3, -2])
def test_groups_must_divide_the_ranks(near):
    with pytest.raises(ValueError, match=f"got near={near} and P=4"):
        run(draw_problem(4, 8, 2, 2), "hybrid", near=near)


def test_shards_must_fit_together():
    problem = draw_problem(2, 8, 2, 2, even=True)
    q, k, v = (problem.cut(problem.operands[name]) for name in "qkv")
    with pytest.raises(ValueError, match="key_positions must have K=8"):
        parallel.all_gather(q, k, v, [problem.shards[0], problem.shards[1][:2]])


# --- faults: each is seen ---


def held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards do not move."""
    monkeypatch.setattr(parallel, "_passed_on", lambda held: held)


def not_rescaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        parallel, "merge", lambda a, lse_a, b, lse_b: ((a + b) / 2, np.logaddexp(lse_a, lse_b))
    )


def last_block_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    block = parallel.attention_block

    def dropped(q: Any, k: Any, v: Any, **options: Any) -> Any:
        out, lse = block(q, k, v, **options)
        last = 8 in options["key_positions"]
        return (0 * out, np.full_like(lse, -np.inf)) if last else (out, lse)

    monkeypatch.setattr(parallel, "attention_block", dropped)


def overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share a key/value head, the last one's gradient is kept, not the sum."""

    def to_positions(parts: Any, heads: Any, like: Any) -> Any:
        whole = np.zeros_like(np.concatenate(like, 1))
        for part, of_rank in zip(parts, heads, strict=True):
            whole[:, :, of_rank] = part
        return parallel._cut(whole, like)

    monkeypatch.setattr(parallel, "to_positions", to_positions)


def split_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank keeps its own part of its own keys' gradients."""
    monkeypatch.setattr(parallel.np, "sum", lambda parts, axis: parts[0])


def base_two(monkeypatch: pytest.MonkeyPatch) -> None:
    block = parallel.attention_block

    def changed(*operands: Any, **options: Any) -> Any:
        out, lse = block(*operands, **options)
        return out, lse / np.log(2)

    monkeypatch.setattr(parallel, "attention_block", changed)


@pytest.mark.parametrize(
    ("strategy", "fault", "seen"),
    [
        ("ring", held_back, {"out", "dq", "dk", "dv"}),
        ("ring", not_rescaled, {"out", "dq"}),
        ("ring", last_block_dropped, {"out", "dq", "dk", "dv"}),
        ("ring", base_two, {"out", "dq", "dk", "dv"}),
        ("ulysses", overwritten, {"dk", "dv"}),
        ("all_gather", split_not_summed, {"dk", "dv"}),
    ],
)
def test_faults_are_seen(monkeypatch, strategy, fault, seen):
    problem = draw_problem(3, 9, 6, 2, even=True, causal=True)
    assert max(worst_error(problem, strategy).values()) < 1e-13
    fault(monkeypatch)
    errors = worst_error(problem, strategy)
    assert {name for name, error in errors.items() if error > 1e-3} >= seen
