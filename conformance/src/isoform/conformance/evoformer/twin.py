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
from isoform.conformance.dtypes import FORMATS, rounded
from isoform.reference.contract import Arithmetic
from isoform.reference.numpy.evoformer import (
    attended,
    heads_first,
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
) -> Operands:
    """All results of one call, with every step rounded as ``arithmetic`` declares.

    Args:
        operands: The operands and ``dout``, in the call's dtype.
        scale: As in the call.
        dtype: The call's dtype.
        arithmetic: The declared arithmetic.
        gradients: Whether the gradients are wanted too.

    Returns:
        By the name of the result, rounded to the call's dtype (lse: to float32 at least).
    """
    step = {
        name: arithmetic.resolve(name, dtype)
        for name in ("accumulate", "logits", "probabilities", "output", "cotangent", "dlogits")
    }
    wide = FORMATS[step["accumulate"]].dtype
    q, k, v, mask = (operands.get(name) for name in ("q", "k", "v", "mask"))
    assert q is not None and k is not None and v is not None
    factor = wide.type(resolve_scale(scale, q))
    H, G = q.shape[3], k.shape[3]

    with np.errstate(all="ignore"):
        qh = heads_first(q, wide)
        kh = heads_first(attended(k, mask), wide, H)
        vh = heads_first(attended(v, mask), wide, H)
        kept = np.ones((), bool) if mask is None else mask[:, :, None, None, :]

        s = factor * (qh @ kh.swapaxes(-1, -2))
        for name in ("mask_bias", "pair_bias"):
            if (bias := operands.get(name)) is not None:
                s = s + bias.astype(wide)
        s = np.where(kept, rounded(s, step["logits"]), wide.type(-np.inf))

        top = s.max(-1, keepdims=True, initial=-np.inf)
        none_left = top == -np.inf
        e = np.exp(s - np.where(none_left, 0, top))
        total = np.where(none_left, 1, e.sum(-1, keepdims=True))
        p = rounded(e, step["probabilities"])
        o = np.where(none_left, 0, (p @ vh) / total)
        lse = np.where(none_left, -np.inf, top + np.log(total))

        gate = operands.get("gate")
        opening = np.ones((), wide) if gate is None else sigmoid(heads_first(gate, wide))
        results = {"out": o * opening}
        if gradients:
            dy = heads_first(operands["dout"], wide)
            do = rounded(dy * opening, step["cotangent"])
            p = np.where(none_left, 0, np.exp(s - np.where(none_left, 0, lse)))
            dp = do @ vh.swapaxes(-1, -2)
            delta = (do * rounded(o, step["output"])).sum(-1, keepdims=True)
            ds = np.where(none_left, 0, p * (dp - delta))
            ds_stored = rounded(ds, step["dlogits"])
            p_stored = rounded(p, step["probabilities"])
            results["dq"] = factor * (ds_stored @ kh)
            results["dk"] = sum_groups(factor * (ds_stored.swapaxes(-1, -2) @ qh), G)
            results["dv"] = sum_groups(p_stored.swapaxes(-1, -2) @ do, G)
            if gate is not None:
                results["dgate"] = dy * o * opening * (1 - opening)
        results = {name: x.swapaxes(2, 3) for name, x in results.items()}
        if gradients and "mask_bias" in operands:
            results["dmask_bias"] = ds.sum((2, 3))[:, :, None, None, :]
        if gradients and "pair_bias" in operands:
            results["dpair_bias"] = ds.sum(1, keepdims=True)
        stored = {name: rounded(x, dtype) for name, x in results.items()}
        stored["lse"] = rounded(lse[..., 0], result_format("lse", dtype))
        return {name: x.astype(np.float64) for name, x in stored.items()}
