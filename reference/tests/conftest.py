"""What the tests of the reference share: random problems, and attention in 60 digits.

Tests reach all of it through fixtures, since test modules cannot import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from isoform.reference.contract import OPTIONAL_OPERANDS, Shape

Array = Any


class Problem(NamedTuple):
    """One call: what goes in, and the gradient that comes back."""

    shape: Shape
    operands: dict[str, Array]
    dout: Array


def draw_problem(
    shape: Shape,
    optional: Any = OPTIONAL_OPERANDS,
    *,
    seed: int = 0,
    dtype: Any = np.float64,
    spread: float = 1.0,
    dead: bool = False,
    infinite: bool = False,
    garbage: bool = False,
) -> Problem:
    """Random operands of ``shape``, and ``dout``.

    Args:
        shape: The sizes.
        optional: Names of the optional operands to have.
        seed: Of the random numbers.
        dtype: Of all operands but the mask.
        spread: Standard deviation of q and of the biases.
        dead: Drop all keys of the first row (mask) and bias the last query by −inf (pair_bias).
        infinite: Make a third of the biases −inf.
        garbage: Put NaN and ±inf in k, v and mask_bias where the mask drops the key.
    """
    rng = np.random.default_rng(seed)

    def normal(name: str, size: float = 1.0) -> Array:
        return size * rng.standard_normal(shape.of(name))

    found = {"q": normal("q", spread), "k": normal("k"), "v": normal("v")}
    for name in ("mask_bias", "pair_bias", "gate"):
        if name in optional:
            found[name] = normal(name, 1.0 if name == "gate" else spread)
            if infinite and name != "gate":
                found[name][rng.random(found[name].shape) < 0.3] = -np.inf
    if dead and "pair_bias" in found:
        found["pair_bias"][..., -1:, :] = -np.inf
    found = {name: x.astype(dtype) for name, x in found.items()}

    if "mask" in optional:
        mask = rng.random(shape.of("mask")) < 0.7
        if dead:
            mask[:, :1] = False
        found["mask"] = mask
        if garbage:
            bad = np.array([np.nan, np.inf, -np.inf], dtype)
            for name in {"k", "v", "mask_bias"} & set(found):
                x = found[name] if name != "mask_bias" else np.moveaxis(found[name], 4, 2)
                x[~mask] = bad[rng.integers(3, size=x[~mask].shape)]
    return Problem(shape, found, normal("out").astype(dtype))


@st.composite
def _problems(draw: Any, *, optional: Any = None, spreads: Any = (1.0, 8.0)) -> Problem:
    tops = {"B": 2, "S": 3, "Q": 6, "K": 7, "G": 2, "H / G": 3, "D": 4}
    sizes = {axis: draw(st.integers(1, top), label=axis) for axis, top in tops.items()}
    # Half of the problems have an empty axis; the others should have something to compare.
    if draw(st.booleans(), label="empty"):
        sizes[draw(st.sampled_from([*"BSQKG", "H / G"]), label="which")] = 0
    sizes["H"] = sizes["G"] * sizes.pop("H / G")
    shape = Shape(**sizes)
    if optional is None:
        optional = [name for name in OPTIONAL_OPERANDS if draw(st.booleans(), label=name)]
    flags = {name: draw(st.booleans(), label=name) for name in ("dead", "infinite", "garbage")}
    seed = draw(st.integers(0, 10**6), label="seed")
    return draw_problem(
        shape, optional, seed=seed, spread=draw(st.sampled_from(spreads), label="spread"), **flags
    )


def _relative_error(actual: Array, expected: Array) -> float:
    """Largest error relative to the largest number expected; NaN and ±inf must be where they are.

    Shapes and dtypes must agree too.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, expected))
    assert np.isfinite(actual[finite]).all()
    if not finite.any():
        return 0.0
    error = np.abs(actual[finite] - expected[finite]).max()
    return float(error / max(np.abs(expected[finite]).max(), np.finfo(error.dtype).tiny))


# --- attention in 60 digits, one query at a time ---

DIGITS = 60
STEP = "1e-20"  # a central difference is off by its square: 40 digits are right


