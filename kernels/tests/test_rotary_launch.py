"""What the rotary kernel is told and how it is launched, decided without a GPU."""

import itertools
import re
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from isoform.kernels import launch as launching
from isoform.kernels import rotary_launch
from isoform.kernels.arguments import View
from isoform.kernels.compiler import SOURCES
from isoform.kernels.rotary_launch import (
    ARGUMENTS,
    ROWS,
    Lying,
    Turn,
    launch,
    tokens_of_a_block,
    told,
    told_frequencies,
    width,
)
from isoform.reference.rotary_contract import POSITION_DTYPES
from isoform.reference.rotary_scaling import LongRoPE, YaRN

HEADER = (SOURCES / "rotary_arguments.cuh").read_text(encoding="utf-8")
SOURCE = (SOURCES / "rotary.cu").read_text(encoding="utf-8")

TYPES = {
    "int64": ("i8", ()),
    "void *": ("u8", ()),
    "Rows": (ROWS, ()),
    "Twofold": ("f4", (2,)),
    "Frequency": ("u8", (2,)),
}
SIZES = {"4": 4, "MOST_PAIRS": rotary_launch.MOST_PAIRS}


def members(struct):
    """The fields of a struct of the header, in its order."""
    body = re.search(rf"struct {struct} {{(.*?)}};", re.sub(r"//.*", "", HEADER), re.DOTALL)[1]
    for kind, names in re.findall(r"\s*(void \*|\w+)\s*([^;]+);", body):
        for name in names.split(", "):
            bare, *length = re.findall(r"\w+", name)
            one, more = TYPES[kind]
            yield bare, one, (*(SIZES[size] for size in length), *more)


@pytest.mark.parametrize(("struct", "mirror"), [("Rows", ROWS), ("RotaryArguments", ARGUMENTS)])
def test_the_header_and_its_mirror_agree(struct, mirror):
    assert np.dtype(list(members(struct))) == mirror


def test_the_host_knows_the_sizes_of_the_source():
    assert int(re.search(r"MOST_PAIRS = (\d+);", HEADER)[1]) == rotary_launch.MOST_PAIRS
    assert int(re.search(r"THREADS = (\d+);", SOURCE)[1]) == rotary_launch.THREADS
    assert ARGUMENTS.itemsize <= 4096  # what a kernel's arguments may take
    token = np.dtype([("magnitude", "u8"), ("negative", "?"), ("rows", "i8", 4)], align=True)
    assert token.itemsize == rotary_launch.TOKEN_BYTES


# --- Frequencies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [1.5, 1e4, 5e5, 1e11])
@pytest.mark.parametrize("d", [2, 64, 256])
def test_frequencies_are_parts_of_a_turn(d, base):
    words, amplitude = told_frequencies(d, base, None)
    assert amplitude == (1.0, 0.0)
    assert words.shape == (d // 2, 2)
    with mpmath.workdps(60):
        for i, (high, low) in enumerate(words.tolist()):
            turns = mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / d) / (2 * mpmath.pi)
            found = mpmath.mpf(high * 2**64 + low) / mpmath.mpf(2) ** 128
            assert abs(found - turns) < turns * mpmath.mpf(2) ** -84


def test_a_frequency_above_a_turn_is_taken_modulo_one():
    scaling = LongRoPE((1 / 128, 2.0), (1.0, 1.0), 8, 8)
    (high, low), _ = told_frequencies(4, 1e4, scaling)[0].tolist()
    with mpmath.workdps(60):
        turns = mpmath.mpf(128) / (2 * mpmath.pi)
        found = mpmath.mpf(high * 2**64 + low) / mpmath.mpf(2) ** 128
        assert abs(found - turns % 1) < mpmath.mpf(2) ** -78


def test_the_amplitude_is_two_floats():
    scaling = YaRN(16.0, 4096)
    _, (high, low) = told_frequencies(64, 1e4, scaling)
    assert high == np.float32(scaling.amplitude)
    assert abs(scaling.amplitude - high - np.float32(low)) < 1e-14
    _, amplitude = told_frequencies(64, 1e4, YaRN(16.0, 4096, attention_factor=1e300))
    assert amplitude == (np.inf, 0.0)


# --- Launches -------------------------------------------------------------------------------------


def lying(shape, dtype="bfloat16", pointer=1 << 20, strides=None):
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return Lying(pointer, shape, strides, dtype)


