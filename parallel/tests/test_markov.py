"""The Markov model: counts, smoothing, both strands, and what it says of real words."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from isoform.parallel.training import markov

KNOWN = 4


def plain(stretches, order: int, strands: int):
    """The definition, base by base: a function p(x, context)."""
    counts: dict[tuple[int, ...], int] = {}
    for bases in stretches:
        both = [list(bases)]
        if strands == 2:
            both.append([3 - b if b < KNOWN else b for b in bases][::-1])
        for strand in both:
            for end, length in product(range(len(strand)), range(1, order + 2)):
                word = tuple(strand[end - length + 1 : end + 1]) if end >= length - 1 else ()
                if word and max(word) < KNOWN:
                    counts[word] = counts.get(word, 0) + 1

    def p(x: int, context: tuple[int, ...]) -> float:
        lower = p(x, context[1:]) if context else 0.25
        total = sum(counts.get((*context, y), 0) for y in range(4))
        return (counts.get((*context, x), 0) + markov.WEIGHT * lower) / (total + markov.WEIGHT)

    return p


@pytest.mark.parametrize("strands", [1, 2])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("piece", [5, markov.PIECE])
def test_it_is_the_definition(order, strands, piece, monkeypatch):
    monkeypatch.setattr(markov, "PIECE", piece)
    rng = np.random.default_rng(order)
    stretches = [rng.choice(5, n, p=[0.4, 0.1, 0.2, 0.2, 0.1]).astype(np.uint8) for n in (60, 1, 9)]
    found = markov.fit(stretches, order, strands=strands)
    assert found.order == order
    p = plain(stretches, order, strands)
    for j, table in enumerate(found.tables):
        assert table.shape == (4**j, 4)
        np.testing.assert_allclose(table.sum(1), 1, rtol=1e-14)
        for number, context in enumerate(product(range(4), repeat=j)):
            np.testing.assert_allclose(table[number], [p(x, context) for x in range(4)], rtol=1e-12)

    text = np.array([0, 1, 2, 3, 4, 2, 2, 0, 1, 3, 3], np.uint8)
    contexts = []
    for place, base in enumerate(text):
        context: tuple[int, ...] = ()
        while (
            len(context) < min(order, place)
            and (before := int(text[place - len(context) - 1])) < KNOWN
        ):
            context = (before, *context)
        contexts.append(-np.log2(p(int(base), context)) if base < KNOWN else 0.0)
    np.testing.assert_allclose(found.bits(text), contexts, rtol=1e-12)


def test_it_finds_the_entropy_of_a_source_it_can_describe():
    """Bases of a chain of order 1: an order of 1 or 3 comes to its entropy, an order of 0 not."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.ones(4) * 0.5, 4)
    state, bases = 0, np.empty(200_000, np.uint8)
    draws = rng.random(len(bases))
    steps = chain.cumsum(1)
    for n, u in enumerate(draws):
        state = min(int(np.searchsorted(steps[state], u)), 3)
        bases[n] = state
    occupied = np.bincount(bases[:-1], minlength=4) / (len(bases) - 1)
    entropy = -(occupied[:, None] * chain * np.log2(chain)).sum()
    train, test = bases[:150_000], bases[150_000:]
    rate = {k: markov.fit([train], k, strands=1).bits(test).mean() for k in (0, 1, 3)}
    assert rate[1] == pytest.approx(entropy, abs=0.01)
    assert rate[3] == pytest.approx(entropy, abs=0.02)
    assert rate[0] > entropy + 0.1


def test_nothing_is_impossible_and_no_more_is_said_than_is_known():
    unseen = markov.fit([np.zeros(50, np.uint8)], 4, strands=1).bits(np.array([3, 3, 3], np.uint8))
    assert np.isfinite(unseen).all()
    assert (unseen > 2).all()
    nothing = markov.fit([], 5)
    np.testing.assert_allclose(nothing.bits(np.arange(4, dtype=np.uint8)), 2)


def test_wrong_calls():
    with pytest.raises(ValueError, match="order must be 0 to 12, got 13"):
        markov.fit([], 13)
    with pytest.raises(ValueError, match="strands must be 1 or 2, got 0"):
        markov.fit([], 5, strands=0)
