"""The struct that kernels take is the same on both sides, and holds what it was given."""

import re

import numpy as np
import pytest

from isoform.kernels import plain
from isoform.kernels.arguments import ARGUMENTS, COUNTS, OPERAND, SCRATCH, View, pack
from isoform.kernels.compiler import SOURCES
from isoform.reference.contract import Shape

TYPES = {
    "void *": "u8",
    "float *": "u8",
    "uint16 *": "u8",
    "uint8 *": "u8",
    "int *": "u8",
    "int64 ": "i8",
    "float ": "f4",
    "Operand ": OPERAND,
}


def members(struct):
    """``(name, type)`` of a struct of the header, in its order."""
    header = re.sub(r"//.*", "", (SOURCES / "evoformer_arguments.cuh").read_text(encoding="utf-8"))
    body = re.search(rf"struct {struct} {{(.*?)}};", header, re.DOTALL)[1]
    for kind, names in re.findall(r"\s*(\w+ \*?)([^;]+);", body):
        for name in names.split(", "):
            bare, *length = re.findall(r"\w+", name)
            yield (bare, TYPES[kind], *map(int, length))


@pytest.mark.parametrize(
    ("struct", "mirror"), [("Operand", OPERAND), ("EvoformerArguments", ARGUMENTS)]
)
def test_the_header_and_its_mirror_agree(struct, mirror):
    assert np.dtype(list(members(struct)), align=True) == mirror


def test_the_mirror_has_the_size_that_the_header_asserts():
    assert OPERAND.itemsize == 48
    assert ARGUMENTS.itemsize == 7 * 8 + 16 * 48 + 8 * len(SCRATCH) + 8 * len(COUNTS) + 8


def test_pack():
    shape = Shape(B=1, S=2, Q=3, K=4, H=6, G=2, D=5)
    views = {"q": View(11, (1, -2, 3, 0, 5)), "mask": View(12, (7, 8, 9)), "top": View(13, ())}
    packed = pack(shape, views, 0.25, {"parts": 3})
    assert [packed[axis] for axis in "BSQKHGD"] == [1, 2, 3, 4, 6, 2, 5]
    assert packed["q"]["data"] == 11
    assert packed["q"]["stride"].tolist() == [1, -2, 3, 0, 5]
    assert packed["mask"]["stride"].tolist() == [7, 8, 9, 0, 0]
    assert packed["top"] == 13
    assert packed["scale"] == 0.25
    assert packed["parts"] == 3
    assert packed["pair_bias_tiles"] == 0
    assert packed["gate"]["data"] == 0  # absent


def test_a_large_offset_is_kept():
    packed = pack(Shape(1, 1, 1, 1, 1, 1, 1), {"k": View(2**47, (2**40,) * 5)}, 1.0)
    assert packed["k"]["data"] == 2**47
    assert packed["k"]["stride"].tolist() == [2**40] * 5


def test_the_host_knows_the_tile_of_the_source():
    source = (SOURCES / "evoformer_plain.cu").read_text(encoding="utf-8")
    limit, small, large = re.search(r"TILE = HEAD_DIM > (\d+) \? (\d+) : (\d+);", source).groups()
    for head_dim in range(1, 257):
        room = plain.defines("float32", head_dim)["HEAD_DIM"]
        assert room >= head_dim
        assert plain.tile(head_dim) == int(small if room > int(limit) else large)


def test_a_view_has_no_stride_where_there_is_one_index():
    """What a library says of such an axis is arbitrary, and no address is made of it."""
    assert View.of(16, (1, 2, 1, 4), (7, 4, 99, 1)) == View(16, (0, 4, 0, 1))
    assert View.of(0, (0, 2), (5, 1)) == View(0, (5, 1))
    with pytest.raises(ValueError, match="zip"):
        View.of(16, (2, 3), (3,))


SHAPE = Shape(1, 2, 17, 33, 4, 2, 8)
ALL = ["q", "k", "v", "mask_bias", "pair_bias", "gate"]


def launched(work):
    return [(launch.kernel.removeprefix("evoformer_plain_"), launch.blocks) for launch in work]


def test_every_kernel_of_the_source_is_launched_and_no_other():
    source = (SOURCES / "evoformer_plain.cu").read_text(encoding="utf-8")
    defined = re.findall(r"__global__.*?evoformer_plain_(\w+)\(", source, re.DOTALL)
    forward = plain.forward(SHAPE, "float32", {})
    backward = plain.backward(SHAPE, "float32", {}, ALL)
    # tiles of 16: 2 of queries, 3 of keys
    blocks = [2 * 4 * 2, 2 * 4 * 2, 3 * 2 * 2, 3 * 2, 3 * 2 * 4]
    assert launched([*forward.launches, *backward.launches]) == [*zip(defined, blocks, strict=True)]
    assert forward.scratch == {}
    assert backward.scratch == dict.fromkeys(("top", "total", "delta"), (1, 2, 4, 17))


def test_only_what_is_wanted_is_launched():
    assert plain.backward(SHAPE, "float32", {}, []).launches == ()
    work = plain.backward(SHAPE, "float32", {}, ["v"])
    assert [kernel for kernel, _ in launched(work.launches)] == ["backward_query", "backward_key"]


@pytest.mark.parametrize("axis", ["B", "S", "Q", "H"])
def test_nothing_is_launched_for_an_empty_result(axis):
    sizes = dict.fromkeys("BSQKHGD", 2) | {axis: 0}
    assert plain.forward(Shape(**sizes), "float32", {}).launches == ()


def test_no_keys_still_give_a_result():
    work = plain.forward(Shape(1, 1, 3, 0, 2, 2, 4), "float32", {})
    assert [blocks for _, blocks in launched(work.launches)] == [2]
