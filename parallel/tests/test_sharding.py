"""The map between positions and ranks and what follows from it, for any length and ranks."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isoform.parallel.sharding import IGNORE, Documents, Sharding, loss_weights
from isoform.reference.numpy.rotary import rotary_embedding

same_examples = settings(deadline=None, derandomize=True, max_examples=100)
LENGTHS = (0, 1, 2, 3, 7, 8, 16, 61)
RANKS = (1, 2, 3, 4, 7, 8)


@st.composite
def shardings(draw: Any) -> Sharding:
    kind = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    length, ranks = draw(st.integers(0, 70)), draw(st.integers(1, 11))
    return Sharding(kind, length, ranks, draw(st.integers(1, 9)) if kind == "striped" else 1)


def every_small_sharding() -> list[Sharding]:
    return [
        sharding
        for L, P in product(LENGTHS, RANKS)
        for sharding in (
            Sharding.contiguous(L, P),
            Sharding.zigzag(L, P),
            Sharding.striped(L, P),
            Sharding.striped(L, P, block=3),
        )
    ]


def written_out(sharding: Sharding) -> list[list[int]]:
    """The definition, word for word: chunks as lists, dealt out one by one."""
    L, P = sharding.length, sharding.ranks
    if sharding.kind == "striped":
        chunks = [range(s, min(s + sharding.block, L)) for s in range(0, L, sharding.block)]
        owner = {c: c % P for c in range(len(chunks))}
    elif sharding.kind == "contiguous":
        chunks, owner = np.array_split(np.arange(L), P), {c: c for c in range(P)}
    else:
        chunks = np.array_split(np.arange(L), 2 * P)
        owner = {r: r for r in range(P)} | {2 * P - 1 - r: r for r in range(P)}
    shards: list[list[int]] = [[] for _ in range(P)]
    for c, chunk in enumerate(chunks):
        shards[owner[c]] += [int(p) for p in chunk]
    return shards


# --- the map ---


@pytest.mark.parametrize("sharding", every_small_sharding(), ids=str)
def test_positions_are_those_of_the_definition(sharding):
    expected = written_out(sharding)
    assert [sharding.positions(r).tolist() for r in range(sharding.ranks)] == expected
    assert sharding.lengths == tuple(len(shard) for shard in expected)


def test_zigzag_by_hand():
    assert [Sharding.zigzag(8, 2).positions(r).tolist() for r in (0, 1)] == [
        [0, 1, 6, 7],
        [2, 3, 4, 5],
    ]
    assert Sharding.zigzag(8, 2).chunks(0) == (range(2), range(6, 8))


@same_examples
@given(shardings())
@example(Sharding.zigzag(7, 8))
@example(Sharding.striped(3, 8, 2))
def test_every_position_is_held_once(sharding):
    shards = [sharding.positions(r) for r in range(sharding.ranks)]
    for rank, shard in enumerate(shards):
        assert shard.dtype == np.int64
        assert (np.diff(shard) > 0).all()
        assert (sharding.owners(shard) == rank).all()
        np.testing.assert_array_equal(sharding.indices(shard), np.arange(len(shard)))
        np.testing.assert_array_equal([p for c in sharding.chunks(rank) for p in c], shard)
        assert all(len(chunk) for chunk in sharding.chunks(rank))
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(sharding.length))
    assert sum(sharding.lengths) == sharding.length


@same_examples
@given(shardings())
def test_shards_are_as_even_as_promised(sharding):
    assert max(sharding.lengths) - min(sharding.lengths) <= sharding.block


@pytest.mark.parametrize("P", [2, 3, 8])
def test_zigzag_makes_causal_work_equal(P):
    """Query p has p + 1 keys. The last contiguous shard has nearly twice the average."""

    def work(sharding: Sharding) -> list[int]:
        return [int((sharding.positions(r) + 1).sum()) for r in range(P)]

    L = 64 * P
    assert len(set(work(Sharding.zigzag(L, P)))) == 1
    contiguous = work(Sharding.contiguous(L, P))
    assert max(contiguous) * P / sum(contiguous) > 2 - 1.1 / P


def test_a_long_sequence_on_many_ranks_costs_no_loops():
    """A million positions dealt out one by one to 4096 ranks."""
    sharding = Sharding.striped(2**20 + 3, 4096)
    np.testing.assert_array_equal(sharding.positions(4095), 4095 + 4096 * np.arange(256))
    assert sharding.lengths[:4] == (257, 257, 257, 256)


def test_a_sharding_is_a_value():
    assert Sharding.zigzag(7, 2) == Sharding("zigzag", np.int64(7), 2)
    assert len({Sharding.zigzag(7, 2), Sharding.zigzag(7, 2), Sharding.contiguous(7, 2)}) == 2
    with pytest.raises(FrozenInstanceError):
        Sharding.zigzag(7, 2).length = 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("ring", 8, 2), ValueError, "kind must be one of contiguous, zigzag, striped, got 'ring'"),
        (("zigzag", -1, 2), ValueError, "length must be at least 0, got -1"),
        (("zigzag", 8, 0), ValueError, "ranks must be at least 1, got 0"),
        (("striped", 8, 2, 0), ValueError, "block must be at least 1, got 0"),
        (("zigzag", 8, 2, 4), ValueError, "a zigzag sharding has no blocks, got block=4"),
        (("zigzag", 8.0, 2), TypeError, "length must be an integer, got float"),
        (("zigzag", True, 2), TypeError, "length must be an integer, got bool"),
    ],
)
def test_wrong_shardings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Sharding(*arguments)


@pytest.mark.parametrize("rank", [-1, 2])
def test_wrong_ranks_are_refused(rank):
    sharding = Sharding.zigzag(8, 2)
    for call in (sharding.positions, sharding.chunks, sharding.successors):
        with pytest.raises(ValueError, match=f"at least 0 and less than P=2, got {rank}"):
            call(rank)


def test_wrong_positions_are_refused():
    sharding = Sharding.zigzag(8, 2)
    with pytest.raises(ValueError, match="less than L=8, got 3 to 8"):
        sharding.owners(np.array([3, 8]))
    with pytest.raises(TypeError, match="must be integers, got float64"):
        sharding.indices(np.array([3.0]))


# --- arrays ---


@same_examples
@given(shardings(), st.integers(-3, 2), st.booleans())
def test_unshard_undoes_shard(sharding, axis, tensor):
    shape = [2, 3, 2]
    shape[axis] = sharding.length
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    given_x = torch.from_numpy(x) if tensor else x
    shards = [sharding.shard(given_x, r, axis) for r in range(sharding.ranks)]
    for r, shard in enumerate(shards):
        expected = np.take(x, written_out(sharding)[r], axis)
        np.testing.assert_array_equal(np.asarray(shard), expected)
    whole = sharding.unshard(shards, axis)
    assert type(whole) is type(given_x)
    assert whole.dtype == given_x.dtype
    np.testing.assert_array_equal(np.asarray(whole), x)


def test_a_shard_is_a_copy():
    """Shards are received into and sent from; the whole must not change with them."""
    x = np.zeros((1, 6))
    shard = Sharding.contiguous(6, 1).shard(x, 0)
    shard[:] = 1
    assert not x.any()
    assert shard.flags.c_contiguous


def test_tensors_stay_differentiable():
    x = torch.arange(7.0).requires_grad_()
    sharding = Sharding.zigzag(7, 3)
    shards = [sharding.shard(x, r, 0) for r in range(3)]
    weights = torch.arange(7.0) ** 2
    (sharding.unshard(shards, 0) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)


def test_bfloat16_is_moved_untouched():
    x = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    sharding = Sharding.striped(9, 2, 2)
    assert torch.equal(sharding.unshard([sharding.shard(x, r) for r in range(2)]), x)


def test_wrong_arrays_are_refused():
    sharding = Sharding.zigzag(8, 3)
    with pytest.raises(ValueError, match=r"x must have L=8 positions on axis 1, got shape \(1, 7"):
        sharding.shard(np.zeros((1, 7, 4)), 0)
    with pytest.raises(ValueError, match=r"x has no axis 1, got shape \(8,\)"):
        sharding.shard(np.zeros(8), 0)
    with pytest.raises(
        TypeError, match="x must be a NumPy array, a PyTorch tensor or a CuPy array, got"
    ):
        sharding.shard([0] * 8, 0)
    with pytest.raises(ValueError, match="one shard for each of 3 ranks, got 2"):
        sharding.unshard([np.zeros((1, 3))] * 2)
    with pytest.raises(ValueError, match="shard 2 must have 2 positions on axis 1, got shape"):
        sharding.unshard([np.zeros((1, 3))] * 3)


# --- labels ---


def shifted(tokens: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """Labels of the whole sequence: the next token of the same document."""
    labels = np.full_like(tokens, IGNORE)
    labels[..., :-1] = tokens[..., 1:]
    if segments is not None:
        labels[..., :-1][..., segments[1:] != segments[:-1]] = IGNORE
    return labels


@same_examples
@given(shardings(), st.booleans(), st.lists(st.integers(0, 9), max_size=8))
def test_labels_are_shifted_across_borders(sharding, tensor, cuts):
    L = sharding.length
    tokens = np.arange(2 * L).reshape(2, L) + 1000
    ends = [min(cut * 7, L) for cut in sorted(cuts)]
    segments = Documents(tuple(np.diff([0, *ends, L]))).segments
    kept = [tokens, segments]
    if tensor:
        kept = [torch.from_numpy(x) for x in kept]
    plain = [sharding.labels(kept[0], r) for r in range(sharding.ranks)]
    packed = [sharding.labels(kept[0], r, segments=kept[1]) for r in range(sharding.ranks)]
    np.testing.assert_array_equal(np.asarray(sharding.unshard(plain)), shifted(tokens))
    np.testing.assert_array_equal(np.asarray(sharding.unshard(packed)), shifted(tokens, segments))


def test_labels_on_a_first_axis_with_segments_per_batch():
    """Tokens [L, B]; segments differ from one example to the next."""
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    segments = np.array([[0, 0], [0, 1], [1, 1]])
    labels = Sharding.contiguous(3, 1).labels(tokens, 0, axis=0, segments=segments)
    np.testing.assert_array_equal(labels, [[3, IGNORE], [IGNORE, 6], [IGNORE, IGNORE]])


def test_a_shift_inside_the_shard_would_be_wrong():
    """The fault that the border exchange is for: it must be seen by the tests above."""
    sharding = Sharding.zigzag(8, 2)
    tokens = np.arange(8)
    careless = sharding.unshard([shifted(sharding.shard(tokens, r, 0)) for r in range(2)], axis=0)
    assert (careless != shifted(tokens)).sum() == 2  # where ranks change: after 1 and after 5


@same_examples
@given(shardings())
def test_successors_are_where_the_next_position_is(sharding):
    shards = [sharding.positions(r) for r in range(sharding.ranks)]
    for own, (rank, place) in zip(
        shards, map(sharding.successors, range(sharding.ranks)), strict=True
    ):
        for p, r, i in zip(own, rank, place, strict=True):
            assert (r == i == -1) if p == sharding.length - 1 else shards[r][i] == p + 1


def test_wrong_tokens_and_segments_are_refused():
    sharding = Sharding.zigzag(8, 2)
    with pytest.raises(ValueError, match="tokens must have L=8 positions on axis -1"):
        sharding.labels(np.zeros((8, 2), int), 0)
    with pytest.raises(ValueError, match="segments must have L=8 positions on axis -1"):
        sharding.labels(np.zeros((2, 8), int), 0, segments=np.zeros(7, int))


# --- the loss ---


@same_examples
@given(shardings(), st.integers(0, 10**6), st.booleans(), st.sampled_from(["mean", "sum"]))
def test_weighted_losses_give_the_global_mean(sharding, seed, tensor, reduction):
    rng = np.random.default_rng(seed)
    losses = rng.exponential(size=(2, sharding.length))
    counted = rng.random(losses.shape) < 0.6
    total, P = int(counted.sum()), sharding.ranks
    ranks = []
    for r in range(P):
        own = sharding.shard(counted, r)
        weights = loss_weights(
            torch.from_numpy(own) if tensor else own, total, P, reduction=reduction
        )
        assert tuple(weights.shape) == own.shape
        ranks.append((np.asarray(weights) * sharding.shard(losses, r)).sum())
    together = np.sum(ranks) / (P if reduction == "mean" else 1)
    expected = losses[counted].mean() if total else 0.0
    np.testing.assert_allclose(together, expected, rtol=1e-6 if tensor else 1e-12)


def test_the_mean_of_means_is_another_number():
    """The fault that the weights are for."""
    losses, sharding = np.arange(7.0), Sharding.contiguous(7, 2)
    means = [sharding.shard(losses, r, 0).mean() for r in range(2)]
    assert abs(np.mean(means) - losses.mean()) > 0.2


def test_wrong_loss_weights_are_refused():
    counted = np.ones(4, bool)
    with pytest.raises(ValueError, match="counts 4 tokens, more than the total of 3"):
        loss_weights(counted, 3, 2)
    with pytest.raises(ValueError, match="reduction must be mean or sum, got 'max'"):
        loss_weights(counted, 4, 2, reduction="max")
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        loss_weights(counted, 4, 0)


# --- documents ---


@same_examples
@given(st.lists(st.integers(0, 12), max_size=9))
def test_documents_packed_without_padding(lengths):
    documents = Documents(tuple(lengths))
    expected = [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    assert list(zip(documents.segments, documents.positions, strict=True)) == expected
    assert documents.length == len(expected)
    assert documents.borders.dtype == documents.positions.dtype == np.int64
    np.testing.assert_array_equal(documents.borders, [0, *np.cumsum(lengths)])


def test_wrong_documents_are_refused():
    with pytest.raises(ValueError, match="length of document 1 must be at least 0, got -2"):
        Documents((3, -2))
    with pytest.raises(TypeError, match="length of document 0 must be an integer, got float"):
        Documents((3.5,))


@pytest.mark.parametrize("sharding", [Sharding.zigzag(13, 3), Sharding.striped(13, 4, 2)], ids=str)
def test_rotary_embedding_of_shards(sharding):
    """A shard turned by its positions is the shard of what is turned, bit for bit; in documents,
    whose positions begin anew, too."""
    x = np.random.default_rng(0).standard_normal((2, 13, 3, 8))
    documents = Documents((6, 0, 7))
    for positions in (np.arange(13), documents.positions):
        whole = rotary_embedding(x, positions)
        for r in range(sharding.ranks):
            own = rotary_embedding(sharding.shard(x, r), sharding.shard(positions, r, 0))
            np.testing.assert_array_equal(own, sharding.shard(whole, r))
    for r in range(sharding.ranks):
        own = sharding.positions(r)
        np.testing.assert_array_equal(own, sharding.shard(np.arange(13), r, 0))
