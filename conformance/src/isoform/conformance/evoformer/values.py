"""What the operands of Evoformer attention hold: ordinary numbers, and those that break kernels.

Each recipe takes freshly drawn standard-normal operands (float64) and changes them in place. The
names are those of the last part of a case's id.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array

Recipe = Callable[[Operands, np.random.Generator, Case], None]


def draw(case: Case) -> Operands:
    """The operands of ``case`` and the cotangent ``dout``, rounded to its dtype, laid out as it
    says. Keys: q, k, v, the optional operands present, dout.
    """
    rng = case.rng()
    shape, dtype = case.shape, FORMATS[case.dtype].dtype
    names = ["q", "k", "v", *sorted(case.operands - {"mask"})]
    operands: Operands = {name: rng.standard_normal(shape.of(name)) for name in names}
    if "mask" in case.operands:
        operands["mask"] = _ragged_mask(rng, shape.of("mask"))
    VALUES[case.values](operands, rng, case)
    operands["dout"] = rng.standard_normal(shape.of("out"))
    with np.errstate(over="ignore"):
        return {
            name: LAYOUTS[case.layout](name, x if name == "mask" else x.astype(dtype))
            for name, x in operands.items()
        }


def _ragged_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """About a tenth of the keys dropped, and the end of every row, as padding does."""
    B, S, K = shape
    lengths = rng.integers((K + 1) // 2, K + 1, size=(B, S, 1))
    kept = (rng.random(shape) < 0.9) & (np.arange(K) < lengths)
    kept[..., :1] |= ~kept.any(-1, keepdims=True)  # every row keeps a key, unless a recipe says so
    return kept


def _normal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Standard normal operands."""


