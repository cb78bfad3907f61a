"""The operations over many ranks: shardings, communicators, and the algorithms that join them.

A parallel result equals the one-rank result, forward and backward, at every world size. MPI and
``torch.distributed`` are imported where a communicator of that kind is made::

    from isoform.parallel import Sharding
    from isoform.parallel.attention import attention
    from isoform.parallel.communicators.mpi import MPICommunicator

    comm = MPICommunicator()
    sharding = Sharding.zigzag(length, comm.size)
    out = attention(q, k, v, comm=comm, sharding=sharding, strategy="ring", causal=True)
"""

from isoform.parallel.communicator import (
    CommunicationError,
    Communicator,
    DeadlockError,
    MismatchError,
    Traffic,
)
from isoform.parallel.sharding import IGNORE, Documents, Sharding, Successors, loss_weights

__all__ = [
    "IGNORE",
    "CommunicationError",
    "Communicator",
    "DeadlockError",
    "Documents",
    "MismatchError",
    "Sharding",
    "Successors",
    "Traffic",
    "loss_weights",
]
