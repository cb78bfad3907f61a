"""Which rank holds which position of a sequence, and everything that follows from it.

A sequence of L positions is cut into consecutive *chunks*, and every chunk is given to one of P
ranks. The three ways to do so differ in how many chunks there are and in whose they are::

    contiguous       P chunks        chunk c to rank c
    zigzag           2P chunks       chunk c to rank min(c, 2P − 1 − c)
    striped(block)   ⌈L / block⌉     chunk c to rank c mod P

Under a causal mask a query at position p has p + 1 keys, so a contiguous last shard has nearly
twice the average work. Zigzag gives every rank an early and a late chunk, whose work adds up to the
same for all (Zhu, ring-flash-attention; Llama 3, arXiv 2407.21783, section 3.3.2). Striping gives
everyone a little from everywhere (Brandon et al., arXiv 2311.09431).

Chunks of the first two have the lengths that ``numpy.array_split`` gives: the first L mod C of C
chunks hold one position more. So no length is illegal. Shards are uneven where P does not divide L,
at most by one position for these two and by one block for the third, and empty where there are
fewer chunks than ranks.

A rank keeps its positions in rising order. Whatever depends on the place in the sequence must be
told them: the causal mask and the rotary embedding (:meth:`Sharding.positions`), the label of a
token, which is the next token and may be on another rank (:meth:`Sharding.successors`), and the
mean of the loss, which is not the mean of the ranks' means (:func:`loss_weights`).

Axes: L positions of the whole sequence, written L_r for those of rank r; P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from isoform.parallel.arrays import (
    Array,
    as_like,
    check_array,
    check_axis,
    concatenate,
    is_tensor,
    take,
    where,
)

Kind = Literal["contiguous", "zigzag", "striped"]

IGNORE = -100
"""The label of a position that has none; what PyTorch's cross entropy leaves out by default."""


class Successors(NamedTuple):
    """Where the next position of each of a shard's positions is held: by which rank, and at which
    place in that rank's shard. ``int64 [L_r]`` each; −1 after the last position of the sequence.
    """

    rank: Array
    place: Array


class _Chunks(NamedTuple):
    """Every chunk of a sharding, in the order of the sequence: C of them, all ``int64``."""

    starts: Array  # [C + 1]: where each begins, with L at the end
    sizes: Array  # [C]
    owners: Array  # [C]: the rank that holds it
    before: Array  # [C]: how many positions the same rank holds in earlier chunks
    held: Array  # [P]: how many positions each rank holds


