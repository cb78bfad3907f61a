"""What the operands of rotary embedding hold: ordinary numbers, and those that break kernels.

Each recipe takes a freshly drawn standard-normal x (float64) and the positions 0 … L − 1 (int64)
and changes them in place, or puts others there. The names are those of a case's ``values``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.rotary.cases import turn_of
from isoform.reference.rotary_contract import RotaryShape

Recipe = Callable[[Operands, np.random.Generator, Case], None]

RANK, RANKS = 3, 8
"""The shard that is looked at, and of how many."""


def draw(case: Case) -> Operands:
    """The operands of ``case``, laid out as it says: x and the cotangent ``dout``, rounded to its
    dtype, and positions.
    """
    rng = case.rng()
    shape, dtype = case.shape, FORMATS[case.dtype].dtype
    operands: Operands = {"x": rng.standard_normal(shape.of("x")), "positions": np.arange(shape.L)}
    VALUES[case.values](operands, rng, case)
    operands["dout"] = rng.standard_normal(shape.of("out"))
    with np.errstate(over="ignore"):
        return {
            name: LAYOUTS[case.layout](name, x if name == "positions" else x.astype(dtype))
            for name, x in operands.items()
        }


def shape_of(operands: Operands) -> RotaryShape:
    """The axis sizes of a call with these operands."""
    return RotaryShape(*operands["x"].shape)


def by_example(operands: Operands) -> Operands:
    """The same operands with positions ``[B, L]``, so that a chunk is cut out of all alike."""
    shape = operands["x"].shape[:2]
    return operands | {"positions": np.broadcast_to(operands["positions"], shape)}


def _normal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Standard normal x, positions 0 … L − 1."""


# Positions


def _from(start: int) -> Recipe:
    def recipe(operands: Operands, rng: np.random.Generator, case: Case) -> None:
        operands["positions"] += start

    recipe.__doc__ = f"Positions from {start} on: float32 angles are wrong there."
    return recipe


