r"""Evoformer attention, defined.

A model of proteins holds a 4-D activation: B examples, S rows, positions along a row, channels.
Evoformer attention is softmax attention along the positions of every row, with two additions to the
logits: a *mask bias* per row and key, and a *pair bias* per head, query and key, which all S rows
share. (Jumper et al. 2021, supplementary algorithms 7, 8, 13, 14, 17 and 19; DeepSpeed4Science,
arXiv 2310.04610, section 3.1.)

Forward
-------
For one row (b, s) and one head h, with i a query, j a key, g = h // (H / G) its key/value head::

    s_ij = scale · Σ_d q_id k_jd + mask_bias_j + pair_bias_ij       for keys j that the mask leaves
    p_ij = exp(s_ij − lse_i),   lse_i = log Σ_j exp(s_ij)           softmax over the keys
    o_i  = Σ_j p_ij v_j
    y_i  = σ(gate_i) ∘ o_i                                          σ(x) = 1 / (1 + exp(−x))

y is returned as ``out``, and lse on request. Keys that the bool mask drops are no part of any sum,
whatever they hold (rule EVO-4). A query with no key left, because all are dropped or all biases are
−inf, has o = 0 and lse = −inf (rule EVO-5).

Backward
--------
Let a bar denote the gradient of the loss: ȳ is given, all others follow from the chain rule, from
the last line of the forward to the first. ::

    ō_i       = ȳ_i ∘ σ(gate_i)
    gate̅_i    = ȳ_i ∘ o_i ∘ σ(gate_i) ∘ (1 − σ(gate_i))
    v̅_j       = Σ_i p_ij ō_i
    p̅_ij      = Σ_d ō_id v_jd

The softmax couples the keys of a row: ∂p_ij/∂s_ik = p_ij (δ_jk − p_ik), so ::

    s̅_ij      = Σ_k p̅_ik ∂p_ik/∂s_ij = p_ij (p̅_ij − δ_i),   δ_i = Σ_k p_ik p̅_ik = Σ_d ō_id o_id

The second form of δ needs no sum over keys, which is what makes tiles possible
(:mod:`.evoformer_tiled`). The logits are linear in what remains::

    q̅_i       = scale · Σ_j s̅_ij k_j            k̅_j = scale · Σ_i s̅_ij q_i
    mask_bias̅_j   = Σ_h Σ_i s̅_ij                one bias for all heads and queries of a row
    pair_bias̅_ij  = Σ_s s̅_ij                    one bias for all rows of an example

and where several query heads share a key/value head, k̅ and v̅ are summed over them.

Everything here holds all B·S·H·Q·K logits at once, in float64: the plainest form, to be compared
against, not to be fast. Rules are numbered in the specification, ``docs/spec/evoformer.md``.

NumPy's functions, given CuPy's arrays, are CuPy's. So no array is made here but from the operands:
the conformance suite runs these lines on a GPU where a case is too large for a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from isoform.reference.contract import ORACLE_DTYPES, evoformer_call

Array = npt.NDArray[Any]

COMPUTE_DTYPES = ("float32", "float64", "longdouble", "complex128")


class Gradients(NamedTuple):
    """The gradient of every operand, in its shape and dtype; None where the operand was absent."""

    dq: Array
    dk: Array
    dv: Array
    dmask_bias: Array | None
    dpair_bias: Array | None
    dgate: Array | None


def evoformer_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: npt.DTypeLike | None = None,
) -> Any:
    """Evoformer attention: softmax attention with a mask bias, a shared pair bias and a gate.

    Args:
        q: Queries ``[B, S, Q, H, D]``, any float dtype (complex128 too, to differentiate by
            complex steps).
        k: Keys ``[B, S, K, G, D]``; G divides H.
        v: Values ``[B, S, K, G, D]``.
        mask: Bool ``[B, S, K]``; True where the key may be attended to.
        mask_bias: ``[B, S, 1, 1, K]``, added to the logits; −inf allowed.
        pair_bias: ``[B, 1, H, Q, K]``, added to the logits of every row; −inf allowed.
        gate: ``[B, S, Q, H, D]``; the output is multiplied by its sigmoid.
        scale: Factor of the logits; ``D**-0.5`` by default.
        return_lse: Return the log-sum-exp of the logits too.
        compute_dtype: Arithmetic to use; float64 by default, or q's dtype where that is wider.

    Returns:
        ``out [B, S, Q, H, D]`` in q's dtype, and with ``return_lse`` also ``lse [B, S, H, Q]``,
        natural logarithm, before the gate; float32, or q's dtype where that is wider.

    Raises:
        TypeError: An operand's dtype is wrong.
        ValueError: An operand's shape or the scale is wrong; the message names the axis.

    Source:
        AlphaFold 2 supplementary, algorithm 7 lines 4 to 6; arXiv 2310.04610, section 3.1.
    """
    biases: dict[str, Any] = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias}
    evoformer_call(q, k, v, **biases, gate=gate, scale=scale, dtypes=ORACLE_DTYPES)
    compute = resolve_compute_dtype(q, compute_dtype)

    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN propagate as IEEE says
        p, lse = _probabilities(q, k, scale, compute, **biases)
        o = p @ heads_first(attended(v, mask), compute, q.shape[3])
        none_left = no_key_left(lse)[..., None]
        o = np.where(none_left, 0, o)
        if gate is not None:
            o = o * sigmoid(living(gate, none_left, compute))
        out = heads_last(o, q.dtype)
        lse = lse.astype(lse_dtype(q))
    return (out, lse) if return_lse else out


def evoformer_attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
    compute_dtype: npt.DTypeLike | None = None,
) -> Gradients:
    """The gradients of :func:`evoformer_attention`, given that of its output.

    Args:
        dout: Gradient of the loss by ``out``, ``[B, S, Q, H, D]``.
        q, k, v, mask, mask_bias, pair_bias, gate, scale, compute_dtype: As in the forward.

    Returns:
        ``dq, dk, dv, dmask_bias, dpair_bias, dgate``, each in the shape and dtype of its operand,
        None where the operand is absent.

    Raises:
        TypeError: As in the forward, or dout is not in q's dtype.
        ValueError: As in the forward, or dout is not in the shape of the output.

    Source:
        The derivation is in this module's docstring.
    """
    biases: dict[str, Any] = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias}
    evoformer_call(q, k, v, **biases, gate=gate, scale=scale, dtypes=ORACLE_DTYPES)
    check_cotangent(dout, q)
    compute = resolve_compute_dtype(q, compute_dtype)

    with np.errstate(invalid="ignore", over="ignore"):
        p, lse = _probabilities(q, k, scale, compute, **biases)
        none_left = no_key_left(lse)[..., None]
        qh = living(q, none_left, compute)
        kh = heads_first(attended(k, mask), compute, q.shape[3])
        vh = heads_first(attended(v, mask), compute, q.shape[3])
        dy = living(dout, none_left, compute)
        o = np.where(none_left, 0, p @ vh)

        dgate = None
        do = dy
        if gate is not None:
            g = living(gate, none_left, compute)
            do = dy * sigmoid(g)
            # 1 − σ(g) = σ(−g), without its cancellation
            dgate = heads_last(dy * o * sigmoid(g) * sigmoid(-g), q.dtype)

        dv = p.swapaxes(-1, -2) @ do
        dp = do @ vh.swapaxes(-1, -2)
        delta = (do * o).sum(-1, keepdims=True)
        ds = np.where(none_left, 0, p * (dp - delta))
        if mask is not None:  # a dropped key has no gradient, be it next to NaN (EVO-4)
            ds = np.where(mask[:, :, None, None, :], ds, 0)

        scale = resolve_scale(scale, q)
        dq = np.where(none_left, 0, scale * (ds @ kh))
        dk = scale * (ds.swapaxes(-1, -2) @ qh)
        dmask_bias = dpair_bias = None
        if mask_bias is not None:
            dmask_bias = ds.sum((2, 3))[:, :, None, None, :].astype(q.dtype)
        if pair_bias is not None:
            dpair_bias = ds.sum(1, keepdims=True).astype(q.dtype)
        return Gradients(
            dq=heads_last(dq, q.dtype),
            dk=attended(heads_last(sum_groups(dk, k.shape[3]), q.dtype), mask),
            dv=attended(heads_last(sum_groups(dv, v.shape[3]), q.dtype), mask),
            dmask_bias=dmask_bias,
            dpair_bias=dpair_bias,
            dgate=dgate,
        )


def _probabilities(
    q: Array,
    k: Array,
    scale: float | None,
    compute: np.dtype[Any],
    *,
    mask: Array | None,
    mask_bias: Array | None,
    pair_bias: Array | None,
) -> tuple[Array, Array]:
    """Softmax probabilities ``p [B, S, H, Q, K]`` and ``lse [B, S, H, Q]``."""
    qh = heads_first(q, compute)
    kh = heads_first(attended(k, mask), compute, q.shape[3])

    s = resolve_scale(scale, q) * (qh @ kh.swapaxes(-1, -2))
    if mask_bias is not None:
        s = s + mask_bias.astype(compute)
    if pair_bias is not None:
        s = s + pair_bias.astype(compute)
    if mask is not None:
        s = np.where(mask[:, :, None, None, :], s, -np.inf)

    # exp(s − max) cannot overflow. The maximum is a constant to the derivative, so its real part
    # serves for complex steps; where no key is left it is −inf, and 0 stands in for it.
    top = largest(s)
    none_left = no_key_left(top)
    shift = np.where(none_left, 0, top)
    e = np.exp(s - shift[..., None])
    total = np.where(none_left, 1, e.sum(axis=-1))
    p = e / total[..., None]
    if mask is not None:
        p = np.where(mask[:, :, None, None, :], p, 0)
    lse = np.where(none_left, -np.inf, shift + np.log(total))
    return p, lse


# The steps that the plain and the tiled form share.


def resolve_scale(scale: float | None, q: Array) -> float:
    """The factor of the logits: ``scale``, or ``D**-0.5`` (rule EVO-2)."""
    return float(q.shape[-1]) ** -0.5 if scale is None else float(scale)


def resolve_compute_dtype(q: Array, compute_dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    """The arithmetic of a call: ``compute_dtype``, or float64, or q's dtype where that is wider."""
    if compute_dtype is None:
        return np.promote_types(q.dtype, np.float64) if q.dtype.kind in "fc" else np.dtype("f8")
    compute = np.dtype(compute_dtype)
    if compute not in [np.dtype(name) for name in COMPUTE_DTYPES]:
        raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute}")
    return compute


