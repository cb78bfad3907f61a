"""What one rank computes by itself: attention to a block of keys, and how blocks are merged.

The strategies are written once for NumPy arrays and PyTorch tensors. Here is where a call reaches
the library whose arrays it came with: the tiled forms of the reference, in float32 (float64 for
float64), or on a GPU :func:`isoform.kernels.attention.attention_block`. The memory of each grows
with the lengths and not with their product.

What positions alone decide goes on a GPU in parts that the fastest kernels can do
(:mod:`isoform.parallel.in_parts`); what these give is rounded to the operands' 16 bits, and merged
and summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from isoform.parallel import in_parts
from isoform.parallel.arrays import Array, as_like, is_tensor, widened
from isoform.parallel.in_parts import Parts, cut
from isoform.parallel.sharding import Sharding
from isoform.reference.numpy.attention import attention_delta
from isoform.reference.numpy.attention import merge as merge_arrays
from isoform.reference.numpy.attention_tiled import (
    attention_block_backward_tiled,
    attention_block_tiled,
)

BLOCK_Q, BLOCK_K = 256, 512
"""Queries, and keys, that are worked on at once."""


class Gradients(NamedTuple):
    """The gradients of this rank's shards of q, k and v, in their shapes."""

    dq: Any
    dk: Any
    dv: Any


class Saved(NamedTuple):
    """What the backward of a strategy needs of its forward."""

    q: Any
    k: Any
    v: Any
    out: Any  # rounded to q's dtype
    lse: Any


@dataclass(frozen=True)
class Mask:
    """Who attends to whom: what every rank knows of all ranks.

    Attributes:
        sharding: Which positions each rank has.
        positions: By rank, where its tokens are, int ``[L_r]`` or ``[B, L_r]``; None where the
            sharding says it.
        segments: By rank, int ``[L_r]`` or ``[B, L_r]``, or None where all is one segment.
        causal: No query attends to a later position.
        window: How far a query looks, as in :func:`isoform.reference.numpy.attention.attention`.
        scale: Factor of the logits, or None for ``D**-0.5``.
        deterministic: Equal calls must give equal bits.
    """

    sharding: Sharding
    positions: tuple[Array, ...] | None = None
    segments: tuple[Array, ...] | None = None
    causal: bool = False
    window: int | tuple[int, int] | None = None
    scale: float | None = None
    deterministic: bool = False

    def to_all(self, rank: int, like: Any) -> dict[str, Any]:
        """The options of attention from one rank's shard to the whole, in its own order."""
        if self.in_parts(like):
            parts = _parts(self.sharding, (rank,), None, self.causal)
            if parts is not None:
                return {"parts": parts, "scale": self.scale}
        options = self.between([rank], range(self.sharding.ranks), like)
        return self._ordered(options, ("key_positions", "key_segments"), like)

    def in_order(self, like: Any) -> dict[str, Any]:
        """The options of attention from the whole to itself, in the order of the sequence."""
        every = range(self.sharding.ranks)
        options = self.between(every, every, like)
        places = ("positions", "segments", "key_positions", "key_segments")
        return self._ordered(options, places, like)

    def between(self, queries: Sequence[int], keys: Sequence[int], like: Any) -> dict[str, Any]:
        """The options of attention from the shards of some ranks to those of others.

        Args:
            queries: Ranks whose queries attend, in the order in which their shards lie.
            keys: Ranks whose keys they attend to, likewise.
            like: An array of the library and device that the options are for.
        """
        if self.in_parts(like):
            parts = _parts(self.sharding, tuple(queries), tuple(keys), self.causal)
            if parts is not None:
                return {"parts": parts, "scale": self.scale}
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "positions": as_like(self._places(queries), like),
            "key_positions": as_like(self._places(keys), like),
        }
        if self.segments is not None:
            options["segments"] = as_like(self._segments(queries), like)
            options["key_segments"] = as_like(self._segments(keys), like)
        return options

    def in_parts(self, like: Any) -> bool:
        """Whether plain calls do it, by the fastest kernels, which are not deterministic."""
        places = self.positions is None and self.segments is None
        plain = places and self.window is None and not self.deterministic
        return plain and _on_kernels(like) and like.dtype.itemsize == 2

    def length(self, ranks: Sequence[int]) -> int:
        """How many positions some ranks have together."""
        return sum(self.sharding.lengths[rank] for rank in ranks)

    def _ordered(self, options: dict[str, Any], names: Sequence[str], like: Any) -> dict[str, Any]:
        """``options`` with those of the whole, ``names``, from the order of ranks to its own."""
        every = map(self.sharding.positions, range(self.sharding.ranks))
        order = as_like(np.argsort(_together(every)), like)
        return {name: x[..., order] if name in names else x for name, x in options.items()}

    def _places(self, ranks: Sequence[int]) -> Array:
        given = self.positions
        return _together(self.sharding.positions(r) if given is None else given[r] for r in ranks)

    def _segments(self, ranks: Sequence[int]) -> Array:
        assert self.segments is not None
        return _together(self.segments[rank] for rank in ranks)