def _reads(
    operands: Mapping[str, Array], b: int, s: int, h: int, i: int
) -> dict[str, tuple[int, ...]]:
    """Which number of which operand enters the output of one query of one head, by a key of ours.

    Rules EVO-2 to EVO-5: dropped keys, and those with a bias of −inf, are not among them.
    """
    g = h // (operands["q"].shape[3] // operands["k"].shape[3])
    channels = range(operands["q"].shape[4])
    reads: dict[str, tuple[int, ...]] = {f"q {d}": (b, s, i, h, d) for d in channels}
    if "gate" in operands:
        reads |= {f"gate {d}": (b, s, i, h, d) for d in channels}
    for j in range(operands["k"].shape[2]):
        own = {f"{name} {d} {j}": (b, s, j, g, d) for name in "kv" for d in channels}
        if "mask_bias" in operands:
            own[f"mask_bias {j}"] = (b, s, 0, 0, j)
        if "pair_bias" in operands:
            own[f"pair_bias {j}"] = (b, 0, h, i, j)
        biases = [operands[key.split()[0]][at] for key, at in own.items() if "bias" in key]
        if ("mask" not in operands or operands["mask"][b, s, j]) and -np.inf not in biases:
            reads |= own
    return reads


def _one_query(
    x: Mapping[str, Decimal], D: int, scale: Decimal, exp: Callable[[Decimal], Decimal]
) -> tuple[list[Decimal], Decimal]:
    """y [D] of one query and the sum of its weights, from the numbers that it reads."""
    zero = Decimal(0)
    total, weighted = zero, [zero] * D
    for j in sorted({int(key.split()[2]) for key in x if key.startswith("k ")}):
        logit = scale * sum(x[f"q {d}"] * x[f"k {d} {j}"] for d in range(D))
        weight = exp(logit + x.get(f"mask_bias {j}", zero) + x.get(f"pair_bias {j}", zero))
        total += weight
        for d in range(D):
            weighted[d] += weight * x[f"v {d} {j}"]
    y = [one / total if total else zero for one in weighted]
    if "gate 0" in x:
        y = [y[d] / (1 + exp(-x[f"gate {d}"])) for d in range(D)]
    return y, total


def exact_attention(problem: Problem, scale: float | None = None) -> dict[str, Array]:
    """out, lse and every gradient to 40 digits, rounded to float64.

    Gradients are central differences of the loss in each number that a query reads, summed over the
    queries that read it: nothing of the hand-derived backward is used.
    """
    shape, operands, dout = problem
    results = {
        "out": np.zeros(shape.of("out")),
        "lse": np.zeros(shape.of("lse")),
        **{f"d{name}": np.full(x.shape, Decimal(0), object) for name, x in operands.items()},
    }
    with localcontext(prec=DIGITS):
        step = Decimal(STEP)
        factor = 1 / Decimal(shape.D).sqrt() if scale is None else Decimal(scale)
        for b, s, h, i in product(*(range(n) for n in (shape.B, shape.S, shape.H, shape.Q))):
            exp = cache(Decimal.exp)  # of all weights a number moves one, or none
            reads = _reads(operands, b, s, h, i)
            x = {key: Decimal(float(operands[key.split()[0]][at])) for key, at in reads.items()}
            y, total = _one_query(x, shape.D, factor, exp)
            results["out"][b, s, i, h] = [float(number) for number in y]
            results["lse"][b, s, h, i] = float(total.ln())  # of 0 it is −inf
            weights = [Decimal(float(number)) for number in dout[b, s, i, h]]
            for key, at in reads.items():
                ends = [
                    _one_query({**x, key: x[key] + moved}, shape.D, factor, exp)[0]
                    for moved in (step, -step)
                ]
                rise = sum(w * (a - b) for w, a, b in zip(weights, *ends, strict=True))
                results[f"d{key.split()[0]}"][at] += rise / (2 * step)
    results.pop("dmask", None)
    return {name: np.asarray(x, np.float64) for name, x in results.items()}


# --- the fixtures ---


@pytest.fixture(scope="session")
def draw() -> Callable[..., Problem]:
    """:func:`draw_problem`."""
    return draw_problem


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    """A hypothesis strategy of problems of any shape, empty axes and dead queries included."""
    return _problems


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Array, Array], float]:
    """:func:`_relative_error`."""
    return _relative_error


@pytest.fixture(scope="session")
def exact() -> Callable[..., dict[str, Array]]:
    """:func:`exact_attention`."""
    return exact_attention
