"""``deterministic=True``: the same bits from run to run; all-gathered, at every world size too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel import whole_tiles
from isoform.parallel.attention import attention
from isoform.parallel.communicator import MismatchError
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.sharding import Sharding
from isoform.parallel.traffic import Sizes, overhead, pattern, sent_by

same_examples = settings(deadline=None, derandomize=True, max_examples=40)
NAMES = ("out", "dq", "dk", "dv")
SHARDINGS = (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3))
FIXED = {"strategy": "all_gather", "deterministic": True}
LIBRARIES = [
    ("numpy", "float32"),
    ("numpy", "bfloat16"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
]


def whole(case: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Every result of the whole sequence; lse has it on its last axis."""
    sharding = case.sharding(len(results))
    names = [name for name in ("lse", *NAMES) if name in results[0]]
    return {
        name: sharding.unshard([result[name] for result in results], 2 if name == "lse" else 1)
        for name in names
    }


def different(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The names of results that are not the same bit for bit."""
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype for name in one)
    return {name for name in one if one[name].tobytes() != other[name].tobytes()}


def divided(case: Any, worlds: tuple[int, ...] = (2, 3, 4, 8)) -> Iterator[tuple[int, Any]]:
    """A case on other numbers of ranks, each time with another sharding."""
    for number, P in enumerate(worlds):
        kind, block = SHARDINGS[number % len(SHARDINGS)]
        yield P, replace(case, kind=kind, block=block)


# --- the same bits ---


@pytest.mark.parametrize(("library", "dtype"), LIBRARIES)
@pytest.mark.parametrize("L", [7, 301])
def test_the_same_at_every_world_size(programs, library, dtype, L):
    """Through the door: fewer positions than ranks, and two tiles that are not full."""
    sizes = {"L": L, "B": 1, "H": 2, "G": 1, "D": 16, "documents": (L // 2, L // 3)}
    case = programs.Case(**FIXED, **sizes, dtype=dtype, library=library)
    alone = whole(case, simulate(programs.attend, 1, case))
    assert all(np.isfinite(np.asarray(x, np.float64)).all() and x.any() for x in alone.values())
    for P, spread in divided(case):
        there = whole(spread, simulate(programs.attend, P, spread))
        assert not different(alone, there), (P, spread)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("library", "dtype"), LIBRARIES)
def test_before_rounding_and_lse_too(programs, library, dtype, kind):
    """Three tiles; products are large enough for a library to use several threads."""
    sizes = {"L": 520, "B": 1, "H": 2, "G": 1, "D": 32}
    case = programs.Case(**sizes, dtype=dtype, library=library, kind=kind)
    alone = whole(case, simulate(programs.in_whole_tiles, 1, case))
    for P in (3, 8):
        assert not different(alone, whole(case, simulate(programs.in_whole_tiles, P, case)))


@st.composite
def cases(draw: Any, case: Any) -> Any:
    L, G = draw(st.integers(0, 40), label="L"), draw(st.integers(1, 2), label="G")
    documents = None
    if draw(st.booleans(), label="packed"):
        ends = sorted(draw(st.lists(st.integers(0, L), max_size=3), label="ends"))
        documents = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    library, dtype = draw(st.sampled_from(LIBRARIES), label="library")
    side = st.integers(-1, 9)
    return case(
        L=L,
        B=draw(st.integers(0, 2), label="B"),
        G=G,
        H=G * draw(st.integers(1, 3), label="H / G"),
        D=draw(st.integers(1, 9), label="D"),
        causal=draw(st.booleans(), label="causal"),
        window=draw(st.none() | st.tuples(side, side), label="window"),
        documents=documents,
        segments_by_example=draw(st.booleans(), label="by example"),
        library=library,
        dtype=dtype,
        seed=draw(st.integers(0, 1000), label="seed"),
    )


@same_examples
@given(data=st.data())
def test_any_length_and_any_division(programs, data):
    """With tiles of 8, so that a shard has rows in many of them and fills few."""
    case = data.draw(cases(programs.Case))
    P = data.draw(st.sampled_from([2, 3, 4, 5, 8]), label="P")
    kind, block = data.draw(st.sampled_from(SHARDINGS), label="sharding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_tiles, "TILE", 8)
        alone = whole(case, simulate(programs.in_whole_tiles, 1, case))
        case = replace(case, kind=kind, block=block)
        assert not different(alone, whole(case, simulate(programs.in_whole_tiles, P, case)))


@pytest.mark.parametrize("transport", ["gloo", pytest.param("mpi", marks=pytest.mark.mpi)])
def test_the_same_on_real_ranks(programs, run, transport):
    """Processes of their own give the bits of one thread."""
    asked = [programs.Case(**FIXED, L=301, dtype="float32", library=x) for x in ("numpy", "torch")]
    results = run(programs.attend_all, (transport, 3), asked)
    for case, found in zip(asked, zip(*results, strict=True), strict=True):
        alone = whole(case, simulate(programs.attend, 1, case))
        assert not different(alone, whole(case, list(found)))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "all_gather"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_same_from_run_to_run(programs, strategy, library):
    case = programs.Case(
        strategy=strategy, deterministic=True, L=301, dtype="float32", library=library
    )
    assert all(simulate(programs.attend_twice, 3, case))


# --- right, and at the price that is said ---


@pytest.mark.parametrize(("library", "dtype"), LIBRARIES)
def test_the_numbers_are_those_of_the_all_gather(programs, library, dtype):
    case = programs.Case(**FIXED, L=301, dtype=dtype, library=library, documents=(100, 190))
    plain = replace(case, deterministic=False)
    found, expected = (whole(c, simulate(programs.attend, 3, c)) for c in (case, plain))
    for name in NAMES:
        a, b = (np.asarray(x[name], np.float64) for x in (found, expected))
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@same_examples
@given(data=st.data())
def test_bytes_and_messages_are_those_predicted(programs, data):
    case = replace(data.draw(cases(programs.Case)), **FIXED, library="numpy", dtype="float16")
    P = data.draw(st.sampled_from([1, 2, 3, 8]), label="P")
    sizes = Sizes(case.B, case.H, case.G, case.D, 2)
    forward, backward = pattern("all_gather", case.sharding(P), sizes, deterministic=True)
    places = case.segments
    told = {} if places is None else {"segments": (places[..., :1].size, places.itemsize)}
    forward += overhead(case.sharding(P), places=told)
    for rank, result in enumerate(simulate(programs.attend, P, case)):
        for steps, counted in ((forward, "forward"), (forward + backward, "both")):
            bytes_, messages = sent_by(steps, rank, P)
            assert result[counted] == {name: (n, messages[name]) for name, n in bytes_.items()}


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_other_strategies_send_what_they_do_without(strategy):
    sharding, sizes = Sharding.zigzag(13, 4), Sizes(1, 4, 2, 4, 4)
    plain, fixed = (
        [sent_by(steps, 1, 4) for steps in pattern(strategy, sharding, sizes, deterministic=asked)]
        for asked in (False, True)
    )
    assert plain == fixed


# --- a fault ---


def keys_in_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered keys lie as ranks hold them, and their positions with them."""
    in_order = whole_tiles.Mask.in_order

    def gathered(x: Any, comm: Any, mask: Any, axis: int = 1) -> Any:
        shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in mask.sharding.lengths]
        return np.concatenate(comm.all_gather(x, shapes), axis)

    def keys_out_of_order(self: Any, like: Any) -> Any:
        every = range(self.sharding.ranks)
        keys = self.between(every, every, like)["key_positions"]
        return in_order(self, like) | {"key_positions": keys}

    monkeypatch.setattr(whole_tiles, "gathered", gathered)
    monkeypatch.setattr(whole_tiles.Mask, "in_order", keys_out_of_order)


