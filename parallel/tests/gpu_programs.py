"""What the tests run on every rank that has a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


def load() -> Any:
    """The programs of the other tests, in a process that pytest has not started."""
    if "parallel_programs" not in sys.modules:
        sys.path.insert(0, str(Path(__file__).parent))
    import parallel_programs

    return parallel_programs


def joined(comm: Any, transport: str) -> Any:
    """This rank's GPU, chosen, and a communicator that moves its memory."""
    import cupy
    import torch

    own = comm.rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(own).use()
    torch.cuda.set_device(own)
    if transport == "nccl":
        from isoform.parallel.communicators.nccl import NCCLCommunicator

        return NCCLCommunicator(comm)
    return comm


def primitives(comm: Any, transport: str, library: str) -> Any:
    """Every operation, with arrays on the GPU."""
    import cupy
    import torch

    put, get = {
        "cupy": (cupy.asarray, cupy.asnumpy),
        "torch": (lambda x: torch.from_numpy(x).cuda(), lambda x: x.cpu().numpy()),
    }[library]
    return load().primitives(joined(comm, transport), np.float32, put, get)


def attend(comm: Any, transport: str, changes: dict[str, Any]) -> Any:
    """Attention with tensors on the GPU, differentiated; results on the host."""
    import torch

    from isoform.parallel.attention import attention

    programs = load()
    case = replace(programs.Case(dtype="float32"), **changes)
    comm = joined(comm, transport)
    sharding = case.sharding(comm.size)
    own = {
        name: torch.from_numpy(sharding.shard(x, comm.rank)).cuda()
        for name, x in case.operands().items()
    }
    inputs = [own[name].requires_grad_() for name in "qkv"]
    options = {**case.options, "strategy": case.strategy, "near": case.near}
    out = attention(*inputs, comm=comm, sharding=sharding, **options)
    gradients = torch.autograd.grad(out, inputs, own["dout"])
    found = [x.detach().cpu().numpy() for x in (out, *gradients)]
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))