def lse_dtype(q: Array) -> np.dtype[Any]:
    """The dtype in which lse is returned: float32, or q's dtype where that is wider."""
    return q.dtype if q.dtype.itemsize > 4 else np.dtype("f4")


def check_cotangent(dout: Array, q: Array) -> None:
    """Raise unless ``dout`` has the shape and the dtype of the output."""
    if not (hasattr(dout, "shape") and hasattr(dout, "dtype")):
        raise TypeError(f"dout must be an array, got {type(dout).__name__}")
    if dout.dtype != q.dtype:
        raise TypeError(f"dout must be {q.dtype}, the dtype of q, got {dout.dtype}")
    if dout.shape != q.shape:
        raise ValueError(f"dout must have the shape of q {q.shape}, got {dout.shape}")


def no_key_left(lse: Array) -> Array:
    """Where a running maximum or lse says that no key is left to a query (rule EVO-5)."""
    none_left: Array = lse.real == -np.inf
    return none_left


def largest(s: Array) -> Array:
    """The largest logit of every query; −inf where there is no key at all."""
    if s.shape[-1] == 0:
        return np.full_like(s.real, -np.inf, shape=s.shape[:-1])
    top: Array = s.real.max(axis=-1)
    return top


def attended(x: Array, mask: Array | None) -> Array:
    """``x [..., K, G, D]`` with zeros for the keys that ``mask [..., K]`` drops (rule EVO-4)."""
    return x if mask is None else np.where(mask[..., None, None], x, x.dtype.type(0))


