"""Faults that implementations of rotary embedding have had, or could have, one mutant each.

All are made from one plain float32 implementation with places to interfere (:class:`Faults`): each
fault is a small function at one of them. Without any it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array, rounded
from isoform.conformance.faults import as_it_is, declines, flushed, reused_buffer
from isoform.conformance.implementation import Implementation
from isoform.conformance.mutant import Mutant
from isoform.reference.contract import Capabilities
from isoform.reference.numpy.rotary import pairs, rotary_tables
from isoform.reference.rotary_contract import ALL_FEATURES, NAME, resolve_rotary_dim, rotary_call
from isoform.reference.rotary_scaling import Scaling, frequencies

Arguments = dict[str, Any]


def _tables(positions: Array, d: int, base: float, scaling: Scaling | None) -> tuple[Array, Array]:
    """Cosine and sine in float32, of exact angles."""
    return rotary_tables(positions, d, base=base, scaling=scaling)


@dataclass(frozen=True)
class Faults:
    """Where to interfere with a plain float32 implementation.

    Attributes:
        check: Checks the operands.
        arguments: Changes the arguments first: x, positions, base, rotary_dim, layout, scaling.
        tables: Cosine and sine ``[..., d/2]`` of positions.
        backward_tables: Changes them for the backward.
        products: The four products that are added.
        passing: Changes the channels that pass through.
        out: Changes the output, in the operands' dtype.
        dx: Changes the gradient.
    """

    check: Callable[..., object] = rotary_call
    arguments: Callable[[Arguments], Arguments] = as_it_is
    tables: Callable[[Array, int, float, Any], tuple[Array, Array]] = _tables
    backward_tables: Callable[[Array, Array], tuple[Array, Array]] = lambda cos, sin: (cos, -sin)
    products: Callable[[Array], Array] = as_it_is
    passing: Callable[[Array], Array] = as_it_is
    out: Callable[[Array], Array] = as_it_is
    dx: Callable[[Array], Array] = as_it_is

    def forward(self, x: Array, positions: Array, **options: Any) -> Array:
        """The operation, with the faults."""
        self.check(x, positions, **options)
        return self.out(self._turned(x, positions, options, lambda cos, sin: (cos, sin)))

    def backward(self, dout: Array, positions: Array, **options: Any) -> Array:
        """Its gradient, with the faults."""
        self.check(dout, positions, **options)
        return self.dx(self._turned(dout, positions, options, self.backward_tables))

    def _turned(
        self,
        x: Array,
        positions: Array,
        options: Arguments,
        direction: Callable[[Array, Array], tuple[Array, Array]],
    ) -> Array:
        given: Arguments = {
            "base": 10000.0,
            "rotary_dim": None,
            "layout": "half",
            "scaling": None,
            **options,
        }
        given = self.arguments({"x": x, "positions": positions, **given})
        x, layout = given["x"], given["layout"]
        d = resolve_rotary_dim(given["rotary_dim"], x.shape[-1])
        wide: np.dtype[Any] = np.dtype("f4")
        tables = self.tables(given["positions"], d, given["base"], given["scaling"])
        cos, sin = (table[..., None, :].astype(wide) for table in direction(*tables))
        out = x.copy()
        with np.errstate(all="ignore"):
            out[..., d:] = self.passing(x[..., d:])
            x1, x2 = (part.astype(wide) for part in pairs(x[..., :d], layout))
            y1, y2 = pairs(out[..., :d], layout)
            y1[...] = (self.products(x1 * cos) - self.products(x2 * sin)).astype(x.dtype)
            y2[...] = (self.products(x2 * cos) + self.products(x1 * sin)).astype(x.dtype)
        return out


CAPABILITIES = Capabilities(
    NAME,
    dtypes=frozenset({"float16", "bfloat16", "float32"}),
    operands=ALL_FEATURES,
    gradients=frozenset({"x"}),
    lse=False,
    deterministic=True,
    memory="linear",
)


def _implementation(name: str, faults: Faults, **declared: Any) -> Implementation:
    return Implementation(
        name, "numpy", replace(CAPABILITIES, **declared), faults.forward, faults.backward
    )


def without_fault(mutant: Mutant) -> Implementation:
    """The same implementation without the fault, declaring what :data:`CAPABILITIES` does."""
    return _implementation(f"{mutant.name}-mended", Faults())


# Faults that take more than a line.


def _change(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: arguments | {name: change(arguments[name])}


def _instead(arguments: Arguments, **others: Any) -> Arguments:
    """Other arguments than those given."""
    return arguments | others


def _float32_angles(
    positions: Array, d: int, base: float, scaling: Scaling | None
) -> tuple[Array, Array]:
    """Frequencies, positions and their product in float32, as most code has it."""
    high, _, amplitude = frequencies(d, float(base), scaling)
    angle = positions.astype(np.float32)[..., None] * high.astype(np.float32)
    return np.float32(amplitude) * np.cos(angle), np.float32(amplitude) * np.sin(angle)


def _bfloat16_positions(positions: Array) -> Array:
    """Positions cast to the model's dtype, which counts in steps of 2 from 256 on."""
    return rounded(positions.astype(np.float32), "bfloat16").astype(np.int64)


