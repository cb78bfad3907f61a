r"""How large an error may honestly be: the first-order condition of every result.

Suppose every elementary step of the definition is done with a relative error of at most u. To first
order, a result x is then off by at most a small multiple of u·κ(x), where κ adds up how every
step's error reaches x. An implementation is judged by its error *over u·κ*, element by element: a
fixed tolerance would be blind where results are small and unjust where they cancel.

With A_ij what a logit was summed from, and Ā_i its mean under the softmax ::

    A_ij    = scale·Σ_d |q_id||k_jd| + |mask_bias_j| + |pair_bias_ij| + |s_ij|
    Ā_i     = Σ_j p_ij A_ij
    κ(lse)  = Σ_j p_ij A_ij + |lse| + 1
    κ(o)    = Σ_j p_ij A_ij |v_j − o_i| + Σ_j p_ij |v_j| + |o_i|

(a logit's error moves p_j up and all others down, so it reaches o through v_j − o). Backward, with
E_ij = A_ij + Ā_i + 1 the relative error of p_ij, each line adds the errors of what it is made of::

    κ(ō)      = |ō| (κ(σ)/σ + 1)
    κ(p̅ − δ)  = Σ_d κ(ō) |v_j| + Σ_d (|ō| κ(o) + κ(ō) |o|)
    κ(s̅)     = p (E |p̅ − δ| + κ(p̅ − δ)) + |s̅|
    κ(q̅)     = scale·Σ_j κ(s̅) |k| + |q̅|          and so on: s̅'s consumers take κ(s̅) through |·|
    κ(v̅)     = Σ_i p E |ō| + |v̅|

Beside κ there is λ: how many *absolute* errors of the smallest subnormal number η reach x, from
probabilities or logit gradients that underflow when stored in the operands' dtype, and from
products that underflow where they are summed, in float32 at least. The budget is C·(u·κ + η·λ); for
bfloat16 and float32, η is so small that λ counts for subnormal operands alone.
"""

from __future__ import annotations

import numpy as np

from isoform.conformance.case import Operands
from isoform.conformance.chunks import Processor, in_chunks
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.evoformer.cases import shape_of
from isoform.conformance.operation import Condition
from isoform.reference.contract import dtype_name
from isoform.reference.numpy.evoformer import (
    attended,
    heads_first,
    resolve_scale,
    sigmoid,
    sum_groups,
)

SUMS = ("dq", "dk", "dv", "dmask_bias", "dpair_bias")
"""Results that are sums of what was itself rounded: the sum's own rounding comes on top."""


def conditions(
    operands: Operands,
    scale: float | None,
    reference: Operands,
    *,
    gradients: bool,
    processor: Processor | None = None,
) -> dict[str, Condition]:
    """The condition of every result of one call.

    Args:
        operands: The operands and ``dout``, any float dtype.
        scale: As in the call.
        reference: The oracle's results for them (``out``, ``lse``, and the gradients).
        gradients: Whether those of the gradients are wanted too.
        processor: As in :func:`~.chunks.in_chunks`.

    Returns:
        By the name of the result, in its shape.
    """
    q, k = operands["q"], operands["k"]
    float_format, float32 = FORMATS[dtype_name(q)], FORMATS["float32"]
    # what float32 loses by cancelling or underflow counts less in the units of a shorter dtype
    wide_unit = min(1.0, float32.unit_roundoff / float_format.unit_roundoff)
    length = max(q.shape[2], k.shape[2])
    products = min(1.0, float32.smallest / float_format.smallest) * length + 1

    def step(chunk: Operands) -> dict[str, Condition]:
        return _propagated(chunk, scale, wide_unit, gradients=gradients)

    found = {}
    propagated = in_chunks(
        step, operands | {"lse": reference["lse"]}, shape_of(operands), processor
    )
    for name, (relative, underflow) in propagated.items():
        if name in SUMS:
            relative += np.abs(reference[name])
        if name != "lse":
            underflow += products
        found[name] = Condition(relative, underflow)
    return found


