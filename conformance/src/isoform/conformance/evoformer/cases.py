"""The cases of Evoformer attention, as tables.

Shapes of real models first, then what breaks kernels: odd lengths, head dims, every combination of
operands, adversarial values, memory layouts, empty axes. The id of a case is
``evoformer/sizes/dtype/variant``; it is the seed of its numbers, so changing an id changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS
from isoform.reference.contract import OPTIONAL_OPERANDS, Shape

NAME = "evoformer_attention"
ALL = frozenset(OPTIONAL_OPERANDS)
ROW = frozenset({"mask", "pair_bias", "gate"})
COLUMN = frozenset({"mask", "gate"})

# Shapes that real models run, B S Q K H G D; the operands they use; and the axes that are cut where
# a CPU runs a small twin of it. Sources: AlphaFold 2 supplementary tables 4 and 5 (crop and MSA
# sizes of initial training and fine-tuning) and sections 1.6 to 1.7 (heads and head dims);
# AlphaFold 3 supplementary sections 3 and 5.
MODELS: dict[str, tuple[Shape, frozenset[str], dict[str, int]]] = {
    "msa-row-train": (Shape(1, 128, 256, 256, 8, 8, 32), ROW, {"S": 2}),
    "msa-row-finetune": (Shape(1, 512, 384, 384, 8, 8, 32), ROW, {"S": 1}),
    "msa-row-512x256": (Shape(1, 512, 256, 256, 8, 8, 32), ROW, {"S": 1}),
    "msa-column": (Shape(1, 256, 128, 128, 8, 8, 32), COLUMN, {"S": 4}),
    "extra-msa-1024": (Shape(1, 1024, 256, 256, 8, 8, 8), ROW, {"S": 2}),
    "extra-msa-5120": (Shape(1, 5120, 384, 384, 8, 8, 8), ROW, {"S": 1}),
    "extra-msa-global-column": (Shape(1, 384, 1, 5120, 8, 1, 8), frozenset({"mask"}), {"S": 16}),
    "template-pointwise": (Shape(1, 65536, 1, 4, 4, 4, 16), frozenset({"mask"}), {"S": 2048}),
    "template-triangle": (Shape(4, 256, 256, 256, 4, 4, 16), ROW, {"B": 2, "S": 1}),
    "triangle-256": (Shape(1, 256, 256, 256, 4, 4, 32), ROW, {"S": 3}),
    "triangle-384": (Shape(1, 384, 384, 384, 4, 4, 32), ROW, {"S": 2}),
    "triangle-512": (Shape(1, 512, 512, 512, 4, 4, 32), ROW, {"S": 1}),
    "triangle-1024": (Shape(1, 1024, 1024, 1024, 4, 4, 32), ROW, {"S": 1, "Q": 512}),
    "af3-pairformer-single": (Shape(1, 1, 384, 384, 16, 16, 24), ROW, {}),
    "af3-pairformer-single-768": (Shape(1, 1, 768, 768, 16, 16, 24), ROW, {"Q": 192}),
    "af3-diffusion": (Shape(1, 48, 768, 768, 16, 16, 48), ROW, {"S": 2, "Q": 256, "K": 256}),
    "af3-diffusion-atoms": (Shape(48, 64, 32, 128, 4, 4, 32), COLUMN, {"B": 4, "S": 8}),
}

LENGTHS = (1, 2, 3, 17, 31, 33, 63, 65, 127, 250, 257, 333)
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 24, 32, 40, 48, 64, 80, 96, 127, 128)
CROSS_LENGTHS = ((1, 64), (64, 1), (33, 127), (127, 33), (5, 300), (300, 5), (64, 65))
GROUPS = ((4, 1), (4, 2), (6, 2), (8, 4))

# Most kernels have no gate and no mask bias, some nothing at all. A case that asks for all operands
# is none for them: whatever is hard is asked for as they would have it, too.
PLAIN = frozenset({"mask", "pair_bias"})
OFFERED: dict[str, frozenset[str]] = {
    "all-operands": ALL,
    "mask+pair-bias": PLAIN,
    "bare": frozenset(),
}

# What each adversarial recipe needs among the operands, and whether gradients are checked.
ADVERSARIAL: dict[str, tuple[frozenset[str], bool]] = {
    "large-logits": (ALL, True),
    "low-logits": (ALL, True),
    "one-hot": (frozenset({"mask_bias"}), True),
    "equal-logits": (ALL, True),
    "spread-values": (ALL, True),
    "minus-inf-bias": (ALL, True),
    "masked-rows": (ALL, True),
    "all-masked": (ALL, True),
    "first-key-only": (ALL, True),
    "last-key-only": (ALL, True),
    "garbage-in-dropped": (ALL, True),
    "nan-attended": (ALL, False),
    "inf-attended": (ALL, False),
    "subnormal": (ALL, True),
    "huge-negative-bias": (frozenset({"mask_bias", "pair_bias"}), True),
    "constant-values": (ALL, True),
    "closed-gate": (ALL, True),
}

NOT_PLAIN = {"one-hot", "huge-negative-bias", "closed-gate", "constant-values"}
"""What is about other operands than mask and pair bias; and, last, where without a gate the twin
makes no error at all in what cancels, with which others' could be compared."""

