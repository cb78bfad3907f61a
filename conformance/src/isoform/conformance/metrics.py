"""How far a result is from the oracle's: the figures that verdicts and reports are made of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isoform.conformance.dtypes import FORMATS, Array, ulp

ULP_EDGES = (0.0, 0.25, 0.5, 1.0, *(2.0**n for n in range(1, 25)), float("inf"))
"""Edges of the ULP histogram's bins."""


@dataclass(frozen=True)
class Errors:
    """The errors of one result, over the elements where oracle and result are finite.

    Attributes:
        count: How many elements that is.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        frobenius: ‖x − reference‖ / ‖reference‖; NaN where the reference vanishes.
        ulp_p50: Median error in units of the last place of the result's dtype.
        ulp_p99: 99th percentile of it.
        ulp_max: Largest.
        ratio_p50: Median of error over u·κ + η·λ.
        ratio_p99: 99th percentile of it.
        ratio_max: Largest.
        bias: |mean signed error| over the root mean square; signed away from zero.
        worst: Coordinate of the largest ratio.
        worst_value: The result there.
        worst_reference: The oracle's there.
        histogram: Counts of errors by ULP, in bins between :data:`ULP_EDGES`.
    """

    count: int
    max_abs: float
    mean_abs: float
    frobenius: float
    ulp_p50: float
    ulp_p99: float
    ulp_max: float
    ratio_p50: float
    ratio_p99: float
    ratio_max: float
    bias: float
    worst: tuple[int, ...]
    worst_value: float
    worst_reference: float
    histogram: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain numbers."""
        return asdict(self)


def errors(actual: Array, reference: Array, budget: Array, dtype: str) -> Errors:
    """Measure ``actual`` against ``reference``.

    Args:
        actual: The result, any float dtype.
        reference: The oracle's, float64, of equal shape.
        budget: u·κ + η·λ, element by element.
        dtype: The result's format, for units of the last place.
    """
    wide = actual.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        comparable = np.isfinite(wide) & np.isfinite(reference)
        difference = np.where(comparable, wide - reference, 0.0)
        size = np.abs(difference)
        ratio = np.where(size > 0, size / budget, 0.0)
        units = np.where(comparable, size / ulp(np.where(comparable, reference, 0), dtype), 0.0)
    count = int(comparable.sum())
    if count == 0:
        empty = tuple(0 for _ in ULP_EDGES[1:])
        zero = dict.fromkeys(
            (
                *("max_abs", "mean_abs", "frobenius", "ulp_p50", "ulp_p99", "ulp_max"),
                *("ratio_p50", "ratio_p99", "ratio_max", "bias"),
            ),
            0.0,
        )
        return Errors(0, worst=(), worst_value=0.0, worst_reference=0.0, histogram=empty, **zero)

    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    norm, norm_exponent = _norm(reference[comparable])
    distance, exponent = _norm(difference[comparable])
    direction = np.where(np.abs(reference) > budget, np.sign(reference), 0)  # else it is noise
    with np.errstate(under="ignore"):
        scaled = np.ldexp(difference, -exponent)
        outward = float(np.mean((scaled * direction)[comparable]))
        relative = float(np.ldexp(distance / norm, exponent - norm_exponent)) if norm else math.nan
    ulp_p50, ulp_p99, ulp_max = _percentiles(units[comparable])
    ratio_p50, ratio_p99, ratio_max = _percentiles(ratio[comparable])
    return Errors(
        count=count,
        max_abs=float(size.max()),
        mean_abs=float(size[comparable].mean()),
        frobenius=relative,
        ulp_p50=ulp_p50,
        ulp_p99=ulp_p99,
        ulp_max=ulp_max,
        ratio_p50=ratio_p50,
        ratio_p99=ratio_p99,
        ratio_max=ratio_max,
        bias=abs(outward) / distance * count**0.5 if distance else 0.0,
        worst=tuple(int(i) for i in worst),
        worst_value=float(wide[worst]),
        worst_reference=float(reference[worst]),
        histogram=tuple(int(n) for n in np.histogram(units[comparable], ULP_EDGES)[0]),
    )


def _norm(x: Array) -> tuple[float, int]:
    """The Euclidean norm as m·2ᵉ. Neither it nor a square on the way to it can overflow or vanish:
    ``x`` is scaled by the power of two of its largest element, which is exact.
    """
    exponent = int(np.frexp(np.abs(x).max())[1])
    with np.errstate(under="ignore"):  # of what is nothing beside the largest
        return float(np.linalg.norm(np.ldexp(x, -exponent))), exponent


def _percentiles(x: Array) -> tuple[float, float, float]:
    middle, high = (max(0, math.ceil(x.size * part - 1)) for part in (0.5, 0.99))
    ordered = np.partition(x, (middle, high))  # not between two errors, but errors that there are
    return float(ordered[middle]), float(ordered[high]), float(x.max())


def pattern_fault(
    actual: Array, reference: Array, zeros: Array | None, dtype: str, *, lse: bool
) -> str | None:
    """What the result's NaN, ±inf and exact zeros do that the contract does not allow.

    Args:
        actual: The result.
        reference: The oracle's, float64.
        zeros: Where the contract fixes exact zeros; None where nowhere.
        dtype: The result's format: what lies beyond it may be rounded to ±inf, with its sign.
        lse: Whether this is lse, where NaN and +inf both tell of a +inf logit (EVO-9).

    Returns:
        A sentence with the first wrong coordinate, or None.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        wide = actual.astype(np.float64)
        limit = FORMATS[dtype].largest
        beyond = np.isfinite(reference) & (reference * np.sign(wide) > limit * (1 - 2**-6))
        undefined = np.isnan(reference) | (lse & (reference == np.inf))
        faults = {
            "must be NaN": undefined & ~(np.isnan(wide) | (lse & (wide == np.inf))),
            "must not be NaN": np.isnan(wide) & ~undefined,
            "must be infinite": np.isinf(reference) & ~undefined & (wide != reference),
            "must be finite": np.isinf(wide) & np.isfinite(reference) & ~beyond,
        }
        if zeros is not None:
            faults["must be exactly 0"] = zeros & (wide != 0)
    for what, where in faults.items():
        if where.any():
            first = tuple(int(i) for i in np.unravel_index(int(np.argmax(where)), where.shape))
            got, wanted = float(wide[first]), float(reference[first])
            return (
                f"{int(where.sum())} of {where.size} elements {what}: "
                f"at {list(first)} it is {got:g}, the definition says {wanted:g}"
            )
    return None
