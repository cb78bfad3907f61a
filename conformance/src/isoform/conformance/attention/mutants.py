"""Faults that implementations of attention over a sequence have had, or could have: the mutants.

All are made from one plain implementation with places to interfere (:class:`Faults`): each fault is
a small function at one of them. Without any it is right. It goes through the keys in blocks and
merges what each gives, as a ring of devices does, so that the faults of that are among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from isoform.conformance.attention.values import mask_of, with_places
from isoform.conformance.dtypes import Array, rounded
from isoform.conformance.faults import (
    Operands,
    as_it_is,
    careless_softmax,
    crashes,
    declines,
    few_digits,
    flushed,
    gradient,
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
from isoform.reference.attention_contract import (
    DIFFERENTIABLE,
    NAME,
    OPTIONS,
    PLACES,
    UNLIMITED,
    Mask,
    attention_call,
    resolve_window,
)
from isoform.reference.contract import Capabilities
from isoform.reference.numpy import AttentionGradients, merge
from isoform.reference.numpy.evoformer import (
    attended,
    check_cotangent,
    heads_first,
    heads_last,
    living,
    lse_dtype,
    no_key_left,
    resolve_scale,
    sum_groups,
)
from isoform.reference.numpy.evoformer_tiled import blocks

BLOCK = 32


@dataclass(frozen=True)
class Faults:
    """Where to interfere with a plain float32 implementation.

    Attributes:
        check: Checks the operands.
        operands: Changes them first (a dictionary, options included, places filled in).
        mask: Changes the rule of who attends to whom.
        pairs: Gives who attends to whom, of the mask.
        clean: Replaces the keys and values that are padding, given them and which are none.
        logits: Changes the logits ``[B, H, Q, block]``.
        softmax: Logits to probabilities and lse, of one block of keys.
        probabilities: Changes P.
        product: P·V.
        merge: Puts the results over two sets of keys together.
        merged: Changes what all blocks together gave, before it is rounded.
        out: Changes the output ``[B, Q, H, D]``, in the operands' dtype.
        lse: Changes lse.
        saved: Changes the lse that the backward reads, given it and that of the block at hand.
        delta: Changes δ in the backward.
        dlogits: Changes dS.
        sum_groups: Sums gradients of k and v over the query heads that share one.
        gradients: Changes the gradients, given them and the operands.
    """

    check: Callable[..., object] = attention_call
    operands: Callable[[Operands], Operands] = as_it_is
    mask: Callable[[Mask], Mask] = as_it_is
    pairs: Callable[[Mask], Array] = Mask.pairs
    clean: Callable[[Array, Array | None], Array] = attended
    logits: Callable[[Array], Array] = as_it_is
    softmax: Callable[[Array], tuple[Array, Array]] = shifted_softmax
    probabilities: Callable[[Array], Array] = as_it_is
    product: Callable[[Array, Array], Array] = np.matmul
    merge: Callable[[Array, Array, Array, Array], tuple[Array, Array]] = merge
    merged: Callable[[Array], Array] = as_it_is
    out: Callable[[Array], Array] = as_it_is
    lse: Callable[[Array], Array] = as_it_is
    saved: Callable[[Array, Array], Array] = lambda lse, of_the_block: lse
    delta: Callable[[Array], Array] = as_it_is
    dlogits: Callable[[Array], Array] = as_it_is
    sum_groups: Callable[[Array, int], Array] = sum_groups
    gradients: Callable[[AttentionGradients, Operands], AttentionGradients] = (
        lambda gradients, operands: gradients
    )

    def forward(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        """The operation, with the faults."""
        return_lse = options.pop("return_lse", False)
        self.check(q, k, v, **options)
        with np.errstate(all="ignore"):
            given = self._given(q, k, v, options)
            o, lse = self._attend(given)
            out = self.out(o.astype(q.dtype))
        return (out, self.lse(lse.astype(lse_dtype(q)))) if return_lse else out

    def backward(
        self, dout: Array, q: Array, k: Array, v: Array, **options: Any
    ) -> AttentionGradients:
        """Its gradients, with the faults."""
        self.check(q, k, v, **options)
        check_cotangent(dout, q)
        with np.errstate(all="ignore"):
            given = self._given(q, k, v, options)
            wide, factor, G = given["wide"], given["factor"], given["k"].shape[2]
            o, lse = self._attend(given)
            none_left = no_key_left(lse)[..., None]
            qh = living(given["q"], none_left, wide)
            do = living(dout, none_left, wide)
            delta = self.delta((do * heads_first(o, wide)).sum(-1, keepdims=True))
            dq = np.zeros_like(qh)
            dk, dv = [], []
            for keys in self._blocks(given):
                s, kh, vh, of_the_block = self._block(given, keys)
                saved = self.saved(lse, of_the_block)[..., None]
                p = self.probabilities(np.where(s == -np.inf, 0, np.exp(s - saved)))
                ds = self.dlogits(p * (do @ vh.swapaxes(-1, -2) - delta))
                dq += factor * (ds @ kh)
                dk.append(self.sum_groups(factor * (ds.swapaxes(-1, -2) @ qh), G))
                dv.append(self.sum_groups(p.swapaxes(-1, -2) @ do, G))
            real = given["key_segments"] >= 0
            gradients = AttentionGradients(
                dq=heads_last(dq, q.dtype),
                dk=self.clean(heads_last(np.concatenate(dk, axis=-2), q.dtype), real),
                dv=self.clean(heads_last(np.concatenate(dv, axis=-2), q.dtype), real),
            )
            return self.gradients(gradients, given)

    def _given(self, q: Array, k: Array, v: Array, options: dict[str, Any]) -> Operands:
        """The operands and options, as the faults leave them, and what follows from them."""
        places = {name: x for name, x in options.items() if name in PLACES and x is not None}
        given = self.operands(
            {"window": None, "causal": False, "scale": None}
            | options
            | with_places({"q": q, "k": k, "v": v, **places})
        )
        wide = np.promote_types(np.float32, q.dtype) if q.dtype.kind == "f" else np.dtype("f4")
        mask = mask_of(given, resolve_window(given["window"], given["causal"]))
        return given | {
            "wide": wide,
            "factor": wide.type(resolve_scale(given["scale"], q)),
            "mask": self.mask(mask),
        }

    def _blocks(self, given: Operands) -> list[slice]:
        return [*blocks(given["k"].shape[1], BLOCK)] or [slice(0, 0)]

    def _block(self, given: Operands, keys: slice) -> tuple[Array, Array, Array, Array]:
        """One block's logits, keys, values (heads first) and lse."""
        wide, H = given["wide"], given["q"].shape[2]
        mask = given["mask"].tile(slice(None), keys)
        real = given["key_segments"][:, keys] >= 0
        qh = heads_first(given["q"], wide)
        kh = heads_first(self.clean(given["k"][:, keys], real), wide, H)
        vh = heads_first(self.clean(given["v"][:, keys], real), wide, H)
        s = self.logits(given["factor"] * (qh @ kh.swapaxes(-1, -2)))
        s = np.where(self.pairs(mask), s, wide.type(-np.inf))
        return s, kh, vh, self.softmax(s)[1]

    def _attend(self, given: Operands) -> tuple[Array, Array]:
        """``o [B, Q, H, D]`` and ``lse [B, H, Q]`` over all blocks."""
        whole: tuple[Array, Array] | None = None
        for keys in self._blocks(given):
            s, _, vh, _ = self._block(given, keys)
            p, lse = self.softmax(s)
            o = heads_last(self.product(self.probabilities(p), vh), given["wide"])
            whole = (o, lse) if whole is None else self.merge(*whole, o, lse)
        assert whole is not None
        return self.merged(whole[0]), whole[1]


