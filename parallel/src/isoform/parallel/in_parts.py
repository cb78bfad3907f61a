"""Causal attention between shards as a few plain calls: whole rectangles, and squares along the
diagonal.

Libraries' kernels of attention know no positions: a call is causal by index, or not at all. Where
neither documents nor windows are asked for, that is all it takes. Shards are *runs* of positions
without a gap. Of two runs, the queries from a on and the keys from b on, everything before the
diagonal attends, nothing beyond it does, and what lies on it is a causal square. And a shard's
attention to itself is causal by index, whatever gaps it has, once it is sorted::

            keys b …         e
    a  ┌────────────┬───────┐
       │  whole     │╲      │        zigzag shards of a ring: one rectangle at each step,
       │            │  ╲    │        and at a rank's own shard one causal square
       ├────────────┴───────┤
       │  whole             │
       └────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from isoform.parallel.arrays import Array

MOST = 8
"""Calls. Where shards are cut finer, as striped ones are, one that knows positions is faster."""


class Part(NamedTuple):
    """A rectangle of queries and keys, by index: all attend, or causally by index."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True, eq=False)
class Parts:
    """Rectangles that cover what attends, each pair once.

    Attributes:
        parts: The rectangles, of queries and keys in the order of their positions where ``order``
            is given.
        order: The indices of queries and keys, which then are the same tokens, by position.
    """

    parts: tuple[Part, ...]
    order: Array | None = None

    @cached_property
    def back(self) -> Array:
        """From the order of their positions to that in which they lie."""
        assert self.order is not None
        return np.argsort(self.order)


class Run(NamedTuple):
    """Positions ``[start, end)``, which lie from index ``at`` on."""

    at: int
    start: int
    end: int

    def between(self, start: int, end: int) -> slice:
        """Indices of these positions."""
        return slice(self.at + start - self.start, self.at + end - self.start)


Attend = Callable[[Any, Any, Any, bool], tuple[Any, Any]]
"""``attend(q, k, v, causal)``: out and lse."""

Differentiate = Callable[[Any, Any, Any, Any, Any, Any, bool], tuple[Any, Any, Any]]
"""``differentiate(dout, q, k, v, out, lse, causal)``: dq, dk and dv."""


def cut(queries: Array, keys: Array, *, causal: bool) -> Parts | None:
    """How attention between tokens at these positions is a few plain calls.

    Args:
        queries: int ``[Q]``, each position once.
        keys: int ``[K]``, likewise.
        causal: No query attends to a later position.

    Returns:
        The parts; None where it takes more than :data:`MOST`.
    """
    if not causal:
        return Parts((Part(slice(0, len(queries)), slice(0, len(keys)), False),))
    if np.array_equal(queries, keys):
        whole = Part(slice(0, len(queries)), slice(0, len(keys)), True)
        return Parts((whole,), None if np.all(np.diff(queries) > 0) else np.argsort(queries))
    own, other = runs(queries), runs(keys)
    if len(own) * len(other) > MOST**2:
        return None
    found = joined([part for a in own for b in other for part in _of_runs(a, b)])
    return Parts(tuple(found)) if len(found) <= MOST else None


def runs(positions: Array) -> list[Run]:
    """The runs of positions that rise by one, in the order in which they lie."""
    if not len(positions):
        return []
    starts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1)]
    ends = [*starts[1:], len(positions)]
    return [
        Run(int(first), int(positions[first]), int(positions[last - 1]) + 1)
        for first, last in zip(starts, ends, strict=True)
    ]


def _of_runs(q: Run, k: Run) -> Iterator[Part]:
    first = max(q.start, k.start)  # queries before it see none of these keys
    if first >= q.end:
        return
    if k.start < first:
        yield Part(q.between(first, q.end), k.between(k.start, min(first, k.end)), False)
    last = min(q.end, k.end)
    if first < last:
        yield Part(q.between(first, last), k.between(first, last), True)
        if last < q.end:
            yield Part(q.between(last, q.end), k.between(first, last), False)


