"""The memory of a GPU as transports need it: copied out and in, and in step with what computes.

What is given are bytes, ``uint8 [n]``, of CuPy or of PyTorch, as :func:`arrays.as_bytes` makes
them. PyTorch moves its own, so that CuPy need not be there for them; what one of the two wants of
the other's goes by DLPack, which copies nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from isoform.parallel.arrays import Array, is_tensor


def load() -> Any:
    """``cupy``.

    Raises:
        ImportError: CuPy is missing or finds no CUDA; the message says what to install.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cupy":
            raise
        raise ImportError(
            "this needs CuPy: install it with 'pip install \"isoform[cuda13]\"', "
            "or cuda12 as your driver is"
        ) from error
    return cupy


def pinned(size: int, like: Any) -> Array:
    """Page-locked memory of the host, which a GPU copies from and to at full speed.

    Args:
        size: Bytes.
        like: Bytes on the GPU; their library brings it.
    """
    if is_tensor(like):
        import torch

        return np.asarray(torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy())
    load()
    from cupyx import empty_pinned

    return np.asarray(empty_pinned((size,), np.uint8))


def copied_out(data: Any) -> Array:
    """A copy in page-locked memory, made when all is computed that ``data`` waits for."""
    host = pinned(len(data), data)
    if is_tensor(data):
        import torch

        torch.from_numpy(host).copy_(data)
    else:
        data.get(out=host)
    return host


def copy_in(host: Array, data: Any) -> None:
    """Fill ``data`` from memory of the host; what is queued from now on sees it."""
    if is_tensor(data):
        import torch

        data.copy_(torch.from_numpy(host))
    else:
        data.set(host)
        stream_of(data).synchronize()  # from page-locked memory CuPy copies later


def stream_of(data: Any) -> Any:
    """The stream on which the library of ``data`` queues its work now, as CuPy's object."""
    cupy = load()
    if is_tensor(data):
        import torch

        return cupy.cuda.ExternalStream(torch.cuda.current_stream(data.device).cuda_stream)
    return cupy.cuda.get_current_stream()


def finish(data: Any) -> None:
    """Return when all is computed that ``data`` waits for."""
    if is_tensor(data):
        import torch

        torch.cuda.current_stream(data.device).synchronize()
    else:
        stream_of(data).synchronize()


def address(data: Any) -> int:
    """Where the bytes lie."""
    return int(data.data_ptr() if is_tensor(data) else data.data.ptr)
