"""Arrays in a GPU's memory, by MPI and by NCCL: against a GPU that is made of host memory.

That the real ones behave like it, `test_nccl_gpu.py` shows where there is one.
"""

from __future__ import annotations

import builtins
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.parallel.communicator import CommunicationError
from isoform.parallel.communicators import nccl
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.launch import launch


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake GPU, in the place of CuPy."""
    path = Path(__file__).with_name("fake_cuda.py")
    spec = importlib.util.spec_from_file_location("fake_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_cuda", module)
    spec.loader.exec_module(module)
    for name, replaced in module.modules().items():
        monkeypatch.setitem(sys.modules, name, replaced)
    return module


def check(programs: Any, P: int, results: list[Any]) -> None:
    """What arrives is what was sent, and a sum is that over ranks in order."""
    numbers, shape_of = programs.numbers, programs.shape_of
    for r, result in enumerate(results):
        dtype = result["summed"].dtype
        for s in range(P):
            np.testing.assert_array_equal(
                result["received"][s], numbers(s, r, shape_of(s, r), dtype)
            )
            np.testing.assert_array_equal(result["gathered"][s], numbers(s, s, (s, 2), dtype))
        terms = [numbers(s, r, (r + 1, 2), dtype) for s in range(P)]
        np.testing.assert_array_equal(result["summed"], sum(terms[1:], terms[0]))
        if P > 1:
            np.testing.assert_array_equal(result["passed"], numbers((r - 1) % P, 0, (2, 5), dtype))


# --- NCCL ---


@pytest.mark.parametrize("P", [1, 2, 3, 8])
def test_every_operation_by_nccl(programs, fake, P):
    def on_gpu(comm: Any) -> Any:
        joined = nccl.NCCLCommunicator(comm)
        return programs.primitives(joined, np.float64, fake.array, fake.ndarray.get)

    def on_host(comm: Any) -> Any:
        return programs.primitives(comm, np.float64)

    results = simulate(on_gpu, P)
    check(programs, P, results)
    for there, here in zip(results, simulate(on_host, P), strict=True):
        there["traffic"].pop("nccl_id", None)
        assert there["traffic"] == here["traffic"]  # bytes and messages alike
    assert not {"pinned", "set"} & {kind for kind, *_ in fake.LOG}  # nothing by way of the host


def test_sends_and_receives_are_one_group_beside_what_computes(fake):
    """A group's sends would else wait for ever; and NCCL starts when what is sent is computed."""

    def call(comm: Any) -> None:
        joined = nccl.NCCLCommunicator(comm)
        fake.LOG.clear()
        comm.barrier()
        filled = fake.array(np.zeros(3))
        transfer = joined.exchange(
            [(1 - comm.rank, fake.array(np.ones(3)))], [(1 - comm.rank, filled)]
        )
        comm.barrier()
        if comm.rank == 0:
            queued = [*fake.LOG]
            assert queued.count(("group", ["recv", "send"])) == 2
            assert queued.count(("record", "current")) == queued.count(("record", "own")) == 2
            assert queued.count(("wait", "own", "current")) == 2
            assert ("wait", "current", "own") not in queued
        comm.barrier()
        transfer.wait()
        comm.barrier()
        assert fake.LOG.count(("wait", "current", "own")) == 4  # for what was sent, too
        assert ("synchronize", "current") not in fake.LOG
        assert (filled.get() == 1).all()

    simulate(call, 2)


def test_host_and_gpu_in_one_exchange(fake):
    def call(comm: Any) -> bool:
        joined = nccl.NCCLCommunicator(comm)
        there = 1 - comm.rank
        filled = [fake.array(np.zeros(2)), np.zeros(5, np.int32)]
        sent = [fake.array(np.full(2, 1.0 + comm.rank)), np.full(5, 7 + comm.rank, np.int32)]
        got = joined.exchange([(there, x) for x in sent], [(there, x) for x in filled]).wait()
        return bool((got[0].get() == 1.0 + there).all() and (got[1] == 7 + there).all())

    assert simulate(call, 2) == [True, True]