def joined(parts: Sequence[Part]) -> list[Part]:
    """Fewer parts: rectangles that share a side are one."""
    found = list(parts)
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            if one.causal or other.causal:
                continue
            if one.queries == other.queries and one.keys.stop == other.keys.start:
                both = one._replace(keys=slice(one.keys.start, other.keys.stop))
            elif one.keys == other.keys and one.queries.stop == other.queries.start:
                both = one._replace(queries=slice(one.queries.start, other.queries.stop))
            else:
                continue
            return joined([both, *(part for part in found if part not in (one, other))])
    return found


def attend(q: Any, k: Any, v: Any, parts: Parts, one: Attend, merge: Callable[..., Any]) -> Any:
    """``out`` and ``lse`` of all parts together.

    Args:
        q: ``[B, Q, H, D]``, a tensor.
        k: ``[B, K, G, D]``.
        v: ``[B, K, G, D]``.
        parts: Of :func:`cut`.
        one: Attention of a part.
        merge: Of two results with their lse.

    Returns:
        ``out [B, Q, H, D]``, in the dtype that ``one`` gives or, where parts are merged, float32;
        ``lse [B, H, Q]``.
    """
    if parts.order is not None:
        order = _indices(parts.order, q)
        again = Parts(parts.parts)
        out, lse = attend(q[:, order], k[:, order], v[:, order], again, one, merge)
        back = _indices(parts.back, q)
        return out[:, back], lse[..., back]
    if len(parts.parts) == 1 and parts.parts[0].queries == slice(0, q.shape[1]):
        return one(q, k[:, parts.parts[0].keys], v[:, parts.parts[0].keys], parts.parts[0].causal)
    out = q.new_zeros(q.shape, dtype=_wide(q))
    B, Q, H, _ = q.shape
    lse = q.new_full((B, H, Q), -float("inf"), dtype=_wide(q))
    begun = np.zeros(Q, bool)
    for queries, keys, causal in parts.parts:
        found, its_lse = one(q[:, queries], k[:, keys], v[:, keys], causal)
        if begun[queries].any():
            found, its_lse = merge(out[:, queries], lse[..., queries], found, its_lse)
        out[:, queries], lse[..., queries] = found, its_lse
        begun[queries] = True
    return out, lse


def differentiate(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, parts: Parts, one: Differentiate
) -> tuple[Any, Any, Any]:
    """``dq, dk, dv`` of all parts together, float32 where there are several.

    Args:
        dout: Gradient of the loss by the whole's output, ``[B, Q, H, D]``.
        q, k, v, parts: As in :func:`attend`.
        out: The whole's output, ``[B, Q, H, D]``.
        lse: ``[B, H, Q]``, over all keys that there are, here and elsewhere.
        one: What a part gives.
    """
    if parts.order is not None:
        order = _indices(parts.order, q)
        again = Parts(parts.parts)
        dout, q, k, v, out = (x[:, order] for x in (dout, q, k, v, out))
        found = differentiate(dout, q, k, v, out, lse[..., order], again, one)
        back = _indices(parts.back, q)
        dq, dk, dv = (x[:, back] for x in found)
        return dq, dk, dv
    whole = (slice(0, q.shape[1]), slice(0, k.shape[1]))
    if len(parts.parts) == 1 and parts.parts[0][:2] == whole:
        return one(dout, q, k, v, out, lse, parts.parts[0].causal)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=_wide(x)) for x in (q, k, v))
    for queries, keys, causal in parts.parts:
        dout_, q_, out_ = (x[:, queries] for x in (dout, q, out))
        found = one(dout_, q_, k[:, keys], v[:, keys], out_, lse[..., queries], causal)
        dq[:, queries] += found[0]
        dk[:, keys] += found[1]
        dv[:, keys] += found[2]
    return dq, dk, dv


def _indices(order: Array, like: Any) -> Any:
    import torch

    return torch.from_numpy(order).to(like.device)


def _wide(x: Any) -> Any:
    import torch

    return torch.promote_types(x.dtype, torch.float32)
