"""The gate's judgement on figures, without a compiler: it must fail on each fault it is for."""

from dataclasses import replace

import pytest

from isoform.kernels import compiler, gate
from isoform.kernels.compiler import Resources
from isoform.kernels.gate import Grid, Variant

GOOD = Resources(registers=96, shared_bytes=4096, stack_bytes=16)
RECORDED = {"kernel N=1 sm_80": {"forward": GOOD}}


def complaints(found, variant="kernel N=1 sm_80"):
    return gate.complaints(variant, found, RECORDED)


def test_every_source_is_gated():
    assert sorted(gate.GRIDS) == sorted(path.stem for path in compiler.SOURCES.glob("*.cu"))


def test_variants_are_all_combinations():
    grids = {"kernel": Grid({"N": (0, 1), "M": (8, 64, 128)}), "plain": Grid({}, ["sm_75"])}
    chosen = gate.variants(grids)
    assert len(chosen) == len({str(variant) for variant in chosen}) == 6 * 4 + 1
    assert chosen[0] == Variant("kernel", {"N": 0, "M": 8}, "sm_80")
    assert str(chosen[0]) == "kernel N=0 M=8 sm_80"
    assert str(chosen[-1]) == "plain sm_75"


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