def _bfloat16_tables(
    positions: Array, d: int, base: float, scaling: Scaling | None
) -> tuple[Array, Array]:
    cos, sin = _tables(positions, d, base, scaling)
    return rounded(cos, "bfloat16"), rounded(sin, "bfloat16")


def _without_amplitude(
    positions: Array, d: int, base: float, scaling: Scaling | None
) -> tuple[Array, Array]:
    amplitude = np.float32(scaling.amplitude if scaling else 1)
    cos, sin = _tables(positions, d, base, scaling)
    return cos / amplitude, sin / amplitude


def _inverse(cos: Array, sin: Array) -> tuple[Array, Array]:
    """The inverse of the turning, not its transpose: the amplitude is divided out."""
    squared = cos[..., :1] ** 2 + sin[..., :1] ** 2
    return cos / squared, -sin / squared


def _from_zero(positions: Array) -> Array:
    """Positions taken for 0, 1, 2, … whatever they are: a shard or document starts anew."""
    return np.broadcast_to(np.arange(positions.shape[-1]), positions.shape)


def _head_dim_frequencies(arguments: Arguments) -> Arguments:
    """The exponent −2i/D instead of −2i/d: another base says the same."""
    d, D = arguments["rotary_dim"], arguments["x"].shape[-1]
    return arguments if d is None else arguments | {"base": arguments["base"] ** (d / D)}


def _cut(x: Array) -> Array:
    """Cut to bfloat16's digits by dropping bits, not rounded to nearest."""
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(x.dtype)


def _coarse(x: Array) -> Array:
    """Rounded to 22 significant bits."""
    mantissa, exponent = np.frexp(x)
    rounded_off: Array = np.ldexp(np.round(mantissa * 2**22) / 2**22, exponent).astype(x.dtype)
    return rounded_off


def _last_token_forgotten(arguments: Arguments) -> Arguments:
    """The last token is not turned, as where a tile's remainder is dropped."""
    positions = arguments["positions"].copy()
    positions[..., -1:] = 0
    return arguments | {"positions": positions}


def _spiked(x: Array) -> Array:
    """One product in 500 off by half a unit of bfloat16's last place: a rare race, a bad lane."""
    x = x.copy()
    x.reshape(-1)[::500] *= x.dtype.type(1 + 2.0**-8)
    return x


def _turned_in_place(arguments: Arguments) -> Arguments:
    """Something is written to x where it lies."""
    arguments["x"][..., :1] += 1
    return arguments


def _noisy(x: Array) -> Array:
    """Another last bit each time."""
    noise = np.random.default_rng().integers(0, 2, size=x.shape)
    changed: Array = x * (1 + noise * 2.0**-23).astype(x.dtype)
    return changed


def _quadratic(x: Array) -> Array:
    """As if by a matrix over all pairs of tokens."""
    L = x.shape[1]
    product: Array = np.einsum("lm,bmhd->blhd", np.eye(L, dtype=x.dtype), x)
    return product


