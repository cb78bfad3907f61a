"""Bars for attention over ranks: `pytest parallel/benchmarks`, on a machine with two idle cores.

Two ranks of one thread each against one, measured in one run; see `isoform.parallel.benchmark`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from isoform.parallel.benchmark.run import STRATEGIES, Call, Speed, measure, shares, timeline
from isoform.parallel.launch import launch
from isoform.parallel.planner import Attended, Sizes, plan
from isoform.parallel.sharding import Sharding

LENGTH, RANKS = 16384, 2
GAIN = 1.7
"""How many times as fast as one rank two must be."""
MERGING = 0.05
"""Of a ring's time."""
BALANCE = 1.05
"""Work of the busiest rank, by the mean."""


@pytest.fixture(scope="module")
def speed() -> Speed:
    """Fail, rather than skip, where two ranks have no cores of their own."""
    assert len(os.sched_getaffinity(0)) >= RANKS
    return measure(Call(LENGTH), RANKS, rounds=2, transport="mpi")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_faster_than_one(speed: Speed, strategy: str) -> None:
    assert speed.gain(strategy) >= GAIN, speed


def test_merging_takes_little_of_a_ring() -> None:
    found: Any = launch(timeline, RANKS, Call(LENGTH, strategy="ring"), limit=600)
    assert shares(found)["merging"] <= MERGING


def test_zigzag_shares_causal_work_evenly() -> None:
    for P in (2, 3, 8, 64):
        found = plan([Sharding.zigzag(LENGTH, P)], Sizes(1, 8, 8, 32, 4), attended=Attended(True))
        balance = {candidate.name: candidate.balance for candidate in found.candidates}
        assert max(balance["ring"], balance["all_gather"]) <= BALANCE
