"""The gate's judgement on figures, without a compiler: it must fail on each fault it is for."""

from dataclasses import replace

import pytest

from isoform.kernels import compiler, gate, tensor
from isoform.kernels.compiler import Resources
from isoform.kernels.gate import Variant

GOOD = Resources(registers=96, shared_bytes=4096, stack_bytes=16)
RECORDED = {"kernel N=1 sm_80": {"forward": GOOD}}
WHOLE = tensor.WHOLE_SOURCE


def complaints(found, variant="kernel N=1 sm_80"):
    return gate.complaints(variant, found, RECORDED)


def test_every_source_is_compiled_for_every_architecture():
    chosen = {(variant.name, variant.architecture) for variant in gate.variants()}
    sources = {path.stem for path in compiler.SOURCES.glob("*.cu")}
    general, specific = sources - compiler.SPECIFIC, sources & compiler.SPECIFIC
    assert specific == compiler.SPECIFIC
    assert chosen >= {(name, arch) for name in general for arch in gate.ARCHITECTURES}
    assert chosen >= {(name, "sm_90a") for name in specific}
    assert not chosen & {(name, arch) for name in specific for arch in gate.ARCHITECTURES}


def test_every_variant_is_another():
    chosen = gate.variants()
    assert len({str(variant) for variant in chosen}) == len(chosen)
    assert str(Variant("kernel", {"N": 0, "M": 8}, "sm_80")) == "kernel N=0 M=8 sm_80"


@pytest.mark.parametrize("name", tensor.PASSES)
def test_every_head_dim_and_every_choice_is_compiled(name):
    chosen = [variant for variant in gate.variants() if variant.name == f"evoformer_tensor_{name}"]
    for element, architectures in ((1, {"sm_90"}), (2, set(gate.ARCHITECTURES))):
        for head_dim in tensor.HEAD_DIMS:
            found = {
                variant.architecture
                for variant in chosen
                if variant.defines["ELEMENT"] == element
                and variant.defines["HEAD_DIM"] == head_dim
                and gate.PRODUCTION.items() <= variant.defines.items()
            }
            assert found == architectures
    never = {"PAIR_BIAS"} if name == "backward_pair_bias" else set()
    for define in gate.PRODUCTION.keys() - never:
        assert {variant.defines[define] for variant in chosen} == {0, 1}


def test_a_spill_of_a_tensor_core_kernel_is_named():
    spilling = Resources(registers=255, spill_stores=8, spill_loads=12)
    figures = {
        "evoformer_tensor_forward HEAD_DIM=16 sm_80": {"forward": GOOD},
        "evoformer_tensor_forward HEAD_DIM=32 sm_80": {"forward": spilling},
        "evoformer_plain HEAD_DIM=256 sm_80": {"forward": spilling},
        f"{WHOLE} HEAD_DIM=32 sm_90": {WHOLE: spilling},
    }
    assert gate.spills(figures) == [
        "evoformer_tensor_forward HEAD_DIM=32 sm_80: forward spills 8 bytes and reads 12 back"
    ]


def test_what_is_spilled_once_a_row_is_bounded():
    most = gate.SPILLED[WHOLE]
    for spilled, said in ((most, 0), (most + 4, 1)):
        taken = Resources(registers=255, spill_stores=spilled, spill_loads=spilled)
        assert len(gate.spills({f"{WHOLE} HEAD_DIM=32 sm_90": {WHOLE: taken}})) == said


def test_the_same_or_better_passes():
    assert complaints({"forward": GOOD}) == []
    assert complaints({"forward": Resources(registers=40)}) == []


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("registers", 97),
        ("spill_stores", 4),
        ("spill_loads", 4),
        ("shared_bytes", 4097),
        ("stack_bytes", 24),
    ],
)
def test_anything_worse_is_named_with_its_figures(figure, value):
    said = complaints({"forward": replace(GOOD, **{figure: value})})
    was = getattr(GOOD, figure)
    assert said == [f"kernel N=1 sm_80: forward has {figure} {value}, recorded are {was}"]


def test_registers_count_as_they_are_given_out():
    recorded = {"v": {"forward": Resources(registers=97)}}
    assert gate.complaints("v", {"forward": Resources(registers=104)}, recorded) == []
    assert gate.complaints("v", {"forward": Resources(registers=105)}, recorded) != []


def test_what_is_not_recorded_or_gone_is_named():
    assert complaints({}, "kernel N=2 sm_80") == ["kernel N=2 sm_80: not recorded"]
    assert complaints({"backward": GOOD}) == [
        "kernel N=1 sm_80: forward is recorded and gone",
        "kernel N=1 sm_80: backward is not recorded",
    ]


def test_a_record_is_read_as_it_was_written(tmp_path):
    figures = {**RECORDED, "kernel N=2 sm_80": {"a": Resources(), "b": GOOD}}
    gate.write(tmp_path / "record.jsonl", "13.0", figures)
    assert gate.read(tmp_path / "record.jsonl") == ("13.0", figures)
    assert len((tmp_path / "record.jsonl").read_text().splitlines()) == 4
