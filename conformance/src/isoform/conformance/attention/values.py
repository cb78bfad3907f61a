"""What the operands of attention hold, where the tokens lie, and how both lie in memory.

Each recipe takes freshly drawn standard-normal operands (float64) and changes them in place; those
that say where tokens lie write the case's positions and segments. The names are those of the last
part of a case's id, as a rule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from isoform.conformance.attention.cases import shape_of
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array
from isoform.reference.attention_contract import PLACES, Mask

Recipe = Callable[[Operands, np.random.Generator, Case], None]

PLACE_DTYPES = {"positions": np.int64, "segments": np.int32}
"""One of both kinds of integers for each, so that every implementation meets both."""


def draw(case: Case) -> Operands:
    """The operands of ``case`` and the cotangent ``dout``, rounded to its dtype, laid out as it
    says. Keys: q, k, v, positions and segments as far as present, dout.
    """
    rng = case.rng()
    dtype = FORMATS[case.dtype].dtype
    operands: Operands = {name: rng.standard_normal(case.shape.of(name)) for name in "qkv"}
    places = [name for name in PLACES if name in case.operands]
    for name in places:
        length = case.shape.of(name)[-1]
        counted = np.arange(length) if name.endswith("positions") else np.zeros(length, int)
        operands[name] = counted
    operands["dout"] = rng.standard_normal(case.shape.of("out"))
    VALUES[case.values](operands, rng, case)
    with np.errstate(over="ignore"):
        found = {
            name: x.astype(PLACE_DTYPES[name.removeprefix("key_")] if name in PLACES else dtype)
            for name, x in operands.items()
            if name not in PLACES or name in places
        }
    return {name: LAYOUTS[case.layout](name, x) for name, x in found.items()}


def with_places(operands: Operands) -> Operands:
    """``operands`` with all places, of each example: the defaults filled in (rule SEQ-2).

    So a chunk of the queries is a call of its own.
    """
    shape = shape_of(operands)
    found = dict(operands)
    for queries, keys in (("positions", "key_positions"), ("segments", "key_segments")):
        counted = [
            np.arange(length) if queries == "positions" else np.zeros(length, int)
            for length in (shape.Q, shape.K)
        ]
        found.setdefault(keys, operands.get(queries, counted[1]))
        found.setdefault(queries, counted[0])
    for name in PLACES:
        found[name] = np.broadcast_to(found[name], shape.of(name)).astype(np.int64)
    return found


def mask_of(chunk: Operands, window: tuple[int, int]) -> Mask:
    """Who attends to whom, for operands with all places."""
    left, right = window
    return Mask(**{name: chunk[name] for name in PLACES}, left=left, right=right)


def _normal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Standard normal operands; tokens in order, in one segment."""


# Where tokens lie.


