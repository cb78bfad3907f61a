"""Faults that implementations of any attention have had, or could have: what mutants are made of.

Each is a small function that stands in for a right one, or changes what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array, rounded
from isoform.reference.contract import Unsupported

Operands = dict[str, Any]


def as_it_is(x: Any) -> Any:
    """No fault."""
    return x


def shifted_softmax(s: Array) -> tuple[Array, Array]:
    """Softmax and lse, right for rows without a key."""
    top = s.max(-1, keepdims=True, initial=-np.inf)
    none_left = top == -np.inf
    e = np.exp(s - np.where(none_left, 0, top))
    total = np.where(none_left, 1, e.sum(-1, keepdims=True))
    return e / total, np.where(none_left, -np.inf, top + np.log(total))[..., 0]


def unshifted_softmax(s: Array) -> tuple[Array, Array]:
    """The maximum is not subtracted first: large logits overflow."""
    e = np.exp(s)
    total = e.sum(-1, keepdims=True)
    return e / total, np.log(total)[..., 0]


def careless_softmax(s: Array) -> tuple[Array, Array]:
    """−inf minus −inf where no key is left."""
    top = s.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    return e / total, (top + np.log(total))[..., 0]


def uniform_softmax(s: Array) -> tuple[Array, Array]:
    """−inf replaced by a large negative number: a row without a key attends to all alike."""
    return shifted_softmax(np.maximum(s, s.dtype.type(-1e30)))


def narrow_product(p: Array, v: Array) -> Array:
    """P·V summed in bfloat16, sixteen keys at a time."""
    total = np.zeros((*p.shape[:-1], v.shape[-1]), p.dtype)
    for start in range(0, v.shape[-2], 16):
        part = p[..., start : start + 16] @ v[..., start : start + 16, :]
        total = rounded(total + part, "bfloat16")
    return total


def shuffled_product(p: Array, v: Array) -> Array:
    """P·V summed over the keys in another order each time, as atomics do."""
    order = np.random.default_rng().permutation(v.shape[-2])
    return sum((p[..., j, None] * v[..., j, None, :] for j in order), start=np.zeros((), p.dtype))


def cut_product(p: Array, v: Array) -> Array:
    """P·V cut to bfloat16 by dropping the lower half of the float32, not rounded to nearest."""
    return ((p @ v).view(np.uint32) & 0xFFFF0000).view(np.float32)


def few_digits(x: Array) -> Array:
    """Rounded to four significant bits, as an 8-bit float has."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 16) / 16, exponent)


def flushed(x: Array) -> Array:
    """Subnormal numbers made zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, x.dtype.type(0), x)


def spiked(x: Array) -> Array:
    """One element in 500 off by a few units of the last place: a rare race, a bad lane."""
    x = x.copy()
    flat = x.reshape(-1)
    flat[::500] = flat[::500] * x.dtype.type(1 + 3 * 2.0**-7)
    return x


def reused_buffer() -> Callable[[Array], Array]:
    """Results are returned in a buffer that the next call of the same shape writes to."""
    buffers: dict[tuple[int, ...], Array] = {}

    def out(x: Array) -> Array:
        buffer = buffers.setdefault(x.shape, np.empty_like(x))
        buffer[...] = x
        return buffer

    return out


def stale_last_query() -> Callable[[Array], Array]:
    """The last query is never written: it holds what the last call left there."""
    last: list[Array] = []

    def out(x: Array) -> Array:
        x = x.copy()
        fresh = x[..., -1, :, :].copy()
        if last and last[0].shape == fresh.shape:
            x[..., -1, :, :] = last[0]
        last[:] = [fresh]
        return x

    return out


def unsummed_groups(dx: Array, groups: int) -> Array:
    """Of the query heads that share a key head, only the last one's gradient is kept."""
    *batch, H, L, D = dx.shape
    return dx.reshape(*batch, groups, H // groups, L, D)[..., -1, :, :]


def gradient(name: str, change: Callable[[Array, Operands], Array]) -> Callable[..., Any]:
    """The gradients (a named tuple), ``name`` changed, given it and the operands."""
    return lambda gradients, operands: gradients._replace(
        **{name: change(getattr(gradients, name), operands)}
    )


def declines(dtype: str) -> Callable[..., object]:
    """A check that declines ``dtype``."""

    def check(q: Array, *operands: Any, **more: Any) -> None:
        if q.dtype.name == dtype:
            raise Unsupported([f"dtype {dtype}"])

    return check


def crashes(dtype: str) -> Callable[..., object]:
    """A check that crashes on ``dtype``."""

    def check(q: Array, *operands: Any, **more: Any) -> None:
        if q.dtype.name == dtype:
            raise KeyError(dtype)

    return check
