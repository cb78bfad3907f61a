"""The float formats that operands and results have: unit roundoff, underflow, ulp, rounding.

NumPy has no bfloat16 of its own; ``ml_dtypes`` adds it, so that cases and the oracle stay in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def same(a: Array, b: Array) -> bool:
    """Bitwise equality, but for the payload of NaN and the sign of zero."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return bool(np.all((a == b) | ((a != a) & (b != b))))


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        name: Its name as a dtype.
        short: The name it has in case ids.
        digits: Significant bits, the hidden one included.
        smallest_exponent: Exponent of the smallest subnormal number.
        dtype: NumPy's dtype.
    """

    name: str
    short: str
    digits: int
    smallest_exponent: int
    dtype: np.dtype[Any]

    @property
    def unit_roundoff(self) -> float:
        """u: the largest relative error of rounding to nearest."""
        return float(2.0**-self.digits)

    @property
    def smallest(self) -> float:
        """η: the smallest positive (subnormal) number, the spacing of numbers near zero."""
        return float(2.0**self.smallest_exponent)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        largest_exponent = {"float16": 15, "float64": 1023}.get(self.name, 127)
        return float((2.0 - 2.0 ** (1 - self.digits)) * 2.0**largest_exponent)


FORMATS = {
    name: FloatFormat(name, short, digits, smallest, np.dtype(dtype))
    for name, short, digits, smallest, dtype in [
        ("float16", "fp16", 11, -24, np.float16),
        ("bfloat16", "bf16", 8, -133, ml_dtypes.bfloat16),
        ("float32", "fp32", 24, -149, np.float32),
        ("float64", "fp64", 53, -1074, np.float64),
    ]
}
SHORT_NAMES = {float_format.short: name for name, float_format in FORMATS.items()}


def rounded(x: Array, name: str) -> Array:
    """``x`` rounded to the format ``name``, in x's own dtype: what storing it there would lose."""
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "bfloat16" and not isinstance(x, np.ndarray | np.generic):
            return bfloat16_by_bits(x)
        return x.astype(FORMATS[name].dtype).astype(x.dtype)


def bfloat16_by_bits(x: Array) -> Array:
    """``x`` rounded to bfloat16 where there is no such dtype, as in CuPy: by the bits of float32,
    whose upper half is a bfloat16.
    """
    narrow = x.astype(np.float32)
    bits = narrow.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # ties to even
    return np.where(np.isnan(narrow), narrow, nearest.view(np.float32)).astype(x.dtype)


def ulp(x: Array, name: str) -> Array:
    """The spacing of the numbers of format ``name`` at ``x`` (float64)."""
    float_format = FORMATS[name]
    mantissa, exponent = np.frexp(x.astype(np.float64))
    spacing = np.maximum(exponent - float_format.digits, float_format.smallest_exponent)
    spacing = np.where(mantissa == 0, float_format.smallest_exponent, spacing)
    distance: Array = np.ldexp(np.ones_like(mantissa), spacing)
    return distance
