"""Hot loops are found and counted in listings written by hand; the compile gate has real ones."""

import pytest

from isoform.kernels import instructions
from isoform.kernels.compiler import Compiled

HEAD = '\t.section\t.text.kernel,"ax",@progbits\nkernel:\n.text.kernel:\n'


def listing(*lines):
    """Machine code as nvdisasm writes it, of instructions and labels."""
    text = (
        f"{line}:" if line.startswith(".L") else f"        /*{at:04x}*/     {line} ;"
        for at, line in enumerate(lines)
    )
    return HEAD + "\n".join(text)


def code(*lines):
    return instructions.kernels(listing(*lines))["kernel"]


def loops(*lines):
    """The names in each loop, in order."""
    found = code(*lines)
    return [[found[at].name for at in sorted(loop)] for loop in instructions.loops(found)]


def test_instructions_are_read_with_guards_and_labels():
    found = code("@!P0 BRA `(.L_x_1)", ".L_x_1", "HMMA.16816.F32 R0, R4.reuse, R2, RZ", "EXIT")
    assert [(one.name, one.guarded, one.label) for one in found] == [
        ("BRA", True, ""),
        ("HMMA.16816.F32", False, ".L_x_1"),
        ("EXIT", False, ""),
    ]
    assert found[1].is_one_of(["HMMA"])
    assert not found[1].is_one_of(["HMM", "HMMA.1688"])


def test_a_loop_within_a_loop():
    found = loops(
        *("MOV R0, R1", ".L_x_0", "LDG R0", ".L_x_1", "HMMA", "@P0 BRA `(.L_x_1)", "STG R0"),
        *("@P1 BRA `(.L_x_0)", "EXIT"),
    )
    assert found == [["HMMA", "BRA"], ["LDG", "HMMA", "BRA", "STG", "BRA"]]


def test_both_sides_of_a_branch_are_in_the_loop_and_code_after_it_is_not():
    found = loops(
        *(".L_x_0", "@P0 BRA `(.L_x_1)", "FADD", "BRA `(.L_x_2)", ".L_x_1", "FMUL"),
        *(".L_x_2", "@P1 BRA `(.L_x_0)", "STG R0", "EXIT"),
    )
    assert found == [["BRA", "FADD", "BRA", "FMUL", "BRA"]]


def test_a_way_back_from_diverged_warps_is_no_loop():
    """What they do lies at the end, and leads back into the middle."""
    found = loops(
        *(".L_x_0", "FADD", "BRA.DIV UR4, `(.L_x_9)", ".L_x_1", "HMMA", "@P0 BRA `(.L_x_0)"),
        *("EXIT", ".L_x_9", "SHFL", "BRA `(.L_x_1)"),
    )
    assert found == [["FADD", "BRA.DIV", "HMMA", "BRA"]]


def test_a_jump_into_the_middle_is_no_loop_either():
    """Not every way to the jump leads through where it leads to."""
    found = loops(
        *(".L_x_0", "@P2 BRA `(.L_x_9)", ".L_x_1", "HMMA", "@P0 BRA `(.L_x_0)", "EXIT"),
        *(".L_x_9", "FADD", "BRA `(.L_x_1)"),
    )
    assert found == [["BRA", "HMMA", "BRA", "FADD", "BRA"]]


def test_a_far_jump_is_a_call():
    """As the assembler leaves a long loop on an Ampere; a call of a function returns."""
    found = loops(
        *("BRA `(.L_x_0)", ".L_x_0", "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)"),
        *("@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1", "EXIT"),
    )
    assert found == [["CALL.REL.NOINC", "CALL.REL.NOINC", "BRA"]]
    found = loops(
        *("@P0 CALL.REL.NOINC `(.L_x_1)", "EXIT", ".L_x_1", "HMMA", "@P0 BRA `(.L_x_1)", "EXIT")
    )
    assert found == [["HMMA", "BRA"]]


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32", 16 * 8 * 8),
        ("HGMMA.64x32x16.F32.BF16", 64 * 32 * 16 // 4),
        ("FFMA", 0),
    ],
)
def test_a_matrix_product_says_its_size(name, macs):
    assert instructions._macs(instructions.Instruction(name, "", guarded=False)) == macs