def living(x: Array, none_left: Array, compute: np.dtype[Any]) -> Array:
    """``x``, heads first, with zeros for the queries that have no key left (rule EVO-5).

    Nothing passes through such a query: not even NaN, which 0 times itself would not remove.
    """
    return np.where(none_left, compute.type(0), heads_first(x, compute))


def heads_first(x: Array, compute: np.dtype[Any], heads: int | None = None) -> Array:
    """``[..., L, G, D]`` to ``[..., H, L, D]`` in the arithmetic of the call.

    Each of the G heads is repeated for the H / G query heads that share it.
    """
    x = x.astype(compute).swapaxes(-3, -2)
    groups = x.shape[-3]
    return x if heads in (None, groups) else np.repeat(x, heads // max(groups, 1), axis=-3)


def heads_last(x: Array, dtype: np.dtype[Any]) -> Array:
    """``[..., H, L, D]`` back to ``[..., L, H, D]`` in the operand's dtype, contiguous."""
    return x.swapaxes(-3, -2).astype(dtype, order="C")


def sum_groups(dx: Array, groups: int) -> Array:
    """The adjoint of the repetition in :func:`heads_first`: sum over the heads that share one."""
    *batch, H, L, D = dx.shape
    summed: Array = dx.reshape(*batch, groups, H // max(groups, 1), L, D).sum(-3)
    return summed


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)) without overflow, exact to the last digits for x → −∞ too, analytic."""
    positive = x.real >= 0
    e = np.exp(np.where(positive, -x, x))
    opening: Array = np.where(positive, 1, e) / (1 + e)
    return opening