def _large_logits(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Logits up to about ±1e4: exp of them overflows unless the maximum is subtracted first."""
    for name in ("q", "k"):
        operands[name] *= 50  # logits of standard normal operands have variance 1


def _low_logits(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """All keys kept, all logits near −200: exp of them underflows unless the maximum is subtracted
    first, and the weight of a key beyond the last, whose logit is taken for 0, overflows.
    """
    operands["mask"][...] = True
    operands["pair_bias"] -= 200


def _one_hot(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Each query looks at one key almost alone: the other probabilities underflow."""
    B, S, Q, K, H, G, D = vars(case.shape).values()
    aimed = rng.integers(0, K, size=(B, S, Q))
    k = operands["k"]
    k /= np.sqrt((k**2).mean(-1, keepdims=True))
    per_head = np.repeat(k, H // G, axis=3)
    operands["q"][...] = 30 * np.take_along_axis(per_head, aimed[..., None, None], axis=2)


def _equal_logits(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """All logits equal: the output is the plain mean of the values."""
    operands["k"][...] = operands["k"][:, :, :1]
    for name in ("mask_bias", "pair_bias"):
        if name in operands:
            operands[name][...] = 0.25


def _spread_values(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """|v| spread over eight decades: a fixed absolute tolerance sees the large ones alone."""
    operands["v"] *= 10.0 ** rng.uniform(-4, 4, size=operands["v"].shape)


def _minus_inf_bias(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """A fifth of the biases −inf, and for some queries all of them: no key left (EVO-5)."""
    for name in ("mask_bias", "pair_bias"):
        if name in operands:
            operands[name][rng.random(operands[name].shape) < 0.2] = -np.inf
    if "pair_bias" in operands:
        operands["pair_bias"][..., ::5, :] = -np.inf
    elif "mask_bias" in operands:
        operands["mask_bias"][:, ::2] = -np.inf


def _masked_rows(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Every other row s has no key at all (EVO-5)."""
    operands["mask"][:, ::2] = False


def _all_masked(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """No key anywhere: every output and every gradient is zero (EVO-5)."""
    operands["mask"][...] = False


def _first_key_only(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Only the first key is left: the output is its value."""
    operands["mask"][...] = np.arange(case.shape.K) == 0


def _last_key_only(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Only the last key is left, at the ragged end of the last tile."""
    operands["mask"][...] = np.arange(case.shape.K) == case.shape.K - 1


def _garbage_in_dropped(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """NaN and ±inf in the keys and values that the mask drops: must not be seen (EVO-4)."""
    dropped = ~operands["mask"][..., None, None]
    garbage = np.array([np.nan, np.inf, -np.inf])
    for name in ("k", "v"):
        picked = garbage[rng.integers(0, 3, size=operands[name].shape)]
        operands[name] = np.where(dropped, picked, operands[name])
    operands["mask"][:, :1] = False  # and a row of nothing but garbage


def _nan_attended(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """A NaN in one attended key: all queries of that row and its heads become NaN (EVO-9)."""
    operands["k"][:, 0, 0, 0, 0] = np.nan
    if "mask" in operands:
        operands["mask"][:, 0, 0] = True


def _inf_attended(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """+inf in one attended value: its column becomes +inf, no other (EVO-9)."""
    operands["v"][:, 0, 0, 0, 0] = np.inf
    if "mask" in operands:
        operands["mask"][:, 0, 0] = True


def _subnormal(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Values in the middle of the dtype's subnormal numbers: a kernel that flushes loses them."""
    subnormal = FORMATS[case.dtype]
    operands["v"] *= subnormal.smallest * 2.0 ** (subnormal.digits // 2)


def _huge_negative_bias(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """A large finite negative bias is a number (EVO-6): −1e9 on some keys is as good as masking
    them; −3e4 on every key of a row, which float32 can still add to, cancels.
    """
    bias = operands["mask_bias"]
    bias[rng.random(bias.shape) < 0.3] = -1e9 if case.dtype != "float16" else -3e4
    bias[:, ::2] = -3e4


def _constant_values(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Every key has the same value: the output is that value, and dq, dk vanish by cancelling."""
    operands["v"][...] = operands["v"][:, :, :1]


def _closed_gate(operands: Operands, rng: np.random.Generator, case: Case) -> None:
    """Gates far out on both sides: sigmoid near 0 and near 1, without overflow."""
    operands["gate"] *= 18


VALUES: dict[str, Recipe] = {
    "normal": _normal,
    "large-logits": _large_logits,
    "low-logits": _low_logits,
    "one-hot": _one_hot,
    "equal-logits": _equal_logits,
    "spread-values": _spread_values,
    "minus-inf-bias": _minus_inf_bias,
    "masked-rows": _masked_rows,
    "all-masked": _all_masked,
    "first-key-only": _first_key_only,
    "last-key-only": _last_key_only,
    "garbage-in-dropped": _garbage_in_dropped,
    "nan-attended": _nan_attended,
    "inf-attended": _inf_attended,
    "subnormal": _subnormal,
    "huge-negative-bias": _huge_negative_bias,
    "constant-values": _constant_values,
    "closed-gate": _closed_gate,
}


# How operands lie in memory. Every layout holds the same numbers.


def _contiguous(name: str, x: Array) -> Array:
    """As drawn."""
    return x


def _heads_first(name: str, x: Array) -> Array:
    """Stored ``[B, S, H, L, D]``, as many models keep it; seen as ``[B, S, L, H, D]``."""
    if x.ndim < 4:
        return x
    return np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)


def _sliced(name: str, x: Array) -> Array:
    """Every other element of a longer axis, on the axis before the last; NaN in between."""
    axis = x.ndim - 2
    wide_shape = (*x.shape[:axis], 2 * x.shape[axis], x.shape[-1])
    wide = np.full(wide_shape, True if x.dtype == bool else np.nan).astype(x.dtype)
    view = wide[..., ::2, :]
    view[...] = x
    return view


def _strided_last(name: str, x: Array) -> Array:
    """The last axis is not contiguous: stored first, seen last."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)


def _packed(name: str, x: Array) -> Array:
    """q, k and v as slices of one wider projection, offset by one channel; not 16-byte aligned."""
    wide: Array = np.zeros((*x.shape[:-1], 3 * x.shape[-1] + 1), dtype=x.dtype)
    view: Array = wide[..., 1 : 1 + x.shape[-1]]
    view[...] = x
    return view


def _broadcast(name: str, x: Array) -> Array:
    """Stride 0: the same row s, and for the pair bias the same head, seen again and again.

    Unlike the others this changes the numbers: all rows are made equal to the first.
    """
    axis = 2 if name == "pair_bias" else 1
    if name == "dout" or x.shape[axis] == 0:
        return x
    strides = (*x.strides[:axis], 0, *x.strides[axis + 1 :])
    return np.lib.stride_tricks.as_strided(x, x.shape, strides)


LAYOUTS: dict[str, Callable[[str, Array], Array]] = {
    "contiguous": _contiguous,
    "heads-first": _heads_first,
    "sliced": _sliced,
    "strided-last": _strided_last,
    "packed": _packed,
    "broadcast": _broadcast,
}