def arrays(B=1, L=6, H=4, D=128, G=None, positions="int64", dtype="bfloat16", in_place=False):
    made = {"x": lying((B, L, H, D), dtype)}
    made["out"] = made["x"] if in_place else lying((B, L, H, D), dtype, 1 << 30)
    if G is not None:
        made["other"] = lying((B, L, G, D), dtype, 1 << 40)
        made["out_other"] = made["other"] if in_place else lying((B, L, G, D), dtype, 1 << 50)
    return made | {"positions": lying((L,), positions, 1 << 10)}


def turn(d=128, layout="half", backwards=False):
    return Turn(d, 1e4, layout, None, backwards)


def test_what_passes_through_is_copied_16_bytes_at_a_time_though_halves_are_narrower():
    """GPT-NeoX-20B turns 24 of 96 channels: halves of 12, which start on 8 bytes."""
    found = told(turn(24), arrays(L=8192, H=64, D=96, G=64))
    (one,) = found.work.launches
    assert one.defines["WIDTH"] == 4
    assert (found.arguments["passing"], found.arguments["passing_width"]) == (72 // 8, 8)
    assert one.threads == (3 + 5, 256 // 8)  # nine vectors in pairs
    narrow = told(turn(24), arrays(D=100)).arguments  # rows start on 8 bytes
    assert (narrow["passing"], narrow["passing_width"]) == (76 // 4, 4)


def test_the_shape_of_the_issue():
    """16-byte vectors; eight of them a thread's, so that a block turns 128 KiB."""
    found = told(turn(), arrays(L=131072, H=16, G=16))
    (one,) = found.work.launches
    assert one.defines == {"ELEMENT": 2, "WIDTH": 8, "INTERLEAVED": 0}
    assert (one.kernel, one.blocks, one.threads) == ("rotary_turn", 131072 // 8, (8, 32))
    assert found.arguments["tokens"] == 8
    assert one.shared_bytes == 8 * (2 * 64 * 4 + 48)
    # five blocks of them on a multiprocessor of 100 KiB, with the KiB of each that CUDA takes
    assert 5 * (rotary_launch.SHARED_BYTES + 1024) < 100 << 10


def test_what_is_told():
    given = arrays(B=2, L=6, H=4, G=3, D=80)
    given["positions"] = lying((2, 6), "uint16", 40, strides=(0, -3))
    found = told(turn(32, "interleaved", backwards=True), given)
    (one,), packed = found.work.launches, found.arguments
    assert one.defines == {"ELEMENT": 2, "WIDTH": 8, "INTERLEAVED": 1}
    assert one.threads == (2 + 3, 51)  # two units to turn, six vectors to copy in pairs
    names = ("B", "L", "heads", "other_heads", "pairs", "passing", "backwards")
    assert [packed[name] for name in names] == [2, 6, 4, 3, 16, 6, 1]
    assert packed["x"]["stride"].tolist() == [6 * 4 * 80, 4 * 80, 80, 1]
    assert packed["out_other"]["data"] == 1 << 50
    assert packed["positions"]["stride"].tolist() == [0, -3, 0, 0]
    assert (packed["position_bytes"], packed["position_signed"]) == (2, 0)
    assert packed["frequency"][16:].tolist() == [[0, 0]] * (128 - 16)
    words = np.frombuffer(packed.tobytes(), np.uint64)
    pointers = [words[place // 8] for place in found.places]
    assert pointers == [given[name].pointer for name in given]


@pytest.mark.parametrize("dtype", POSITION_DTYPES)
def test_positions_of_any_integer_dtype(dtype):
    packed = told(turn(), arrays(positions=dtype)).arguments
    assert packed["position_bytes"] == np.dtype(dtype).itemsize
    assert packed["position_signed"] == dtype.startswith("int")
    assert packed["positions"]["stride"].tolist() == [0, 1, 0, 0]


def test_in_place_nothing_is_copied():
    packed = told(turn(32), arrays(in_place=True, G=2)).arguments
    assert packed["passing"] == 0
    assert told(turn(32), arrays()).arguments["passing"] == (128 - 32) // 8


def test_in_place_one_array_is_not_turned_twice():
    given = arrays(H=2, G=2, in_place=True)
    given["other"] = given["out_other"] = given["x"]
    with pytest.raises(ValueError, match="q and k are at one place in memory"):
        launch(turn(), given, 0, 0)


@pytest.mark.parametrize("axis", ["B", "L", "H"])
def test_nothing_is_launched_where_there_is_nothing(axis):
    assert told(turn(), arrays(**{axis: 0})).work.launches == ()
    assert told(turn(), arrays(H=0, G=2)).work.launches != ()


@pytest.mark.parametrize(
    ("dtype", "pairs", "passing", "strides", "pointer", "wanted"),
    [
        ("bfloat16", 64, 0, (9984, 384, 128, 1), 1 << 20, 8),
        ("float16", 64, 0, (9984, 384, 128, 1), (1 << 20) + 8, 4),  # starts on 8 bytes
        ("float32", 64, 0, (9984, 384, 128, 1), 1 << 20, 4),
        ("float32", 64, 0, (9984, 384, 130, 1), 1 << 20, 2),  # rows on 8 bytes
        ("bfloat16", 64, 0, (9984, 384, 131, 1), 1 << 20, 1),
        ("bfloat16", 64, 0, (9984, 384, 128, 2), 1 << 20, 1),  # channels apart
        ("bfloat16", 64, 0, (-9984, -384, 128, 1), 1 << 20, 8),
        ("bfloat16", 64, 0, (0, 0, 0, 1), 1 << 20, 8),
        ("bfloat16", 12, 0, (9984, 384, 24, 1), 1 << 20, 4),  # halves on 8 bytes
        ("bfloat16", 16, 4, (9984, 384, 36, 1), 1 << 20, 4),
        ("bfloat16", 1, 62, (9984, 384, 64, 1), 1 << 20, 1),
        ("bfloat16", 64, 0, (9984, 384, 128, 1), (1 << 20) + 2, 1),
        ("float32", 64, 0, (9984, 384, 128, 1), (1 << 20) + 2, 1),  # off even its element
    ],
)
def test_width(dtype, pairs, passing, strides, pointer, wanted):
    assert width(dtype, [View(pointer, strides)], pairs, passing) == wanted
    plain = View(1 << 20, (1 << 20, 1 << 10, 256, 1))
    assert width(dtype, [plain, View(pointer, strides), plain], pairs, passing) == wanted


def test_no_block_takes_too_much_shared_memory_or_leaves_a_gpu_idle():
    for tokens, units, pairs in itertools.product(
        (1, 7, 4096, 1 << 20), (1, 8, 4096), (1, 64, 128)
    ):
        found = tokens_of_a_block(tokens, units, pairs)
        assert found >= 1
        assert found * (8 * pairs + 48) <= rotary_launch.SHARED_BYTES
        assert found == 1 or tokens // found >= rotary_launch.BLOCKS
        assert found == 1 or (found - 1) * units < rotary_launch.UNITS


# --- What is kept ---------------------------------------------------------------------------------


def test_a_call_is_told_once_and_launched_with_its_addresses(monkeypatch):
    class Kernel:
        max_dynamic_shared_size_bytes = 48 << 10
        calls: list = []  # noqa: RUF012

        def kernel(self, *call):
            self.calls.append(call)

    kernel = Kernel()
    module = type("Module", (), {"get_function": lambda self, name: kernel})()
    monkeypatch.setattr(launching, "load", lambda source, defines: module)
    monkeypatch.setattr(launching, "toolkit", lambda: None)
    monkeypatch.setattr(launching, "_stream", lambda pointer: ("stream", pointer))
    monkeypatch.setattr(launching, "_PREPARED", {})
    for step in (0, 16, 4096):
        moved = {
            name: Lying(x.pointer + step, x.shape, x.strides, x.dtype)
            for name, x in arrays(G=2).items()
        }
        launch(turn(), moved, 0, 77)
    launch(turn(), arrays(in_place=True), 0, 77)
    launch(turn(backwards=True), arrays(), 0, 77)
    launch(turn(), arrays(), 1, 77)
    assert len(launching._PREPARED) == 4
    for (blocks, _, (struct,), _, stream), step in zip(kernel.calls, (0, 16, 4096), strict=False):
        packed = np.frombuffer(struct.tobytes(), ARGUMENTS)[0]
        assert (blocks, stream) == ((6,), ("stream", 77))
        assert packed["out_other"]["data"] == (1 << 50) + step
        assert packed["positions"]["data"] == (1 << 10) + step


def test_the_frequencies_are_read_only_by_the_reference():
    """The one place that defines them: what it says in two parts is what is told."""
    from isoform.reference.rotary_scaling import frequencies

    high, low, _ = frequencies(64, 1e4, None)
    words, _ = told_frequencies(64, 1e4, None)
    exact = [Fraction(h) + Fraction(w) for h, w in zip(high, low, strict=True)]
    found = [Fraction(int(a) << 64 | int(b), 2**128) for a, b in words]
    tau = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582")
    assert all(abs(f * tau - w) < tau / 2**127 for f, w in zip(found, exact, strict=True))