def _together(places: Iterable[Array]) -> Array:
    """Positions or segments of several ranks, one after the other."""
    return np.concatenate([*places], axis=-1)


@lru_cache(maxsize=1024)  # the same at every layer and step
def _parts(
    sharding: Sharding, queries: tuple[int, ...], keys: tuple[int, ...] | None, causal: bool
) -> Parts | None:
    """How the shards of some ranks attend to those of others, or to the whole in its own order."""
    own = _together(map(sharding.positions, queries))
    whole = np.arange(sharding.length)
    other = whole if keys is None else _together(map(sharding.positions, keys))
    return cut(own, other, causal=causal)


def attend(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """``out`` and ``lse`` of one block of keys, at least float32 but where it is in one part."""
    if _on_kernels(q):
        from isoform.kernels.attention import attention, attention_block

        if "parts" not in options:
            return attention_block(q, k, v, **options)
        parts, scale = options["parts"], options["scale"]

        def of_part(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
            found: tuple[Any, Any] = attention(q, k, v, causal=causal, scale=scale, return_lse=True)
            return found

        found: tuple[Any, Any] = in_parts.attend(q, k, v, parts, of_part, merge)
        return found
    if is_tensor(q):
        from isoform.reference.torch.attention import attention_block_tiled as tiled

        return tiled(q, k, v, **options, block_q=BLOCK_Q)
    options = {**options, "compute_dtype": _compute_dtype(q)}
    return attention_block_tiled(q, k, v, **options, block_q=BLOCK_Q, block_k=BLOCK_K)


def differentiate(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    lse: Any,
    delta: Any,
    options: dict[str, Any],
    out: Any = None,
) -> Gradients:
    """What one block of keys gives to ``dq``, and its ``dk`` and ``dv``, at least float32 but where
    it is in one part.

    Parts need ``out``, the whole's output; whatever else, ``delta``.
    """
    if _on_kernels(q):
        from isoform.kernels.attention import attention_block_backward, attention_saved_backward

        if "parts" not in options:
            delta = delta_of(dout, out) if delta is None else delta
            return Gradients(*attention_block_backward(dout, q, k, v, lse, delta, **options))
        parts, scale = options["parts"], options["scale"]

        def of_part(
            dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool
        ) -> tuple[Any, Any, Any]:
            return attention_saved_backward(dout, q, k, v, out, lse, causal=causal, scale=scale)

        return Gradients(*in_parts.differentiate(dout, q, k, v, out, lse, parts, of_part))
    if is_tensor(q):
        from isoform.reference.torch.attention import attention_block_backward_tiled as tiled

        return Gradients(*tiled(dout, q, k, v, lse, delta, **options, block_q=BLOCK_Q))
    options = {**options, "compute_dtype": _compute_dtype(q)}
    return Gradients(
        *attention_block_backward_tiled(
            dout, q, k, v, lse, delta, **options, block_q=BLOCK_Q, block_k=BLOCK_K
        )
    )


def add(total: Any, part: Any) -> Any:
    """``total + part``, at least float32. What ``total`` holds, 0 at first, may be overwritten."""
    if not _on_kernels(part):
        return total + part
    return widened(part) if isinstance(total, int) else total.add_(part)


def delta_of(dout: Any, out: Any) -> Any:
    """δ ``[B, H, L_r]``, which the backward of every block needs."""
    if is_tensor(out):
        from isoform.reference.torch.attention import attention_delta as of_tensors

        return of_tensors(dout, out)
    return attention_delta(dout, out, compute_dtype=_compute_dtype(out))


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """Attention to two blocks of keys from that to each, at least float32 (rule EVO-11).

    ``out_a`` may be overwritten.
    """
    if _on_kernels(out_a):
        return merge_into(out_a, lse_a, out_b, lse_b)
    if is_tensor(out_a):
        from isoform.reference.torch.attention import merge as of_tensors

        return of_tensors(out_a, lse_a, out_b, lse_b)
    return merge_arrays(out_a, lse_a, out_b, lse_b)


def merge_into(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """:func:`merge` of tensors in two passes over ``out_a``, which is overwritten if it is wide."""
    import torch

    lse = torch.logaddexp(lse_a, lse_b)
    none_left = lse == -torch.inf

    def share(of: Any) -> Any:
        return (of - lse).exp_().masked_fill_(none_left, 0.0).transpose(-1, -2)[..., None]

    return widened(out_a).mul_(share(lse_a)).addcmul_(widened(out_b), share(lse_b)), lse


def _on_kernels(x: Any) -> bool:
    """Whether ``x`` is a tensor on a GPU, and no float64: that, kernels leave to the reference."""
    return is_tensor(x) and x.device.type == "cuda" and x.dtype.itemsize < 8


def _compute_dtype(x: Array) -> np.dtype[Any]:
    return np.dtype(np.float64 if x.dtype.itemsize == 8 else np.float32)
