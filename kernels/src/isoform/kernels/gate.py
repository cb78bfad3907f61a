"""The compile gate: what every variant of every kernel takes of a GPU, and whether it got worse.

No continuous-integration machine has a GPU, but each can compile for all of them. A kernel that
still compiles may have become slow without a test failing: one variable too many, and its registers
spill to memory or half as many blocks fit on a multiprocessor. So the assembler's figures are
recorded, a line each, in ``kernels/compile_gate.jsonl``, and :func:`complaints` says which of the
present ones are worse than those. So are the instructions of the tensor-core kernels' hot loops, in
``kernels/instruction_counts.jsonl`` (:mod:`isoform.kernels.instructions`).

The figures depend on the compiler's version; the gate refuses to compare across versions, and the
checks pin one. After a change that is meant to cost what it costs (or gains), record anew and have
the difference reviewed with the change::

    python -m isoform.kernels.gate kernels/compile_gate.jsonl

which writes both records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from isoform.kernels import (
    attention_plain,
    attention_tensor,
    fused_launch,
    instructions,
    layer_norm_launch,
    plain,
    rotary_launch,
    softmax_launch,
    tensor,
    warpgroup,
)
from isoform.kernels.compiler import (
    Compiled,
    Define,
    Resources,
    compile_source,
    resources,
    toolkit,
)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
"""Ampere, Hopper, Blackwell in data centres, Blackwell in workstations."""


REGISTERS_AT_A_TIME = 8
"""A thread is given registers in eights: 97 cost what 104 do, and 105 may cost a block."""

INSTRUCTIONS = "instruction_counts.jsonl"
"""The name of the second record, in the folder of the first."""

NEVER_SPILL = ("evoformer_tensor_", "attention_tensor_", "rotary ", "bias_", "masked_softmax")
"""How the names of variants begin whose kernels may not spill a register."""

SPILLED = {"evoformer_tensor_backward_query_pair": 128, "evoformer_tensor_backward_key": 4}
"""Bytes that some of them may spill all the same. The registers of the first hold sums for all rows
s, and what little else there is to hold is stored and read back once a row, of 128 logits a lane.
The other does where operands do not lie on 16 bytes. (``evoformer_warpgroup_*`` are not among
:data:`NEVER_SPILL`: of their warps, those that multiply spill nothing in their loop over tiles, but
between two works, and those that copy do. The instruction counts tell.)"""

Figures = dict[str, dict[str, Resources]]
"""Of every variant, by its name as a string, what each of its kernels takes."""


@dataclass(frozen=True)
class Variant:
    """One source with its definitions, compiled for one architecture."""

    name: str
    defines: Mapping[str, Define]
    architecture: str

    def __str__(self) -> str:
        chosen = (f"{key}={value}" for key, value in self.defines.items())
        return " ".join([self.name, *chosen, self.architecture])

    @property
    def counted(self) -> bool:
        """Whether the instructions of its loops are counted: one element type says enough."""
        return (
            self.name in instructions.PRODUCTS
            and self.architecture in instructions.ARCHITECTURES
            and self.defines["ELEMENT"] == tensor.ELEMENTS["bfloat16"]
        )

    def compile(self) -> Compiled:
        """Compile it; what :func:`~isoform.kernels.compiler.compile_source` raises, this does."""
        return compile_source(self.name, architecture=self.architecture, defines=self.defines)


# --- What is compiled -----------------------------------------------------------------------------
#
# A minute or two of one core's work. Not every combination, but every source, element type and head
# dim on an architecture, every head dim on each of them, and every part of the source that a
# definition turns on or off. Only what `compiler.SPECIFIC` names uses what sm_90a has and its
# successors do not.

PRODUCTION = {"MASK_BIAS": 1, "PAIR_BIAS": 1, "GATED": 1, "ALIGNED": 1, "ALIGNED_BIAS": 1}
"""All operands, their rows copied 16 bytes at a time: of the tensor-core kernels, what takes most
registers among what a model calls.
"""

TENSOR_CHOICES = (
    {"MASK_BIAS": 0},
    {"PAIR_BIAS": 0},
    {"GATED": 0},
    {"ALIGNED": 0, "ALIGNED_BIAS": 0},
)
"""How else operands may be: each absent by itself, and lying oddly."""


def variants() -> list[Variant]:
    """Every variant that the gate compiles."""
    return [
        *_plain(),
        *(one for name in tensor.PASSES for one in _tensor(name)),
        *_whole(),
        *_grouped(),
        *_teams(),
        *_rotary(),
        *_fused(),
        *_softmax(),
        *_layer_norm(),
        *_attention(),
    ]


def _plain() -> Iterator[Variant]:
    """Turing too: it needs no newer instruction."""
    for dtype, architecture in [
        *(("float32", architecture) for architecture in ("sm_75", *ARCHITECTURES)),
        ("float16", "sm_90"),
        ("bfloat16", "sm_90"),
    ]:
        for head_dim in plain.HEAD_DIMS:
            yield Variant(plain.SOURCE, plain.defines(dtype, head_dim), architecture)


def _tensor(name: str) -> Iterator[Variant]:
    def one(dtype: str, D: int, chosen: Mapping[str, int], architecture: str) -> Variant:
        return Variant(
            f"evoformer_tensor_{name}",
            tensor.variant(name, dtype, D, {**PRODUCTION, **chosen}),
            architecture,
        )

    for D in tensor.HEAD_DIMS:
        for architecture in ARCHITECTURES:
            yield one("bfloat16", D, {}, architecture)
        yield one("float16", D, {}, "sm_90")
    for chosen in TENSOR_CHOICES:
        if name == "backward_pair_bias" and "PAIR_BIAS" in chosen:
            continue  # where there is no pair bias there is no gradient of it
        yield one("bfloat16", 32, chosen, "sm_90")


def _whole() -> Iterator[Variant]:
    """The fewest keys on each architecture, any number on Hopper, and there what else may be."""
    ungated = {**PRODUCTION, "GATED": 0}

    def one(dtype: str, D: int, K: int, architecture: str, **chosen: int) -> Variant:
        defines = tensor.whole_variant(tensor.WHOLE[D], dtype, D, K, {**ungated, **chosen})
        return Variant(tensor.WHOLE_SOURCE, defines, architecture)

    for D, whole in tensor.WHOLE.items():
        fewest, most = whole.keys
        few = [2 * fewest, *(fewest * warps for warps in range(3, whole.warps))]
        many = [keys * whole.warps for keys in range(fewest, most + 1, 16)]
        for architecture in ARCHITECTURES:
            yield one("bfloat16", D, few[0], architecture)
        for K in (*few[1:], *many):
            yield one("bfloat16", D, K, "sm_90")
        yield one("bfloat16", D, many[-1], "sm_100")
        yield one("float16", D, many[-1], "sm_90")
        yield one("bfloat16", D, many[-1], "sm_90", MASK_BIAS=0)
        yield one("bfloat16", D, many[-1], "sm_90", ALIGNED_BIAS=0)


def _grouped() -> Iterator[Variant]:
    """As a model calls it, with a mask bias too, and in float16: all that there is."""
    for D, options in tensor.GROUPED.items():
        for grouped in options:
            for dtype, mask_bias in (("bfloat16", 1), ("bfloat16", 0), ("float16", 1)):
                chosen = {**PRODUCTION, "GATED": 0, "MASK_BIAS": mask_bias}
                defines = tensor.grouped_variant(grouped, dtype, D, chosen)
                yield Variant(tensor.GROUPED_SOURCE, defines, f"{tensor.WARPGROUPS}a")


def _teams() -> Iterator[Variant]:
    """Each pass of the backward by warpgroups, as a model calls it, and in float16 with a mask
    bias, which takes most registers, where it can; and what comes before them.
    """
    for D, passes in warpgroup.BACKWARD.items():
        for name, teams in passes.items():
            other = "bfloat16" if name == warpgroup.TOGETHER else "float16"
            for dtype, mask_bias in (("bfloat16", 0), (other, 1)):
                chosen = {**PRODUCTION, "GATED": 0, "MASK_BIAS": mask_bias}
                defines = warpgroup.variant(name, teams, dtype, D, chosen)
                yield Variant(f"evoformer_warpgroup_{name}", defines, f"{tensor.WARPGROUPS}a")
        for dtype, architectures in (("bfloat16", ARCHITECTURES), ("float16", ("sm_90",))):
            defines = warpgroup.queries_variant(dtype, D, {**PRODUCTION, "GATED": 0})
            for architecture in architectures:
                yield Variant(warpgroup.QUERIES_SOURCE, defines, architecture)


def _rotary() -> Iterator[Variant]:
    """Rows of any kind on an architecture; on each, those that a model has, in both layouts."""
    bfloat16, float32 = (plain.ELEMENTS[dtype] for dtype in ("bfloat16", "float32"))

    def one(element: int, vector: int, interleaved: int, architecture: str) -> Variant:
        chosen = {"ELEMENT": element, "WIDTH": vector, "INTERLEAVED": interleaved}
        return Variant(rotary_launch.SOURCE, chosen, architecture)

    for interleaved in (0, 1):
        for architecture in ("sm_75", *ARCHITECTURES):
            yield one(bfloat16, 8, interleaved, architecture)
            yield one(float32, 4, interleaved, architecture)
        yield one(plain.ELEMENTS["float16"], 8, interleaved, "sm_90")
        for vector in (1, 2, 4):
            yield one(bfloat16, vector, interleaved, "sm_90")
        for vector in (1, 2):
            yield one(float32, vector, interleaved, "sm_90")


def _fused() -> Iterator[Variant]:
    """As of the rotary kernel: rows of any kind on an architecture, on each those of a model."""
    bfloat16, float32 = (plain.ELEMENTS[dtype] for dtype in ("bfloat16", "float32"))
    everywhere = ("sm_75", *ARCHITECTURES)
    for function in (fused_launch.gelu(True), fused_launch.gelu(False), fused_launch.dropout(0)):

        def one(element: int, vector: int, architecture: str, chosen: Any = function) -> Variant:
            defines = {"ELEMENT": element, "WIDTH": vector, **dict(chosen.defines)}
            return Variant(chosen.source, defines, architecture)

        for architecture in everywhere:
            yield one(bfloat16, 8, architecture)
            yield one(float32, 4, architecture)
        yield one(plain.ELEMENTS["float16"], 8, "sm_90")
        for vector in (1, 2, 4):
            yield one(bfloat16, vector, "sm_90")
        for vector in (1, 2):
            yield one(float32, vector, "sm_90")
    for element in plain.ELEMENTS.values():
        yield Variant("column_sums", {"ELEMENT": element}, "sm_90")
    for architecture in everywhere:
        if architecture != "sm_90":
            yield Variant("column_sums", {"ELEMENT": bfloat16}, architecture)


def _softmax() -> Iterator[Variant]:
    """As of those: on each architecture rows that several warps hold and rows that none can, on one
    rows of every kind.
    """

    def one(dtype: str, keys: int, width: int, architecture: str, masked: bool = True) -> Variant:
        how = softmax_launch.shared(keys, width)
        defines = softmax_launch.defines(dtype, width, how, masked)
        return Variant(how.source, defines, architecture)

    for keys in (4096, 32768):
        for architecture in ("sm_75", *ARCHITECTURES):
            yield one("bfloat16", keys, 8, architecture)
            yield one("float32", keys, 4, architecture)
        yield one("float16", keys, 8, "sm_90")
        yield one("bfloat16", keys, 8, "sm_90", masked=False)
        yield one("float32", keys, 4, "sm_90", masked=False)
        for width in (1, 2, 4):
            yield one("bfloat16", keys, width, "sm_90")
        for width in (1, 2):
            yield one("float32", keys, width, "sm_90")
    for keys in (64, 1024, 2560, 16384):
        yield one("bfloat16", keys, 8, "sm_90")
    yield one("bfloat16", 1, 1, "sm_90")
    yield one("float32", 16384, 4, "sm_90")


def _layer_norm() -> Iterator[Variant]:
    """The widest rows and a model's on each architecture, on one rows of every kind."""
    for backward in (False, True):

        def one(
            dtype: str, columns: int, width: int, architecture: str, backward: bool = backward
        ) -> Variant:
            norm = layer_norm_launch.LayerNorm(1e-5, backward)
            how = layer_norm_launch.shared(norm, columns, width)
            return Variant(norm.source, layer_norm_launch.defines(dtype, width, how), architecture)

        for columns in (2560, 8192):
            for architecture in ("sm_75", *ARCHITECTURES):
                yield one("bfloat16", columns, 8, architecture)
                yield one("float32", columns, 4, architecture)
            yield one("float16", columns, 8, "sm_90")
        for width in (1, 2, 4):
            yield one("bfloat16", 8192, width, "sm_90")
        for width in (1, 2):
            yield one("float32", 8192, width, "sm_90")
        for columns in (128, 1024):
            yield one("bfloat16", columns, 8, "sm_90")
            yield one("float32", columns, 4, "sm_90")


