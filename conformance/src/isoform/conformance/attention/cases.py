"""The cases of attention over a sequence, as tables.

Shapes of language models of genomes first, then what breaks kernels: masks of every kind, the ends
of windows, shards of a sequence, odd lengths, head dims, adversarial values, memory layouts, empty
axes. The id of a case is ``attention/sizes/dtype/variant``; it is the seed of its numbers, so
changing an id changes them. Where the tokens lie is said by ``values`` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS
from isoform.reference.attention_contract import NAME, PLACES, SequenceShape, resolve_window

CAUSAL = (("causal", True),)
OWN = frozenset({"positions", "segments"})
"""Where queries and keys are the same tokens."""

SHARDS = frozenset({"positions", "key_positions"})
ALL = frozenset(PLACES)

# Shapes of models of genomes and other long sequences; what they ask for; where the tokens lie; and
# the axes that are cut where a CPU runs a small twin. GenSLM's larger models read sequences of
# 10 240 codons (Zvyagin et al. 2022, bioRxiv 2022.10.10.511571, section 4); heads and head dims are
# those of one GPU's share of such a model, and of grouped-query models of text.
MODELS: dict[str, tuple[SequenceShape, frozenset[str], str, Any, dict[str, int]]] = {
    "genslm-10240": (
        SequenceShape(1, 10240, 10240, 8, 8, 64), frozenset(), "normal", CAUSAL,
        {"Q": 384, "K": 384},
    ),
    "genslm-10240-d128": (
        SequenceShape(1, 10240, 10240, 4, 4, 128), frozenset(), "normal", CAUSAL,
        {"Q": 320, "K": 320},
    ),
    "long-32768": (
        SequenceShape(1, 32768, 32768, 2, 2, 64), frozenset(), "normal", CAUSAL,
        {"Q": 700, "K": 700},
    ),
    "packed-16384": (
        SequenceShape(1, 16384, 16384, 8, 8, 64), frozenset({"segments"}), "packed", CAUSAL,
        {"Q": 512, "K": 512, "H": 4, "G": 4},
    ),
    "window-32768": (
        SequenceShape(1, 32768, 32768, 2, 2, 128), frozenset(), "normal",
        (*CAUSAL, ("window", (4095, 0))), {"Q": 520, "K": 520},
    ),
    "bidirectional-8192": (
        SequenceShape(2, 8192, 8192, 8, 8, 64), frozenset({"segments"}), "padded", (),
        {"Q": 256, "K": 256, "H": 4, "G": 4},
    ),
    "grouped-8192": (
        SequenceShape(1, 8192, 8192, 16, 4, 128), frozenset(), "normal", CAUSAL,
        {"Q": 257, "K": 257, "H": 8, "G": 2},
    ),
    "zigzag-8192-of-65536": (
        SequenceShape(1, 8192, 8192, 8, 8, 64), frozenset({"positions"}), "zigzag", CAUSAL,
        {"Q": 384, "K": 384, "H": 4, "G": 4},
    ),
    "ring-step-8192": (
        SequenceShape(1, 8192, 8192, 8, 8, 64), SHARDS, "zigzag-pair", CAUSAL,
        {"Q": 384, "K": 384, "H": 4, "G": 4},
    ),
}  # fmt: skip
QUICK_MODELS = {"genslm-10240", "packed-16384", "ring-step-8192"}

LENGTHS = (1, 2, 3, 17, 31, 33, 63, 65, 127, 250, 257, 333)
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 24, 32, 40, 48, 64, 80, 96, 127, 128, 192, 256)
CROSS_LENGTHS = ((1, 64), (64, 1), (33, 127), (127, 33), (5, 300), (300, 5), (64, 65))
GROUPS = ((4, 1), (4, 2), (6, 2), (8, 4))

# Every kind of mask: where the tokens lie, what is asked for, and options.
MASKS: dict[str, tuple[str, frozenset[str], tuple[tuple[str, Any], ...]]] = {
    "bare": ("normal", frozenset(), ()),
    "causal": ("normal", frozenset(), CAUSAL),
    "window": ("normal", frozenset(), (("window", (9, 4)),)),
    "window-causal": ("normal", frozenset(), (*CAUSAL, ("window", (16, 0)))),
    "shuffled": ("shuffled", frozenset({"positions"}), CAUSAL),
    "shuffled-window": ("shuffled", frozenset({"positions"}), (("window", (9, 4)),)),
    "zigzag-window": ("zigzag", frozenset({"positions"}), (*CAUSAL, ("window", (20, 0)))),
    "packed": ("packed", frozenset({"segments"}), ()),
    "packed-causal": ("packed", frozenset({"segments"}), CAUSAL),
    "packed-restarting": ("restarting", OWN, CAUSAL),
    "padded": ("padded", frozenset({"segments"}), ()),
    "padded-causal-window": ("padded", OWN, (*CAUSAL, ("window", (20, 0)))),
    "per-example": ("per-example", OWN, CAUSAL),
    "far": ("far", frozenset({"positions"}), (*CAUSAL, ("window", (30, 0)))),
}

# Windows of which one position more or less is seen.
WINDOWS: tuple[Any, ...] = (
    (0, 0), (1, 0), (0, 1), (15, 0), (16, 0), (63, 0), (64, 0), (65, 0),
    (0, 16), (0, 65), (-1, 3), (3, -1), (31, 32), 7, 500,
)  # fmt: skip

# Queries of one shard, keys of another: ring attention's blocks.
RINGS: dict[str, tuple[str, tuple[int, int], frozenset[str], tuple[tuple[str, Any], ...]]] = {
    "past": ("past", (64, 64), SHARDS, CAUSAL),
    "future": ("future", (64, 64), SHARDS, CAUSAL),
    "zigzag": ("zigzag-pair", (64, 64), SHARDS, CAUSAL),
    "zigzag-uneven": ("zigzag-pair", (48, 56), SHARDS, CAUSAL),
    "striped": ("striped", (64, 64), SHARDS, CAUSAL),
    "window": ("past", (64, 64), SHARDS, (*CAUSAL, ("window", (40, 0)))),
    "packed": ("packed-pair", (64, 64), ALL, CAUSAL),
    "packed-uneven": ("packed-pair", (70, 33), ALL, ()),
    "million": ("million", (64, 64), SHARDS, (*CAUSAL, ("window", (1 << 19, 0)))),
}

# What is hard to divide among ranks: fewer positions than ranks, heads that are no multiple of
# theirs, fewer heads than ranks; with which kinds of mask, in which dtypes.
RANKS: dict[str, tuple[SequenceShape, tuple[str, ...], tuple[str, ...]]] = {
    "ranks-0": (SequenceShape(1, 0, 0, 2, 2, 16), ("causal",), ("float32",)),
    "ranks-7": (
        SequenceShape(2, 7, 7, 4, 2, 16), ("causal", "packed-causal"), ("float32", "bfloat16"),
    ),
    "ranks-heads-3-1": (
        SequenceShape(1, 29, 29, 3, 1, 16), ("bare", "window-causal"), ("float32",),
    ),
    "ranks-heads-12-4": (
        SequenceShape(2, 41, 41, 12, 4, 16),
        ("causal", "window", "packed-causal", "padded-causal-window", "per-example"),
        ("float32", "bfloat16"),
    ),
    "ranks-heads-12-6": (
        SequenceShape(1, 64, 64, 12, 6, 16), ("causal",), ("float64", "float16"),
    ),
}  # fmt: skip

# What each adversarial recipe asks for, with which options, and whether gradients are checked.
ADVERSARIAL: dict[str, tuple[frozenset[str], tuple[tuple[str, Any], ...], bool]] = {
    "large-logits": (frozenset(), CAUSAL, True),
    "rising-logits": (frozenset(), (), True),
    "one-hot": (frozenset(), (), True),
    "equal-logits": (frozenset(), CAUSAL, True),
    "spread-values": (frozenset(), CAUSAL, True),
    "no-keys-for-some": (ALL, CAUSAL, True),
    "all-padding": (frozenset({"segments"}), (), True),
    "alone": (frozenset({"segments"}), (), True),
    "first-key-only": (frozenset({"segments", "key_segments"}), (), True),
    "last-key-only": (frozenset({"segments", "key_segments"}), (), True),
    "garbage-in-padding": (frozenset({"segments"}), CAUSAL, True),
    "nan-attended": (frozenset(), CAUSAL, False),
    "inf-attended": (frozenset(), CAUSAL, False),
    "subnormal": (frozenset(), CAUSAL, True),
    "constant-values": (frozenset(), CAUSAL, True),
}

EMPTY = {
    "no-batch": SequenceShape(0, 5, 7, 2, 2, 8),
    "no-queries": SequenceShape(1, 0, 7, 2, 2, 8),
    "no-keys": SequenceShape(1, 5, 0, 2, 2, 8),
    "no-heads": SequenceShape(1, 5, 7, 0, 0, 8),
}


def scale_of(case: Case) -> float | None:
    """The factor of the logits that ``case`` gives; None where it gives none."""
    return dict(case.options).get("scale")


def window_of(case: Case) -> tuple[int, int]:
    """How far before and after its own position a query of ``case`` looks; −1: no end."""
    options = dict(case.options)
    return resolve_window(options.get("window"), options.get("causal", False))


def shape_of(operands: Operands) -> SequenceShape:
    """The axis sizes of a call."""
    B, Q, H, D = operands["q"].shape
    K, G = operands["k"].shape[1:3]
    return SequenceShape(B, Q, K, H, G, D)


def _case(
    sizes: str,
    shape: SequenceShape,
    dtype: str,
    places: Iterable[str],
    variant: str,
    tags: Iterable[str],
    options: tuple[tuple[str, Any], ...] = (),
    **more: Any,
) -> Case:
    """A case; ``places`` are the operands beside q, k and v."""
    case_id = f"{NAME}/{sizes}/{FORMATS[dtype].short}/{variant}"
    features = frozenset(name for name, _ in options if name in ("causal", "window"))
    asked = frozenset(places) | features
    case = Case(case_id, NAME, shape, dtype, asked, options=options, tags=frozenset(tags))
    return replace(case, **more)


def _models() -> Iterator[Case]:
    for name, (full, places, values, options, cut) in MODELS.items():
        for dtype in ("bfloat16", "float32", "float16"):
            tags = {"model", "full-size"}
            yield _case(name, full, dtype, places, "masked", tags, options, values=values)
            tags = {"model", *(["quick"] if name in QUICK_MODELS else [])}
            yield _case(
                f"{name}-small",
                replace(full, **cut),
                dtype,
                places,
                "masked",
                tags,
                options,
                values=values,
                note=f"cut from {full}",
            )


def _masks() -> Iterator[Case]:
    shape = SequenceShape(2, 70, 70, 4, 2, 16)
    for (name, (values, places, options)), dtype in product(
        MASKS.items(), ("float32", "bfloat16", "float16")
    ):
        tags = {"mask", *(["quick"] if dtype == "float32" else [])}
        yield _case("mask", shape, dtype, places, name, tags, options, values=values)


def _windows() -> Iterator[Case]:
    shape = SequenceShape(1, 130, 130, 2, 2, 16)
    for window in WINDOWS:
        name = f"window-{window}" if isinstance(window, int) else "window-{}-{}".format(*window)
        name = name.replace("--1", "-all")
        options = (("window", window),)
        yield _case("window", shape, "float32", (), name, {"window", "edge"}, options)


def _rings() -> Iterator[Case]:
    for (name, (values, (Q, K), places, options)), dtype in product(
        RINGS.items(), ("float32", "bfloat16")
    ):
        shape = SequenceShape(1, Q, K, 4, 2, 32)
        tags = {"ring", *(["quick"] if dtype == "float32" else [])}
        yield _case("ring", shape, dtype, places, name, tags, options, values=values)


def _ranks() -> Iterator[Case]:
    for sizes, (shape, masks, dtypes) in RANKS.items():
        for name, dtype in product(masks, dtypes):
            values, places, options = MASKS[name]
            yield _case(sizes, shape, dtype, places, name, {"ranks"}, options, values=values)


def _lengths() -> Iterator[Case]:
    for length, dtype in product(LENGTHS, ("float32", "bfloat16")):
        tags = {"length", "edge", *(["quick"] if length in (1, 17, 65) else [])}
        shape = SequenceShape(1, length, length, 2, 2, 16)
        yield _case(f"length-{length}", shape, dtype, (), "causal", tags, CAUSAL)
    for (Q, K), dtype in product(CROSS_LENGTHS, ("float32", "bfloat16")):
        shape = SequenceShape(1, Q, K, 2, 2, 16)
        tags = {"length", "cross"}
        yield _case(f"lengths-{Q}-{K}", shape, dtype, (), "full", tags)
        for values in ("last-aligned", "first-aligned"):
            yield _case(
                f"lengths-{Q}-{K}", shape, dtype, SHARDS, values, tags, CAUSAL, values=values
            )


def _head_dims() -> Iterator[Case]:
    for D, dtype in product(HEAD_DIMS, ("float32", "bfloat16", "float16")):
        tags = {"head-dim", *(["quick"] if D in (8, 64, 128) else [])}
        shape = SequenceShape(1, 70, 70, 2, 2, D)
        yield _case(f"head-dim-{D}", shape, dtype, (), "causal", tags, CAUSAL)


def _heads() -> Iterator[Case]:
    for (H, G), dtype in product(GROUPS, ("float32", "bfloat16")):
        shape = SequenceShape(2, 40, 40, H, G, 16)
        tags = {"grouped-heads", *(["quick"] if G == 1 else [])}
        yield _case(f"heads-{H}-{G}", shape, dtype, (), "causal", tags, CAUSAL)
    yield _case(
        "batch-3", SequenceShape(3, 24, 24, 3, 3, 16), "float32", OWN, "per-example", {"batch"},
        CAUSAL, values="per-example",
    )  # fmt: skip


def _adversarial() -> Iterator[Case]:
    shape = SequenceShape(2, 72, 72, 2, 2, 16)
    for (values, (places, options, differentiate)), dtype in product(
        ADVERSARIAL.items(), ("float32", "bfloat16", "float16")
    ):
        tags = {"adversarial", "edge", *(["quick"] if dtype == "float32" else [])}
        # bfloat16 dot products of some processors take subnormal operands for zero, so their
        # gradients have no error that could be called normal
        smooth = differentiate and (values, dtype) != ("subnormal", "bfloat16")
        more = {"values": values, "differentiate": smooth}
        yield _case("values", shape, dtype, places, values, tags, options, **more)


def _layouts() -> Iterator[Case]:
    shape = SequenceShape(2, 40, 40, 4, 2, 16)
    for layout, dtype in product(
        ("heads-first", "sliced", "strided-last", "packed-qkv", "broadcast"),
        ("float32", "bfloat16"),
    ):
        tags = {"layout", "edge", *(["quick"] if dtype == "float32" else [])}
        more = {"values": "per-example", "layout": layout}
        yield _case("layout", shape, dtype, OWN, layout, tags, CAUSAL, **more)


def _empty() -> Iterator[Case]:
    for (name, shape), dtype in product(EMPTY.items(), ("float32", "bfloat16")):
        tags = {"empty", "edge", "quick"}
        yield _case("empty", shape, dtype, ALL, name, tags, CAUSAL, values="packed-pair")


def _scales() -> Iterator[Case]:
    shape = SequenceShape(1, 48, 48, 2, 2, 16)
    for scale in (1.0, 0.0, -0.5):
        options = (*CAUSAL, ("scale", scale))
        yield _case("scale", shape, "float32", (), f"{scale:g}", {"scale"}, options)


def _double() -> Iterator[Case]:
    for sizes, shape in {
        "double": SequenceShape(1, 70, 70, 2, 2, 32),
        "double-grouped": SequenceShape(1, 40, 40, 4, 2, 16),
    }.items():
        yield _case(
            sizes, shape, "float64", OWN, "masked", {"double", "quick"}, CAUSAL, values="padded"
        )


CASES: dict[str, Case] = {
    case.id: case
    for group in (
        _models,
        _masks,
        _windows,
        _rings,
        _ranks,
        _lengths,
        _head_dims,
        _heads,
        _adversarial,
        _layouts,
        _empty,
        _scales,
        _double,
    )
    for case in group()
}
