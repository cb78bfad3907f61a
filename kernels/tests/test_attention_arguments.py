"""The struct that kernels of attention over a sequence take is the same on both sides."""

import re

import numpy as np
import pytest

from isoform.kernels.arguments import View
from isoform.kernels.attention_arguments import ATTENTION, NO_END, Options
from isoform.kernels.compiler import SOURCES
from isoform.reference.attention_contract import SequenceShape

TYPES = {
    "void *": "u8",
    "Span *": "u8",
    "int64 ": "i8",
    "float ": "f4",
    "Operand ": ATTENTION.array,
}


def members(struct):
    """``(name, type)`` of a struct of the header, in its order."""
    header = re.sub(r"//.*", "", (SOURCES / "attention_arguments.cuh").read_text(encoding="utf-8"))
    body = re.search(rf"struct {struct} {{(.*?)}};", header, re.DOTALL)[1]
    for kind, names in re.findall(r"\s*(\w+ \*?)([^;]+);", body):
        for name in names.split(", "):
            bare, *length = re.findall(r"\w+", name)
            yield (bare, TYPES[kind], *map(int, length))


@pytest.mark.parametrize(
    ("struct", "mirror"), [("Operand", ATTENTION.array), ("AttentionArguments", ATTENTION.dtype)]
)
def test_the_header_and_its_mirror_agree(struct, mirror):
    assert np.dtype(list(members(struct)), align=True) == mirror


def test_pack():
    shape = SequenceShape(B=1, Q=3, K=4, H=6, G=2, D=5)
    views = {
        "q": View(11, (1, -2, 0, 5)),
        "lse": View(12, (7, 8, 9)),
        "segments": View(13, (0, 1)),
        "key_spans": View(14, ()),
    }
    packed = ATTENTION.pack(shape, views, 0.25, Options(left=8, wide=True).counts)
    assert [packed[axis] for axis in "BQKHGD"] == [1, 3, 4, 6, 2, 5]
    assert packed["q"]["data"] == 11
    assert packed["q"]["stride"].tolist() == [1, -2, 0, 5]
    assert packed["lse"]["stride"].tolist() == [7, 8, 9, 0]
    assert packed["segments"]["stride"].tolist() == [0, 1, 0, 0]
    assert packed["key_spans"] == 14
    assert packed["positions"]["data"] == 0  # absent
    assert (packed["left"], packed["right"], packed["wide"]) == (8, NO_END, 1)
    assert packed["scale"] == 0.25


@pytest.mark.parametrize("name", ["q", "key_segments", "query_spans"])
def test_a_pointer_is_where_it_is_said_to_be(name):
    packed = ATTENTION.pack(SequenceShape(0, 0, 0, 0, 0, 1), {name: View(99, ())}, 1.0)
    (at,) = np.flatnonzero(np.frombuffer(packed.tobytes(), np.uint64) == 99)
    assert 8 * at == ATTENTION.place_of(name)


@pytest.mark.parametrize(
    ("causal", "window", "sides"),
    [
        (False, None, (NO_END, NO_END)),
        (True, None, (NO_END, 0)),
        (False, 7, (7, 7)),
        (True, (7, 3), (7, 0)),
        (False, (-1, 3), (NO_END, 3)),
        (False, (2**80, -1), (NO_END, NO_END)),  # no two positions are further apart
    ],
)
def test_windows(causal, window, sides):
    options = Options.of(causal=causal, window=window)
    assert (options.left, options.right) == sides
