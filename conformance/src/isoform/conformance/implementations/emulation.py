"""Running emulated kernels as the suite does: in every order of threads, into unwritten memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array
from isoform.kernels.arguments import Struct
from isoform.kernels.emulate import ORDERS, KernelFault, Order
from isoform.kernels.emulate.calls import launch_all, unwritten, views_of
from isoform.kernels.launch import Pass
from isoform.reference.contract import Call

Made = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of results, by name."""


def results_of(
    passes: Sequence[Pass],
    call: Call,
    operands: Mapping[str, Array],
    scale: float,
    made: Made,
    struct: Struct,
) -> dict[str, Array]:
    """What the passes write, results as ``made`` lists, in memory made anew for each order.

    Args:
        passes: Those of one call, one after the other.
        call: The call.
        operands: Its arrays, by name.
        scale: The factor of the logits.
        made: The results.
        struct: What the operation's kernels are told.
    """

    def run(order: Order) -> dict[str, Array]:
        results = {name: unwritten(*each) for name, each in made.items()}
        for one in passes:
            views = views_of({**operands, **results})
            work = one(call.shape, call.dtype, views)
            scratch = {name: unwritten(shape, np.float32) for name, shape in work.scratch.items()}
            views |= views_of(scratch)
            arguments = struct.pack(call.shape, views, scale, work.counts)
            launch_all(work.launches, arguments, order)
        return results

    return in_every_order(run)


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
