"""A pass is prepared once, and launched with the addresses of each call. The GPU is a stand-in."""

import numpy as np
import pytest

from isoform.kernels import launch
from isoform.kernels.arguments import ARGUMENTS, View
from isoform.kernels.launch import Launch, Work, prepared
from isoform.kernels.tiles import Tile
from isoform.reference.contract import Shape

SHAPE = Shape(B=1, S=2, Q=3, K=4, H=6, G=2, D=5)


class Kernel:
    """What CuPy would give, which writes down how it is called."""

    def __init__(self):
        self.max_dynamic_shared_size_bytes = 48 << 10
        self.calls = []
        self.kernel = lambda *call: self.calls.append(call)


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    module = type("Module", (), {"get_function": lambda self, name: kernel})()
    monkeypatch.setattr(launch, "load", lambda source, defines: module)
    monkeypatch.setattr(launch, "toolkit", lambda: None)
    monkeypatch.setattr(launch, "_stream", lambda pointer: ("stream", pointer))
    monkeypatch.setattr(launch, "_PREPARED", {})
    monkeypatch.setattr(launch, "_device_name", lambda: "a GPU")
    monkeypatch.setattr(launch, "_device_traits", lambda: (99 << 10, 128, "sm_89"))
    monkeypatch.setenv("ISOFORM_GEOMETRIES", "builtin")  # whatever the user of this machine has
    return kernel


def test_a_pass_is_asked_once_and_launched_with_the_addresses_of_each_call(kernel):
    asked = []

    def one(shape, dtype, views):
        asked.append((shape, dtype, *views))
        launched = Launch("source", {"D": 5}, "kernel", 7, (32, 2), 64 << 10)
        return Work((launched,), {"delta": (2, 3)}, {"parts": 9})

    def described():
        return SHAPE, "float16", {"k": View(0, (1, 2, 3, 4, 5)), "q": View(0, (6, 7, 8, 9, 1))}

    for pointers in ([10, 20, 30], [11, 21, 31]):
        found = prepared("key", one, described, 0.5)
        assert found.scratch == {"delta": (2, 3)}
        found.launch(pointers, 77)
    assert asked == [(SHAPE, "float16", "k", "q")]
    assert kernel.max_dynamic_shared_size_bytes == 64 << 10

    for call, pointers in zip(kernel.calls, ([10, 20, 30], [11, 21, 31]), strict=True):
        blocks, threads, (struct,), shared_bytes, stream = call
        assert (blocks, threads, shared_bytes) == ((7,), (32, 2), 64 << 10)
        assert stream == ("stream", 77)
        packed = np.frombuffer(struct.tobytes(), ARGUMENTS)[0]
        assert [packed["k"]["data"], packed["q"]["data"], packed["delta"]] == pointers
        assert packed["q"]["stride"].tolist() == [6, 7, 8, 9, 1]
        assert (packed["scale"], packed["parts"], packed["H"]) == (0.5, 9, 6)
        assert packed["v"]["data"] == packed["top"] == 0


def test_maps_of_tiles_have_the_addresses_of_each_call(kernel, monkeypatch):
    """A kernel that fetches none is not given any."""
    monkeypatch.setattr(launch, "driver_map", lambda it: it.address.to_bytes(128, "little"))
    views = {"k": View(0, (8, 8, 8, 8, 1)), "q": View(0, (8, 8, 8, 8, 1))}
    tiles = (Tile("q", 64), Tile("k", 64))
    plain = Launch("source", {}, "kernel", 1, (32,))
    fetching = Launch("source", {}, "kernel", 1, (32,), tiles=tiles)
    work = Work((plain, fetching, plain))

    for pointers in ([16, 32], [48, 64]):
        found = prepared("key", lambda *given: work, lambda: (SHAPE, "float16", views), 0.5)
        found.launch(pointers, 77)
        first, second, third = (call[2][0].tobytes() for call in kernel.calls[-3:])
        assert first == third
        assert len(first) == ARGUMENTS.itemsize
        assert second[: len(first)] == first
        packed = np.frombuffer(first, ARGUMENTS)[0]
        assert [packed["k"]["data"], packed["q"]["data"]] == pointers
        maps = [int.from_bytes(second[-start:][:8], "little") for start in (256, 128)]
        assert maps == pointers[::-1]


def test_another_key_is_another_pass(kernel):
    for number in range(2):
        prepared(number, lambda *given: Work(()), lambda: (SHAPE, "float16", {}), 1.0)
    assert len(launch._PREPARED) == 2


def test_what_is_kept_does_not_grow_for_ever(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 2)
    for number in range(5):
        prepared(number, lambda *given: Work(()), lambda: (SHAPE, "float16", {}), 1.0)
    assert len(launch._PREPARED) <= 2
