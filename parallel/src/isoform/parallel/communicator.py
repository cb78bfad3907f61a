"""Moving arrays between ranks: the few operations that sequence parallelism needs.

A *rank* is one of P programs that run at once, each with its own memory. Everything here is built
on one step: post some sends and some receives, and wait for them later. A transport
(:mod:`isoform.parallel.communicators`) brings that step, for plain bytes, and nothing else::

    exchange           sends and receives of the caller's choice; what a ring needs
    all_to_all         rank a's part b becomes rank b's part a; turns one sharded axis into another
    all_gather         everybody gets everybody's array; its adjoint is
    reduce_scatter     rank r gets the sum of everybody's part r
    split              communicators of some of the ranks, for grids of ranks
    agree              stop, with names, where ranks have come with different calls

Three decisions follow.

*Nothing is added up on the way.* A reduction is an all-to-all and a sum on arrival, over the ranks
in order, in at least float32. So bfloat16 needs no support from the transport, a sum is the same
bit for bit from run to run, and no more bytes are sent than by any other reduce-scatter.

*Counts are known, not asked for.* Shapes of what arrives are the caller's to say; a
:class:`~isoform.parallel.Sharding` knows them. Empty arrays are not sent.

*What is sent is counted.* Every rank counts its bytes and messages by operation
(:class:`Traffic`), so that a strategy's cost can be held to its formula exactly.

Arrays are NumPy arrays or PyTorch tensors, of any dtype; results are of the kind that was given.
Where the transport moves a GPU's memory (:attr:`Communicator.devices`), tensors may lie there, and
CuPy arrays.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from isoform.parallel.arrays import (
    as_bytes,
    check_array,
    contiguous,
    device_of,
    empty,
    is_contiguous,
    widened,
)
from isoform.reference.contract import dtype_name

Shape = Sequence[int]


class CommunicationError(RuntimeError):
    """Ranks could not do together what they were called for."""


class MismatchError(CommunicationError):
    """Ranks have come with different calls; the message says which and how they differ."""


class DeadlockError(CommunicationError):
    """Every rank waits for another; the message says who waits for what."""


@dataclass
class Traffic:
    """What one rank has sent to others, by operation.

    Attributes:
        bytes_by: Bytes, by the name of the operation.
        messages_by: Messages, likewise.
    """

    bytes_by: Counter[str] = field(default_factory=Counter)
    messages_by: Counter[str] = field(default_factory=Counter)

    def count(self, operation: str, size: int) -> None:
        """Add one message of ``size`` bytes."""
        self.bytes_by[operation] += size
        self.messages_by[operation] += 1

    def clear(self) -> None:
        """Begin again from zero."""
        self.bytes_by.clear()
        self.messages_by.clear()


class Parcel(NamedTuple):
    """One message as a transport sees it: sent to rank ``peer`` or wanted from it.

    ``data`` is the memory of the array that is sent or filled, ``uint8 [bytes]``, never empty: a
    NumPy array, or where that memory is a GPU's a CuPy array or a PyTorch tensor. What it is says
    ``label``, in words, as ``"all_gather float32[2, 7]"``: the same on both sides.
    """

    peer: int
    data: Any
    label: str


class Transfer:
    """Sends and receives under way.

    Until :meth:`wait` returns, what is sent must not be changed and what is received not be read.
    """

    def __init__(self, finish: Callable[[], None], filled: Sequence[Any]) -> None:
        self._finish: Callable[[], None] | None = finish
        self._filled = filled

    def wait(self) -> Sequence[Any]:
        """Return what was received, when all is sent and received. Again: at once."""
        if self._finish is not None:
            self._finish()
            self._finish = None  # and with it every array that was kept for the transport
        return self._filled


class Communicator(ABC):
    """P ranks that can send each other arrays; this is one of them.

    Every operation but :meth:`exchange` is collective: all ranks call it, in the same order.

    Attributes:
        rank: Which rank this is, 0 to P − 1.
        size: P.
        traffic: What this rank has sent, communicators split from this one included.
        devices: The kinds of memory that arrays may lie in.
    """

    devices: frozenset[str] = frozenset({"cpu"})

    def __init__(self, rank: int, size: int, traffic: Traffic | None = None) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic() if traffic is None else traffic
        self._grids: dict[int, tuple[Communicator, Communicator]] = {}

    # --- what a transport brings ---

    @abstractmethod
    def _post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        """Begin to send and to receive; return what waits for all of it.

        Messages from one rank to another arrive in the order in which they were posted. No call may
        rely on a send being finished before its receive is posted.
        """

    @abstractmethod
    def _subgroup(self, groups: Sequence[Sequence[int]], mine: int) -> Communicator:
        """A communicator of the ranks in ``groups[mine]``, in that order; collective over all."""

    # --- operations ---

    def exchange(
        self,
        sends: Iterable[tuple[int, Any]],
        receives: Iterable[tuple[int, Any]],
        *,
        operation: str = "exchange",
    ) -> Transfer:
        """Begin to send and to receive; compute something; then wait for it.

        Args:
            sends: Pairs of a rank and the array to send it.
            receives: Pairs of a rank and the array to fill with what it sends. Its shape and dtype
                are those of what was sent. It must be contiguous, since it is filled in place.
            operation: Under which name to count what is sent, and to report what is wrong.

        Returns:
            The transfer under way, to be waited for.

        Raises:
            TypeError: Something is no array.
            ValueError: A rank is not another rank of this communicator, or an array to be filled is
                not contiguous.
        """
        filled = list(receives)
        outgoing = [self._parcel(to, x, operation, "sent") for to, x in sends]
        incoming = [self._parcel(source, x, operation, "filled") for source, x in filled]
        outgoing = [parcel for parcel in outgoing if len(parcel.data)]
        for parcel in outgoing:
            self.traffic.count(operation, len(parcel.data))
        finish = self._post(outgoing, [parcel for parcel in incoming if len(parcel.data)])
        return Transfer(finish, [x for _, x in filled])

    def _parcel(self, peer: int, x: Any, operation: str, use: str) -> Parcel:
        if not (0 <= peer < self.size and peer != self.rank):
            raise ValueError(f"rank {self.rank} of {self.size} cannot exchange with rank {peer}")
        check_array(f"what is {use}", x)
        if (device := device_of(x)) not in self.devices:
            moved = ", ".join(sorted(self.devices))
            raise TypeError(f"what is {use} must be in memory of {moved}, this is on {device}")
        if use == "sent":
            x = contiguous(x)
        elif not is_contiguous(x):
            raise ValueError(f"what is filled must be contiguous, got shape {tuple(x.shape)}")
        return Parcel(peer, as_bytes(x), f"{operation} {dtype_name(x)}{list(x.shape)}")

    def all_to_all(
        self, parts: Sequence[Any], shapes: Sequence[Shape], *, operation: str = "all_to_all"
    ) -> list[Any]:
        """Give every rank its part, and get one from each.

        Args:
            parts: P arrays of one dtype; ``parts[r]`` is for rank r. Their shapes may differ.
            shapes: P shapes; ``shapes[r]`` is that of what rank r has for this one.
            operation: Name in the counts and in errors.

        Returns:
            P arrays: what each rank had for this one. The own part is given back as it is.

        Raises:
            ValueError: There are not P parts and P shapes, or the own part has not its shape.
        """
        return list(self.start_all_to_all(parts, shapes, operation=operation).wait())

    def start_all_to_all(
        self, parts: Sequence[Any], shapes: Sequence[Shape], *, operation: str = "all_to_all"
    ) -> Transfer:
        """Begin an :meth:`all_to_all`; compute something; then wait for what it gives back.

        Args:
            parts, shapes, operation: As in :meth:`all_to_all`.

        Returns:
            The transfer under way. Its ``wait`` returns the P arrays.

        Raises:
            ValueError: As :meth:`all_to_all`.
        """
        self._check_count("parts", parts)
        self._check_count("shapes", shapes)
        own = tuple(parts[self.rank].shape)
        if own != tuple(shapes[self.rank]):
            raise ValueError(
                f"shape {self.rank} is {tuple(shapes[self.rank])}, but the own part has {own}"
            )
        received = [
            parts[r] if r == self.rank else empty(shape, parts[self.rank])
            for r, shape in enumerate(shapes)
        ]
        # To the next rank first, then to the one after it: no rank is everybody's first.
        away = [(self.rank + step) % self.size for step in range(1, self.size)]
        back = [(self.rank - step) % self.size for step in range(1, self.size)]
        under_way = self.exchange(
            [(to, parts[to]) for to in away],
            [(source, received[source]) for source in back],
            operation=operation,
        )

        def finish() -> None:
            under_way.wait()

        return Transfer(finish, received)

    def all_gather(
        self, x: Any, shapes: Sequence[Shape], *, operation: str = "all_gather"
    ) -> list[Any]:
        """Get everybody's array.

        Args:
            x: This rank's array.
            shapes: P shapes; ``shapes[r]`` is that of rank r's array.
            operation: Name in the counts and in errors.

        Returns:
            P arrays; this rank's own as it is.

        Raises:
            ValueError: There are not P shapes, or x has not its shape.
        """
        return self.all_to_all([contiguous(x)] * self.size, shapes, operation=operation)

    def reduce_scatter(self, parts: Sequence[Any], *, operation: str = "reduce_scatter") -> Any:
        """The sum over ranks of what each has for this one. Adjoint of :meth:`all_gather`.

        Args:
            parts: P arrays of one dtype; ``parts[r]`` is this rank's contribution to rank r's sum,
                in the shape that all ranks have for r.
            operation: Name in the counts and in errors.

        Returns:
            The sum, in at least float32, added up from rank 0 to rank P − 1 at every world size.

        Raises:
            ValueError: There are not P parts.
        """
        self._check_count("parts", parts)
        shapes = [parts[self.rank].shape] * self.size
        first, *others = self.all_to_all(parts, shapes, operation=operation)
        total = widened(first, copy=True)
        for part in others:
            total += widened(part)
        return total

    def split(self, color: int, key: int = 0) -> Communicator:
        """A communicator of the ranks that give the same color.

        Args:
            color: Any integer.
            key: Ranks of the new communicator go by rising key, and by this rank where keys are
                equal.

        Returns:
            The communicator of this rank's color. It counts into the same traffic.
        """
        mine = np.array([color, key], np.int64)
        asked = self.all_gather(mine, [mine.shape] * self.size, operation="split")
        colors = sorted({int(c) for c, _ in asked})
        groups: list[list[int]] = [
            sorted((r for r in range(self.size) if asked[r][0] == c), key=lambda r: asked[r][1])
            for c in colors
        ]
        return self._subgroup(groups, colors.index(color))

    def grid(self, near: int) -> tuple[Communicator, Communicator]:
        """The ranks as groups of ``near`` consecutive ones; made once, and kept.

        Args:
            near: Ranks in a group; divides P.

        Returns:
            This rank's group, and the ranks that have its place in every group.

        Raises:
            ValueError: ``near`` does not divide P.
        """
        if near < 1 or self.size % near:
            raise ValueError(f"near must divide the {self.size} ranks, got near={near}")
        if near not in self._grids:
            self._grids[near] = (self.split(self.rank // near), self.split(self.rank % near))
        return self._grids[near]

    def agree(self, **facts: Any) -> None:
        """Raise on every rank, unless all ranks came with equal facts.

        Ranks that call an operation with different shapes or dtypes would wait for each other
        forever, or take one array for another. This finds out first: 32 bytes to every rank.

        Args:
            facts: What must be equal on all ranks: numbers, strings, None, and lists of them.

        Raises:
            MismatchError: Ranks differ; every fact that differs is named, with its values.
        """
        text = json.dumps(facts, sort_keys=True, default=str).encode()
        digest = _writable(hashlib.sha256(text).digest())
        digests = self.all_gather(digest, [digest.shape] * self.size, operation="agree")
        if all((other == digest).all() for other in digests):
            return
        # All ranks have seen that two differ, so all of them are here.
        size = np.array([len(text)], np.int64)
        sizes = self.all_gather(size, [size.shape] * self.size, operation="agree")
        texts = self.all_gather(_writable(text), [(int(n[0]),) for n in sizes], operation="agree")
        raise MismatchError(_differences([json.loads(bytes(text)) for text in texts]))

    def barrier(self) -> None:
        """Return when all ranks have come here. For tests: no algorithm needs it."""
        byte = np.zeros(1, np.uint8)
        self.all_gather(byte, [byte.shape] * self.size, operation="barrier")

    def _check_count(self, name: str, items: Sequence[Any]) -> None:
        if len(items) != self.size:
            raise ValueError(f"there must be {self.size} {name}, one per rank, got {len(items)}")


def _writable(text: bytes) -> Any:
    """Bytes as an array that may be written, which PyTorch insists on even where it only reads."""
    return np.frombuffer(bytearray(text), np.uint8)


def _differences(facts: Sequence[Mapping[str, Any]]) -> str:
    """What differs between the facts of the ranks, in words.

    What only some ranks know is not named, unless nothing else differs.
    """
    names = {name for own in facts for name in own}
    by_all = {name for name in names if all(name in own for own in facts)}
    found: list[str] = []
    for name in sorted(by_all) + sorted(names - by_all):
        ranks: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(json.dumps(own[name]) if name in own else "not given", []).append(rank)
        if len(ranks) > 1 and (name in by_all or not found):
            values = ", ".join(f"{value} on {_listed(who)}" for value, who in ranks.items())
            found.append(f"{name} is {values}")
    return f"ranks have come with different calls: {'; '.join(found)}"


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