def _propagated(
    chunk: Operands, scale: float | None, wide_unit: float, *, gradients: bool
) -> dict[str, Condition]:
    """κ and λ of one chunk's results, but for what the last sum of each adds of its own.

    Args:
        chunk: Operands, and ``lse``.
        scale: As in the call.
        wide_unit: float32's unit roundoff over the call's, at most 1.
        gradients: As in :func:`conditions`.
    """
    wide = np.dtype(np.float64)
    q, k, v, mask = (chunk.get(name) for name in ("q", "k", "v", "mask"))
    assert q is not None and k is not None and v is not None
    factor = abs(resolve_scale(scale, q))
    H, G = q.shape[3], k.shape[3]

    with np.errstate(all="ignore"):
        qh = heads_first(q, wide)
        kh = heads_first(attended(k, mask), wide, H)
        vh = heads_first(attended(v, mask), wide, H)

        s = resolve_scale(scale, q) * (qh @ kh.swapaxes(-1, -2))
        size = factor * (np.abs(qh) @ np.abs(kh).swapaxes(-1, -2))
        for name in ("mask_bias", "pair_bias"):
            if (bias := chunk.get(name)) is not None:
                s = s + bias.astype(wide)
                size = size + np.abs(bias.astype(wide))
        lse = chunk["lse"].astype(wide)
        alive = np.isfinite(lse)[..., None]
        attends = alive if mask is None else alive & mask[:, :, None, None, :]
        p = np.where(attends, np.exp(s - np.where(alive, lse[..., None], 0)), 0)
        A = np.where(p > 0, size + np.abs(s), 0)  # a bias of −inf is exact
        mean_A = (p * A).sum(-1, keepdims=True)
        o = p @ vh
        total_v = np.broadcast_to(np.abs(vh).sum(-2, keepdims=True), o.shape)
        kappa_o = spread(p * A, vh, o) + p @ np.abs(vh) + np.abs(o)

        gate = chunk.get("gate")
        opening: Array | float = 1.0 if gate is None else sigmoid(heads_first(gate, wide))
        # σ's own error: of the exponential, |gate|·(1 − σ), and of the sum and the quotient
        kappa_gate: Array | float = (
            0.0 if gate is None else np.abs(heads_first(gate, wide)) * (1 - opening) + 2
        )
        found = {
            "out": Condition(
                _last(opening * (kappa_o + kappa_gate * np.abs(o))), _last(opening * total_v)
            ),
            "lse": Condition(
                mean_A[..., 0] + np.where(np.isfinite(lse), np.abs(lse), 0) + 1,
                np.ones_like(lse),
            ),
        }
        if not gradients:
            return found

        dy = heads_first(chunk["dout"], wide)
        do = dy * opening
        kappa_do = np.abs(do) * (kappa_gate + 1)
        dp_delta = do @ vh.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True)
        kappa_dp = kappa_do @ np.abs(vh).swapaxes(-1, -2) + (
            np.abs(do) * kappa_o + kappa_do * np.abs(o)
        ).sum(-1, keepdims=True)
        E = A + mean_A + 1
        ds = p * dp_delta
        kappa_ds = np.where(p > 0, p * (E * np.abs(dp_delta) + kappa_dp), 0) + np.abs(ds)
        # a probability that underflows in storage loses p̅ − δ times η, and s̅ itself η
        eta_ds = np.where(attends, np.abs(dp_delta) + 1, 0)

        found["dq"] = Condition(
            _last(factor * (kappa_ds @ np.abs(kh))), _last(factor * (eta_ds @ np.abs(kh)))
        )
        found["dk"] = Condition(
            _last(sum_groups(factor * (kappa_ds.swapaxes(-1, -2) @ np.abs(qh)), G)),
            _last(sum_groups(factor * (eta_ds.swapaxes(-1, -2) @ np.abs(qh)), G)),
        )
        kappa_dv = (p * E).swapaxes(-1, -2) @ np.abs(do) + p.swapaxes(-1, -2) @ kappa_do
        weight = np.where(attends, np.ones_like(p), 0)
        found["dv"] = Condition(
            _last(sum_groups(kappa_dv, G)),
            _last(sum_groups(weight.swapaxes(-1, -2) @ np.abs(do), G)),
        )
        if "mask_bias" in chunk:
            found["dmask_bias"] = Condition(
                kappa_ds.sum((2, 3))[:, :, None, None, :], eta_ds.sum((2, 3))[:, :, None, None, :]
            )
        if "pair_bias" in chunk:
            found["dpair_bias"] = Condition(
                kappa_ds.sum(1, keepdims=True), eta_ds.sum(1, keepdims=True)
            )
        if gate is not None:
            # 1 − σ cancels where σ is near 1, but in float32 at least (EVO-7), whatever the dtype
            cancelled = opening**2 * wide_unit
            shut = opening * (1 - opening)
            kappa_shut = shut * (kappa_gate + 2) + cancelled
            found["dgate"] = Condition(
                _last(np.abs(dy) * (shut * kappa_o + kappa_shut * np.abs(o))),
                _last(np.abs(dy) * shut * total_v),
            )
        return found


def spread(weight: Array, v: Array, o: Array) -> Array:
    """``Σ_j weight_ij |v_jd − o_id|``, a channel at a time: it is no matrix product."""
    spread = np.empty_like(o)
    for d in range(o.shape[-1]):
        distance = np.abs(v[..., None, :, d] - o[..., :, None, d])
        spread[..., d] = (weight * distance).sum(-1)
    return spread


def _last(x: Array) -> Array:
    """``[B, S, H, L, D]`` to ``[B, S, L, H, D]``."""
    return x.swapaxes(2, 3)