def _to_2m(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """The last positions below 2²¹."""
    operands["positions"] += 2**21 - case.shape.L


def _anywhere(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Anywhere up to 2²¹, in no order, differently in every example."""
    operands["positions"] = rng.integers(0, 2**21, size=case.shape.of("positions"))


def _by_example(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Every example starts elsewhere, as left-padded prompts do."""
    starts = rng.integers(0, 5000, size=(case.shape.B, 1))
    operands["positions"] = operands["positions"] + starts


def _shard_contiguous(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """One of eight shards of a sequence, cut in order."""
    operands["positions"] += RANK * case.shape.L


def _shard_zigzag(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """One of eight shards of two chunks each, r and 2P − 1 − r, which balance causal work."""
    L = case.shape.L
    chunk = (L + 1) // 2
    operands["positions"] += np.where(
        operands["positions"] < chunk, RANK * chunk, (2 * RANKS - 2 - RANK) * chunk
    )


def _shard_striped(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """One of eight shards that take every eighth token."""
    operands["positions"] = RANK + RANKS * operands["positions"]


def _packed_documents(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Documents packed one behind the other: positions restart, at other places in each example."""
    B, L = case.shape.of("positions")
    starts = rng.random((B, L)) < 8 / max(L, 1)
    starts[:, :1] = True
    place = np.arange(L)
    operands["positions"] = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


def _backwards(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """From L − 1 down to 0."""
    operands["positions"] = np.ascontiguousarray(operands["positions"][::-1])


def _shuffled(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """In no order."""
    rng.shuffle(operands["positions"])


def _all_equal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """One position for all, as where one token is generated for many sequences."""
    operands["positions"][...] = 1234


def _all_zero(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Position 0: nothing is turned."""
    operands["positions"][...] = 0


def _negative(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Around 0, on both sides, and some far below."""
    operands["positions"] -= case.shape.L // 2
    operands["positions"][::7] -= 2**20


def _in_dtype(dtype: type[np.integer]) -> Recipe:
    def recipe(operands: Operands, rng: np.random.Generator, case: Case) -> None:
        operands["positions"] = operands["positions"].astype(dtype)

    recipe.__doc__ = f"Positions in {dtype.__name__}."
    return recipe


# Values


def _spread_values(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """|x| spread over eight decades: a fixed absolute tolerance sees the large ones alone."""
    operands["x"] *= 10.0 ** rng.uniform(-4, 4, size=operands["x"].shape)


def _huge(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Up to the largest number of the dtype: a pair may turn to what is beyond, and only that may
    become infinite.
    """
    x = operands["x"]
    x[...] = FORMATS[case.dtype].largest * rng.uniform(-1, 1, size=x.shape)


def _subnormal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """The middle of the dtype's subnormal numbers: a kernel that flushes loses them."""
    subnormal = FORMATS[case.dtype]
    operands["x"] *= subnormal.smallest * 2.0 ** (subnormal.digits // 2)


def _padding(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Zeros at the end, as padding is: zero whatever the angle."""
    operands["x"][:, case.shape.L // 2 :] = 0


def _nan_passing(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """NaN and ±inf in the channels that pass through: they stay there, and reach no other."""
    passing = operands["x"][..., turn_of(case).rotary_dim :]
    garbage = np.array([np.nan, np.inf, -np.inf])
    passing[...] = garbage[rng.integers(0, 3, size=passing.shape)]


def _nan_turned(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """A NaN in one channel: its pair becomes NaN, and no other number."""
    operands["x"][:, 3, 0, 1] = np.nan


def _inf_turned(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """+inf in one channel: its pair becomes ±inf, each by the sign of its cosine or sine."""
    operands["x"][:, 3, 0, 1] = np.inf


VALUES: dict[str, Recipe] = {
    "normal": _normal,
    "from-512k": _from(2**19),
    "from-1m": _from(2**20),
    "to-2m": _to_2m,
    "anywhere": _anywhere,
    "by-example": _by_example,
    "shard-contiguous": _shard_contiguous,
    "shard-zigzag": _shard_zigzag,
    "shard-striped": _shard_striped,
    "packed-documents": _packed_documents,
    "backwards": _backwards,
    "shuffled": _shuffled,
    "all-equal": _all_equal,
    "all-zero": _all_zero,
    "negative": _negative,
    "int32": _in_dtype(np.int32),
    "uint8": _in_dtype(np.uint8),
    "spread-values": _spread_values,
    "huge": _huge,
    "subnormal": _subnormal,
    "padding": _padding,
    "nan-passing": _nan_passing,
    "nan-turned": _nan_turned,
    "inf-turned": _inf_turned,
}


# How operands lie in memory. Every layout holds the same numbers.


def _contiguous(name: str, x: Array) -> Array:
    """As drawn."""
    return x


def _packed_qkv(name: str, x: Array) -> Array:
    """The keys of one projection ``qkv [B, L, 3, H, D]``; positions as the middle of three rows."""
    axis = 0 if name == "positions" else 2
    wide: Array = np.zeros((*x.shape[:axis], 3, *x.shape[axis:]), dtype=x.dtype)
    view: Array = wide[1] if name == "positions" else wide[:, :, 1]
    view[...] = x
    return view


def _heads_first(name: str, x: Array) -> Array:
    """Stored ``[B, H, L, D]``, as many models keep it; seen as ``[B, L, H, D]``."""
    return x if x.ndim < 4 else np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _sliced(name: str, x: Array) -> Array:
    """Every other token of a longer array; NaN, or a wrong position, in between."""
    axis = 1 if x.ndim == 4 else x.ndim - 1
    wide = np.repeat(x, 2, axis=axis)
    wide[...] = 77 if x.dtype.kind in "iu" else np.nan
    view: Array = np.moveaxis(np.moveaxis(wide, axis, 0)[::2], 0, axis)
    view[...] = x
    return view


def _strided_last(name: str, x: Array) -> Array:
    """The last axis is not contiguous: stored first, seen last."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)


def _offset(name: str, x: Array) -> Array:
    """A slice of a wider array that starts off alignment, by one element."""
    wide: Array = np.zeros((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype)
    view: Array = wide[..., 1 : 1 + x.shape[-1]]
    view[...] = x
    return view


def _broadcast(name: str, x: Array) -> Array:
    """Stride 0: one head seen again and again. This changes the numbers: all are the first's."""
    if name != "x" or x.shape[2] == 0:
        return x
    return np.lib.stride_tricks.as_strided(x, x.shape, (*x.strides[:2], 0, x.strides[3]))


LAYOUTS: dict[str, Callable[[str, Array], Array]] = {
    "contiguous": _contiguous,
    "packed-qkv": _packed_qkv,
    "heads-first": _heads_first,
    "sliced": _sliced,
    "strided-last": _strided_last,
    "offset": _offset,
    "broadcast": _broadcast,
}