def test_a_matrix_product_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="HMMA: a matrix product of sizes"):
        instructions._macs(instructions.Instruction("HMMA", "", guarded=False))


@pytest.fixture
def hot(monkeypatch):
    """What is counted of a kernel whose loop is given, with 16 channels and one product a logit:
    a multiplication of matrices is 128 logits of a warp, four of a thread.
    """
    monkeypatch.setitem(instructions.PRODUCTS, "source", 1)

    def count(*inside, around=()):
        text = listing(
            *(".L_x_0", *around, ".L_x_1", "HMMA.16816.F32", *inside, "@P0 BRA `(.L_x_1)"),
            *("@P1 BRA `(.L_x_0)", "EXIT"),
        )
        monkeypatch.setattr(instructions, "disassemble", lambda cubin: text)
        return instructions.counted(Compiled("source", "sm_90", {"HEAD_DIM": 16}, b"", ""))

    return count


LOOP = ("MUFU.EX2 R0, R0",) * 4 + ("FFMA R0", "FADD.FTZ R0", "LDSM.16.M88.4", "LDS.64")


def test_counts_are_per_logit(hot):
    counts = hot(*LOOP, around=("LDGSTS.E.BYPASS.128", "MUFU.RCP"))["kernel"]
    assert counts["loop 1"] == {
        "exponentials": 1.0,
        "floats": 0.5,
        "products": 0.25,
        "shared_loads": 0.5,
        "global_loads": 0.0,
        "total": 2.5,
    }
    assert counts["around"]["global_loads"] == 1
    assert counts["around"]["total"] == 3


# --- The judgement --------------------------------------------------------------------------------


def said(before, after, may_rise=0.03):
    return instructions.complaints("v", after, {"v": before}, may_rise)


def test_the_same_passes_and_a_little_more_too(hot):
    assert said(hot(*LOOP), hot(*LOOP)) == []
    assert said(hot(*LOOP), hot(*LOOP, "MOV R0, R1"), may_rise=0.11) == []


def test_an_exponential_more_is_named(hot):
    assert said(hot(*LOOP), hot(*LOOP, "MUFU.EX2 R1, R1")) == [
        "v: kernel, loop 1 has 1.25 exponentials a logit, recorded are 1",
        "v: kernel, loop 1 has 2.75 total a logit, recorded are 2.5",
    ]


def test_more_around_the_loop_is_named(hot):
    assert said(hot(*LOOP), hot(*LOOP, around=("LDG R0",)))[0] == (
        "v: kernel, around has 1 global_loads a turn, recorded are 0"
    )


def test_what_is_better_is_to_be_recorded(hot):
    assert said(hot(*LOOP), hot(*LOOP[1:])) == [
        "v: kernel, loop 1 has 0.75 exponentials a logit, recorded are 1: that is better, "
        "record anew",
        "v: kernel, loop 1 has 2.25 total a logit, recorded are 2.5: that is better, record anew",
    ]


def test_what_is_not_recorded_or_gone_is_named(hot):
    found = hot(*LOOP)
    assert instructions.complaints("v", found, {}, 0.03) == [
        "v: no instruction counts are recorded"
    ]
    assert said(found, {}) == ["v: kernel has no loop, recorded are loop 1, around: record anew"]
    assert said({}, found) == ["v: kernel has loop 1, around, recorded are none: record anew"]


def test_a_record_is_read_as_it_was_written(hot, tmp_path):
    found = {"v": hot(*LOOP), "w": hot(*LOOP[2:], around=("LDG R0",))}
    record = tmp_path / "counts.jsonl"
    instructions.write(record, "13.0", found)
    assert instructions.read(record) == ("13.0", instructions.MAY_RISE, found)
    assert len(record.read_text().splitlines()) == 1 + 2 * 2


def test_how_much_may_rise_is_the_records(hot, tmp_path):
    record = tmp_path / "counts.jsonl"
    instructions.write(record, "13.0", {"v": hot(*LOOP)})
    first, *rows = record.read_text().splitlines(keepends=True)
    record.write_text(first.replace("0.03", "0.05") + "".join(rows))
    instructions.write(record, "13.1", {"v": hot(*LOOP)})
    assert instructions.read(record)[:2] == ("13.1", 0.05)
