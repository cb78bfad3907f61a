"""Faults that implementations of Evoformer attention have had, or could have, one mutant each.

All are made from one plain implementation with places to interfere (:class:`Faults`): each fault is
a small function at one of them. Without any it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array, rounded
from isoform.conformance.evoformer.cases import NAME
from isoform.conformance.faults import (
    Operands,
    as_it_is,
    careless_softmax,
    crashes,
    cut_product,
    declines,
    few_digits,
    flushed,
    gradient,
    narrow_product,
    reused_buffer,
    shifted_softmax,
    shuffled_product,
    spiked,
    stale_last_query,
    uniform_softmax,
    unshifted_softmax,
    unsummed_groups,
)
from isoform.conformance.implementation import Implementation
from isoform.conformance.mutant import Mutant
from isoform.reference.contract import Capabilities, evoformer_call
from isoform.reference.numpy import Gradients
from isoform.reference.numpy.evoformer import (
    attended,
    check_cotangent,
    heads_first,
    heads_last,
    lse_dtype,
    resolve_scale,
    sigmoid,
    sum_groups,
)


@dataclass(frozen=True)
class Faults:
    """Where to interfere with a plain float32 implementation.

    Attributes:
        check: Checks the operands.
        operands: Changes them first (a dictionary, scale included).
        clean: Replaces the keys and values that the mask drops, given them and the mask.
        logits: Changes the logits ``[B, S, H, Q, K]``.
        softmax: Logits to probabilities and lse.
        probabilities: Changes P.
        product: P·V.
        opening: The gate's factor.
        out: Changes the output ``[B, S, Q, H, D]``, in the operands' dtype.
        lse: Changes lse.
        delta: Changes δ in the backward.
        dlogits: Changes dS.
        sum_rows: dS to the gradient of the pair bias, summing over rows.
        sum_heads: dS to the gradient of the mask bias, summing over heads and queries.
        sum_groups: Sums gradients of k and v over the query heads that share one.
        gradients: Changes the gradients, given them and the operands.
    """

    check: Callable[..., object] = evoformer_call
    operands: Callable[[Operands], Operands] = as_it_is
    clean: Callable[[Array, Array | None], Array] = attended
    logits: Callable[[Array], Array] = as_it_is
    softmax: Callable[[Array], tuple[Array, Array]] = shifted_softmax
    probabilities: Callable[[Array], Array] = as_it_is
    product: Callable[[Array, Array], Array] = np.matmul
    opening: Callable[[Array], Array] = sigmoid
    out: Callable[[Array], Array] = as_it_is
    lse: Callable[[Array], Array] = as_it_is
    delta: Callable[[Array], Array] = as_it_is
    dlogits: Callable[[Array], Array] = as_it_is
    sum_rows: Callable[[Array], Array] = lambda ds: ds.sum(1, keepdims=True)
    sum_heads: Callable[[Array], Array] = lambda ds: ds.sum((2, 3))[:, :, None, None, :]
    sum_groups: Callable[[Array, int], Array] = sum_groups
    gradients: Callable[[Gradients, Operands], Gradients] = lambda gradients, operands: gradients

    def forward(self, q: Array, k: Array, v: Array, **operands: Any) -> Any:
        """The operation, with the faults."""
        return_lse = operands.pop("return_lse", False)
        self.check(q, k, v, **operands)
        with np.errstate(all="ignore"):
            state = self._state(self.operands({"q": q, "k": k, "v": v, **operands}))
            out = self.out(heads_last(state["o"] * state["opening"], q.dtype))
            lse = self.lse(state["lse"]).astype(lse_dtype(q))
        return (out, lse) if return_lse else out

    def backward(self, dout: Array, q: Array, k: Array, v: Array, **operands: Any) -> Gradients:
        """Its gradients, with the faults."""
        self.check(q, k, v, **operands)
        check_cotangent(dout, q)
        with np.errstate(all="ignore"):
            given = self.operands({"q": q, "k": k, "v": v, **operands})
            state = self._state(given)
            p, o, opening = state["p"], state["o"], state["opening"]
            dy = heads_first(dout, o.dtype)
            do = dy * opening
            delta = self.delta((do * o).sum(-1, keepdims=True))
            ds = self.dlogits(p * (do @ state["v"].swapaxes(-1, -2) - delta))
            G = k.shape[3]
            dk = self.sum_groups(state["scale"] * (ds.swapaxes(-1, -2) @ state["q"]), G)
            dv = self.sum_groups(p.swapaxes(-1, -2) @ do, G)
            gradients = Gradients(
                dq=heads_last(state["scale"] * (ds @ state["k"]), q.dtype),
                dk=self.clean(heads_last(dk, q.dtype), given.get("mask")),
                dv=self.clean(heads_last(dv, q.dtype), given.get("mask")),
                dmask_bias=self.sum_heads(ds).astype(q.dtype),
                dpair_bias=self.sum_rows(ds).astype(q.dtype),
                dgate=heads_last(dy * o * opening * (1 - opening), q.dtype),
            )
            return self.gradients(gradients, given | {"dout": dout})

    def _state(self, given: Operands) -> dict[str, Any]:
        q, k, v, mask = given["q"], given["k"], given["v"], given.get("mask")
        wide = np.promote_types(np.float32, q.dtype) if q.dtype.kind == "f" else np.dtype("f4")
        scale = wide.type(resolve_scale(given.get("scale"), q))
        qh = heads_first(q, wide)
        kh = heads_first(self.clean(k, mask), wide, q.shape[3])
        vh = heads_first(self.clean(v, mask), wide, q.shape[3])
        s = scale * (qh @ kh.swapaxes(-1, -2))
        for name in ("mask_bias", "pair_bias"):
            if given.get(name) is not None:
                s = s + given[name].astype(wide)
        if mask is not None:
            s = np.where(mask[:, :, None, None, :], s, wide.type(-np.inf))
        p, lse = self.softmax(self.logits(s))
        p = self.probabilities(p)
        gate = given.get("gate")
        opening = np.ones((), wide) if gate is None else self.opening(heads_first(gate, wide))
        return {"q": qh, "k": kh, "v": vh, "scale": scale, "p": p, "lse": lse} | {
            "o": self.product(p, vh),
            "opening": opening,
        }


CAPABILITIES = Capabilities(NAME, deterministic=True, memory="quadratic")


def _implementation(name: str, faults: Faults, **declared: Any) -> Implementation:
    return Implementation(
        name, "numpy", replace(CAPABILITIES, **declared), faults.forward, faults.backward
    )


def without_fault(mutant: Mutant) -> Implementation:
    """The same implementation without the fault, declaring what :data:`CAPABILITIES` does."""
    return _implementation(f"{mutant.name}-mended", Faults())


# Faults that take more than a line.


def _drop(name: str) -> Callable[[Operands], Operands]:
    return lambda operands: operands | {name: None}


def _change(name: str, change: Callable[[Any], Any]) -> Callable[[Operands], Operands]:
    return lambda operands: (
        operands if operands.get(name) is None else operands | {name: change(operands[name])}
    )


def _first_keys(count: Callable[[int], int]) -> Callable[[Operands], Operands]:
    """Only the first keys are looked at."""

    def cut(operands: Operands) -> Operands:
        kept = count(operands["k"].shape[2])
        short = {name: operands[name][:, :, :kept] for name in ("k", "v")}
        biases = {
            name: operands[name][..., :kept]
            for name in ("mask", "mask_bias", "pair_bias")
            if operands.get(name) is not None
        }
        return operands | short | biases

    return cut


def _scaled_in_place(operands: Operands) -> Operands:
    """The scale is multiplied into q where it lies, and left there."""
    q = operands["q"]
    if q.flags.writeable:
        q *= q.dtype.type(resolve_scale(operands.get("scale"), q))
    return operands | {"scale": 1.0}


def _mutants() -> Iterator[Mutant]:
    def mutant(name: str, fault: str, killed_by: str, case: str, **faults: Any) -> Mutant:
        declared = {key: faults.pop(key) for key in list(faults) if key not in PLACES}
        case = f"evoformer/{case}" if case else ""
        implementation = _implementation(f"mutant-{name}", Faults(**faults), **declared)
        return Mutant(implementation, fault, killed_by, case)

    # The operation
    yield mutant("zeros", "returns zeros", "out/condition", "operands/fp32/bare", out=np.zeros_like)
    yield mutant(
        "scale-dropped",
        "logits are not scaled",
        "out/condition",
        "operands/fp32/bare",
        operands=lambda operands: operands | {"scale": 1.0},
    )
    yield mutant(
        "mask-ignored",
        "the bool mask is ignored",
        "out/condition",
        "operands/fp32/mask",
        operands=_drop("mask"),
    )
    yield mutant(
        "mask-bias-ignored",
        "the mask bias is ignored",
        "out/condition",
        "operands/fp32/mask-bias",
        operands=_drop("mask_bias"),
    )
    yield mutant(
        "pair-bias-transposed",
        "queries and keys of the pair bias exchanged",
        "out/condition",
        "length-17/fp32/all-operands",
        operands=_change("pair_bias", lambda x: x.swapaxes(-1, -2)),
    )
    yield mutant(
        "pair-bias-first-head",
        "all heads use the first one's pair bias",
        "out/condition",
        "operands/fp32/pair-bias",
        operands=_change("pair_bias", lambda x: x[:, :, [0] * x.shape[2]]),
    )
    yield mutant(
        "gate-raw",
        "the gate is not put through the sigmoid",
        "out/condition",
        "operands/fp32/gate",
        opening=as_it_is,
    )
    yield mutant(
        "last-key-lost",
        "the last key is never looked at",
        "out/condition",
        "values/fp32/last-key-only",
        operands=_first_keys(lambda K: K - 1),
    )
    yield mutant(
        "tail-lost",
        "keys beyond the last whole tile of 64 are lost",
        "out/condition",
        "length-65/fp32/all-operands",
        operands=_first_keys(lambda K: K - K % 64),
    )
    yield mutant(
        "heads-interleaved",
        "query heads are assigned to key heads in turn",
        "out/condition",
        "heads-4-2/fp32/all-operands",
        operands=lambda o: o | {name: np.tile(o[name], (1, 1, 1, 2, 1)) for name in "kv"},
    )
    # Rows without a key, and what must not be seen
    yield mutant(
        "uniform-without-keys",
        "a row without a key attends to all keys alike",
        "out/pattern",
        "values/fp32/masked-rows",
        softmax=uniform_softmax,
        clean=lambda x, mask: x,
    )
    yield mutant(
        "nan-without-keys",
        "a row without a key is NaN",
        "out/pattern",
        "values/fp32/minus-inf-bias",
        softmax=careless_softmax,
    )
    yield mutant(
        "nan-gradient-without-keys",
        "a row without a key has NaN gradients",
        "dq/pattern",
        "values/fp32/masked-rows",
        dlogits=lambda ds: np.where(ds.any(-1, keepdims=True), ds, np.nan),
    )
    yield mutant(
        "garbage-seen",
        "NaN in dropped keys reaches the output through 0·NaN",
        "out/pattern",
        "values/fp32/garbage-in-dropped",
        clean=lambda x, mask: x,
    )
    yield mutant(
        "nan-cleaned",
        "NaN and infinities that are attended to are replaced by numbers",
        "out/pattern",
        "values/fp32/nan-attended",
        operands=lambda given: (
            given | {name: np.nan_to_num(given[name]) for name in ("q", "k", "v")}
        ),
    )
    yield mutant(
        "bias-as-mask",
        "a finite bias below −1e4 is taken for a mask",
        "lse/pattern",
        "values/fp32/huge-negative-bias",
        logits=lambda s: np.where(s < -1e4, s.dtype.type(-np.inf), s),
    )
    # lse
    yield mutant(
        "lse-base-2",
        "lse is the logarithm to base 2",
        "lse/condition",
        "operands/fp32/bare",
        lse=lambda lse: lse * np.float32(1.4426950408889634),
    )
    # Arithmetic
    yield mutant(
        "overflowing",
        "exp without subtracting the maximum",
        "out/pattern",
        "values/fp32/large-logits",
        softmax=unshifted_softmax,
    )
    yield mutant(
        "fp16-probabilities",
        "probabilities pass through float16 for float32 operands",
        "out/condition",
        "operands/fp32/bare",
        probabilities=lambda p: rounded(p, "float16"),
    )
    yield mutant(
        "bf16-logits",
        "logits pass through bfloat16, undeclared",
        "out/twin_mean",
        "values/bf16/large-logits",
        logits=lambda s: rounded(s, "bfloat16"),
    )
    yield mutant(
        "bf16-sums",
        "P·V is summed in bfloat16",
        "out/twin_mean",
        "length-257/bf16/all-operands",
        product=narrow_product,
    )
    yield mutant(
        "spiked",
        "one element in 500 is off by three units",
        "out/twin_max",
        "head-dim-64/bf16/all-operands",
        out=spiked,
    )
    yield mutant(
        "truncated",
        "results are cut, not rounded",
        "out/bias",
        "operands/bf16/bare",
        product=cut_product,
    )
    yield mutant(
        "flushed",
        "subnormal results are flushed to zero",
        "out/condition",
        "values/fp32/subnormal",
        out=flushed,
    )
    # Gradients
    yield mutant(
        "dq-unscaled",
        "dq lacks the scale",
        "dq/condition",
        "operands/fp32/bare",
        gradients=gradient("dq", lambda dq, o: dq * dq.dtype.type(o["q"].shape[-1] ** 0.5)),
    )
    yield mutant(
        "delta-omitted",
        "δ is left out of dS",
        "dq/condition",
        "operands/fp32/bare",
        delta=np.zeros_like,
    )
    yield mutant(
        "groups-unsummed",
        "dk and dv are not summed over the heads that share them",
        "dk/condition",
        "heads-4-2/fp32/all-operands",
        sum_groups=unsummed_groups,
    )
    yield mutant(
        "dv-ungated",
        "dv uses the gradient before the gate",
        "dv/condition",
        "operands/fp32/gate",
        gradients=lambda gradients, o: gradients._replace(
            dv=Faults().backward(o["dout"], o["q"], o["k"], o["v"]).dv
        ),
    )
    yield mutant(
        "dpair-first-row",
        "dpair_bias is not summed over rows",
        "dpair_bias/condition",
        "operands/fp32/pair-bias",
        sum_rows=lambda ds: ds[:, :1],
    )
    yield mutant(
        "dpair-transposed",
        "dpair_bias has queries and keys exchanged",
        "dpair_bias/condition",
        "length-17/fp32/all-operands",
        sum_rows=lambda ds: ds.sum(1, keepdims=True).swapaxes(-1, -2),
    )
    yield mutant(
        "dmask-first-head",
        "dmask_bias is not summed over heads",
        "dmask_bias/condition",
        "operands/fp32/mask-bias",
        sum_heads=lambda ds: ds[:, :, 0].sum(2)[:, :, None, None, :],
    )
    yield mutant(
        "dgate-open",
        "dgate lacks the sigmoid's derivative",
        "dgate/condition",
        "operands/fp32/gate",
        gradients=gradient(
            "dgate",
            lambda dgate, o: (
                dgate / (1 - sigmoid(o["gate"].astype(np.float32))).astype(dgate.dtype)
            ),
        ),
    )
    yield mutant(
        "dropped-key-gradient",
        "a dropped key gets a gradient",
        "dk/pattern",
        "values/fp32/garbage-in-dropped",
        gradients=gradient("dk", lambda dk, o: dk + np.float32(1e-30)),
    )
    yield mutant(
        "fp8-dlogits",
        "dS is kept in four bits, undeclared",
        "dq/twin_mean",
        "head-dim-64/bf16/all-operands",
        dlogits=few_digits,
    )
    # Shape, dtype, declaration
    yield mutant(
        "heads-first",
        "returns [B, S, H, Q, D]",
        "out/shape",
        "operands/fp32/bare",
        out=lambda out: out.swapaxes(2, 3),
    )
    yield mutant(
        "widened",
        "returns float64 for float32",
        "out/dtype",
        "operands/fp32/bare",
        out=lambda out: out.astype(np.float64),
    )
    yield mutant(
        "refusing",
        "declares a dtype and then declines it",
        "case",
        "operands/bf16/bare",
        check=declines("bfloat16"),
    )
    yield mutant(
        "crashing",
        "declines by crashing",
        "case",
        "operands/bf16/bare",
        check=crashes("bfloat16"),
        dtypes=frozenset({"float32"}),
    )
    yield mutant(
        "undeclared",
        "returns wrong numbers for what it declares unsupported",
        "out/condition",
        "operands/fp32/gate",
        opening=as_it_is,
        head_dims=(32, 128),
    )
    # Behaviour
    yield mutant(
        "scales-in-place",
        "the scale is multiplied into q in place",
        "unmodified",
        "operands/fp32/bare",
        operands=_scaled_in_place,
    )
    yield mutant(
        "shuffled",
        "sums in another order each time, declared deterministic",
        "determinism",
        "length-65/fp32/all-operands",
        product=shuffled_product,
    )
    yield mutant(
        "buffer-reused",
        "returns a buffer that a later call overwrites",
        "independence",
        "operands/fp32/bare",
        out=reused_buffer(),
    )
    yield mutant(
        "query-stale",
        "the last query is left from the call before",
        "independence",
        "operands/fp32/bare",
        out=stale_last_query(),
    )
    yield mutant(
        "unchecked",
        "operands are not checked: NumPy broadcasts what it can",
        "invalid/pair_bias: one head for all",
        "",
        check=lambda *operands, **more: None,
    )
    yield mutant(
        "not-linear",
        "declares linear memory and holds all logits",
        "memory/growth",
        "",
        memory="linear",
    )


PLACES = {place.name for place in fields(Faults)}
MUTANTS: tuple[Mutant, ...] = tuple(_mutants())
