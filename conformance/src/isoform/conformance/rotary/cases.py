"""The cases of rotary embedding, as tables.

Shapes of real models first, then what breaks kernels: positions far out, in shards and in packed
documents, odd sizes, channels that pass through, adversarial values, memory layouts, empty axes.
The id of a case is ``rotary/sizes/dtype/variant``; it is the seed of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from isoform.conformance.case import Case
from isoform.conformance.dtypes import FORMATS
from isoform.reference.rotary_contract import BY_EXAMPLE, NAME, PARTIAL, RotaryShape
from isoform.reference.rotary_scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Scaling,
    YaRN,
)

SHORT_DTYPES = ("float32", "bfloat16", "float16")


class Turn(NamedTuple):
    """The arguments of a call that are no arrays."""

    base: float = 10000.0
    rotary_dim: int | None = None
    layout: str = "half"
    scaling: Scaling | None = None


def turn_of(case: Case) -> Turn:
    """How ``case`` turns its operand."""
    return Turn(**dict(case.options))


# The recipes of values that give positions [B, L]; all others give [L].
POSITIONS_BY_EXAMPLE = frozenset({"by-example", "packed-documents", "anywhere"})

# Where positions lie, besides 0 … L − 1.
POSITIONS = (
    "from-512k",
    "from-1m",
    "to-2m",
    "anywhere",
    "by-example",
    "shard-contiguous",
    "shard-zigzag",
    "shard-striped",
    "packed-documents",
    "backwards",
    "shuffled",
    "all-equal",
    "all-zero",
    "negative",
    "int32",
    "uint8",
)

# What x holds, besides standard normal numbers.
ADVERSARIAL = (
    "spread-values",
    "huge",
    "subnormal",
    "padding",
    "nan-passing",
    "nan-turned",
    "inf-turned",
)


def _rising(d: int, last: float) -> tuple[float, ...]:
    """Factors as a search finds them: 1 for the fast pairs, growing for the slow ones."""
    return tuple(last ** (i / (d // 2 - 1)) for i in range(d // 2))


SCALINGS: dict[str, Turn] = {
    "linear": Turn(scaling=Linear(8.0)),
    "dynamic": Turn(scaling=DynamicNTK(4.0, 2048, 2**19)),
    "dynamic-short": Turn(scaling=DynamicNTK(4.0, 2048, 1024)),
    "yarn": Turn(scaling=YaRN(16.0, 4096)),
    "yarn-untruncated": Turn(scaling=YaRN(16.0, 4096, truncate=False)),
    "yarn-attention-factor": Turn(scaling=YaRN(40.0, 4096, attention_factor=1.25)),
    "longrope-short": Turn(
        scaling=LongRoPE(_rising(64, 1.5), _rising(64, 60.0), 4096, 4096, factor=32.0)
    ),
    "longrope-long": Turn(
        scaling=LongRoPE(_rising(64, 1.5), _rising(64, 60.0), 4096, 131072, factor=32.0)
    ),
    "llama3": Turn(base=500000.0, scaling=Llama3()),
}

# Shapes that real models run, B L H D; how they turn; the recipe of positions; and the axes that
# are cut where a CPU runs a small twin of it. Head dims of genome language models, with the heads
# of one rank; sizes and arguments of the others from their published configurations. Lengths are
# such that the oracle, which holds every result in float64, can still be run beside others.
MODELS: dict[str, tuple[RotaryShape, Turn, str, dict[str, int]]] = {
    "esm2-650m": (RotaryShape(4, 1024, 20, 64), Turn(), "normal", {"B": 2, "L": 256}),
    "genome-64": (RotaryShape(1, 524288, 4, 64), Turn(), "to-2m", {"L": 512}),
    "genome-80": (RotaryShape(1, 131072, 8, 80), Turn(), "from-512k", {"L": 256}),
    "genome-128": (RotaryShape(1, 131072, 16, 128), Turn(), "from-1m", {"L": 256}),
    "gpt-neox-20b": (RotaryShape(2, 2048, 64, 96), Turn(rotary_dim=24), "normal", {"L": 32}),
    "gpt-j-6b": (
        RotaryShape(2, 2048, 16, 256),
        Turn(rotary_dim=64, layout="interleaved"),
        "normal",
        {"L": 48},
    ),
    "llama-3.1-8b": (
        RotaryShape(1, 32768, 32, 128),
        Turn(base=500000.0, scaling=Llama3()),
        "normal",
        {"L": 96},
    ),
    "qwen2.5-7b": (
        RotaryShape(1, 32768, 28, 128),
        Turn(base=1000000.0, scaling=YaRN(4.0, 32768)),
        "shard-zigzag",
        {"L": 96},
    ),
    "phi-3-128k": (
        RotaryShape(1, 32768, 32, 96),
        Turn(scaling=LongRoPE(_rising(96, 1.2), _rising(96, 64.0), 4096, 131072, factor=32.0)),
        "normal",
        {"L": 96},
    ),
}
QUICK_MODELS = {"genome-64", "gpt-j-6b"}

LENGTHS = (1, 2, 3, 31, 65, 257)
HEAD_DIMS = (2, 4, 6, 10, 16, 24, 40, 64, 66, 80, 96, 128, 256)
PARTIAL_DIMS = ((3, 2), (17, 16), (64, 2), (64, 62), (80, 32), (96, 24), (127, 64))
HEADS = (1, 3, 5)
BASES = (1.5, 500000.0, 1e11)

EMPTY = {
    "no-batch": RotaryShape(0, 5, 2, 8),
    "no-length": RotaryShape(2, 0, 2, 8),
    "no-heads": RotaryShape(2, 5, 0, 8),
}


def features(shape: RotaryShape, turn: Turn, values: str) -> frozenset[str]:
    """What a call asks for, as :func:`isoform.reference.rotary_contract.rotary_call` says it."""
    asked = {
        f"layout={turn.layout}": True,
        BY_EXAMPLE: values in POSITIONS_BY_EXAMPLE,
        PARTIAL: turn.rotary_dim not in (None, shape.D),
        f"scaling={getattr(turn.scaling, 'name', None)}": turn.scaling is not None,
    }
    return frozenset(name for name, holds in asked.items() if holds)


def _case(
    sizes: str,
    shape: RotaryShape,
    dtype: str,
    variant: str,
    tags: Iterable[str],
    turn: Turn = Turn(),  # noqa: B008 (it is immutable)
    values: str = "normal",
    **more: Any,
) -> Case:
    chosen = turn._asdict().items()
    options = tuple((name, x) for name, x in chosen if x != Turn._field_defaults[name])
    case = Case(
        id=f"rotary/{sizes}/{FORMATS[dtype].short}/{variant}",
        operation=NAME,
        shape=shape,
        dtype=dtype,
        operands=features(shape, turn, values),
        values=values,
        options=options,
        tags=frozenset(tags),
    )
    return replace(case, **more)


def _models() -> Iterator[Case]:
    for name, (full, turn, values, cut) in MODELS.items():
        for dtype in ("bfloat16", "float32", "float16"):
            case = _case(name, full, dtype, values, {"model"}, turn, values)
            yield replace(case, tags=case.tags | {"full-size"}) if case.large else case
            tags = {"model", *(["quick"] if name in QUICK_MODELS else [])}
            small = replace(full, **cut)
            note = f"cut from {full}"
            yield _case(f"{name}-small", small, dtype, values, tags, turn, values, note=note)


def _lengths() -> Iterator[Case]:
    for length, layout in product(LENGTHS, ("half", "interleaved")):
        tags = {"length", "edge", *(["quick"] if length in (1, 65) else [])}
        shape = RotaryShape(2, length, 2, 16)
        yield _case(f"length-{length}", shape, "float32", layout, tags, Turn(layout=layout))


def _head_dims() -> Iterator[Case]:
    for D, layout, dtype in product(HEAD_DIMS, ("half", "interleaved"), ("float32", "bfloat16")):
        tags = {"head-dim", *(["quick"] if D in (2, 66, 128) else [])}
        shape = RotaryShape(2, 33, 3, D)
        yield _case(f"head-dim-{D}", shape, dtype, layout, tags, Turn(layout=layout))
    for H, dtype in product(HEADS, ("float32", "bfloat16")):
        shape = RotaryShape(2, 40, H, 32)
        yield _case(f"heads-{H}", shape, dtype, "half", {"heads"})


def _partial() -> Iterator[Case]:
    for (D, d), layout, dtype in product(PARTIAL_DIMS, ("half", "interleaved"), SHORT_DTYPES):
        tags = {"partial", *(["quick"] if D == 80 else [])}
        shape, turn = RotaryShape(2, 40, 2, D), Turn(rotary_dim=d, layout=layout)
        yield _case(f"partial-{D}-{d}", shape, dtype, layout, tags, turn)
    shape, turn = RotaryShape(2, 40, 2, 64), Turn(rotary_dim=64)
    yield _case("partial-64-64", shape, "float32", "all", {"partial"}, turn)


def _positions() -> Iterator[Case]:
    shape = RotaryShape(3, 96, 2, 64)
    for values, dtype in product(POSITIONS, SHORT_DTYPES):
        tags = {"positions", *(["quick"] if dtype == "float32" else [])}
        yield _case("positions", shape, dtype, values, tags, values=values)
    turn = Turn(base=500000.0, layout="interleaved")
    for values, dtype in product(("from-512k", "from-1m", "to-2m"), SHORT_DTYPES):
        yield _case("positions-500k", shape, dtype, values, {"positions"}, turn, values)
    yield _case(
        "positions-one", RotaryShape(2, 1, 3, 64), "float32", "to-2m", {"edge"}, Turn(), "to-2m"
    )


def _bases() -> Iterator[Case]:
    for base, dtype in product(BASES, ("float32", "bfloat16")):
        shape = RotaryShape(2, 40, 2, 64)
        yield _case("base", shape, dtype, f"{base:g}", {"base"}, Turn(base=base))


def _scalings() -> Iterator[Case]:
    shape = RotaryShape(2, 96, 2, 64)
    for (name, turn), dtype in product(SCALINGS.items(), SHORT_DTYPES):
        tags = {"scaling", *(["quick"] if dtype == "float32" else [])}
        yield _case("scaling", shape, dtype, name, tags, turn, "to-2m")
    wide = RotaryShape(2, 64, 2, 96)
    for name, turn in SCALINGS.items():
        partial = turn._replace(rotary_dim=64, layout="interleaved")
        yield _case("scaling-partial", wide, "float32", name, {"scaling", "partial"}, partial)


def _adversarial() -> Iterator[Case]:
    shape, turn = RotaryShape(2, 64, 2, 48), Turn(rotary_dim=32)
    for values, dtype in product(ADVERSARIAL, SHORT_DTYPES):
        tags = {"adversarial", "edge", *(["quick"] if dtype == "float32" else [])}
        yield _case("values", shape, dtype, values, tags, turn, values)


def _layouts() -> Iterator[Case]:
    shape = RotaryShape(2, 33, 3, 32)
    for layout, dtype in product(
        ("packed-qkv", "heads-first", "sliced", "strided-last", "offset", "broadcast"),
        ("float32", "bfloat16"),
    ):
        tags = {"layout", "edge", *(["quick"] if dtype == "float32" else [])}
        yield _case("layout", shape, dtype, layout, tags, layout=layout)
        turn = Turn(rotary_dim=20, layout="interleaved")
        yield _case("layout-partial", shape, dtype, layout, tags - {"quick"}, turn, layout=layout)


def _empty() -> Iterator[Case]:
    for (name, shape), dtype in product(EMPTY.items(), ("float32", "bfloat16")):
        yield _case("empty", shape, dtype, name, {"empty", "edge", "quick"})


def _double() -> Iterator[Case]:
    shape = RotaryShape(2, 65, 2, 64)
    for values in ("normal", "to-2m"):
        yield _case("double", shape, "float64", values, {"double", "quick"}, values=values)
    turn = Turn(rotary_dim=40, layout="interleaved", scaling=YaRN(8.0, 4096))
    yield _case("double", shape, "float64", "interleaved-yarn", {"double"}, turn)


CASES: dict[str, Case] = {
    case.id: case
    for group in (
        _models,
        _lengths,
        _head_dims,
        _partial,
        _positions,
        _bases,
        _scalings,
        _adversarial,
        _layouts,
        _empty,
        _double,
    )
    for case in group()
}
