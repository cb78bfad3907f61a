"""Calls on real ranks: how long they take, and what each rank does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from isoform.parallel import local
from isoform.parallel.attention import Strategy, attention_vjp
from isoform.parallel.communicator import Communicator, Transfer
from isoform.parallel.launch import Transport, launch
from isoform.parallel.sharding import Sharding

STRATEGIES: tuple[Strategy, ...] = ("ulysses", "ring", "all_gather")
KINDS = ("computing", "merging", "waiting")
"""Of what a rank does."""


@dataclass(frozen=True)
class Call:
    """Causal attention of float32: ``q [1, L, H, D]``, and k and v alike."""

    L: int = 16384
    H: int = 8
    D: int = 32
    strategy: Strategy = "ring"


class Event(NamedTuple):
    """Something that a rank did, in seconds since all were ready."""

    what: str
    start: float
    end: float


# --- on the ranks ---


def seconds(comm: Communicator, calls: list[Call]) -> list[float]:
    """How long each call takes, forward and backward, from when all ranks are ready."""
    return [timeline(comm, call, record=False)[0] for call in calls]


def timeline(comm: Communicator, call: Call, record: bool = True) -> tuple[float, list[Event]]:
    """How long a call takes, and what this rank did meanwhile."""
    sharding = Sharding.zigzag(call.L, comm.size)
    rng = np.random.default_rng(comm.rank)
    shape = (1, sharding.lengths[comm.rank], call.H, call.D)
    q, k, v, dout = (rng.standard_normal(shape, np.float32) for _ in range(4))
    # Groups of ranks are made at the first call, and kept.
    few = [x[:, :0] for x in (q, k, v)]
    empty = Sharding.zigzag(0, comm.size)
    attention_vjp(*few, comm=comm, sharding=empty, strategy=call.strategy)
    events: list[Event] = []
    comm.barrier()
    start = time.perf_counter()
    with recorded(events, start) if record else _nothing():
        _, backward = attention_vjp(
            q, k, v, comm=comm, sharding=sharding, strategy=call.strategy, causal=True
        )
        backward(dout)
    return time.perf_counter() - start, events


@contextmanager
def recorded(events: list[Event], zero: float) -> Iterator[None]:
    """Write down what is computed, merged and waited for, until the end of the block."""
    inside: list[str] = []  # a transfer may wait for another: that counts once

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            inside.append(what)
            start = time.perf_counter() - zero
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    events.append(Event(what, start, time.perf_counter() - zero))

        return wrapped

    places: list[tuple[Any, str, str]] = [
        (local, "attend", "computing"),
        (local, "differentiate", "computing"),
        (local, "merge", "merging"),
        (Transfer, "wait", "waiting"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, what in places:
        setattr(owner, name, timed(what, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# --- here ---


class Speed(NamedTuple):
    """Of the fastest round: seconds on one rank, and by strategy on several."""

    one: float
    several: dict[str, float]

    def gain(self, strategy: str) -> float:
        """How many times as fast as one rank."""
        return self.one / self.several[strategy]


def measure(call: Call, ranks: int, rounds: int, transport: Transport) -> Speed:
    """One rank, and every strategy on several; the fastest of some rounds of each."""
    calls = [Call(call.L, call.H, call.D, strategy) for strategy in STRATEGIES]
    alone: list[float] = []
    together: list[list[float]] = []
    for _ in range(rounds):
        alone += launch(seconds, 1, [call], transport=transport, limit=600)[0]
        # A call is as long as on the rank that takes longest.
        by_rank = launch(seconds, ranks, calls, transport=transport, limit=600)
        together.append([max(times) for times in zip(*by_rank, strict=True)])
    fastest = [min(times) for times in zip(*together, strict=True)]
    return Speed(min(alone), dict(zip(STRATEGIES, fastest, strict=True)))


def shares(by_rank: list[tuple[float, list[Event]]]) -> dict[str, float]:
    """Of the time of all ranks, what went into each kind of event."""
    total = sum(whole for whole, _ in by_rank)
    return {
        what: sum(e.end - e.start for _, events in by_rank for e in events if e.what == what)
        / total
        for what in KINDS
    }