EMPTY = {
    "no-batch": Shape(0, 2, 5, 7, 2, 2, 8),
    "no-rows": Shape(1, 0, 5, 7, 2, 2, 8),
    "no-queries": Shape(1, 2, 0, 7, 2, 2, 8),
    "no-keys": Shape(1, 2, 5, 0, 2, 2, 8),
    "no-heads": Shape(1, 2, 5, 7, 0, 0, 8),
}


def scale_of(case: Case) -> float | None:
    """The factor of the logits that ``case`` gives; None where it gives none."""
    return dict(case.options).get("scale")


def shape_of(operands: Operands) -> Shape:
    """The axis sizes of a call."""
    B, S, Q, H, D = operands["q"].shape
    K, G = operands["k"].shape[2:4]
    return Shape(B, S, Q, K, H, G, D)


def _case(
    sizes: str,
    shape: Shape,
    dtype: str,
    operands: Iterable[str],
    variant: str,
    tags: Iterable[str],
    **more: Any,
) -> Case:
    case_id = f"evoformer/{sizes}/{FORMATS[dtype].short}/{variant}"
    return replace(
        Case(case_id, NAME, shape, dtype, frozenset(operands), tags=frozenset(tags)), **more
    )


def _models() -> Iterator[Case]:
    for name, (full, operands, cut) in MODELS.items():
        for dtype in ("bfloat16", "float32", "float16"):
            case = _case(name, full, dtype, operands, "ragged-mask", {"model"})
            if not case.large:
                yield case
                continue
            yield replace(case, tags=case.tags | {"full-size"})
            tags = {"model", *(["quick"] if name in QUICK_MODELS else [])}
            small = replace(full, **cut)
            note = f"cut from {full}"
            yield _case(f"{name}-small", small, dtype, operands, "ragged-mask", tags, note=note)
    for name in UNGATED_MODELS:
        full, operands, cut = MODELS[name]
        small = replace(full, **cut)
        sizes = name if small == full else f"{name}-small"
        note = f"cut from {full}, whose gate is applied elsewhere"
        tags = {"model", *(["quick"] if name in QUICK_MODELS else [])}
        yield _case(sizes, small, "bfloat16", operands - {"gate"}, "ungated", tags, note=note)


QUICK_MODELS = {"triangle-256", "template-pointwise", "extra-msa-global-column"}
UNGATED_MODELS = (
    *("msa-row-train", "msa-column", "triangle-256", "triangle-384"),
    *("af3-pairformer-single", "af3-diffusion"),
)


def _lengths() -> Iterator[Case]:
    for length, dtype in product(LENGTHS, ("float32", "bfloat16")):
        tags = {"length", "edge", *(["quick"] if length in (1, 17, 65) else [])}
        shape = Shape(1, 2, length, length, 2, 2, 16)
        for variant, operands in OFFERED.items():
            yield _case(f"length-{length}", shape, dtype, operands, variant, tags)
    for Q, K in CROSS_LENGTHS:
        for dtype, (variant, operands) in product(("float32", "bfloat16"), OFFERED.items()):
            shape = Shape(1, 2, Q, K, 2, 2, 16)
            yield _case(f"lengths-{Q}-{K}", shape, dtype, operands, variant, {"length", "cross"})


