"""What the components of this layer do alike to NumPy and CuPy arrays and PyTorch tensors.

Neither sharding nor communication depends on the library: both move numbers and never compute with
them. The few functions here are where the libraries spell the same thing differently; CuPy mostly
spells as NumPy does. PyTorch and CuPy are imported only where such an array has come in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a PyTorch tensor, found out without importing PyTorch."""
    return type(x).__module__.partition(".")[0] == "torch" or any(
        base.__module__ == "torch" for base in type(x).__mro__
    )


def is_cupy(x: Any) -> bool:
    """Whether ``x`` is a CuPy array, found out without importing CuPy."""
    return type(x).__module__.partition(".")[0] == "cupy"


def check_array(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a NumPy or CuPy array or a PyTorch tensor."""
    if not isinstance(x, np.ndarray) and not is_tensor(x) and not is_cupy(x):
        raise TypeError(
            f"{name} must be a NumPy array, a PyTorch tensor or a CuPy array, "
            f"got {type(x).__name__}"
        )


def device_of(x: Any) -> str:
    """The kind of memory that ``x`` lies in: ``"cpu"``, ``"cuda"``, or another of PyTorch's."""
    if is_tensor(x):
        return str(x.device.type)
    return "cuda" if is_cupy(x) else "cpu"


def _library(x: Any) -> Any:
    """NumPy, or CuPy where ``x`` is its array: they have the same functions."""
    if is_cupy(x):
        import cupy

        return cupy
    return np


def check_axis(name: str, x: Any, axis: int) -> None:
    """Raise ValueError where ``x`` has no such axis."""
    if not -len(x.shape) <= axis < len(x.shape):
        raise ValueError(f"{name} has no axis {axis}, got shape {tuple(x.shape)}")


def as_like(x: Array, like: Any) -> Any:
    """``x`` in its own dtype, in the library and on the device of ``like``."""
    if is_tensor(like):
        import torch

        return torch.from_numpy(x).to(like.device)
    return _library(like).asarray(x)


def where(condition: Any, number: float, x: Any) -> Any:
    """``number`` where the condition holds and ``x`` elsewhere, in the dtype of ``x``."""
    if is_tensor(x):
        return x.masked_fill(condition, number)
    return _library(x).where(condition, x.dtype.type(number), x)


def take(x: Any, index: Array, axis: int) -> Any:
    """The entries ``index`` of ``x`` along ``axis``, as a copy; differentiable for a tensor."""
    if is_tensor(x):
        return x.index_select(axis, as_like(index, x))
    return _library(x).take(x, as_like(index, x), axis)


def concatenate(pieces: Sequence[Any], axis: int) -> Any:
    """The pieces one after the other along ``axis``; differentiable for tensors."""
    if is_tensor(pieces[0]):
        import torch

        return torch.cat(tuple(pieces), dim=axis)
    return _library(pieces[0]).concatenate(pieces, axis=axis)


def empty(shape: Sequence[int], like: Any) -> Any:
    """A new array of ``shape`` with the dtype, library and device of ``like``, holding anything."""
    if is_tensor(like):
        return like.new_empty(tuple(shape))
    return _library(like).empty(tuple(shape), like.dtype)


def detached(x: Any) -> Any:
    """``x``, of which autograd records nothing."""
    return x.detach() if is_tensor(x) else x


def contiguous(x: Any) -> Any:
    """``x`` itself if its numbers lie one after the other in memory, or a copy where they do."""
    return x.detach().contiguous() if is_tensor(x) else _library(x).ascontiguousarray(x)


def as_bytes(x: Any) -> Any:
    """The memory of a contiguous array or tensor as ``uint8 [bytes]``, shared, not copied.

    Of CPU memory it is a NumPy array, of a GPU's one of the library of ``x``. Every dtype becomes
    plain bytes, those too that a transport has no name for, as bfloat16.
    """
    if is_tensor(x):
        import torch

        flat = x.detach().reshape(-1).view(torch.uint8)
        return np.asarray(flat.numpy()) if x.device.type == "cpu" else flat
    return _library(x).asarray(x).reshape(-1).view(np.uint8)


def is_contiguous(x: Any) -> bool:
    """Whether the numbers of ``x`` lie one after the other in memory."""
    return bool(x.is_contiguous() if is_tensor(x) else x.flags.c_contiguous)


def widened(x: Any, *, copy: bool = False) -> Any:
    """``x`` in float32 if it is narrower, else in its own dtype: what sums are held in."""
    narrow = x.dtype.itemsize < 4
    if is_tensor(x):
        return (x.float() if narrow else x.clone() if copy else x).detach()
    return x.astype(np.float32 if narrow else x.dtype, copy=copy)


def astype_of(x: Any, like: Any) -> Any:
    """``x`` rounded to the dtype of ``like``."""
    return x.to(like.dtype) if is_tensor(x) else x.astype(like.dtype)


def zeros(shape: Sequence[int], like: Any) -> Any:
    """A new array of zeros, with the dtype, library and device of ``like``."""
    if is_tensor(like):
        return like.new_zeros(tuple(shape))
    return _library(like).zeros(tuple(shape), like.dtype)
