r"""How large an error may honestly be: the first-order condition of every result.

The reasoning is that of :mod:`isoform.conformance.evoformer.condition`, without biases and gate,
over the keys that a query attends to. With ::

    A_ij    = scale·Σ_d |q_id||k_jd| + |s_ij|
    κ(lse)  = Σ_j p_ij A_ij + |lse| + 1
    κ(o)    = Σ_j p_ij A_ij |v_j − o_i| + Σ_j p_ij |v_j| + |o_i|
    κ(p̅−δ)  = Σ_d |ō| |v_j| + Σ_d |ō| (κ(o) + |o|)
    κ(s̅)    = p (E |p̅ − δ| + κ(p̅ − δ)) + |s̅|             E_ij = A_ij + Σ_j p_ij A_ij + 1
    κ(q̅)    = scale·Σ_j κ(s̅) |k| + |q̅|                    and k̅ likewise
    κ(v̅)    = Σ_i p E |ō| + |v̅|

and with λ, how many absolute errors of the smallest subnormal number η reach a result, the budget
is C·(u·κ + η·λ).
"""

from __future__ import annotations

import numpy as np

from isoform.conformance.attention.cases import shape_of
from isoform.conformance.attention.values import mask_of, with_places
from isoform.conformance.case import Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.evoformer.condition import spread
from isoform.conformance.operation import Condition
from isoform.reference.contract import dtype_name
from isoform.reference.numpy.evoformer import (
    attended,
    heads_first,
    living,
    resolve_scale,
    sum_groups,
)

GRADIENTS = ("dq", "dk", "dv")


def conditions(
    operands: Operands,
    scale: float | None,
    window: tuple[int, int],
    reference: Operands,
    *,
    gradients: bool,
    processor: Processor | None = None,
) -> dict[str, Condition]:
    """The condition of every result of one call.

    Args:
        operands: The operands and ``dout``, any float dtype.
        scale: As in the call.
        window: How far a query looks before and after its position; −1: no end.
        reference: The oracle's results for them (``out``, ``lse``, and the gradients).
        gradients: Whether those of the gradients are wanted too.
        processor: As in :func:`~.chunks.in_chunks`.

    Returns:
        By the name of the result, in its shape.
    """
    own, float32 = FORMATS[dtype_name(operands["q"])], FORMATS["float32"]
    length = max(operands["q"].shape[1], operands["k"].shape[1])
    products = min(1.0, float32.smallest / own.smallest) * length + 1

    def step(chunk: Operands) -> dict[str, Condition]:
        return _propagated(chunk, scale, window, gradients=gradients)

    given = with_places(operands) | {"lse": reference["lse"]}
    found = {}
    for name, (relative, underflow) in in_chunks(
        step, given, shape_of(operands), processor
    ).items():
        # a gradient is a sum of what was itself rounded: the sum's own rounding comes on top
        own_rounding = np.abs(reference[name]) if name in GRADIENTS else 0
        absolute = products if name != "lse" else 0
        found[name] = Condition(relative + own_rounding, underflow + absolute)
    return found


def _propagated(
    chunk: Operands, scale: float | None, window: tuple[int, int], *, gradients: bool
) -> dict[str, Condition]:
    """κ and λ of one chunk's results, but for what the last sum of each adds of its own."""
    wide = np.dtype(np.float64)
    mask = mask_of(chunk, window)
    factor, H, G = resolve_scale(scale, chunk["q"]), chunk["q"].shape[2], chunk["k"].shape[2]

    with np.errstate(all="ignore"):
        lse = chunk["lse"].astype(wide)
        alive = np.isfinite(lse)[..., None]
        attends = alive & mask.pairs()
        qh = living(chunk["q"], ~alive, wide)
        kh = heads_first(attended(chunk["k"], mask.real_keys()), wide, H)
        vh = heads_first(attended(chunk["v"], mask.real_keys()), wide, H)

        s = factor * (qh @ kh.swapaxes(-1, -2))
        p = np.where(attends, np.exp(s - np.where(alive, lse[..., None], 0)), 0)
        size = abs(factor) * (np.abs(qh) @ np.abs(kh).swapaxes(-1, -2))
        A = np.where(p > 0, size + np.abs(s), 0)
        mean_A = (p * A).sum(-1, keepdims=True)
        o = p @ vh
        kappa_o = spread(p * A, vh, o) + p @ np.abs(vh) + np.abs(o)
        weight = np.where(attends, np.ones_like(p), 0)
        found = {
            "out": Condition(_last(kappa_o), _last(weight @ np.abs(vh))),
            "lse": Condition(
                mean_A[..., 0] + np.where(np.isfinite(lse), np.abs(lse), 0) + 1,
                np.ones_like(lse),
            ),
        }
        if not gradients:
            return found

        do = living(chunk["dout"], ~alive, wide)
        dp_delta = do @ vh.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True)
        kappa_dp = np.abs(do) @ np.abs(vh).swapaxes(-1, -2) + (
            np.abs(do) * (kappa_o + np.abs(o))
        ).sum(-1, keepdims=True)
        E = A + mean_A + 1
        ds = p * dp_delta
        kappa_ds = np.where(p > 0, p * (E * np.abs(dp_delta) + kappa_dp) + np.abs(ds), 0)
        # a probability that underflows in storage loses p̅ − δ times η, and s̅ itself η
        eta_ds = np.where(attends, np.abs(dp_delta) + 1, 0)

        for name, of, transposed in (("dq", kh, False), ("dk", qh, True)):
            parts = []
            for amount in (kappa_ds, eta_ds):
                rows = amount.swapaxes(-1, -2) if transposed else amount
                part = abs(factor) * (rows @ np.abs(of))
                parts.append(_last(sum_groups(part, G) if transposed else part))
            found[name] = Condition(*parts)
        found["dv"] = Condition(
            _last(sum_groups((p * E).swapaxes(-1, -2) @ np.abs(do), G)),
            _last(sum_groups(weight.swapaxes(-1, -2) @ np.abs(do), G)),
        )
        return found


def _last(x: Array) -> Array:
    """``[B, H, L, D]`` to ``[B, L, H, D]``."""
    return x.swapaxes(1, 2)
