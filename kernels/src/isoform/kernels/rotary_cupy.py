"""The rotary kernel for CuPy's arrays: results allocated by CuPy, on its current stream."""

from __future__ import annotations

from typing import Any

import cupy

from isoform.kernels.cupy_arrays import strides
from isoform.kernels.rotary_launch import Lying, Turn, launch


def turned(turn: Turn, x: Any, other: Any, positions: Any) -> tuple[Any, Any]:
    """``x`` and ``other``, or None, turned."""
    with cupy.cuda.Device(x.device.id):
        out, out_other = (y if y is None else cupy.empty(y.shape, y.dtype) for y in (x, other))
        _launch(turn, positions, x=x, out=out, other=other, out_other=out_other)
    return out, out_other


def turn_in_place(turn: Turn, x: Any, other: Any, positions: Any) -> None:
    """Turn ``x`` and ``other``, if there is one, where they lie."""
    with cupy.cuda.Device(x.device.id):
        _launch(turn, positions, x=x, out=x, other=other, out_other=other)


def _launch(turn: Turn, positions: Any, **arrays: Any) -> None:
    """On CuPy's current device and stream."""
    lying = {
        name: Lying(x.data.ptr, x.shape, strides(x), str(x.dtype))
        for name, x in {**arrays, "positions": positions}.items()
        if x is not None
    }
    device = cupy.cuda.runtime.getDevice()
    launch(turn, lying, device, cupy.cuda.get_current_stream().ptr)
