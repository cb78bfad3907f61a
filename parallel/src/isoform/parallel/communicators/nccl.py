"""Ranks that each have a GPU, joined by NCCL through CuPy, and started by MPI.

Arrays in GPU memory go by NCCL. What lies in the memory of the host (what ranks say to each other
to agree, positions, segment ids) goes by the communicator that the ranks had before, MPI's by
default; by it they find each other too. Choose each rank's GPU first::

    comm = MPICommunicator()
    cupy.cuda.Device(comm.rank % cupy.cuda.runtime.getDeviceCount()).use()
    comm = NCCLCommunicator(comm)

NCCL is asked to send and to receive bytes, in a group, and nothing else: sums are made on arrival,
in at least float32, as everywhere here. Messages have a stream of their own, beside what computes.
It begins when what is sent has been computed, and what computes goes on to use what has arrived,
without the host waiting for either.

Exchanges follow each other on that stream: what one rank sends in its n-th exchange with another,
that one must receive in its n-th with it, not later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from isoform.parallel import device
from isoform.parallel.communicator import CommunicationError, Communicator, Parcel

ID_BYTES = 128
"""Bytes of the name by which ranks of NCCL find each other."""


def load() -> Any:
    """``cupy.cuda.nccl``.

    Raises:
        ImportError: CuPy is missing, or was built without NCCL, or does not find it.
    """
    device.load()
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ImportError(
            "CuPy finds no NCCL: install it with 'pip install nvidia-nccl-cu13', "
            f"or nvidia-nccl-cu12 as your CuPy is ({error})"
        ) from error
    if not nccl.available:
        raise ImportError(
            "CuPy finds no NCCL: install it with 'pip install nvidia-nccl-cu13', "
            "or nvidia-nccl-cu12 as your CuPy is"
        )
    return nccl


class NCCLCommunicator(Communicator):
    """The ranks of another communicator, each with a GPU.

    Making one is collective.

    Args:
        host: The same ranks, as they move the memory of the host: all of MPI's by default. Traffic
            is counted with it.

    Raises:
        ImportError: CuPy, NCCL or MPI is missing; the message says what to install.
        CommunicationError: NCCL does not join the ranks: two have chosen the same GPU, say.
    """

    devices = frozenset({"cpu", "cuda"})

    def __init__(self, host: Communicator | None = None) -> None:
        nccl = load()
        if host is None:
            from isoform.parallel.communicators.mpi import MPICommunicator

            host = MPICommunicator()
        super().__init__(host.rank, host.size, host.traffic)
        self._host = host
        self._nccl = nccl
        self._stream = device.load().cuda.Stream(non_blocking=True)
        try:
            self._comm = nccl.NcclCommunicator(host.size, self._shared_id(), host.rank)
        except nccl.NcclError as error:
            raise CommunicationError(f"rank {host.rank} of {host.size}: {error}") from error

    def _shared_id(self) -> bytes:
        """The first rank's name for all of them."""
        own = np.zeros(ID_BYTES, np.uint8)
        if self.rank == 0:
            own[:] = np.frombuffer(self._nccl.get_unique_id(), np.uint8)
        first, *_ = self._host.all_gather(own, [own.shape] * self.size, operation="nccl_id")
        return bytes(first)

    def _post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        here, there = ([one for one in parcels if _in_host(one)] for parcels in (sends, receives))
        finish_host = self._host._post(here, there) if here or there else None
        sent = [one for one in sends if not _in_host(one)]
        filled = [one for one in receives if not _in_host(one)]
        finish_gpu = self._group(sent, filled) if sent or filled else None

        def finish() -> None:
            for wait in (finish_host, finish_gpu):
                if wait is not None:
                    wait()

        return finish

    def _group(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        """Queue them as one: NCCL would else wait for a send before it looks at a receive."""
        nccl, stream = self._nccl, self._stream
        stream.wait_event(device.stream_of((*sends, *receives)[0].data).record())
        nccl.groupStart()
        try:
            for call, parcels in ((self._comm.recv, receives), (self._comm.send, sends)):
                for one in parcels:
                    where = device.address(one.data)
                    call(where, len(one.data), nccl.NCCL_UINT8, one.peer, stream.ptr)
        finally:
            nccl.groupEnd()
        done = stream.record()
        kept = [one.data for one in (*sends, *receives)]  # until NCCL is done with their memory

        def finish() -> None:
            for data in kept:
                device.stream_of(data).wait_event(done)
            kept.clear()

        return finish

    def _subgroup(self, groups: Sequence[Sequence[int]], mine: int) -> Communicator:
        return NCCLCommunicator(self._host._subgroup(groups, mine))


def _in_host(parcel: Parcel) -> bool:
    return isinstance(parcel.data, np.ndarray)