def _attention() -> Iterator[Variant]:
    """Each head dim with positions on each architecture, and those that models have without them,
    too; the plain kernel in each element type.
    """
    for name in attention_tensor.PASSES:
        for D in attention_tensor.HEAD_DIMS:
            common = D in (64, 128)
            for architecture in ARCHITECTURES:
                yield _attention_tensor(name, "bfloat16", D, architecture)
                if common or architecture == "sm_80":
                    yield _attention_tensor(name, "bfloat16", D, architecture, places=False)
            if common:
                yield _attention_tensor(name, "float16", D, "sm_90")
        yield _attention_tensor(name, "bfloat16", 64, "sm_90", aligned=False)
    for dtype, element in plain.ELEMENTS.items():
        for architecture in ("sm_75", *ARCHITECTURES):
            yield Variant("attention_delta", {"ELEMENT": element}, architecture)
        for D in plain.HEAD_DIMS if dtype == "float32" else (64,):
            yield Variant(attention_plain.SOURCE, plain.defines(dtype, D), "sm_90")
    for architecture in ("sm_75", *ARCHITECTURES):
        yield Variant("attention_spans", {}, architecture)
        if architecture != "sm_90":
            yield Variant(attention_plain.SOURCE, plain.defines("float32", 128), architecture)


def _attention_tensor(
    name: str, dtype: str, D: int, architecture: str, places: bool = True, aligned: bool = True
) -> Variant:
    defines = attention_tensor.variant(name, dtype, D, places=places, aligned=aligned)
    return Variant(f"attention_tensor_{name}", defines, architecture)


