"""The planner's memory against that of real runs: processes, NumPy arrays, ``tracemalloc``.

Sizes are such that arrays are some tens of MB, and what Python, the transport and the sharding keep
(a few 100 kB) does not count. Everything that NumPy allocates on a rank is seen, the tiles of the
reference included; what is compared is the rank that holds most.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from isoform.parallel.launch import launch
from isoform.parallel.planner import memory
from isoform.parallel.planner.plan import ways
from isoform.parallel.traffic import Sizes

TOLERANCE = 0.05
LIKE = {"H": 2, "G": 2, "D": 128, "dtype": "float32", "B": 1, "kind": "contiguous"}
SHARED = {"H": 8, "G": 2, "D": 64, "dtype": "float16", "B": 1, "kind": "zigzag"}
EXAMPLES = {"H": 3, "G": 1, "D": 96, "dtype": "float32", "B": 2, "kind": "striped"}
WORLDS: dict[int, list[dict[str, Any]]] = {2: [LIKE], 3: [LIKE, SHARED], 4: [LIKE, EXAMPLES]}
"""By number of ranks. A ring holds more up to its fourth block; on 3 ranks key/value heads of
SHARED are copied for their query heads; examples do not lie together in memory."""


@pytest.fixture(scope="module")
def measured(programs: Any) -> dict[int, list[tuple[Any, list[tuple[int, int]]]]]:
    """By number of ranks: cases, and what the forward and the backward held on every rank."""
    found = {}
    for P, several in WORLDS.items():
        cases = [
            programs.Case(strategy=strategy, near=near, L=1024 * P + 1, **sizes)
            for sizes, (strategy, near) in product(several, ways(P))
        ]
        by_rank = launch(programs.held_at_most, P, cases, transport="gloo", limit=300)
        found[P] = [*zip(cases, zip(*by_rank, strict=True), strict=True)]
    return found


def shares(measured: Any) -> dict[str, float]:
    """Predicted over measured, for every case and pass."""
    found = {}
    for P, cases in measured.items():
        for case, by_rank in cases:
            sizes = Sizes(case.B, case.H, case.G, case.D, np.dtype(case.dtype).itemsize)
            peaks = memory.peaks(case.strategy, case.sharding(P), sizes, near=case.near)
            for name, predicted, held in zip(
                peaks._fields, peaks, zip(*by_rank, strict=True), strict=True
            ):
                label = f"{name} P={P} {case.strategy} near={case.near} {case.dtype} H={case.H}"
                found[label] = predicted.max() / max(held)
    return found


def test_within_five_percent_of_real_runs(measured):
    outside = {name: s for name, s in shares(measured).items() if abs(s - 1) > TOLERANCE}
    assert not outside


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_arrays_forgotten_are_seen(measured, monkeypatch, strategy):
    """Those in the dtype of the operands, the smaller ones: q, k, v and what comes of them."""
    plain = memory._bytes

    def forgotten(sizes: Sizes, positions: Any, heads: Any, itemsize: int) -> Any:
        return (itemsize == sizes.wide) * plain(sizes, positions, heads, itemsize)

    monkeypatch.setattr(memory, "_bytes", forgotten)
    changed = [s for name, s in shares(measured).items() if f"{strategy} near=None float16" in name]
    assert changed
    assert min(changed) < 1 - TOLERANCE
