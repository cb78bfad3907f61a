"""Ranks of an MPI job, by mpi4py.

Start a program on four ranks with ::

    mpiexec -n 4 python -m mpi4py program.py

``-m mpi4py`` matters: with it an error on one rank ends the job, with that rank's traceback. Under
plain ``python`` the other ranks would wait for the dead one for ever; :func:`end_job_on_error`
protects a program that is started so.

``pip install "isoform[mpi]"`` brings mpi4py and MPICH, which is enough on one machine. On a cluster
install mpi4py against the cluster's own MPI.

Arrays may lie in the memory of a GPU. They go by way of page-locked memory of the host, unless the
user says that the MPI library reads a GPU's memory itself: ``MPICommunicator(cuda_aware=True)``.
One that does not ends the program when it is given such memory, and there is no way to ask it.

Whether messages move while a rank computes is up to the library. MPICH moves large ones only during
its calls, unless ``MPIR_CVAR_ASYNC_PROGRESS=1`` is set, which gives it a thread of its own.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from isoform.parallel import device
from isoform.parallel.communicator import (
    CommunicationError,
    Communicator,
    MismatchError,
    Parcel,
    Traffic,
)

LARGE_COUNTS_SINCE = (4, 0)
"""The version of the MPI standard from which one message may have 2³¹ bytes and more."""

SMALL_COUNT = 2**30
"""Bytes in one message at most, where the library is older than that; more goes in pieces."""


PASSED_ON = 0.2
"""Seconds in which mpiexec passes on what a rank has written, before it ends all of them."""


def load() -> Any:
    """``mpi4py.MPI``.

    Raises:
        ImportError: mpi4py or an MPI library is missing; the message says what to install.
    """
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mpi4py":
            raise
        raise ImportError(
            "MPI ranks need mpi4py: install it with 'pip install \"isoform[mpi]\"'"
        ) from error
    except (ImportError, RuntimeError) as error:  # which of them depends on how it was built
        raise ImportError(
            f"mpi4py has found no MPI library: install one with 'pip install \"isoform[mpi]\"', "
            f"or load your cluster's ({error})"
        ) from error
    return MPI


class MPICommunicator(Communicator):
    """The ranks of an MPI communicator.

    Args:
        comm: An ``mpi4py.MPI.Intracomm``; all ranks of the job by default. It is duplicated so that
            our messages cannot meet others, which is collective.
        traffic: What to count into; a new count by default.
        cuda_aware: Whether the MPI library takes memory of a GPU as it is.

    Raises:
        ImportError: mpi4py or an MPI library is missing.
    """

    devices = frozenset({"cpu", "cuda"})

    def __init__(
        self, comm: Any = None, traffic: Traffic | None = None, *, cuda_aware: bool = False
    ) -> None:
        mpi = load()
        self._cuda_aware = cuda_aware
        self._mpi = mpi
        self._comm = (mpi.COMM_WORLD if comm is None else comm).Dup()
        self._comm.Set_errhandler(mpi.ERRORS_RETURN)  # mpi4py raises what is returned
        self._largest = sys.maxsize if mpi.Get_version() >= LARGE_COUNTS_SINCE else SMALL_COUNT
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), traffic)

    def _post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        mpi, comm = self._mpi, self._comm
        landed = [self._landing(one.data) for one in receives]
        incoming = [
            (one, piece)
            for one, data in zip(receives, landed, strict=True)
            for piece in self._pieces(data)
        ]
        outgoing = [(one, piece) for one in sends for piece in self._pieces(self._ready(one.data))]
        # Receives first: a message that finds its receive posted is not copied on the way.
        requests = [comm.Irecv([piece, mpi.BYTE], source=one.peer) for one, piece in incoming]
        requests += [comm.Isend([piece, mpi.BYTE], dest=one.peer) for one, piece in outgoing]

        def finish() -> None:
            statuses = [mpi.Status() for _ in requests]
            try:
                mpi.Request.Waitall(requests, statuses)
            except mpi.Exception as error:
                raise self._failed(error, statuses, incoming) from error
            for (one, piece), status in zip(incoming, statuses[: len(incoming)], strict=True):
                if (got := status.Get_count(mpi.BYTE)) != len(piece):
                    raise MismatchError(self._unequal(one, piece, f"sent {got}"))
            for one, data in zip(receives, landed, strict=True):
                if data is not one.data:
                    device.copy_in(data, one.data)

        return finish

    def _ready(self, data: Any) -> Any:
        """What MPI can send: ``data``, computed, or a copy that the library can read."""
        if isinstance(data, np.ndarray):
            return data
        if not self._cuda_aware:
            return device.copied_out(data)
        device.finish(data)  # MPI knows nothing of streams
        return data

    def _landing(self, data: Any) -> Any:
        """Where MPI can put what is for ``data``."""
        if isinstance(data, np.ndarray):
            return data
        if not self._cuda_aware:
            return device.pinned(len(data), data)
        device.finish(data)  # nothing queued earlier may write there later
        return data

    def _pieces(self, data: Any) -> list[Any]:
        return [data[at : at + self._largest] for at in range(0, len(data), self._largest)]

    def _unequal(self, wanted: Parcel, piece: Any, sent: str) -> str:
        return (
            f"rank {self.rank} wants {wanted.label} from rank {wanted.peer}, {len(piece)} bytes, "
            f"but it {sent}"
        )

    def _failed(
        self, error: Any, statuses: Sequence[Any], incoming: Sequence[tuple[Parcel, Any]]
    ) -> CommunicationError:
        """What MPI's error means: a message longer than wanted, or something else of MPI's."""
        for (one, piece), status in zip(incoming, statuses, strict=False):
            code = status.Get_error()
            if code and self._mpi.Get_error_class(code) == self._mpi.ERR_TRUNCATE:
                return MismatchError(self._unequal(one, piece, "sent more"))
        return CommunicationError(f"rank {self.rank}: {error}")

    def _subgroup(self, groups: Sequence[Sequence[int]], mine: int) -> Communicator:
        part = self._comm.Split(mine, groups[mine].index(self.rank))
        try:
            return MPICommunicator(part, self.traffic, cuda_aware=self._cuda_aware)
        finally:
            part.Free()


def end_job_on_error() -> None:
    """From now on an uncaught error on this rank ends all ranks of the job.

    For programs that are not started with ``python -m mpi4py``. The rank's traceback is printed
    first. ``sys.exit`` is no uncaught error and ends nobody else.

    Raises:
        ImportError: mpi4py or an MPI library is missing.
    """
    mpi = load()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error.add_note(f"on rank {mpi.COMM_WORLD.rank} of {mpi.COMM_WORLD.size}: the job ends here")
        sys.stderr.write("".join(traceback.format_exception(kind, error, trace)))
        sys.stderr.flush()
        time.sleep(PASSED_ON)
        mpi.COMM_WORLD.Abort(1)

    sys.excepthook = hook
