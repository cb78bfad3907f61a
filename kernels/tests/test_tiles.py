"""Tiles that kernels fetch: how arrays lie, what the driver is asked. The GPU is a stand-in."""

import ctypes

import numpy as np
import pytest

from isoform.kernels import tiles
from isoform.kernels.arguments import ARGUMENTS, View, pack
from isoform.kernels.tiles import Lying, Tile, TileMapRefused, driver_map, fetchable, with_maps
from isoform.reference.contract import Shape

SHAPE = Shape(B=2, S=3, Q=5, K=8, H=4, G=2, D=16)
VIEWS = {
    "q": View(16, (960, 320, 64, 16, 1)),
    "k": View(32, (768, 256, 32, 16, 1)),
    "pair_bias": View(64, (160, 0, 40, 8, 1)),
}
PACKED = pack(SHAPE, VIEWS, 1.0)


def test_rows_of_channels_lie_as_their_strides_say():
    """Of q: channels, queries, heads, rows s, batch."""
    assert tiles.lying(Tile("q", 64), PACKED) == Lying(
        16, (16, 5, 4, 3, 2), (128, 32, 640, 1920), (16, 64)
    )
    assert tiles.lying(Tile("k", 128), PACKED).sizes == (16, 8, 2, 3, 2)


def test_a_pair_bias_lies_by_keys_and_queries():
    """An axis of one index has any step: the driver takes none of 0."""
    assert tiles.lying(Tile("pair_bias", 64), PACKED) == Lying(
        64, (8, 5, 4, 1, 2), (16, 80, 16, 320), (64, 64)
    )


def test_what_has_no_elements_has_no_map():
    """The driver would refuse it."""
    empty = pack(Shape(B=2, S=3, Q=5, K=0, H=4, G=2, D=16), VIEWS, 1.0)
    with pytest.raises(ValueError, match="k has no elements"):
        tiles.lying(Tile("k", 64), empty)


@pytest.mark.parametrize(
    ("strides", "can_be"),
    [
        ((960, 320, 64, 16, 1), True),
        ((0, 320, 64, 16, 1), True),
        ((960, -320, 64, 16, 1), False),
        ((960, 324, 64, 16, 1), False),
        ((2**39, 320, 64, 16, 1), False),
    ],
)
def test_what_can_be_fetched(strides, can_be):
    assert fetchable({**VIEWS, "q": View(16, strides)}, ("k", "q")) == can_be


def test_maps_follow_the_arguments():
    fetched = Tile("q", 64), Tile("k", 64)
    given = with_maps(PACKED, fetched, lambda it: bytes(128 * [it.address]))
    assert given[: ARGUMENTS.itemsize] == PACKED.tobytes()
    first = len(given) - 256
    assert first % 64 == 0
    assert 0 <= first - ARGUMENTS.itemsize < 64
    assert given[first:] == bytes(128 * [16] + 128 * [32])
    assert first == tiles.place_of_map(0, ARGUMENTS.itemsize)
    assert with_maps(PACKED, (), lambda it: b"") == PACKED.tobytes()


def driver(monkeypatch, error=0, address=None):
    """Stands for the driver's function, and writes down how it is called."""
    asked = []

    def encode(place, kind, rank, at, sizes, steps, box, every, *modes):
        asked.append((kind, rank, at, *map(tuple, (sizes, steps, box, every)), modes))
        assert place % 64 == 0
        ctypes.memmove(place, np.uint64(at if address is None else address).tobytes(), 8)
        return error

    monkeypatch.setattr(tiles, "_encode", lambda: encode)
    return asked


def test_the_driver_is_asked_for_boxes(monkeypatch):
    asked = driver(monkeypatch)
    made = driver_map(tiles.lying(Tile("q", 64), PACKED))
    assert len(made) == 128
    assert int.from_bytes(made[:8], "little") == 16
    sizes, steps, box = (16, 5, 4, 3, 2), (128, 32, 640, 1920), (16, 64, 1, 1, 1)
    assert asked == [(1, 5, 16, sizes, steps, box, (1, 1, 1, 1, 1), (0, 1, 3, 0))]
    driver_map(tiles.lying(Tile("pair_bias", 64), PACKED))
    assert asked[1][-1] == (0, 3, 3, 0)  # rows of 128 bytes are swizzled otherwise


def test_who_gets_no_map_is_told_of_what(monkeypatch):
    driver(monkeypatch, error=1)
    with pytest.raises(TileMapRefused, match=r"returned 1 for Lying\(address=16"):
        driver_map(tiles.lying(Tile("q", 64), PACKED))


def test_a_map_that_does_not_begin_with_the_address_is_refused(monkeypatch):
    """Later calls write theirs there."""
    driver(monkeypatch, address=99)
    with pytest.raises(TileMapRefused, match="to begin with the address"):
        driver_map(tiles.lying(Tile("q", 64), PACKED))
