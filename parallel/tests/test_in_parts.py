"""Attention between shards as plain calls: the pairs that are covered, and the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel import Sharding, in_parts
from isoform.parallel.in_parts import Part, Parts, cut
from isoform.parallel.local import Mask
from isoform.reference.torch.attention import (
    attention_block_backward_tiled,
    attention_block_tiled,
    attention_delta,
    merge,
)

KINDS = (Sharding.contiguous, Sharding.zigzag, Sharding.striped)


def covered(queries: np.ndarray, keys: np.ndarray, found: Parts) -> np.ndarray:
    """How often each pair is attended to, by index."""
    if found.order is not None:
        queries = keys = found.order
    else:
        queries, keys = np.arange(len(queries)), np.arange(len(keys))
    count = np.zeros((len(queries), len(keys)), int)
    for rows, columns, causal in found.parts:
        i, j = queries[rows], keys[columns]
        count[np.ix_(i, j)] += np.tri(len(i), len(j), dtype=int) if causal else 1
    return count


@settings(deadline=None)  # the machine may have other things to do
@given(st.sampled_from(KINDS), st.integers(0, 40), st.integers(1, 6), st.data(), st.booleans())
def test_each_pair_that_attends_is_covered_once(kind, L, P, data, causal):
    sharding = kind(L, P)
    some = st.lists(st.integers(0, P - 1), min_size=1, max_size=3, unique=True)
    queries, keys = (
        np.concatenate([sharding.positions(rank) for rank in data.draw(some)]) for _ in range(2)
    )
    found = cut(queries, keys, causal=causal)
    if found is None:
        assert causal
        assert len(in_parts.runs(queries)) * len(in_parts.runs(keys)) > in_parts.MOST
        return
    wanted = queries[:, None] >= keys if causal else np.ones((len(queries), len(keys)), bool)
    np.testing.assert_array_equal(covered(queries, keys, found), wanted)


@pytest.mark.parametrize("P", [2, 4, 8])
def test_at_each_step_a_zigzag_ring_makes_one_call(P):
    sharding = Sharding.zigzag(16 * P, P)
    for rank in range(P):
        for owner in range(P):
            parts = cut(sharding.positions(rank), sharding.positions(owner), causal=True).parts
            assert [part.causal for part in parts] == [rank == owner]


def test_all_shards_together_are_one_causal_call_in_the_order_of_positions():
    sharding = Sharding.zigzag(64, 4)
    everywhere = np.concatenate([sharding.positions(rank) for rank in range(4)])
    found = cut(everywhere, everywhere, causal=True)
    assert found.parts == (Part(slice(0, 64), slice(0, 64), True),)
    np.testing.assert_array_equal(everywhere[found.order], np.arange(64))


def test_a_mask_is_cut_once_for_all_steps(monkeypatch):
    monkeypatch.setattr(Mask, "in_parts", lambda self, like: True)
    sharding = Sharding.zigzag(37, 4)
    mask, own = Mask(sharding, causal=True), sharding.positions(1)
    between, to_all = mask.between([1], [2, 0], None), mask.to_all(1, None)
    other = np.concatenate([sharding.positions(2), sharding.positions(0)])
    assert between["parts"].parts == cut(own, other, causal=True).parts
    assert to_all["parts"].parts == cut(own, np.arange(37), causal=True).parts
    assert mask.between([1], [2, 0], None)["parts"] is between["parts"]


def test_what_is_cut_too_finely_is_declined():
    striped = Sharding.striped(4096, 2)
    assert cut(striped.positions(0), striped.positions(1), causal=True) is None


@pytest.mark.parametrize(
    ("kind", "queries", "keys"),
    [
        (Sharding.zigzag, [1], [1]),
        (Sharding.zigzag, [0], [2]),
        (Sharding.zigzag, [2], [0]),
        (Sharding.contiguous, [0], [1]),  # nobody attends to anything
        (Sharding.contiguous, [1], [0]),
        (Sharding.zigzag, [0, 1, 2], [0, 1, 2]),
        (Sharding.zigzag, [1], [0, 1, 2]),
        (Sharding.zigzag, [0, 1], [1, 2]),
    ],
)
def test_the_results_are_those_of_one_call_that_knows_positions(kind, queries, keys):
    sharding = kind(37, 3)
    own, other = (
        np.concatenate([sharding.positions(rank) for rank in ranks]) for ranks in (queries, keys)
    )
    generator = torch.Generator().manual_seed(1)

    def drawn(L: int, heads: int) -> torch.Tensor:
        return torch.randn(2, L, heads, 8, dtype=torch.float64, generator=generator)

    q, dout = drawn(len(own), 4), drawn(len(own), 4)
    k, v = drawn(len(other), 2), drawn(len(other), 2)
    places = {"positions": torch.from_numpy(own), "key_positions": torch.from_numpy(other)}
    out, lse = attention_block_tiled(q, k, v, causal=True, **places)
    delta = attention_delta(dout, out)
    gradients = attention_block_backward_tiled(dout, q, k, v, lse, delta, causal=True, **places)

    def attend(q, k, v, causal):
        return attention_block_tiled(q, k, v, causal=causal)

    def differentiate(dout, q, k, v, out, lse, causal):
        delta = attention_delta(dout, out)
        return attention_block_backward_tiled(dout, q, k, v, lse, delta, causal=causal)

    parts = cut(own, other, causal=True)
    found, its_lse = in_parts.attend(q, k, v, parts, attend, merge)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(its_lse, lse)
    found = in_parts.differentiate(dout, q, k, v, out, lse, parts, differentiate)
    for x, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(x, right)