CAPABILITIES = Capabilities(
    NAME,
    operands=frozenset(OPTIONS),
    gradients=frozenset(DIFFERENTIABLE),
    deterministic=True,
    memory="quadratic",
)


def _implementation(name: str, faults: Faults, **declared: Any) -> Implementation:
    return Implementation(
        name, "numpy", replace(CAPABILITIES, **declared), faults.forward, faults.backward
    )


def without_fault(mutant: Mutant) -> Implementation:
    """The same implementation without the fault, declaring what :data:`CAPABILITIES` does."""
    return _implementation(f"{mutant.name}-mended", Faults())


# Faults that take more than a line.


def _instead(**changed: Any) -> Callable[[Any], Any]:
    """Operands, or a mask, with other values of these names."""
    return lambda given: given._replace(**changed) if isinstance(given, Mask) else given | changed


def _strictly_causal(mask: Mask) -> Array:
    """A query does not attend to its own position."""
    own = mask.key_positions[:, None, None, :] == mask.positions[:, None, :, None]
    pairs: Array = mask.pairs() & ~own
    return pairs


def _padding_attends(mask: Mask) -> Array:
    """A negative segment is taken for a document like any other."""
    raised = mask._replace(segments=mask.segments + 1, key_segments=mask.key_segments + 1)
    pairs: Array = raised.pairs()
    return pairs