def test_keys_in_another_order_are_seen(programs, monkeypatch):
    """``out`` stays right, but its bits are no longer those of one rank.

    Tiles that are not whole, or whose rows lie elsewhere, are seen only where the BLAS treats rows
    by their place.
    """
    case = programs.Case(L=301, B=1, H=2, G=1, D=16, dtype="float32", kind="zigzag")
    alone = whole(case, simulate(programs.in_whole_tiles, 1, case))
    keys_in_the_order_of_ranks(monkeypatch)
    there = whole(case, simulate(programs.in_whole_tiles, 8, case))
    np.testing.assert_allclose(there["out"], alone["out"], atol=1e-5)
    assert "out" in different(alone, there)


# --- wrong calls ---


def test_it_must_be_said_on_all_ranks(programs):
    message = 'deterministic is "True" on ranks 0, 2, "False" on rank 1'
    with pytest.raises(MismatchError, match=re.escape(message)):
        simulate(programs.wrong_on_one, 3, programs.Case(**FIXED), {"deterministic": False})


def test_auto_is_refused():
    x = np.zeros((1, 5, 2, 3))
    with pytest.raises(ValueError, match="deterministic=True needs a strategy by name"):
        simulate(
            lambda comm: attention(
                x, x, x, comm=comm, sharding=Sharding.zigzag(5, 1), deterministic=True
            ),
            1,
        )
