"""Guard bands: memory around arrays that nobody may touch.

A kernel that writes one element too far does harm elsewhere, long after. Here every operand, and
every array that is made in Python while a call lasts (``torch.empty`` and the like, from which
kernels take their outputs), lies between two bands of bytes 0xFF, and whoever writes to a band is
found out when the call is over. In every float format those bytes are NaN, so that reading too far
shows in the results.

Not seen: arrays that native code allocates for itself, and writes beyond a band, of
:data:`BAND` bytes. On a processor those tend to kill the process, which is seen too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from isoform.conformance.dtypes import Array

BAND = 4096
"""Bytes of a band: a multiple of every alignment that kernels ask for."""

UNTOUCHED = 0xFF

MAKERS = {
    "numpy": ("empty", "empty_like", "zeros", "zeros_like"),
    "torch": ("empty", "empty_like", "empty_strided", "zeros", "zeros_like"),
}
"""Functions that make arrays, by library."""

METHODS = ("new_empty", "new_empty_strided", "new_zeros")
"""Methods of ``torch.Tensor`` that do."""


class Guards:
    """The arrays that are guarded.

    Args:
        library: ``"numpy"`` or ``"torch"``: whose arrays.
    """

    def __init__(self, library: str) -> None:
        self._guard = _guarded_numpy if library == "numpy" else _guarded_torch
        self._library = library
        self._bands: list[tuple[str, Any, Any]] = []

    def around(self, x: Any, name: str) -> Any:
        """A copy of ``x``, with its strides, between bands."""
        guarded, before, after = self._guard(x)
        self._bands.append((name, before, after))
        return guarded

    def touched(self) -> list[str]:
        """What was written around, each with the side and the distance in bytes."""
        found = []
        for name, before, after in self._bands:
            for side, band in (("before", before), ("after", after)):
                where = np.flatnonzero(_bytes(band) != UNTOUCHED)
                if where.size:
                    near = BAND - where[-1] if side == "before" else where[0] + 1
                    found.append(
                        f"{where.size} bytes {side} {name} were written, the nearest {near} away"
                    )
        return found

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """While this lasts, what Python code makes with :data:`MAKERS` is guarded too."""
        if self._library == "numpy":
            owners: list[tuple[Any, tuple[str, ...]]] = [(np, MAKERS["numpy"])]
        else:
            import torch

            owners = [(torch, MAKERS["torch"]), (torch.Tensor, METHODS)]
        saved = [(owner, name, getattr(owner, name)) for owner, names in owners for name in names]
        for owner, name, maker in saved:
            setattr(owner, name, self._guarding(name, maker))
        try:
            yield
        finally:
            for owner, name, maker in saved:
                setattr(owner, name, maker)

    def _guarding(self, name: str, maker: Callable[..., Any]) -> Callable[..., Any]:
        inside = False

        @functools.wraps(maker)
        def guarding(*args: Any, **options: Any) -> Any:
            nonlocal inside
            made = maker(*args, **options)
            if inside or options.get("out") is not None or not _can_be_guarded(made):
                return made
            inside = True  # the guard makes arrays too
            try:
                found = self.around(made, f"an array {tuple(made.shape)} of {name}")
            finally:
                inside = False
            return found.requires_grad_() if options.get("requires_grad") else found

        return guarding


def _can_be_guarded(x: Any) -> bool:
    """Whether an array is plain memory that can be laid elsewhere."""
    if isinstance(x, np.ndarray):
        return type(x) is np.ndarray and not x.dtype.hasobject and min(x.strides, default=0) >= 0
    import torch

    plain = type(x) is torch.Tensor and x.layout is torch.strided and not x.is_pinned()
    return bool(plain and x.device.type in ("cpu", "cuda") and not x.is_complex())


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How far the last element is from the first, in the strides' units; −1 for no elements."""
    if 0 in shape:
        return -1
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _guarded_numpy(x: Array) -> tuple[Array, Array, Array]:
    size = _extent(x.shape, x.strides)
    held = size + x.itemsize if size >= 0 else 0
    whole = np.full(held + 2 * BAND + 64, UNTOUCHED, np.uint8)
    start = BAND + -(whole.ctypes.data + BAND) % 64
    guarded: Array = np.ndarray(x.shape, x.dtype, whole, start, x.strides)
    guarded[...] = x
    return guarded, whole[start - BAND : start], whole[start + held : start + held + BAND]


def _guarded_torch(x: Any) -> tuple[Any, Any, Any]:
    import torch

    size = _extent(tuple(x.shape), tuple(x.stride()))
    band = BAND // x.element_size()
    whole = torch.full(
        ((size + 1) * x.element_size() + 2 * BAND,), UNTOUCHED, dtype=torch.uint8, device=x.device
    )
    elements = whole.view(x.dtype)
    guarded = elements.as_strided(x.shape, x.stride(), band)
    with torch.no_grad():
        for axis, step in enumerate(x.stride()):
            if step == 0 and x.shape[axis] > 1:  # seen again and again, written once
                x = x.narrow(axis, 0, 1)
        target = elements.as_strided(x.shape, x.stride(), band)
        target.copy_(x)
    return guarded, whole[:BAND], whole[whole.numel() - BAND :]


def _bytes(band: Any) -> Array:
    """A band as NumPy's bytes, waiting for the device."""
    return band if isinstance(band, np.ndarray) else np.asarray(band.cpu())