def _window(left: int = 0, right: int = 0) -> Callable[[Mask], Mask]:
    """Sides that are longer by so much."""
    return lambda mask: mask._replace(
        left=mask.left + (left if mask.left != UNLIMITED else 0),
        right=mask.right + (right if mask.right != UNLIMITED else 0),
    )


def _counted(mask: Mask) -> Mask:
    """Tokens are taken to lie where their index says."""
    return mask._replace(
        positions=np.arange(mask.positions.shape[1])[None],
        key_positions=np.arange(mask.key_positions.shape[1])[None],
    )


def _made_whole(mask: Mask) -> Mask:
    """The mask of all queries and keys is made, if only to look at it."""
    mask.pairs()
    return mask


def _positions_as(dtype: Any) -> Callable[[Mask], Mask]:
    """Positions that have gone through another dtype."""
    return lambda mask: mask._replace(
        positions=mask.positions.astype(dtype).astype(np.int64),
        key_positions=mask.key_positions.astype(dtype).astype(np.int64),
    )


def _first_example(mask: Mask) -> Mask:
    """All examples have the first one's places."""
    return mask._replace(**{name: getattr(mask, name)[:1] for name in PLACES})


def _restarted(mask: Mask) -> Mask:
    """Every shard counts its positions from 0."""
    return mask._replace(
        positions=mask.positions - mask.positions.min(initial=2**40),
        key_positions=mask.key_positions - mask.key_positions.min(initial=2**40),
    )


def _first_keys(count: Callable[[int], int]) -> Callable[[Operands], Operands]:
    """Only the first keys are looked at; the others are padding."""

    def cut(given: Operands) -> Operands:
        lost = np.arange(given["k"].shape[1]) >= count(given["k"].shape[1])
        return given | {"key_segments": np.where(lost, -1, given["key_segments"])}

    return cut