def test_ranks_of_a_grid_have_nccl_of_their_own(fake):
    def call(comm: Any) -> tuple[float, ...]:
        group, around = nccl.NCCLCommunicator(comm).grid(2)
        own = fake.array(np.full(1, float(comm.rank)))
        met = [c.all_gather(own, [(1,)] * c.size) for c in (group, around)]
        return tuple(float(x.get()[0]) for found in met for x in found)

    assert simulate(call, 4) == [
        (0.0, 1.0, 0.0, 2.0),
        (0.0, 1.0, 1.0, 3.0),
        (2.0, 3.0, 0.0, 2.0),
        (2.0, 3.0, 1.0, 3.0),
    ]


def test_a_narrow_sum_is_made_in_float32(fake):
    """256 + 1 + 1 + 1 in float16 is 259, in bfloat16 256; and 2048 + 1 in float16 is 2048."""

    def call(comm: Any) -> Any:
        number = 2048.0 if comm.rank == 0 else 1.0
        parts = [fake.array(np.full(3, number, np.float16))] * comm.size
        return nccl.NCCLCommunicator(comm).reduce_scatter(parts).get()

    for summed in simulate(call, 4):
        assert summed.dtype == np.float32
        assert (summed == 2051).all()


def test_what_nccl_says_is_passed_on_with_the_rank(fake, monkeypatch):
    monkeypatch.setattr(nccl, "ID_BYTES", 127)
    monkeypatch.setattr(sys.modules["cupy.cuda.nccl"], "get_unique_id", lambda: b"1" * 127)
    with pytest.raises(CommunicationError, match="rank 0 of 1: NCCL_ERROR_INVALID_ARGUMENT"):
        simulate(nccl.NCCLCommunicator, 1)


def test_what_is_missing_is_named(fake, monkeypatch):
    fake_nccl = sys.modules["cupy.cuda.nccl"]
    monkeypatch.setattr(fake_nccl, "available", False)
    with pytest.raises(ImportError, match="CuPy finds no NCCL: install it with 'pip install nv"):
        nccl.load()

    real = builtins.__import__

    def without_cupy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_cupy)
    with pytest.raises(ImportError, match=re.escape('pip install "isoform[cuda13]"')):
        nccl.load()


# --- MPI ---


@pytest.mark.mpi
@pytest.mark.parametrize("largest", [None, 7])
def test_mpi_goes_by_way_of_page_locked_memory(programs, fake, largest):
    """In pieces of 7 bytes too, where the library takes no more."""
    found = launch(fake.on_mpi, 3, np.float64, largest, False)
    check(programs, 3, [result for result, _ in found])
    for _, log in found:
        kinds = [kind for kind, *_ in log]
        assert kinds.count("set") > 0
        assert kinds.count("pinned") > kinds.count("set")  # for what is sent, too
        assert "address" not in kinds


@pytest.mark.mpi
@pytest.mark.parametrize("largest", [None, 7])
def test_cuda_aware_mpi_is_given_the_memory_itself(programs, fake, largest):
    found = launch(fake.on_mpi, 3, np.float64, largest, True)
    check(programs, 3, [result for result, _ in found])
    for _, log in found:
        kinds = [kind for kind, *_ in log]
        assert not {"pinned", "set"} & {*kinds}
        first = kinds.index("address")
        assert "synchronize" in kinds[:first]  # MPI knows nothing of streams


# --- which memory ---


def test_memory_that_is_not_moved_is_refused(fake):
    def call(comm: Any) -> None:
        comm.devices = frozenset({"cpu"})
        comm.all_gather(fake.array(np.ones(2)), [(2,)] * comm.size)

    with pytest.raises(TypeError, match="what is sent must be in memory of cpu, this is on cuda"):
        simulate(call, 2)


def test_attention_says_how_cupys_arrays_become_tensors(fake):
    from isoform.parallel import Sharding
    from isoform.parallel.attention import attention
    from isoform.reference.contract import Unsupported

    x = fake.array(np.ones((1, 4, 2, 8), np.float32))
    with pytest.raises(Unsupported, match=r"torch.from_dlpack\(x\) is its tensor"):
        simulate(lambda comm: attention(x, x, x, comm=comm, sharding=Sharding.zigzag(4, 1)), 1)
