"""Running emulated kernels as the suite does: in every order of threads, into unwritten memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array
from isoform.kernels.emulate import ORDERS, KernelFault, Order


def in_every_order(run: Callable[[Order], dict[str, Array]]) -> dict[str, Array]:
    """What ``run`` gives, results by name, which must be the same bit by bit in all orders.

    Raises:
        KernelFault: It is not.
    """
    first, *others = (run(order) for order in ORDERS)
    for order, results in zip(ORDERS[1:], others, strict=True):
        differing = [name for name, x in first.items() if x.tobytes() != results[name].tobytes()]
        if differing:
            raise KernelFault(
                f"{', '.join(differing)} differ between threads in {ORDERS[0]} order and in "
                f"{order}: a barrier is missing, or two threads write to one place"
            )
    return first


def unwritten(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory for a result, all bits set: what is not written to it is seen as NaN."""
    bits = np.full((*shape, np.dtype(dtype).itemsize), 0xFF, np.uint8)
    memory: Array = bits.view(dtype)[..., 0]
    return memory