def _shuffled(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Positions in no order, with gaps: a token's index says nothing."""
    length = case.shape.Q
    operands["positions"] = rng.permutation(2 * length)[:length]


def _zigzag(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """One rank's tokens: an early chunk of the sequence and the late one that balances it."""
    operands["positions"] = _shard(case.shape.Q, rank=1, ranks=8)


def _shard(length: int, rank: int, ranks: int) -> Array:
    """The positions of a rank with ``length`` tokens under zigzag sharding."""
    early = (length + 1) // 2
    late = length - early
    start = (2 * ranks - 1 - rank) * early
    return np.concatenate([rank * early + np.arange(early), start + np.arange(late)])


def _far(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Positions near 2³¹ and beyond: 32-bit differences would wrap around."""
    operands["positions"] = 2**31 - case.shape.Q // 2 + np.arange(case.shape.Q)


def _documents(length: int, rng: np.random.Generator, longest: int = 24) -> Array:
    """Segment ids of documents of random lengths, one after the other; not in rising order."""
    lengths: list[int] = []
    while sum(lengths) < length:
        lengths.append(int(rng.integers(1, longest)))
    return np.repeat(rng.permutation(len(lengths)), lengths)[:length]


def _packed(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Documents one after the other; the ids say nothing but which is which."""
    shape = case.shape
    longest = max(24, shape.Q // 8)
    operands["segments"] = np.stack([_documents(shape.Q, rng, longest) for _ in range(shape.B)])


def _restarting(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Positions that start anew with each document, as packing loaders give them."""
    segments = _documents(case.shape.Q, rng)
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    lengths = np.diff(starts, append=case.shape.Q)
    operands["segments"] = segments
    operands["positions"] = np.concatenate([np.arange(length) for length in lengths])


def _padded(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Documents, and a tail of padding whose length differs between examples."""
    _packed(operands, rng, case)
    segments = operands["segments"]
    length = case.shape.Q
    kept = rng.integers((length + 1) // 2, length, size=(case.shape.B, 1), endpoint=True)
    kept[:1] = (length + 1) // 2  # one has padding for sure
    segments[np.arange(length) >= kept] = -1


def _per_example(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Every example has its own order, documents and padding."""
    _padded(operands, rng, case)
    orders = [rng.permutation(case.shape.Q) for _ in range(case.shape.B)]
    operands["positions"] = np.stack(orders)


def _past(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """All keys before all queries: the mask drops nothing, unless there is a window."""
    operands["positions"] = case.shape.K + np.arange(case.shape.Q)


def _future(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """All keys after all queries: causal attention has no key left (SEQ-5)."""
    operands["key_positions"] = case.shape.Q + np.arange(case.shape.K)


def _zigzag_pair(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Queries of rank 2 and keys of rank 1 of 4 under zigzag sharding."""
    operands["positions"] = _shard(case.shape.Q, rank=2, ranks=4)
    operands["key_positions"] = _shard(case.shape.K, rank=1, ranks=4)


def _striped(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Queries of rank 1 and keys of rank 2 of 4 under striped sharding: off the diagonal by one."""
    operands["positions"] = 1 + 4 * np.arange(case.shape.Q)
    operands["key_positions"] = 2 + 4 * np.arange(case.shape.K)


def _packed_pair(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Two shards of packed documents with padding in both."""
    shape = case.shape
    whole = _documents(shape.Q + shape.K, rng)
    whole[rng.random(len(whole)) < 0.1] = -1
    order = rng.permutation(shape.Q + shape.K)
    operands["positions"], operands["key_positions"] = order[: shape.Q], order[shape.Q :]
    operands["segments"], operands["key_segments"] = (
        whole[order[: shape.Q]],
        whole[order[shape.Q :]],
    )


def _million(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Shards of a sequence of a million tokens: float32 cannot tell all their positions apart."""
    operands["positions"] = 2**24 + np.arange(case.shape.Q)
    operands["key_positions"] = 2**24 - 2**19 + np.arange(case.shape.K)


def _last_aligned(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """The last query at the last key: decoding with a cache. Early queries may have no key."""
    operands["positions"] = case.shape.K - case.shape.Q + np.arange(case.shape.Q)


def _first_aligned(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """The first query at the first key."""


# What q, k and v hold.


def _large_logits(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Logits up to about ±1e4: exp of them overflows unless the maximum is subtracted first."""
    for name in ("q", "k"):
        operands[name] *= 50  # logits of standard normal operands have variance 1


def _rising_logits(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Each key's logit is above those before it: an online softmax rescales at every block."""
    operands["q"] = np.abs(operands["q"]) + 0.5
    rise = np.arange(case.shape.K)[:, None, None] / 8
    operands["k"] = 0.1 * operands["k"] + rise


def _one_hot(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Each query looks at one key almost alone: the other probabilities underflow."""
    B, Q, K, H, G, D = vars(case.shape).values()
    aimed = rng.integers(0, K, size=(B, Q))
    k = operands["k"]
    k /= np.sqrt((k**2).mean(-1, keepdims=True))
    per_head = np.repeat(k, H // G, axis=2)
    operands["q"][...] = 30 * np.take_along_axis(per_head, aimed[..., None, None], axis=1)


def _equal_logits(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """All logits equal: the output is the plain mean of the values attended to."""
    operands["k"][...] = operands["k"][:, :1]


def _spread_values(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """|v| spread over eight decades: a fixed absolute tolerance sees the large ones alone."""
    operands["v"] *= 10.0 ** rng.uniform(-4, 4, size=operands["v"].shape)


def _no_keys_for_some(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """A third of the queries are of a document that no key is of, and the first few before any."""
    segments = np.zeros(case.shape.Q, int)
    segments[::3] = 7
    operands["segments"] = segments
    operands["key_positions"] = operands["key_positions"] + 5


def _all_padding(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """No token anywhere: every output and every gradient is zero (SEQ-5)."""
    operands["segments"][...] = -1


def _alone(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Every token is a document of its own: the output is its own value."""
    operands["segments"] = rng.permutation(case.shape.Q)


def _first_key_only(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Only the first key is left: the output is its value."""
    operands["key_segments"] = np.where(np.arange(case.shape.K) == 0, 0, -1)


def _last_key_only(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Only the last key is left, at the ragged end of the last tile."""
    operands["key_segments"] = np.where(np.arange(case.shape.K) == case.shape.K - 1, 0, -1)


def _garbage_in_padding(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """NaN and ±inf in whatever padding holds: must not be seen (SEQ-4)."""
    _padded(operands, rng, case)
    garbage = np.array([np.nan, np.inf, -np.inf])
    padding = operands["segments"] < 0
    for name in ("q", "k", "v", "dout"):
        x = operands[name]
        x[padding] = garbage[rng.integers(0, 3, size=x[padding].shape)]


def _nan_attended(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """A NaN in the first key, which all queries attend to: its heads become NaN (SEQ-9)."""
    operands["k"][:, 0, 0, 0] = np.nan


def _inf_attended(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """+inf in the first value, which all queries attend to: its channel becomes +inf (SEQ-9)."""
    operands["v"][:, 0, 0, 0] = np.inf


def _subnormal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Values in the middle of the dtype's subnormal numbers: a kernel that flushes loses them."""
    subnormal = FORMATS[case.dtype]
    operands["v"] *= subnormal.smallest * 2.0 ** (subnormal.digits // 2)


def _constant_values(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Every key has the same value: the output is that value, and dq, dk vanish by cancelling."""
    operands["v"][...] = operands["v"][:, :1]


VALUES: dict[str, Recipe] = {
    "normal": _normal,
    "shuffled": _shuffled,
    "zigzag": _zigzag,
    "far": _far,
    "packed": _packed,
    "restarting": _restarting,
    "padded": _padded,
    "per-example": _per_example,
    "past": _past,
    "future": _future,
    "zigzag-pair": _zigzag_pair,
    "striped": _striped,
    "packed-pair": _packed_pair,
    "million": _million,
    "last-aligned": _last_aligned,
    "first-aligned": _first_aligned,
    "large-logits": _large_logits,
    "rising-logits": _rising_logits,
    "one-hot": _one_hot,
    "equal-logits": _equal_logits,
    "spread-values": _spread_values,
    "no-keys-for-some": _no_keys_for_some,
    "all-padding": _all_padding,
    "alone": _alone,
    "first-key-only": _first_key_only,
    "last-key-only": _last_key_only,
    "garbage-in-padding": _garbage_in_padding,
    "nan-attended": _nan_attended,
    "inf-attended": _inf_attended,
    "subnormal": _subnormal,
    "constant-values": _constant_values,
}


# How operands lie in memory. Every layout holds the same numbers.


def _contiguous(name: str, x: Array) -> Array:
    """As drawn."""
    return x


def _heads_first(name: str, x: Array) -> Array:
    """Stored ``[B, H, L, D]``, as many models keep it; seen as ``[B, L, H, D]``."""
    if x.ndim < 4:
        return x
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _sliced(name: str, x: Array) -> Array:
    """Every other token of a longer sequence; what lies between would be noticed."""
    axis = 1 if x.ndim == 4 else x.ndim - 1
    between = -1 if name in PLACES else np.nan
    wide = np.full((*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :]), between)
    wide = wide.astype(x.dtype)
    view = wide[(*(slice(None),) * axis, slice(None, None, 2))]
    view[...] = x
    return view


def _strided_last(name: str, x: Array) -> Array:
    """The last axis is not contiguous: stored first, seen last."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)


def _packed_qkv(name: str, x: Array) -> Array:
    """q, k and v as slices of one wider projection, offset by one channel; not 16-byte aligned."""
    wide: Array = np.zeros((*x.shape[:-1], 3 * x.shape[-1] + 1), dtype=x.dtype)
    view: Array = wide[..., 1 : 1 + x.shape[-1]]
    view[...] = x
    return view


def _broadcast(name: str, x: Array) -> Array:
    """Stride 0: the same head of k and v seen again and again, as grouped heads are expanded.

    Unlike the others this changes the numbers: all heads are made equal to the first.
    """
    if name not in ("k", "v"):
        return x
    strides = (*x.strides[:2], 0, x.strides[3])
    return np.lib.stride_tricks.as_strided(x, x.shape, strides)


LAYOUTS: dict[str, Callable[[str, Array], Array]] = {
    "contiguous": _contiguous,
    "heads-first": _heads_first,
    "sliced": _sliced,
    "strided-last": _strided_last,
    "packed-qkv": _packed_qkv,
    "broadcast": _broadcast,
}
