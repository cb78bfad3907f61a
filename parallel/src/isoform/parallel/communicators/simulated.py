"""P ranks as threads of one process: for tests, for teaching, and to study P ranks on one machine.

:func:`simulate` runs one function on every rank and returns what each returned. Two things are
stricter than on a real machine, so that a program that runs here runs there:

- a send is finished only when it was received, and the bytes are those at that moment. A program
  that counts on a copy being made, or changes what it has sent, shows its fault here;
- every rank's state is known. A deadlock is an error that names who waits for what; so is a message
  that is not what its receiver wants, and one that nobody receives.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from isoform.parallel.communicator import (
    CommunicationError,
    Communicator,
    DeadlockError,
    MismatchError,
    Parcel,
    Traffic,
)

Result = TypeVar("Result")


def simulate(
    function: Callable[..., Result], ranks: int, *args: Any, **kwargs: Any
) -> list[Result]:
    """Run ``function(comm, *args, **kwargs)`` on ``ranks`` ranks at once.

    Args:
        function: Called on every rank with its :class:`~isoform.parallel.Communicator` first.
        ranks: P, 1 or more.
        args: Given to every rank; they are shared, not copied.
        kwargs: Likewise.

    Returns:
        What the function returned, by rank.

    Raises:
        ValueError: ``ranks`` is less than 1.
        DeadlockError: Every rank that still runs waits for another.
        MismatchError: A message is not what its receiver wants.
        CommunicationError: A message was received by nobody.
        Exception: Whatever the function raised first on any rank, with its own traceback and a note
            of the rank. The other ranks end at their next call.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    world = _World(ranks)
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            comm = SimulatedCommunicator(world, (), list(range(ranks)), rank)
            results[rank] = function(comm, *args, **kwargs)
            world.finish(rank)
        except _Ended:
            pass
        except BaseException as error:
            if not isinstance(error, CommunicationError):  # those name their ranks
                error.add_note(f"raised by rank {rank} of {ranks}")
            world.fail(error)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(ranks)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C here must reach the ranks too
        world.fail(error)
        raise
    if world.failure is not None:
        raise world.failure
    world.check_delivered()
    return results


class _Ended(BaseException):
    """Raised on a rank because another one has failed."""


@dataclass(eq=False)
class _Posted:
    """One side of a message, and whether it has met the other."""

    rank: int  # of the world, as is the peer
    peer: int
    parcel: Parcel
    sent: bool
    met: bool = False

    def __str__(self) -> str:
        did, way = ("sends", "to") if self.sent else ("awaits", "from")
        return f"rank {self.rank} {did} {self.parcel.label} {way} rank {self.peer}"


@dataclass(eq=False)
class _World:
    """All ranks' messages and what each rank waits for; one lock guards everything."""

    size: int
    failure: BaseException | None = None
    finished: set[int] = field(default_factory=set)
    waiting: dict[int, list[_Posted]] = field(default_factory=dict)
    queues: dict[Hashable, deque[_Posted]] = field(default_factory=lambda: defaultdict(deque))
    changed: threading.Condition = field(default_factory=threading.Condition)

    def post(self, context: Hashable, posted: Sequence[_Posted]) -> None:
        """Put messages where their other sides are or will be; those that meet are delivered."""
        with self.changed:
            self._check_alive()
            for one in posted:
                ends = (one.rank, one.peer) if one.sent else (one.peer, one.rank)
                others = self.queues[context, ends, not one.sent]
                if others:
                    self._deliver(one, others.popleft())
                else:
                    self.queues[context, ends, one.sent].append(one)
            self.changed.notify_all()

    def _deliver(self, one: _Posted, other: _Posted) -> None:
        sent, wanted = (one, other) if one.sent else (other, one)
        if sent.parcel.label != wanted.parcel.label:
            raise MismatchError(
                f"rank {sent.rank} sends {sent.parcel.label}, "
                f"but rank {wanted.rank} wants {wanted.parcel.label}"
            )
        wanted.parcel.data[:] = sent.parcel.data
        sent.met = wanted.met = True

    def wait(self, rank: int, posted: Sequence[_Posted]) -> None:
        """Return when all of ``posted`` have met their other sides."""
        with self.changed:
            self.waiting[rank] = [one for one in posted if not one.met]
            while True:
                self._check_alive()
                self.waiting[rank] = [one for one in posted if not one.met]
                if not self.waiting[rank]:
                    del self.waiting[rank]
                    return
                self._check_deadlock()
                self.changed.wait()

    def finish(self, rank: int) -> None:
        """The rank has returned."""
        with self.changed:
            self.finished.add(rank)
            self._check_deadlock()

    def fail(self, error: BaseException) -> None:
        """End all ranks; the first error is the one that counts."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise _Ended

    def _check_deadlock(self) -> None:
        stuck = {
            rank: [one for one in posted if not one.met] for rank, posted in self.waiting.items()
        }
        # A rank whose messages have all met only has not woken up yet.
        if not stuck or not all(stuck.values()) or len(stuck) + len(self.finished) < self.size:
            return
        lines = [str(one) for rank in sorted(stuck) for one in stuck[rank]]
        lines += [f"rank {rank} has returned" for rank in sorted(self.finished)]
        raise DeadlockError("no rank can go on: " + "; ".join(lines))

    def check_delivered(self) -> None:
        """Raise CommunicationError where a message or a receive has found no other side."""
        left = [str(one) for queue in self.queues.values() for one in queue]
        if left:
            raise CommunicationError(f"left over when all ranks had returned: {'; '.join(left)}")


class SimulatedCommunicator(Communicator):
    """A rank of :func:`simulate`, which makes them. Ranks may share a GPU."""

    devices = frozenset({"cpu", "cuda"})

    def __init__(
        self,
        world: _World,
        context: tuple[Hashable, ...],
        members: Sequence[int],
        rank: int,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__(rank, len(members), traffic)
        self._world = world
        self._context = context  # tells messages of one communicator from those of another
        self._members = members  # ranks of the world
        self._splits = 0

    def _post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        own = self._members[self.rank]
        posted = [
            _Posted(own, self._members[parcel.peer], parcel, sent)
            for parcels, sent in ((receives, False), (sends, True))
            for parcel in parcels
        ]
        self._world.post(self._context, posted)
        return lambda: self._world.wait(own, posted)

    def _subgroup(self, groups: Sequence[Sequence[int]], mine: int) -> Communicator:
        self._splits += 1
        members = [self._members[rank] for rank in groups[mine]]
        return SimulatedCommunicator(
            self._world,
            (*self._context, (self._splits, mine)),
            members,
            groups[mine].index(self.rank),
            self.traffic,
        )