def _mutants() -> Iterator[Mutant]:
    def mutant(name: str, fault: str, killed_by: str, case: str, **faults: Any) -> Mutant:
        declared = {key: faults.pop(key) for key in list(faults) if key not in PLACES}
        case = f"rotary/{case}" if case else ""
        implementation = _implementation(f"rotary-mutant-{name}", Faults(**faults), **declared)
        return Mutant(implementation, fault, killed_by, case)

    # Angles
    for dtype in ("fp32", "bf16", "fp16"):
        yield mutant(
            f"float32-angles-{dtype}",
            "angles are computed in float32",
            "out/condition",
            f"positions/{dtype}/from-512k",
            tables=_float32_angles,
        )
    yield mutant(
        "bfloat16-positions",
        "positions are cast to bfloat16",
        "out/condition",
        "positions/bf16/shard-contiguous",
        arguments=_change("positions", _bfloat16_positions),
    )
    yield mutant(
        "bfloat16-tables",
        "cosine and sine are rounded to bfloat16, undeclared",
        "out/condition",
        "positions/bf16/shuffled",
        tables=_bfloat16_tables,
    )
    yield mutant(
        "base-ignored",
        "the base is always 10000",
        "out/condition",
        "base/fp32/500000",
        arguments=partial(_instead, base=10000.0),
    )
    yield mutant(
        "exponent-of-all-channels",
        "frequencies are those of D channels, not of rotary_dim",
        "out/condition",
        "partial-80-32/fp32/half",
        arguments=_head_dim_frequencies,
    )

    # Positions
    yield mutant(
        "position-off-by-one",
        "positions count from 1",
        "out/condition",
        "length-65/fp32/half",
        arguments=_change("positions", lambda p: p + 1),
    )
    for values in ("shard-contiguous", "shard-zigzag", "shard-striped"):
        yield mutant(
            f"restarting-in-{values}",
            "positions restart in every shard",
            "out/condition",
            f"positions/fp32/{values}",
            arguments=_change("positions", _from_zero),
        )
    yield mutant(
        "documents-joined",
        "positions run on where a packed document starts anew",
        "out/condition",
        "positions/fp32/packed-documents",
        arguments=_change("positions", _from_zero),
    )
    yield mutant(
        "first-example-for-all",
        "all examples have the positions of the first",
        "out/condition",
        "positions/fp32/by-example",
        arguments=_change("positions", lambda p: p[:1] if p.ndim == 2 else p),
    )
    yield mutant(
        "negative-clamped",
        "negative positions are taken for 0",
        "out/condition",
        "positions/fp32/negative",
        arguments=_change("positions", lambda p: np.maximum(p, 0)),
    )
    yield mutant(
        "positions-sorted",
        "positions are put in order first",
        "out/condition",
        "positions/fp32/backwards",
        arguments=_change("positions", lambda p: np.sort(p, axis=-1)),
    )
    yield mutant(
        "last-token-forgotten",
        "the last token is not turned",
        "out/condition",
        "length-65/fp32/half",
        arguments=_last_token_forgotten,
    )

    # Channels
    for layout, other in (("half", "interleaved"), ("interleaved", "half")):
        yield mutant(
            f"{layout}-as-{other}",
            f"{layout} is taken for {other}",
            "out/condition",
            f"length-65/fp32/{layout}",
            arguments=partial(_instead, layout=other),
        )
    yield mutant(
        "all-channels-turned",
        "the channels that pass through are turned as well",
        "out/condition",
        "partial-64-62/fp32/half",
        arguments=partial(_instead, rotary_dim=None),
    )
    yield mutant(
        "passing-dropped",
        "the channels that pass through are zero",
        "out/condition",
        "partial-80-32/fp32/half",
        passing=np.zeros_like,
    )
    yield mutant(
        "passing-cleaned",
        "NaN in channels that pass through is replaced",
        "out/pattern",
        "values/fp32/nan-passing",
        passing=np.nan_to_num,
    )
    yield mutant(
        "nan-cleaned",
        "NaN in channels that are turned is replaced by a number",
        "out/pattern",
        "values/fp32/nan-turned",
        arguments=lambda given: given | {"x": np.nan_to_num(given["x"])},
    )
    yield mutant(
        "passing-rounded",
        "the channels that pass through are multiplied by a number near 1",
        "out/condition",
        "partial-80-32/fp32/half",
        passing=lambda x: x * x.dtype.type(1 + 2.0**-23),
    )

    # Scaling
    for name in ("linear", "dynamic", "yarn", "longrope-long", "longrope-short", "llama3"):
        yield mutant(
            f"{name}-ignored",
            "the scaling is ignored",
            "out/condition",
            f"scaling/fp32/{name}",
            arguments=partial(_instead, scaling=None),
        )
    for name in ("yarn", "longrope-long"):
        yield mutant(
            f"{name}-attention-factor-dropped",
            "frequencies are scaled, cosine and sine are not multiplied",
            "out/condition",
            f"scaling/fp32/{name}",
            tables=_without_amplitude,
        )

    # The backward
    yield mutant(
        "backward-forwards",
        "the gradient is turned by +θ",
        "dx/condition",
        "length-65/fp32/half",
        backward_tables=lambda cos, sin: (cos, sin),
    )
    yield mutant(
        "backward-inverse",
        "the gradient is divided by the attention factor",
        "dx/condition",
        "scaling/fp32/yarn",
        backward_tables=_inverse,
    )
    yield mutant(
        "backward-unturned",
        "the gradient is passed on as it is",
        "dx/condition",
        "length-65/fp32/half",
        backward_tables=lambda cos, sin: (np.ones_like(cos), np.zeros_like(sin)),
    )

    # Arithmetic
    yield mutant(
        "narrow-products",
        "products are rounded to bfloat16 before they are added",
        "out/condition",
        "positions/bf16/shuffled",
        products=lambda x: rounded(x, "bfloat16"),
    )
    yield mutant(
        "coarse",
        "the last two bits of a result are lost",
        "out/twin_mean",
        "positions/fp32/shuffled",
        out=_coarse,
    )
    yield mutant(
        "spiked",
        "one product in 500 is off by half a unit of the last place",
        "out/twin_max",
        "positions/fp32/shuffled",
        products=_spiked,
    )
    yield mutant(
        "cut",
        "products are cut to bfloat16, not rounded",
        "out/bias",
        "positions/bf16/shuffled",
        products=_cut,
    )
    yield mutant(
        "flushed",
        "subnormal numbers are flushed to zero",
        "out/condition",
        "values/fp32/subnormal",
        out=flushed,
    )
    yield mutant(
        "zeros", "returns zeros", "out/condition", "length-65/fp32/half", out=np.zeros_like
    )

    # Shape, dtype, declaration, behaviour
    yield mutant(
        "passing-missing",
        "the channels that pass through are not returned",
        "out/shape",
        "partial-80-32/fp32/half",
        out=lambda x: x[..., :32],
    )
    yield mutant(
        "too-wide",
        "the gradient is returned in float32",
        "dx/dtype",
        "positions/bf16/shuffled",
        dx=lambda x: x.astype(np.float32),
    )
    yield mutant(
        "refusing",
        "declines a dtype that it declares",
        "case",
        "positions/bf16/shuffled",
        check=declines("bfloat16"),
    )
    yield mutant(
        "writing",
        "x is written to",
        "unmodified",
        "length-65/fp32/half",
        arguments=_turned_in_place,
    )
    yield mutant(
        "noisy",
        "another last bit each time, declared deterministic",
        "determinism",
        "length-65/fp32/half",
        out=_noisy,
    )
    yield mutant(
        "buffer-reused",
        "returns a buffer that a later call overwrites",
        "independence",
        "length-65/fp32/half",
        out=reused_buffer(),
    )
    yield mutant(
        "unchecked",
        "arguments are not checked",
        "invalid/positions: floating",
        "",
        check=lambda *operands, **more: None,
    )
    yield mutant(
        "not-linear",
        "holds a matrix over all pairs of tokens",
        "memory/growth",
        "",
        out=_quadratic,
    )


PLACES = {place.name for place in fields(Faults)}
MUTANTS: tuple[Mutant, ...] = tuple(_mutants())
