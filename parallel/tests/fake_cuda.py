"""A GPU made of host memory: as much of CuPy as the transports use, and NCCL between threads.

A rank of MPI imports this file. Its arrays are no NumPy arrays and nothing converts them unasked,
so that what would fail on a GPU fails here. What is queued on a stream is done at once; what a
stream was told is written down.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from ctypes import c_char
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

LOG: list[tuple[Any, ...]] = []
"""What was asked for, in order."""


class ndarray:  # noqa: N801 (its name in CuPy)
    """A CuPy array, whose memory only ``get`` and ``set`` reach."""

    __module__ = "cupy"

    def __init__(self, host: Any) -> None:
        self._host = host
        self.data = Memory(host)

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    flags = property(lambda self: Flags(self._host))

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(self._host[index])

    def __setitem__(self, index: Any, x: ndarray) -> None:
        self._host[index] = x._host

    def __iadd__(self, other: ndarray) -> ndarray:
        self._host += other._host
        return self

    @property
    def __cuda_array_interface__(self) -> Any:
        """As CUDA-aware MPI asks for it; the address is one of the host, where it can read."""
        LOG.append(("address", self._host.nbytes))
        return {**self._host.__array_interface__, "version": 3, "stream": None}

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def reshape(self, *shape: int) -> ndarray:
        return ndarray(self._host.reshape(*shape))

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self._host.view(dtype))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return ndarray(self._host.astype(dtype, copy=copy))

    def get(self, out: Any = None) -> Any:
        LOG.append(("get", self._host.nbytes))
        if out is None:
            return self._host.copy()
        out[...] = self._host
        return out

    def set(self, host: Any) -> None:
        LOG.append(("set", self._host.nbytes))
        self._host[...] = host


class Memory:
    def __init__(self, host: Any) -> None:
        self.ptr = host.ctypes.data


class Flags:
    def __init__(self, host: Any) -> None:
        self.c_contiguous = host.flags.c_contiguous


class Stream:
    def __init__(self, non_blocking: bool = False, ptr: int = 77) -> None:
        self.name = "own" if non_blocking else "current"
        self.ptr = ptr

    def record(self) -> str:
        LOG.append(("record", self.name))
        return self.name

    def wait_event(self, event: str) -> None:
        LOG.append(("wait", self.name, event))

    def synchronize(self) -> None:
        LOG.append(("synchronize", self.name))


def array(x: Any) -> ndarray:
    """On the fake GPU."""
    return ndarray(np.array(x))


def pinned(shape: Any, dtype: Any) -> Any:
    LOG.append(("pinned", int(np.prod(shape))))
    return np.empty(shape, dtype)


class NcclError(RuntimeError):
    pass


class Wire:
    """What all ranks of one NCCL communicator share: queues of messages by sender and receiver."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queues: dict[tuple[int, int], deque[bytes]] = defaultdict(deque)


WIRES: dict[bytes, Wire] = defaultdict(Wire)


class Nccl:
    """``cupy.cuda.nccl``: within a group sends come first, as NCCL makes progress with all."""

    available = True
    NCCL_UINT8 = 1
    NcclError = NcclError

    def __init__(self) -> None:
        self.calls = threading.local()  # a group is a thread's
        self.made = 0

    def get_unique_id(self) -> bytes:
        self.made += 1
        return bytes([self.made, *[255] * 127])

    def groupStart(self) -> None:  # noqa: N802
        assert getattr(self.calls, "group", None) is None, "a group in a group"
        self.calls.group = []

    def groupEnd(self) -> None:  # noqa: N802
        group, self.calls.group = self.calls.group, None
        LOG.append(("group", sorted(kind for kind, *_ in group)))
        for kind, *call in sorted(group, key=lambda call: call[0] == "recv"):
            getattr(self, f"_{kind}")(*call)

    def NcclCommunicator(self, size: int, name: bytes, rank: int) -> Any:  # noqa: N802
        if not isinstance(name, bytes):  # as of CuPy 14
            raise TypeError(f"expected bytes, got {type(name).__name__}")
        if not 0 <= rank < size or len(name) != 128:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT")
        return Ends(self, WIRES[name], rank)

    def _send(self, wire: Wire, rank: int, at: int, count: int, peer: int) -> None:
        with wire.changed:
            wire.queues[rank, peer].append(bytes((c_char * count).from_address(at)))
            wire.changed.notify_all()

    def _recv(self, wire: Wire, rank: int, at: int, count: int, peer: int) -> None:
        queue = wire.queues[peer, rank]
        with wire.changed:
            assert wire.changed.wait_for(lambda: queue, timeout=20), f"{rank} awaits {peer}"
            sent = queue.popleft()
        assert len(sent) == count, f"{peer} sent {len(sent)} bytes, {rank} wants {count}"
        (c_char * count).from_address(at)[:] = sent


class Ends:
    def __init__(self, nccl: Nccl, wire: Wire, rank: int) -> None:
        self.nccl, self.wire, self.rank = nccl, wire, rank

    def send(self, at: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._ask("send", at, count, dtype, peer, stream)

    def recv(self, at: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._ask("recv", at, count, dtype, peer, stream)

    def _ask(self, kind: str, at: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert dtype == Nccl.NCCL_UINT8, "only bytes are sent"
        assert stream == 77 and peer != self.rank
        group = self.nccl.calls.group
        assert group is not None, f"{kind} outside of a group"
        group.append((kind, self.wire, self.rank, at, count, peer))


def modules() -> dict[str, ModuleType]:
    """What to put in the place of CuPy's modules."""
    cupy, cuda, cupyx = (ModuleType(name) for name in ("cupy", "cupy.cuda", "cupyx"))
    cuda.Stream, cuda.get_current_stream = Stream, Stream
    cuda.nccl = Nccl()
    cupy.cuda, cupy.ndarray = cuda, ndarray
    cupy.empty = lambda shape, dtype: ndarray(np.empty(shape, dtype))
    cupy.asarray = lambda x: x if isinstance(x, ndarray) else ndarray(np.asarray(x))
    cupy.ascontiguousarray = lambda x: ndarray(np.ascontiguousarray(x._host))
    cupyx.empty_pinned = pinned
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": cuda.nccl, "cupyx": cupyx}


def install() -> None:
    """In this process, for good: for a rank that is a process."""
    sys.modules.update(modules())


# --- what ranks run ---


def on_mpi(comm: Any, dtype: Any, largest: int | None, cuda_aware: bool) -> Any:
    """Every operation with arrays on the fake GPU, on a rank that is a process; and the log."""
    sys.path.insert(0, str(Path(__file__).parent))
    import parallel_programs

    install()
    comm._cuda_aware = cuda_aware
    comm._largest = largest or comm._largest
    found = parallel_programs.primitives(comm, dtype, array, ndarray.get)
    return found, LOG