def _head_dims() -> Iterator[Case]:
    for D, dtype in product(HEAD_DIMS, ("float32", "bfloat16", "float16")):
        tags = {"head-dim", *(["quick"] if D in (8, 24, 128) else [])}
        for variant, operands in OFFERED.items():
            yield _case(
                f"head-dim-{D}", Shape(1, 2, 65, 70, 2, 2, D), dtype, operands, variant, tags
            )


def _heads() -> Iterator[Case]:
    for (H, G), dtype in product(GROUPS, ("float32", "bfloat16")):
        shape = Shape(2, 2, 33, 40, H, G, 16)
        tags = {"grouped-heads", *(["quick"] if G == 1 else [])}
        yield _case(f"heads-{H}-{G}", shape, dtype, ALL, "all-operands", tags)
        yield _case(f"heads-{H}-{G}", shape, dtype, PLAIN, "mask+pair-bias", tags)
    batch = Shape(3, 4, 20, 24, 3, 3, 16)
    yield _case("batch-3", batch, "float32", ALL, "all-operands", {"batch"})
    yield _case("batch-3", batch, "float32", PLAIN, "mask+pair-bias", {"batch"})


def _operand_combinations() -> Iterator[Case]:
    shape = Shape(2, 3, 48, 50, 2, 2, 16)
    for dtype in ("float32", "bfloat16"):
        for present in product((False, True), repeat=len(OPTIONAL_OPERANDS)):
            operands = [name for name, on in zip(OPTIONAL_OPERANDS, present, strict=True) if on]
            variant = "+".join(name.replace("_", "-") for name in operands) or "bare"
            tags = {"operands", *(["quick"] if sum(present) in (0, 4) else [])}
            yield _case("operands", shape, dtype, operands, variant, tags)


def _adversarial() -> Iterator[Case]:
    shape = Shape(1, 4, 64, 72, 2, 2, 16)
    for (values, (operands, differentiate)), dtype in product(
        ADVERSARIAL.items(), ("float32", "bfloat16", "float16")
    ):
        tags = {"adversarial", "edge", *(["quick"] if dtype == "float32" else [])}
        recipe = {"values": values, "differentiate": differentiate}
        yield _case("values", shape, dtype, operands, values, tags, **recipe)
        if values not in NOT_PLAIN:
            yield _case("values-plain", shape, dtype, PLAIN, values, tags, **recipe)


def _layouts() -> Iterator[Case]:
    shape = Shape(2, 3, 33, 40, 2, 2, 16)
    for layout, dtype in product(
        ("heads-first", "sliced", "strided-last", "packed", "broadcast"), ("float32", "bfloat16")
    ):
        tags = {"layout", "edge", *(["quick"] if dtype == "float32" else [])}
        yield _case("layout", shape, dtype, ALL, layout, tags, layout=layout)
        yield _case("layout-plain", shape, dtype, PLAIN, layout, tags, layout=layout)


def _empty() -> Iterator[Case]:
    for (name, shape), dtype in product(EMPTY.items(), ("float32", "bfloat16")):
        yield _case("empty", shape, dtype, ALL, name, {"empty", "edge", "quick"})
        yield _case("empty-plain", shape, dtype, PLAIN, name, {"empty", "edge", "quick"})


def _scales() -> Iterator[Case]:
    shape = Shape(1, 2, 40, 48, 2, 2, 16)
    for scale in (1.0, 0.0, -0.5):
        yield _case(
            "scale", shape, "float32", ALL, f"{scale:g}", {"scale"}, options=(("scale", scale),)
        )


def _double() -> Iterator[Case]:
    for sizes, shape in {
        "double": Shape(1, 2, 65, 70, 2, 2, 32),
        "double-grouped": Shape(1, 2, 33, 40, 4, 2, 16),
    }.items():
        yield _case(sizes, shape, "float64", ALL, "all-operands", {"double", "quick"})


CASES: dict[str, Case] = {
    case.id: case
    for group in (
        _models,
        _lengths,
        _head_dims,
        _heads,
        _operand_combinations,
        _adversarial,
        _layouts,
        _empty,
        _scales,
        _double,
    )
    for case in group()
}
