"""Guard bands: a write beside an array is seen, with its side; what is right is left in peace."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from isoform.conformance.guards import BAND, Guards


def address(x: Any) -> int:
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr())


def made(library: str, shape: tuple[int, ...]) -> Any:
    return (
        np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        if library == "numpy"
        else (torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape))
    )


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("offset", "side"), [(-2, "before"), (4 * 6, "after"), (4 * 6 + 99, "after")]
)
def test_a_write_beside_an_operand_is_seen(library: str, offset: int, side: str) -> None:
    guards = Guards(library)
    x = guards.around(made(library, (2, 3)), "q")
    assert not guards.touched()
    ctypes.memset(address(x) + offset, 0, 2)
    (said,) = guards.touched()
    assert f"2 bytes {side} q were written" in said


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_write_into_the_operand_is_none(library: str) -> None:
    guards = Guards(library)
    x = guards.around(made(library, (2, 3)), "q")
    x[...] = 7
    assert not guards.touched()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_outputs_that_are_made_during_the_call_are_guarded(library: str) -> None:
    guards = Guards(library)
    with guards.allocations():
        out = np.empty((2, 3), np.float32) if library == "numpy" else torch.empty(2, 3)
        like = np.zeros_like(out) if library == "numpy" else out.new_zeros(2, 3)
    assert not guards.touched()
    assert (np.asarray(like) == 0).all()
    ctypes.memset(address(out) + 4 * 6, 0, 4)
    (said,) = guards.touched()
    assert "4 bytes after an array (2, 3) of empty were written" in said
    assert np.empty.__module__ == "numpy" and torch.empty is not None
    assert not hasattr(torch.empty, "__wrapped__")


def test_strides_and_dtypes_are_kept() -> None:
    wide = np.zeros((4, 10), ml_dtypes.bfloat16)
    for x in (
        wide[:, 1:4],
        wide.T,
        np.lib.stride_tricks.as_strided(wide, (3, 10), (0, 2)),
        wide[:0],
    ):
        guarded = Guards("numpy").around(x, "x")
        assert guarded.strides == x.strides and guarded.dtype == x.dtype
        assert (guarded == x).all()
    for t in (torch.ones(4, 6)[:, 1:3], torch.ones(4, 6).T, torch.ones(1, 6).expand(4, 6)):
        guarded = Guards("torch").around(t, "t")
        assert guarded.stride() == t.stride() and torch.equal(guarded, t)


def test_reading_too_far_is_nan() -> None:
    x = Guards("numpy").around(np.ones(4, np.float32), "x")
    beyond = np.lib.stride_tricks.as_strided(x, (5,), (4,))
    assert np.isnan(beyond[-1])
    assert BAND % 512 == 0