def _averaged(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """The mean of two parts, however much each weighs."""
    return (out_a + out_b) / 2, merge(out_a, lse_a, out_b, lse_b)[1]


def _unrescaled(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """What was there already is not rescaled to the new sum; only what is added is weighed."""
    out, lse = merge(np.zeros_like(out_a), lse_a, out_b, lse_b)
    return out_a + out, lse


def _careless_merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """−inf minus −inf where neither part has a key."""
    lse = np.logaddexp(lse_a, lse_b)
    weights = [np.exp(part - lse).swapaxes(-1, -2)[..., None] for part in (lse_a, lse_b)]
    return weights[0] * out_a + weights[1] * out_b, lse


def _overflowing_merge(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array
) -> tuple[Array, Array]:
    """The parts are weighed by exp(lse), of which no maximum is subtracted first."""
    weights = [np.exp(part).swapaxes(-1, -2)[..., None] for part in (lse_a, lse_b)]
    total = weights[0] + weights[1]
    dead = total == 0
    out = (weights[0] * out_a + weights[1] * out_b) / np.where(dead, 1, total)
    return out, merge(out_a, lse_a, out_b, lse_b)[1]


def _narrow_merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """The result is rounded to bfloat16 after every block."""
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    return rounded(out, "bfloat16"), lse


def _cut(x: Array) -> Array:
    """Cut to bfloat16 by dropping the lower half of the float32, not rounded to nearest."""
    return (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF0000).view(np.float32)


def _scaled_in_place(given: Operands) -> Operands:
    """The scale is multiplied into q where it lies, and left there."""
    q = given["q"]
    if q.flags.writeable:
        q *= q.dtype.type(resolve_scale(given["scale"], q))
    return given | {"scale": 1.0}


def _mutants() -> Iterator[Mutant]:
    def mutant(name: str, fault: str, killed_by: str, case: str, **faults: Any) -> Mutant:
        declared = {key: faults.pop(key) for key in list(faults) if key not in FAULTS}
        case = f"attention/{case}" if case else ""
        implementation = _implementation(f"attention-mutant-{name}", Faults(**faults), **declared)
        return Mutant(implementation, fault, killed_by, case)

    # Who attends to whom
    yield mutant(
        "causal-ignored",
        "queries see what comes after them",
        "out/condition",
        "mask/fp32/causal",
        mask=_instead(right=UNLIMITED),
    )
    yield mutant(
        "causal-one-more",
        "a query sees the next position",
        "out/condition",
        "mask/fp32/causal",
        mask=_window(right=1),
    )
    yield mutant(
        "causal-one-less",
        "a query does not see its own position",
        "lse/pattern",
        "mask/fp32/causal",
        pairs=_strictly_causal,
    )
    for name, sides in {
        "left-short": {"left": -1},
        "left-long": {"left": 1},
        "right-short": {"right": -1},
        "right-long": {"right": 1},
    }.items():
        yield mutant(
            f"window-{name}",
            f"the window ends one position too early or too late: {name}",
            "out/condition",
            "mask/fp32/window",
            mask=_window(**sides),
        )
    yield mutant(
        "window-ignored",
        "the window is ignored",
        "out/condition",
        "mask/fp32/window-causal",
        mask=_instead(left=UNLIMITED),
    )
    yield mutant(
        "segments-ignored",
        "documents see each other",
        "out/condition",
        "mask/fp32/packed-causal",
        mask=_instead(segments=None),
    )
    yield mutant(
        "positions-ignored",
        "tokens lie where their index says",
        "out/condition",
        "mask/fp32/shuffled",
        mask=_counted,
    )
    yield mutant(
        "positions-ignored-by-the-window",
        "the window is measured in indices",
        "out/condition",
        "mask/fp32/zigzag-window",
        mask=_counted,
    )
    yield mutant(
        "key-positions-ignored",
        "keys are taken to lie where the queries do",
        "out/condition",
        "ring/fp32/past",
        mask=lambda mask: mask._replace(key_positions=mask.positions),
    )
    yield mutant(
        "positions-restarted",
        "every shard counts its positions from 0",
        "out/condition",
        "ring/fp32/past",
        mask=_restarted,
    )
    yield mutant(
        "positions-of-the-first-example",
        "all examples have the first one's places",
        "out/condition",
        "mask/fp32/per-example",
        mask=_first_example,
    )
    yield mutant(
        "positions-32-bit",
        "positions are kept in 32 bits",
        "out/condition",
        "mask/fp32/far",
        mask=_positions_as(np.int32),
    )
    yield mutant(
        "positions-float32",
        "positions are kept in float32",
        "out/condition",
        "mask/fp32/far",
        mask=_positions_as(np.float32),
    )
    # The operation
    yield mutant("zeros", "returns zeros", "out/condition", "mask/fp32/bare", out=np.zeros_like)
    yield mutant(
        "scale-dropped",
        "logits are not scaled",
        "out/condition",
        "mask/fp32/causal",
        operands=_instead(scale=1.0),
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
        "length-65/fp32/causal",
        operands=_first_keys(lambda K: K - K % 64),
    )
    yield mutant(
        "heads-interleaved",
        "query heads are assigned to key heads in turn",
        "out/condition",
        "heads-4-2/fp32/causal",
        operands=lambda o: o | {name: np.tile(o[name], (1, 1, 2, 1)) for name in "kv"},
    )
    # Queries without a key, and padding
    yield mutant(
        "uniform-without-keys",
        "a query without a key attends to all keys alike",
        "out/pattern",
        "values/fp32/no-keys-for-some",
        softmax=uniform_softmax,
    )
    yield mutant(
        "nan-without-keys",
        "a query without a key is NaN",
        "out/pattern",
        "values/fp32/no-keys-for-some",
        softmax=careless_softmax,
    )
    yield mutant(
        "nan-gradient-without-keys",
        "a query without a key has NaN gradients",
        "dq/pattern",
        "values/fp32/no-keys-for-some",
        dlogits=lambda ds: np.where(ds.any(-1, keepdims=True), ds, np.nan),
    )
    yield mutant(
        "padding-attends",
        "padding is a document like any other",
        "lse/pattern",
        "mask/fp32/padded",
        pairs=_padding_attends,
    )
    yield mutant(
        "garbage-seen",
        "NaN in padding reaches the output through 0·NaN",
        "out/pattern",
        "values/fp32/garbage-in-padding",
        clean=lambda x, real: x,
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
        "padding-gradient",
        "padding gets a gradient",
        "dk/pattern",
        "values/fp32/garbage-in-padding",
        gradients=gradient("dk", lambda dk, o: dk + np.float32(1e-30)),
    )
    # Merging
    yield mutant(
        "merge-averages",
        "two parts are averaged, whatever they weigh",
        "out/condition",
        "mask/fp32/causal",
        merge=_averaged,
    )
    yield mutant(
        "merge-unscaled",
        "what was there is not rescaled when more is merged in",
        "out/condition",
        "values/fp32/rising-logits",
        merge=_unrescaled,
    )
    yield mutant(
        "merge-nan",
        "merging two parts without a key gives NaN",
        "out/pattern",
        "values/fp32/no-keys-for-some",
        merge=_careless_merge,
    )
    yield mutant(
        "merge-overflows",
        "parts are weighed by exp(lse)",
        "out/pattern",
        "values/fp32/large-logits",
        merge=_overflowing_merge,
    )
    yield mutant(
        "merge-narrow",
        "the result is rounded to bfloat16 after every block",
        "out/twin_mean",
        "long-32768-small/bf16/masked",
        merge=_narrow_merge,
    )
    # lse
    yield mutant(
        "lse-base-2",
        "lse is the logarithm to base 2",
        "lse/condition",
        "mask/fp32/causal",
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
        "mask/fp32/causal",
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
        "spiked",
        "one element in 500 is off by three units",
        "out/twin_max",
        "mask/bf16/bare",
        out=spiked,
    )
    yield mutant(
        "truncated",
        "results are cut, not rounded",
        "out/bias",
        "mask/bf16/causal",
        merged=_cut,
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
        "mask/fp32/causal",
        gradients=gradient("dq", lambda dq, o: dq * dq.dtype.type(o["q"].shape[-1] ** 0.5)),
    )
    yield mutant(
        "delta-omitted",
        "δ is left out of dS",
        "dq/condition",
        "mask/fp32/causal",
        delta=np.zeros_like,
    )
    yield mutant(
        "groups-unsummed",
        "dk and dv are not summed over the heads that share them",
        "dk/condition",
        "heads-4-2/fp32/causal",
        sum_groups=unsummed_groups,
    )
    yield mutant(
        "lse-of-the-block",
        "the backward of a block uses the block's lse, not that of all keys",
        "dv/condition",
        "length-65/fp32/causal",
        saved=lambda lse, of_the_block: of_the_block,
    )
    yield mutant(
        "fp8-dlogits",
        "dS is kept in four bits, undeclared",
        "dq/twin_mean",
        "head-dim-64/bf16/causal",
        dlogits=few_digits,
    )
    # Shape, dtype, declaration
    yield mutant(
        "heads-first",
        "returns [B, H, Q, D]",
        "out/shape",
        "mask/fp32/bare",
        out=lambda out: out.swapaxes(1, 2),
    )
    yield mutant(
        "widened",
        "returns float64 for float32",
        "out/dtype",
        "mask/fp32/bare",
        out=lambda out: out.astype(np.float64),
    )
    yield mutant(
        "refusing",
        "declares a dtype and then declines it",
        "case",
        "mask/bf16/bare",
        check=declines("bfloat16"),
    )
    yield mutant(
        "crashing",
        "declines by crashing",
        "case",
        "mask/bf16/bare",
        check=crashes("bfloat16"),
        dtypes=frozenset({"float32"}),
    )
    yield mutant(
        "undeclared",
        "returns wrong numbers for what it declares unsupported",
        "out/condition",
        "mask/fp32/window",
        mask=_instead(left=UNLIMITED, right=UNLIMITED),
        head_dims=(32, 128),
    )
    # Behaviour
    yield mutant(
        "scales-in-place",
        "the scale is multiplied into q in place",
        "unmodified",
        "mask/fp32/bare",
        operands=_scaled_in_place,
    )
    yield mutant(
        "shuffled",
        "sums in another order each time, declared deterministic",
        "determinism",
        "length-65/fp32/causal",
        product=shuffled_product,
    )
    yield mutant(
        "buffer-reused",
        "returns a buffer that a later call overwrites",
        "independence",
        "mask/fp32/bare",
        out=reused_buffer(),
    )
    yield mutant(
        "query-stale",
        "the last query is left from the call before",
        "independence",
        "mask/fp32/bare",
        out=stale_last_query(),
    )
    yield mutant(
        "unchecked",
        "operands are not checked: NumPy broadcasts what it can",
        "invalid/key_segments: fewer examples",
        "",
        check=lambda *operands, **more: None,
    )
    yield mutant(
        "not-linear",
        "declares linear memory and makes a mask of size Q × K",
        "memory/growth",
        "",
        mask=_made_whole,
        memory="linear",
    )


FAULTS = {place.name for place in fields(Faults)}
MUTANTS: tuple[Mutant, ...] = tuple(_mutants())