@dataclass(frozen=True)
class Sharding:
    """A division of ``length`` positions among ``ranks`` ranks.

    Attributes:
        kind: ``"contiguous"``, ``"zigzag"`` or ``"striped"``.
        length: L, positions in the whole sequence, 0 or more.
        ranks: P, 1 or more; any number, whether or not it divides L.
        block: Positions in a stripe, 1 or more; 1 for the kinds that have no stripes.

    Raises:
        TypeError: A number is no integer.
        ValueError: The kind is unknown or a number is out of range.
    """

    kind: Kind
    length: int
    ranks: int
    block: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name, least in (("length", 0), ("ranks", 1), ("block", 1)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
            object.__setattr__(self, name, int(number))
        if self.kind != "striped" and self.block != 1:
            raise ValueError(f"a {self.kind} sharding has no blocks, got block={self.block}")

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Sharding:
        """P chunks, one for each rank in turn."""
        return cls("contiguous", length, ranks)

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Sharding:
        """2P chunks, of which rank r holds r and 2P − 1 − r: causal work is the same for all."""
        return cls("zigzag", length, ranks)

    @classmethod
    def striped(cls, length: int, ranks: int, block: int = 1) -> Sharding:
        """Chunks of ``block`` positions (the last may be shorter), dealt out in turn."""
        return cls("striped", length, ranks, block)

    # --- the map ---

    @property
    def chunk_count(self) -> int:
        """How many chunks the sequence is cut into."""
        if self.kind == "striped":
            return -(-self.length // self.block)
        return self.ranks if self.kind == "contiguous" else 2 * self.ranks

    @cached_property
    def cuts(self) -> tuple[Array, Array]:
        """Where each of C chunks begins, with L at the end, and who holds it: ``int64``."""
        c = np.arange(self.chunk_count)
        if self.kind == "striped":
            return np.append(c * self.block, self.length), c % self.ranks
        each, left = divmod(self.length, len(c))
        starts = np.append(c * each + np.minimum(c, left), self.length)
        return starts, c if self.kind == "contiguous" else np.minimum(c, len(c) - 1 - c)

    @cached_property
    def _chunks(self) -> _Chunks:
        starts, owners = self.cuts
        # What the same rank holds before a chunk: sort by rank, and sum up what is smaller.
        sizes, held = np.diff(starts), np.array(self.lengths, np.int64)
        by_owner = np.argsort(owners, kind="stable")
        before = np.empty_like(sizes)
        before[by_owner] = np.cumsum(sizes[by_owner]) - sizes[by_owner]
        before -= (np.cumsum(held) - held)[owners]
        return _Chunks(starts, sizes, owners, before, held)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """L_r of every rank: how many positions it holds."""
        starts, owners = self.cuts
        held = np.zeros(self.ranks, np.int64)
        np.add.at(held, owners, np.diff(starts))
        return tuple(held.tolist())

    def chunks(self, rank: int) -> tuple[range, ...]:
        """The runs of consecutive positions that ``rank`` holds, in order, none of them empty.

        Raises:
            ValueError: There is no such rank.
        """
        starts, sizes, owners, *_ = self._chunks
        mine = np.flatnonzero((owners == self._checked(rank)) & (sizes > 0))
        return tuple(range(int(starts[c]), int(starts[c + 1])) for c in mine)

    def positions(self, rank: int) -> Array:
        """The positions that ``rank`` holds, rising, ``int64 [L_r]``.

        Raises:
            ValueError: There is no such rank.
        """
        starts, sizes, owners, before, held = self._chunks
        mine = owners == self._checked(rank)
        # A chunk lies in the shard at ``before``: position and place differ by a constant in it.
        shift: Array = np.repeat((starts[:-1] - before)[mine], sizes[mine])
        return np.arange(held[rank]) + shift

    def owners(self, positions: Array) -> Array:
        """The rank that holds each of ``positions``, in their shape, ``int64``.

        Raises:
            TypeError: Positions are no integers.
            ValueError: A position is not in the sequence.
        """
        owners: Array = self._chunks.owners[self._chunk_of(positions)]
        return owners

    def indices(self, positions: Array) -> Array:
        """Where in its owner's shard each of ``positions`` lies, in their shape, ``int64``.

        Raises:
            TypeError: Positions are no integers.
            ValueError: A position is not in the sequence.
        """
        c = self._chunk_of(positions)
        return np.asarray(positions) - self._chunks.starts[c] + self._chunks.before[c]

    def _chunk_of(self, positions: Array) -> Array:
        at = np.asarray(positions)
        if not np.issubdtype(at.dtype, np.integer):
            raise TypeError(f"positions must be integers, got {at.dtype}")
        if at.size and (at.min() < 0 or at.max() >= self.length):
            raise ValueError(
                f"positions must be at least 0 and less than L={self.length}, "
                f"got {at.min()} to {at.max()}"
            )
        # "right" passes over empty chunks to the one that holds the position
        return np.searchsorted(self._chunks.starts, at, side="right") - 1

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be at least 0 and less than P={self.ranks}, got {rank}")
        return rank

    # --- arrays ---

    def shard(self, x: Any, rank: int, axis: int = 1) -> Any:
        """The part of ``x`` that ``rank`` holds, a copy.

        Args:
            x: Array or tensor with L positions on ``axis``. A tensor's shard is differentiable.
            rank: Whose part.
            axis: The axis of the sequence; 1 for ``[B, L, H, D]``.

        Returns:
            ``x`` with L_r positions on ``axis``, in the order of :meth:`positions`.

        Raises:
            TypeError: ``x`` is no array.
            ValueError: There is no such rank or axis, or the axis has not L positions.
        """
        self._check_length("x", x, axis)
        return take(x, self.positions(rank), axis)

    def unshard(self, shards: Sequence[Any], axis: int = 1) -> Any:
        """The whole from the shards of all ranks: undoes :meth:`shard`.

        Args:
            shards: One array or tensor per rank, rank 0 first, L_r positions on ``axis``.
            axis: The axis of the sequence.

        Returns:
            The whole, with L positions on ``axis``; a copy, differentiable for tensors.

        Raises:
            TypeError: A shard is no array.
            ValueError: There is not one shard per rank, or one has not its L_r positions.
        """
        if len(shards) != self.ranks:
            raise ValueError(
                f"there must be one shard for each of {self.ranks} ranks, got {len(shards)}"
            )
        for rank, (x, held) in enumerate(zip(shards, self.lengths, strict=True)):
            check_array(f"shard {rank}", x)
            check_axis(f"shard {rank}", x, axis)
            if x.shape[axis] != held:
                raise ValueError(
                    f"shard {rank} must have {held} positions on axis {axis}, "
                    f"got shape {tuple(x.shape)}"
                )
        order = np.concatenate([self.positions(rank) for rank in range(self.ranks)])
        return take(concatenate(shards, axis), np.argsort(order), axis)

    # --- labels ---

    def successors(self, rank: int) -> Successors:
        """Who holds the position after each of ``rank``'s own.

        Most are the next in the same shard. At the end of a chunk they are elsewhere: there a shift
        by one within the shard takes a token from the wrong place.
        """
        following = self.positions(rank) + 1
        inside = following < self.length
        reach = np.where(inside, following, 0)
        return Successors(
            np.where(inside, self.owners(reach), -1), np.where(inside, self.indices(reach), -1)
        )

    def labels(
        self,
        tokens: Any,
        rank: int,
        *,
        axis: int = -1,
        segments: Any = None,
        ignore: int = IGNORE,
    ) -> Any:
        """The labels of ``rank``'s tokens for next-token prediction, from the whole sequence.

        Where no rank has the whole, :func:`isoform.parallel.labels.shift_labels` exchanges the
        tokens at the borders.

        Args:
            tokens: Integer array or tensor with L positions on ``axis``.
            rank: Whose labels.
            axis: The axis of the sequence; the last for ``[B, L]``.
            segments: Integer ids that broadcast against ``tokens``, where the sequence holds
                several documents; the last token of a document has no label.
            ignore: The label of a token that has none.

        Returns:
            ``tokens`` with L_r positions on ``axis``: the token after each of the rank's own.

        Raises:
            As :meth:`shard`.
        """
        own = self.positions(rank)
        following = np.minimum(own + 1, self.length - 1)
        self._check_length("tokens", tokens, axis)
        axis -= len(tokens.shape) if axis >= 0 else 0  # from the end, as broadcasting counts
        along = [-1] + [1] * (-axis - 1)
        none = as_like((own == following).reshape(along), tokens)  # after the last there is none
        if segments is not None:
            self._check_length("segments", segments, axis)
            none = none | (take(segments, own, axis) != take(segments, following, axis))
        return where(none, ignore, take(tokens, following, axis))

    def _check_length(self, name: str, x: Any, axis: int) -> None:
        check_array(name, x)
        check_axis(name, x, axis)
        if x.shape[axis] != self.length:
            raise ValueError(
                f"{name} must have L={self.length} positions on axis {axis}, "
                f"got shape {tuple(x.shape)}"
            )


def loss_weights(
    counted: Any, total: int, ranks: int, *, reduction: Literal["mean", "sum"] = "mean"
) -> Any:
    """What to multiply a rank's token losses with, so that the ranks together give the global mean.

    The mean over all N counted tokens is not the mean of the ranks' own means: shards are uneven,
    and tokens without a label are not spread evenly. With the weights w of this function and the
    rank's loss Σ_t w_t ℓ_t (a sum, no mean), the mean over ranks (``reduction="mean"``: w = P / N,
    as data-parallel wrappers average gradients) or the sum over ranks (``"sum"``: w = 1 / N) is
    Σ ℓ / N.

    Args:
        counted: Bool, any shape: which of the rank's own tokens have a label.
        total: N, the counted tokens of all ranks together.
        ranks: P, how many ranks are averaged over.
        reduction: How the ranks' losses or gradients are put together.

    Returns:
        float64 (a float32 tensor for a tensor) in the shape of ``counted``; 0 where it is not
        counted. All 0 where N = 0: a mean over nothing trains nothing.

    Raises:
        ValueError: ``total`` is less than what this rank counts, or the reduction is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if (own := int(counted.sum())) > total:
        raise ValueError(f"this rank counts {own} tokens, more than the total of {total}")
    weight = (ranks if reduction == "mean" else 1) / max(total, 1)
    return counted.float() * weight if is_tensor(counted) else counted * np.float64(weight)


@dataclass(frozen=True)
class Documents:
    """Documents packed one after the other into one sequence, without padding.

    Attributes:
        lengths: Tokens of every document, in order; 0 is legal.

    Raises:
        TypeError: A length is no integer.
        ValueError: A length is negative.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        for number, length in enumerate(self.lengths):
            if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
                raise TypeError(
                    f"length of document {number} must be an integer, got {type(length).__name__}"
                )
            if length < 0:
                raise ValueError(f"length of document {number} must be at least 0, got {length}")
        object.__setattr__(self, "lengths", tuple(int(length) for length in self.lengths))

    @property
    def length(self) -> int:
        """L, the tokens of all documents together."""
        return sum(self.lengths)

    @property
    def borders(self) -> Array:
        """Where each document begins, with L at the end, ``int64 [documents + 1]``.

        Known elsewhere as ``cu_seqlens``.
        """
        return np.concatenate([[0], np.cumsum(np.asarray(self.lengths, np.int64))]).astype(np.int64)

    @property
    def segments(self) -> Array:
        """The number of the document that each position belongs to, ``int64 [L]``."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def positions(self) -> Array:
        """The place of each position in its own document, from 0, ``int64 [L]``.

        What the rotary embedding wants. The causal mask may have these or the positions in the
        packed sequence: within one document they differ by a constant.
        """
        starts: Array = np.repeat(self.borders[:-1], self.lengths)
        return np.arange(self.length) - starts
