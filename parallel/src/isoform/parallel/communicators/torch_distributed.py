"""Ranks of ``torch.distributed``, which training frameworks already run.

The process group must be there (``torch.distributed.init_process_group``), with a backend for CPU
memory, gloo, and where arrays lie on GPUs NCCL beside it: ``"cpu:gloo,cuda:nccl"``, which is
PyTorch's default. Point-to-point messages are all that is asked of it, and all of them are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from isoform.parallel.communicator import Communicator, Parcel, Traffic
from isoform.reference.contract import Unsupported


def load() -> Any:
    """``torch.distributed``.

    Raises:
        ImportError: torch is missing or was built without it; the message says what to install.
    """
    try:
        from torch import distributed
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise ImportError(
            "torch.distributed needs torch: install it with 'pip install \"isoform[torch]\"'"
        ) from error
    if not distributed.is_available():
        raise ImportError("this build of torch is without torch.distributed: install another")
    return distributed


class TorchCommunicator(Communicator):
    """The ranks of a process group.

    Args:
        group: A ``torch.distributed.ProcessGroup``; all ranks by default. No messages of others may
            be under way between its ranks while ours are.
        traffic: What to count into; a new count by default.
        order: Ranks of the group in the order that they have here; the group's own by default.

    Raises:
        ImportError: torch is missing.
        ValueError: No process group has been initialised, or this rank is not in the group.
        Unsupported: The group's backend moves no CPU memory.
    """

    def __init__(
        self, group: Any = None, traffic: Traffic | None = None, order: Sequence[int] | None = None
    ) -> None:
        dist = load()
        if not dist.is_initialized():
            raise ValueError("call torch.distributed.init_process_group before this")
        self._dist = dist
        self._group = dist.group.WORLD if group is None else group
        if (rank := dist.get_rank(self._group)) < 0:
            raise ValueError("this rank is not in the process group")
        backend = dist.get_backend_config(self._group)
        if "cpu:" not in str(backend):
            raise Unsupported([f"backend {backend} (one for CPU memory only, as gloo)"], "torch")
        if "cuda:nccl" in str(backend):
            self.devices = frozenset({"cpu", "cuda"})
        size = dist.get_world_size(self._group)
        self._order = list(range(size) if order is None else order)
        super().__init__(self._order.index(rank), size, traffic)

    @property
    def group(self) -> Any:
        """The process group, whose order of ranks may be another than this one's."""
        return self._group

    def _post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Callable[[], None]:
        import torch
        from torch.utils.dlpack import from_dlpack

        def operation(call: Any, parcel: Parcel) -> Any:
            given = parcel.data
            host = isinstance(given, np.ndarray)
            data = torch.from_numpy(given) if host else from_dlpack(given)
            return self._dist.P2POp(
                call, data, group=self._group, group_peer=self._order[parcel.peer]
            )

        operations = [operation(self._dist.irecv, parcel) for parcel in receives]
        operations += [operation(self._dist.isend, parcel) for parcel in sends]
        works = [
            work
            for on_host in (True, False)  # each is another backend's
            if (some := [one for one in operations if (not one.tensor.is_cuda) == on_host])
            for work in self._dist.batch_isend_irecv(some)
        ]

        def finish() -> None:
            for work in works:
                work.wait()
            # Till then NCCL reads what is sent, on a stream of its own. PyTorch would keep that
            # memory by itself, were it not for DLPack: what came that way its allocator does not
            # know.
            operations.clear()

        return finish

    def _subgroup(self, groups: Sequence[Sequence[int]], mine: int) -> Communicator:
        world = self._dist.get_process_group_ranks(self._group)
        members = [world[self._order[rank]] for rank in groups[mine]]
        group = self._dist.new_group(members, use_local_synchronization=True)
        # torch has put them in its own order
        own = self._dist.get_process_group_ranks(group)
        return TorchCommunicator(group, self.traffic, [own.index(member) for member in members])
