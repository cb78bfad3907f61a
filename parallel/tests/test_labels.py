"""Labels and loss weights from shards alone are those of the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel import labels
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.labels import shift_labels
from isoform.parallel.sharding import IGNORE, Sharding, Successors

same_examples = settings(deadline=None, derandomize=True, max_examples=60)
SHARDINGS = (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3))


def whole_labels(case: Any) -> tuple[np.ndarray, np.ndarray]:
    """Without and with segments, from the whole sequence."""
    tokens = np.arange(case.B * case.L).reshape(case.B, case.L) + 1000
    plain = np.full_like(tokens, IGNORE)
    plain[:, :-1] = tokens[:, 1:]
    packed = plain.copy()
    segments = np.broadcast_to(case.segments, tokens.shape)
    packed[:, :-1][segments[:, 1:] != segments[:, :-1]] = IGNORE
    return plain, packed


def check(case: Any, results: list[Any]) -> None:
    P = len(results)
    sharding = case.sharding(P)
    plain, packed, weights = (sharding.unshard(x) for x in zip(*results, strict=True))
    expected = whole_labels(case)
    np.testing.assert_array_equal(plain, expected[0])
    np.testing.assert_array_equal(packed, expected[1])
    counted = expected[1] != IGNORE
    wanted = np.where(counted, P / max(counted.sum(), 1), 0)
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_labels_and_weights(programs, run, world):
    case = programs.Case(L=13, documents=(5, 1, 6))
    cases = [replace(case, kind=kind, block=block) for kind, block in SHARDINGS]
    results = run(programs.all_label_shards, world, cases)
    for case, found in zip(cases, zip(*results, strict=True), strict=True):
        check(case, list(found))


def test_of_tensors(programs):
    for kind, block in SHARDINGS:
        case = programs.Case(kind=kind, block=block, L=13, documents=(5, 1, 6))
        check(case, simulate(programs.label_shards, 3, case, "torch"))


@same_examples
@given(
    L=st.integers(0, 30),
    P=st.integers(1, 9),
    sharding=st.sampled_from(SHARDINGS),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    by_example=st.booleans(),
)
def test_any_length_and_ranks(programs, L, P, sharding, cuts, by_example):
    ends = [0, *sorted(min(cut, L) for cut in cuts), L]
    documents = tuple(b - a for a, b in pairwise(ends))
    case = programs.Case(
        kind=sharding[0],
        block=sharding[1],
        L=L,
        documents=documents,
        segments_by_example=by_example,
    )
    check(case, simulate(programs.label_shards, P, case, "numpy"))


def test_the_same_as_from_the_whole_sequence():
    """Both ways to labels agree, on another axis than the last, too."""
    sharding = Sharding.zigzag(11, 3)
    tokens = np.arange(22).reshape(11, 2)

    def shift(comm: Any) -> Any:
        return shift_labels(
            sharding.shard(tokens, comm.rank, 0), comm=comm, sharding=sharding, axis=0
        )

    for rank, found in enumerate(simulate(shift, 3)):
        np.testing.assert_array_equal(found, sharding.labels(tokens, rank, axis=0))


def test_only_borders_are_sent(programs):
    """Zigzag on 4 ranks: 7 inner borders, of which one lies within rank 3."""

    def sent(comm: Any) -> int:
        programs.label_shards(comm, programs.Case(L=32, B=1, documents=(32,)), "numpy")
        return comm.traffic.bytes_by["labels"]

    tokens, segments_with_them = 2, 1  # twice for tokens, and once for segments
    assert sum(simulate(sent, 4)) == 6 * 8 * (tokens + segments_with_them)


def test_a_shift_lost_at_borders_is_seen(programs, monkeypatch):
    """The fault: the label of a chunk's last token is the next token of the same shard."""

    def within(self: Sharding, rank: int) -> Successors:
        n = self.lengths[rank]
        place = np.minimum(np.arange(n) + 1, n - 1)
        return Successors(np.full(n, rank), place)

    case = programs.Case(L=13, documents=(13,))
    check(case, simulate(programs.label_shards, 3, case, "numpy"))
    monkeypatch.setattr(labels.Sharding, "successors", within)
    with pytest.raises(AssertionError):
        check(case, simulate(programs.label_shards, 3, case, "numpy"))


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        (np.zeros((2, 5), int), {}, r"tokens must have the 4 positions of rank 0 on axis -1"),
        (np.zeros((2, 4), int), {"axis": 2}, "tokens has no axis 2"),
        (np.zeros((2, 4), int), {"segments": np.zeros(3, int)}, "segments must have the 4"),
        (
            np.zeros((2, 4), int),
            {"sharding": Sharding.zigzag(8, 3)},
            "the sharding is for 3 ranks, but there are 2",
        ),
    ],
)
def test_wrong_calls_are_refused(tokens, more, message):
    options = {"sharding": Sharding.zigzag(8, 2), **more}
    with pytest.raises(ValueError, match=message):
        simulate(lambda comm: shift_labels(tokens, comm=comm, **options), 2)
