"""The definition, run with an implementation's declared arithmetic: its twin.

The condition bounds what *can* go wrong; the twin shows what typically does. An implementation that
declares "operands bfloat16, sums float32, P rounded to bfloat16" should err about as much as the
plain definition with just those roundings, and not by a lesser choice hidden inside the worst case.

Sums are done in ``accumulate``; logits, P, O (where the backward reads it), dO (after the gate) and
dS are rounded to what the declaration says before they enter a product; results are rounded once,
to the operands' dtype. P is rounded as online softmax has it, before the division by its sum.
"""

from __future__ import annotations

import numpy as np

from isoform.conformance.budgets import result_format
from isoform.conformance.case import Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import FORMATS, Array, rounded
from isoform.conformance.evoformer.cases import shape_of
from isoform.conformance.products import product_over_channels
from isoform.reference.contract import Arithmetic
from isoform.reference.numpy.evoformer import (
    attended,
    heads_first,
    largest,
    resolve_scale,
    sigmoid,
    sum_groups,
)


def twin(
    operands: Operands,
    scale: float | None,
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
        dtype: The call's dtype.
        arithmetic: The declared arithmetic.
        gradients: Whether the gradients are wanted too.
        processor: As in :func:`~.chunks.in_chunks`.

    Returns:
        By the name of the result, rounded to the call's dtype (lse: to float32 at least).
    """

    def step(chunk: Operands) -> dict[str, tuple[Array]]:
        found = _with_roundings(chunk, scale, dtype, arithmetic, gradients=gradients)
        return {name: (x,) for name, x in found.items()}

    # what is summed over chunks is summed in ``accumulate``, and rounded when it is whole
    return {
        name: rounded(x, result_format(name, dtype)).astype(np.float64)
        for name, (x,) in in_chunks(step, operands, shape_of(operands), processor).items()
    }


def _with_roundings(
    chunk: Operands, scale: float | None, dtype: str, arithmetic: Arithmetic, *, gradients: bool
) -> Operands:
    """The results of one chunk, as they are before they are rounded to what is returned."""
    steps = {
        name: arithmetic.resolve(name, dtype)
        for name in ("accumulate", "logits", "probabilities", "output", "cotangent", "dlogits")
    }
    wide = FORMATS[steps["accumulate"]].dtype
    q, k, v, mask = (chunk.get(name) for name in ("q", "k", "v", "mask"))
    assert q is not None and k is not None and v is not None
    over_channels = product_over_channels(arithmetic, dtype)
    factor = wide.type(resolve_scale(scale, q))
    H, G = q.shape[3], k.shape[3]

    with np.errstate(all="ignore"):
        qh = heads_first(q, wide)
        kh = heads_first(attended(k, mask), wide, H)
        vh = heads_first(attended(v, mask), wide, H)

        s = factor * over_channels(qh, kh.swapaxes(-1, -2))
        for name in ("mask_bias", "pair_bias"):
            if (bias := chunk.get(name)) is not None:
                s = s + bias.astype(wide)
        s = rounded(s, steps["logits"])
        if mask is not None:
            s = np.where(mask[:, :, None, None, :], s, wide.type(-np.inf))

        top = largest(s)[..., None]
        none_left = top == -np.inf
        e = np.exp(s - np.where(none_left, 0, top))
        total = np.where(none_left, 1, e.sum(-1, keepdims=True))
        p = rounded(e, steps["probabilities"])
        o = np.where(none_left, 0, (p @ vh) / total)
        lse = np.where(none_left, -np.inf, top + np.log(total))

        gate = chunk.get("gate")
        opening = wide.type(1) if gate is None else sigmoid(heads_first(gate, wide))
        results = {"out": o * opening}
        if gradients:
            dy = heads_first(chunk["dout"], wide)
            do = rounded(dy * opening, steps["cotangent"])
            p = np.where(none_left, 0, np.exp(s - np.where(none_left, 0, lse)))
            dp = over_channels(do, vh.swapaxes(-1, -2))
            delta = (do * rounded(o, steps["output"])).sum(-1, keepdims=True)
            ds = np.where(none_left, 0, p * (dp - delta))
            ds_stored = rounded(ds, steps["dlogits"])
            p_stored = rounded(p, steps["probabilities"])
            results["dq"] = factor * (ds_stored @ kh)
            results["dk"] = sum_groups(factor * (ds_stored.swapaxes(-1, -2) @ qh), G)
            results["dv"] = sum_groups(p_stored.swapaxes(-1, -2) @ do, G)
            if gate is not None:
                results["dgate"] = dy * o * opening * (1 - opening)
        results = {name: x.swapaxes(2, 3) for name, x in results.items()}
        if gradients and "mask_bias" in chunk:
            results["dmask_bias"] = ds.sum((2, 3))[:, :, None, None, :]
        if gradients and "pair_bias" in chunk:
            results["dpair_bias"] = ds.sum(1, keepdims=True)
        return results | {"lse": lse[..., 0]}
