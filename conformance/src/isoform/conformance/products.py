"""Products as processors do them, for the twins: how sums over channels are rounded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from isoform.conformance.dtypes import FORMATS, Array
from isoform.reference.contract import Arithmetic


def product_over_channels(arithmetic: Arithmetic, dtype: str) -> Callable[[Array, Array], Array]:
    """The product of matrices whose inner axis is the channels, with ``arithmetic.sums``.

    Args:
        arithmetic: The declared arithmetic.
        dtype: Of the operands; only those of 16 bits are multiplied on tensor cores.
    """
    narrow = FORMATS[dtype].digits < FORMATS["float32"].digits
    return _truncating if narrow and arithmetic.sums == "truncated" else np.matmul


def _truncating(x: Array, y: Array) -> Array:
    """``x @ y`` as tensor cores do it: the sum of sixteen products, exact, is added and cut off."""
    total = np.zeros_like(x, shape=(*x.shape[:-1], y.shape[-1]))  # of whichever library x is
    for first in range(0, x.shape[-1], 16):
        some = slice(first, first + 16)
        exact = total + x[..., some].astype(np.float64) @ y[..., some, :].astype(np.float64)
        nearest = exact.astype(x.dtype)
        total = np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, 0), nearest)
    return total
