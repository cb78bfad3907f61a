"""What the backward needs, kept in the host's memory meanwhile.

On a GPU a tensor is copied to page-locked memory on a stream of its own while the next block
computes, and copied back while the block that comes before it in the backward does. There are never
more than two tensors on their way out, and two on their way back, so what is held on the GPU does
not grow with the number of blocks. Elsewhere copies are plain ones.

Page-locked memory is PyTorch's to reuse from step to step. It rounds a request up to a power of
two, so tensors are cut: :data:`CHUNK` is one.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

CHUNK = 1 << 26
"""Bytes of page-locked memory that are asked for at once."""


class Offload:
    """Keeps what autograd saves within :meth:`hooks` in the host's memory.

    Attributes:
        bytes_held: Bytes in the host's memory now.
        most_held: The most so far.
    """

    def __init__(self) -> None:
        self.bytes_held = self.most_held = 0
        self._last: weakref.ref[_Kept] | None = None
        self._streams: dict[torch.device, tuple[Any, Any]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        """Within, tensors that autograd saves go to the host; parameters stay where they are."""
        return cast(AbstractContextManager[Any], saved_tensors_hooks(self._pack, _unpack))

    def _pack(self, x: Tensor) -> Any:
        if isinstance(x, torch.nn.Parameter) or not x.is_floating_point():
            return x
        last = None if self._last is None else self._last()
        if last is not None and last.is_of(x):
            return last  # both branches of a block keep its input
        if last is not None:
            last.let_go()
        kept = _Kept(self, x, last)
        self._last = weakref.ref(kept)
        return kept

    def streams(self, device: torch.device) -> tuple[Any, Any]:
        """Where copies out, and back, are queued."""
        if device not in self._streams:
            stream: Any = torch.cuda.Stream
            self._streams[device] = stream(device), stream(device)
        return self._streams[device]

    def reserve(self, size: int, count: int, device: torch.device) -> None:
        """Lock pages for ``count`` tensors of ``size`` bytes now, which takes long."""
        if _on_gpu(device):
            held = [_locked(n) for n in _cut(size) * count]
            del held  # PyTorch keeps them for later

    def count(self, size: int) -> None:
        """So many bytes more, or fewer, in the host's memory."""
        self.bytes_held += size
        self.most_held = max(self.most_held, self.bytes_held)


class _Kept:
    """A tensor in the host's memory, and that kept before it: the next that a backward wants."""

    def __init__(self, offload: Offload, x: Tensor, before: _Kept | None) -> None:
        self.offload, self.shape, self.dtype = offload, x.shape, x.dtype
        self.device, self.size = x.device, x.numel() * x.element_size()
        self.before = None if before is None else weakref.ref(before)
        self.source: Tensor | None = x.detach()  # until it is copied
        self.back: Tensor | None = None
        self.copied: Any = None  # events, on a GPU
        self.arrived: Any = None
        self.version = x._version
        flat = self.source.contiguous().view(-1).view(torch.uint8)
        on_gpu = _on_gpu(x.device)
        # not PyTorch's, elsewhere: what is counted there as a GPU's memory is not to have it
        self.host = [
            _locked(n) if on_gpu else torch.from_numpy(np.empty(n, np.uint8))
            for n in _cut(self.size)
        ]
        offload.count(self.size)
        weakref.finalize(self, offload.count, -self.size)
        if not on_gpu:
            self._copy(self.host, flat)
            return
        out, _ = offload.streams(x.device)
        out.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(out):
            self._copy(self.host, flat)
            self.copied = out.record_event()
        self.flat: Tensor | None = flat  # where it is a copy, that too must live until then

    def _copy(self, pieces: list[Tensor], flat: Tensor, back: bool = False) -> None:
        for piece, part in zip(pieces, torch.split(flat, [p.numel() for p in pieces]), strict=True):
            to, source = (part, piece) if back else (piece, part)
            to.copy_(source, non_blocking=True)

    def is_of(self, x: Tensor) -> bool:
        """Whether it is the same memory, seen alike and not written since."""
        source = self.source
        return (
            source is not None
            and source.data_ptr() == x.data_ptr()
            and source.shape == x.shape
            and source.stride() == x.stride()
            and self.version == x._version
        )

    def let_go(self) -> None:
        """Forget the tensor on the GPU, once it is copied; the host waits for that.

        The memory is then free for whatever is queued next: without waiting, what is queued could
        not have it yet, and would take more.
        """
        if self.source is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        self.source = self.flat = None

    def fetch(self) -> None:
        """Begin to bring it back, unless that has been done."""
        if self.back is not None:
            return
        if self.source is not None and self.source._version == self.version:
            self.back, self.source = self.source, None  # it has not left yet
            return
        self.let_go()
        back = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        flat = back.view(-1).view(torch.uint8)
        if _on_gpu(self.device):
            _, stream = self.offload.streams(self.device)
            # the memory may be still in use by what was queued before
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._copy(self.host, flat, back=True)
                self.arrived = stream.record_event()
        else:
            self._copy(self.host, flat, back=True)
        self.back = back

    def get(self) -> Tensor:
        """The tensor, in use from now on; that which is wanted next is sent for."""
        self.fetch()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            self.arrived = None
        found = self.back
        assert found is not None
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return found


def _unpack(kept: Any) -> Tensor:
    return kept.get() if isinstance(kept, _Kept) else cast(Tensor, kept)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _locked(size: int) -> Tensor:
    """Page-locked memory."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _cut(size: int) -> list[int]:
    """Sizes of pieces of at most CHUNK bytes, largest first, none empty."""
    whole, rest = divmod(size, CHUNK)
    return [CHUNK] * whole + [rest] * bool(rest)
