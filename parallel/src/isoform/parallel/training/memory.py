"""What PyTorch's tensors hold at most, counted: exact, and the same on every machine.

On a GPU PyTorch's allocator counts itself. :class:`Counted` does so on a processor, for plans to be
held to, and as a limit that fails as a GPU does.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, counts the bytes of all memory that this thread makes for tensors.

    What is made before, what NumPy makes, and what :mod:`.offload` keeps on the host does not
    count.

    Args:
        limit: Bytes that may be held at once; None for any number.

    Attributes:
        now: Bytes that are held.
        most: The most so far.

    Raises:
        torch.OutOfMemoryError: Within: the limit is passed.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.now = self.most = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            if x.device.type != "meta" and id(x.untyped_storage()) not in given:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return

        def gone(_: Any) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
        if self.limit is not None and self.now > self.limit:
            raise torch.OutOfMemoryError(f"{self.now} bytes are held, of {self.limit}")


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
