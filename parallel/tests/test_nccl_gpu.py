"""Arrays on real GPUs: NCCL through CuPy, and MPI by way of page-locked memory.

One GPU makes one rank of NCCL, and several ranks of MPI that share it; with more of them there are
as many ranks as GPUs too. ``pytest -m mpi parallel/tests/test_nccl_gpu.py`` where there is a GPU;
``ISOFORM_REQUIRE_GPU=1`` makes it an error that there is none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.launch import launch
from isoform.reference.numpy.attention import attention as one_rank
from isoform.reference.numpy.attention import attention_backward as one_rank_backward


def count_gpus() -> int:
    """How many GPUs CuPy and PyTorch both see."""
    if importlib.util.find_spec("cupy") is None:
        return 0
    import cupy
    import torch

    try:
        return min(int(cupy.cuda.runtime.getDeviceCount()), torch.cuda.device_count())
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return 0


GPUS = count_gpus()
if not GPUS and os.environ.get("ISOFORM_REQUIRE_GPU"):
    raise RuntimeError("ISOFORM_REQUIRE_GPU is set, but CuPy and PyTorch see no GPU here")
WORLDS = [("nccl", 1), ("simulated", 3), ("mpi", 1), ("mpi", 3)]
WORLDS += [(name, GPUS) for name in ("nccl", "mpi") if GPUS > 1]

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not GPUS, reason="there is no NVIDIA GPU here"),
]


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    path = Path(__file__).with_name("gpu_programs.py")
    spec = importlib.util.spec_from_file_location("gpu_programs", path)
    assert spec is not None and spec.loader is not None
    sys.modules["gpu_programs"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(function: Any, world: tuple[str, int], *args: Any) -> list[Any]:
    transport, size = world
    if transport == "simulated":
        return simulate(function, size, transport, *args)
    return launch(function, size, transport, *args, limit=120)


@pytest.mark.parametrize("library", ["cupy", "torch"])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_every_operation(programs, on_gpu, world, library):
    there = run(on_gpu.primitives, world, library)
    here = simulate(programs.primitives, world[1], np.float32)
    for found, right in zip(there, here, strict=True):
        found["traffic"].pop("nccl_id", None)
        assert found["traffic"] == right["traffic"]
        for name in ("received", "gathered"):
            for x, y in zip(found[name], right[name], strict=True):
                np.testing.assert_array_equal(x, y)
        for name in ("summed", "passed"):
            np.testing.assert_array_equal(found[name], right[name])


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "all_gather", "hybrid"])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_attention(programs, on_gpu, world, strategy):
    near = world[1] if strategy == "hybrid" else None
    changes = {"strategy": strategy, "near": near, "L": 70, "H": 6, "D": 16, "window": (30, 0)}
    case = programs.Case(**changes)
    results = run(on_gpu.attend, world, changes)
    x = case.operands()
    out = one_rank(x["q"], x["k"], x["v"], **case.options)
    gradients = one_rank_backward(x["dout"], x["q"], x["k"], x["v"], **case.options)
    sharding = case.sharding(world[1])
    for name, right in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        whole = sharding.unshard([result[name] for result in results])
        np.testing.assert_allclose(whole, right, atol=2e-5 * np.abs(right).max(), err_msg=name)