def spills(figures: Figures) -> list[str]:
    """The kernels of :data:`NEVER_SPILL` that do, a sentence each.

    The inner loops of tensor-core kernels are as fast as registers are, and a tile that does not
    fit is one to be cut smaller in :data:`isoform.kernels.tensor.GEOMETRIES`. The rotary kernel and
    those of biases and of the softmax are to do nothing with memory but read and write their rows.
    The figures of the plain kernel and of LayerNorm's, whose backward holds sums besides a row, are
    recorded, as all are, but they may spill.
    """
    return [
        f"{variant}: {kernel} spills {taken.spill_stores} bytes and reads {taken.spill_loads} back"
        for variant, kernels in figures.items()
        if variant.startswith(NEVER_SPILL)
        for kernel, taken in kernels.items()
        if taken.spill_stores > SPILLED.get(kernel, 0)
    ]


Taken = tuple[dict[str, Resources], dict[str, instructions.Counts]]


def taken(variant: Variant) -> Taken:
    """Compile one variant and read what its kernels take, and its loops do, if it is counted."""
    compiled = variant.compile()
    counts = instructions.counted(compiled) if variant.counted else {}
    return resources(compiled.log), counts


def measure(
    chosen: Iterable[Variant], each: Callable[..., Iterable[Taken]] = map
) -> tuple[Figures, instructions.Recorded]:
    """Compile each variant and read what its kernels take, and what the loops do that are counted.

    Args:
        chosen: The variants.
        each: ``map``, or that of a pool of processes: within one, NVRTC compiles one at a time.

    Raises:
        ValueError: There is a variant without a kernel: to the compiler that is no error.
    """
    asked = tuple(chosen)
    found = tuple(zip(asked, each(taken, asked), strict=True))
    figures = {str(variant): kernels for variant, (kernels, _) in found}
    counts = {str(variant): loops for variant, (_, loops) in found if variant.counted}
    if empty := [variant for variant, found in figures.items() if not found]:
        raise ValueError(f"no kernels in {', '.join(empty)}")
    return figures, counts


