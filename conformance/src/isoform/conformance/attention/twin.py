"""The definition, run with an implementation's declared arithmetic: its twin.

As :mod:`isoform.conformance.evoformer.twin`: sums are done in ``accumulate``; logits, P, O (where
the backward reads it), dO and dS are rounded to what the declaration says before they enter a
product; results are rounded once, to the operands' dtype. P is rounded as online softmax has it,
before the division by its sum.
"""

from __future__ import annotations

import numpy as np

from isoform.conformance.attention.cases import shape_of
from isoform.conformance.attention.values import mask_of, with_places
from isoform.conformance.budgets import result_format
from isoform.conformance.case import Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import FORMATS, Array, rounded
from isoform.conformance.products import product_over_channels
from isoform.conformance.signatures import ATTENTION
from isoform.reference.contract import Arithmetic
from isoform.reference.numpy.evoformer import (
    attended,
    heads_first,
    largest,
    living,
    resolve_scale,
    sum_groups,
)


def twin(
    operands: Operands,
    scale: float | None,
    window: tuple[int, int],
    dtype: str,
    arithmetic: Arithmetic,
    *,
    gradients: bool,
    processor: Processor | None = None,
) -> Operands:
    """All results of one call, with every step rounded as ``arithmetic`` declares.

    Args:
        operands: The operands and ``dout``, in the call's dtype.
        scale: As in the call.
        window: How far a query looks before and after its position; −1: no end.
        dtype: The call's dtype.
        arithmetic: The declared arithmetic.
        gradients: Whether the gradients are wanted too.
        processor: As in :func:`~.chunks.in_chunks`.

    Returns:
        By the name of the result, rounded to the call's dtype (lse: to float32 at least).
    """

    def step(chunk: Operands) -> dict[str, tuple[Array]]:
        found = _with_roundings(chunk, scale, window, dtype, arithmetic, gradients=gradients)
        return {name: (x,) for name, x in found.items()}

    # what is summed over chunks is summed in ``accumulate``, and rounded when it is whole
    whole = in_chunks(step, with_places(operands), shape_of(operands), processor)
    return {
        name: rounded(x, result_format(name, dtype)).astype(np.float64)
        for name, (x,) in whole.items()
    }


def _with_roundings(
    chunk: Operands,
    scale: float | None,
    window: tuple[int, int],
    dtype: str,
    arithmetic: Arithmetic,
    *,
    gradients: bool,
) -> Operands:
    """The results of one chunk, as they are before they are rounded to what is returned."""
    steps = {name: arithmetic.resolve(name, dtype) for name in ATTENTION.arithmetic}
    wide = FORMATS[steps["accumulate"]].dtype
    over_channels = product_over_channels(arithmetic, dtype)
    mask = mask_of(chunk, window)
    pairs = mask.pairs()
    factor = wide.type(resolve_scale(scale, chunk["q"]))
    H, G = chunk["q"].shape[2], chunk["k"].shape[2]

    with np.errstate(all="ignore"):
        qh = living(chunk["q"], ~pairs.any(-1, keepdims=True), wide)
        kh = heads_first(attended(chunk["k"], mask.real_keys()), wide, H)
        vh = heads_first(attended(chunk["v"], mask.real_keys()), wide, H)

        s = rounded(factor * over_channels(qh, kh.swapaxes(-1, -2)), steps["logits"])
        s = np.where(pairs, s, wide.type(-np.inf))
        top = largest(s)[..., None]
        none_left = top == -np.inf
        e = np.where(pairs, np.exp(s - np.where(none_left, 0, top)), wide.type(0))
        total = np.where(none_left, 1, e.sum(-1, keepdims=True))
        p = rounded(e, steps["probabilities"])
        o = np.where(none_left, 0, (p @ vh) / total)
        lse = np.where(none_left, -np.inf, top + np.log(total))
        results = {"out": o.swapaxes(1, 2), "lse": lse[..., 0]}
        if not gradients:
            return results

        do = rounded(living(chunk["dout"], none_left, wide), steps["cotangent"])
        p = np.where(pairs & ~none_left, np.exp(s - np.where(none_left, 0, lse)), wide.type(0))
        dp = over_channels(do, vh.swapaxes(-1, -2))
        delta = (do * rounded(o, steps["output"])).sum(-1, keepdims=True)
        ds = rounded(np.where(none_left, 0, p * (dp - delta)), steps["dlogits"])
        p = rounded(p, steps["probabilities"])
        gradient_of = {
            "dq": factor * (ds @ kh),
            "dk": sum_groups(factor * (ds.swapaxes(-1, -2) @ qh), G),
            "dv": sum_groups(p.swapaxes(-1, -2) @ do, G),
        }
        return results | {name: x.swapaxes(1, 2) for name, x in gradient_of.items()}