def complaints(variant: str, found: Mapping[str, Resources], recorded: Figures) -> list[str]:
    """What is worse in ``variant`` than recorded, a sentence each; empty if nothing is.

    A kernel may take more registers than recorded as long as it is given no more than then
    (:data:`REGISTERS_AT_A_TIME`), and not a byte more of anything else.
    """
    if variant not in recorded:
        return [f"{variant}: not recorded"]
    before = recorded[variant]
    said = [f"{variant}: {kernel} is recorded and gone" for kernel in before if kernel not in found]
    for kernel, now in found.items():
        if kernel not in before:
            said.append(f"{variant}: {kernel} is not recorded")
            continue
        for figure, is_now in asdict(now).items():
            was = getattr(before[kernel], figure)
            step = REGISTERS_AT_A_TIME if figure == "registers" else 1
            if -(-is_now // step) > -(-was // step):
                said.append(f"{variant}: {kernel} has {figure} {is_now}, recorded are {was}")
    return said


# --- The record -----------------------------------------------------------------------------------


def compiler_version() -> str:
    """The version of NVRTC that is installed, e.g. ``"13.0"``."""
    return ".".join(str(part) for part in toolkit().version)


def read(record: Path) -> tuple[str, Figures]:
    """The recorded figures, and the version of the compiler that they are of."""
    first, *rows = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    figures: Figures = {}
    for row in rows:
        variant, kernel = row.pop("variant"), row.pop("kernel")
        figures.setdefault(variant, {})[kernel] = Resources(**row)
    return first["compiler"], figures


def write(record: Path, compiler: str, figures: Figures) -> None:
    """Record the figures: the compiler's version, then a line per kernel, so that a diff reads."""
    rows: list[dict[str, object]] = [{"compiler": compiler}]
    rows += [
        {"variant": variant, "kernel": kernel, **asdict(found)}
        for variant, kernels in figures.items()
        for kernel, found in sorted(kernels.items())
    ]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile every variant and record what it takes, and beside that what its hot loops do."""
    parser = argparse.ArgumentParser(
        prog="python -m isoform.kernels.gate", description=main.__doc__
    )
    parser.add_argument("record", type=Path, help="the file to write, kernels/compile_gate.jsonl")
    record = parser.parse_args(arguments).record
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        figures, counts = measure(variants(), pool.map)
    write(record, compiler_version(), figures)
    instructions.write(record.with_name(INSTRUCTIONS), compiler_version(), counts)


if __name__ == "__main__":
    main()
