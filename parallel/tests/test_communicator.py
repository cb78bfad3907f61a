"""Every operation on every transport: what arrives, its adjoint, what it costs, what goes wrong."""

from __future__ import annotations

import gc
import re
import traceback
import weakref
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from isoform.parallel import communicator
from isoform.parallel.communicator import (
    CommunicationError,
    DeadlockError,
    MismatchError,
)
from isoform.parallel.communicators import mpi, torch_distributed
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.launch import LaunchError, launch

TRANSPORTS = ["simulated", "gloo", pytest.param("mpi", marks=pytest.mark.mpi)]


def sizes(shapes: Any) -> tuple[int, int]:
    """Bytes and messages of sending float64 in these shapes; what is empty is not sent."""
    counts = [int(np.prod(shape)) for shape in shapes]
    return 8 * sum(counts), sum(count > 0 for count in counts)


# --- what arrives, and what it costs ---


def check_primitives(programs: Any, P: int, results: list[Any]) -> None:
    numbers, shape_of = programs.numbers, programs.shape_of
    for r, result in enumerate(results):
        others = [s for s in range(P) if s != r]
        for s in range(P):
            np.testing.assert_array_equal(result["received"][s], numbers(s, r, shape_of(s, r)))
            np.testing.assert_array_equal(result["gathered"][s], numbers(s, s, (s, 2)))
        expected = numbers(0, r, (r + 1, 2))
        for s in range(1, P):
            expected = expected + numbers(s, r, (r + 1, 2))
        np.testing.assert_array_equal(result["summed"], expected)  # bitwise: in the order of ranks
        if P > 1:
            np.testing.assert_array_equal(result["passed"], numbers((r - 1) % P, 0, (2, 5)))
        cost = {
            "agree": (32 * (P - 1), P - 1),
            "all_gather": sizes([(r, 2)] * (P - 1)),
            "all_to_all": sizes(shape_of(r, s) for s in others),
            "barrier": (P - 1, P - 1),
            "exchange": sizes([(2, 5)]),
            "reduce_scatter": sizes((s + 1, 2) for s in others),
        }
        assert result["traffic"] == {name: n for name, n in cost.items() if P > 1 and n[1]}


def test_primitives(programs, run, world):
    check_primitives(programs, world[1], run(programs.primitives, world, np.float64))


def test_adjoints(programs, run, world):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, summed over ranks, for every operation and what is its adjoint."""
    results = run(programs.adjoints, world)
    for name in ("all_to_all", "all_gather"):
        forward, backward = np.sum([result[name] for result in results], axis=0)
        assert abs(forward) > 1e-3
        np.testing.assert_allclose(forward, backward, rtol=1e-12)


def test_a_split_instead_of_a_reduce_scatter_is_no_adjoint():
    """The fault that the adjoint test is for: a gather's gradient, cut out but not summed."""

    def careless(comm: Any) -> tuple[float, float]:
        x, y = np.full(2, 1.0 + comm.rank), [np.full(2, 3.0 + comm.rank + s) for s in range(2)]
        gathered = comm.all_gather(x, [(2,)] * 2)
        return sum(float(a @ b) for a, b in zip(gathered, y, strict=True)), float(x @ y[comm.rank])

    forward, backward = np.sum(simulate(careless, 2), axis=0)
    assert abs(forward - backward) > 1


def check_bfloat16(P: int, results: list[Any]) -> None:
    """256 + 1 is 256 in bfloat16, however often it is added."""
    for summed, gathered in results:
        assert summed.dtype == np.float32
        assert (summed == 256.0 + P - 1).all()
        assert gathered == [256.0, *[1.0] * (P - 1)]


def test_bfloat16_is_sent_as_it_is_and_summed_in_float32(programs, run, world):
    check_bfloat16(world[1], run(programs.bfloat16, world, "numpy"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tensors_are_sent_and_summed_likewise(programs, run, transport):
    check_bfloat16(3, run(programs.bfloat16, (transport, 3), "torch"))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_sum_is_a_new_array(library):
    """Even where a rank is alone and there is nothing to add."""
    for dtype in ("float32", "float64"):
        part = (
            np.ones(3, dtype) if library == "numpy" else torch.ones(3, dtype=getattr(torch, dtype))
        )
        (summed,) = simulate(lambda comm, x: comm.reduce_scatter([x]), 1, part)
        summed += 1
        assert (part == 1).all()


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int64, np.float16, ml_dtypes.bfloat16, np.complex64]
)
def test_any_dtype_can_be_sent(dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)

    def gather(comm: Any) -> Any:
        return comm.all_gather(x, [x.shape] * 3)

    for got in simulate(gather, 3)[1]:
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, x)


def test_split_into_rows_and_columns(programs, run, world):
    """A grid of 2 columns; a last row may be short. Keys give the order; traffic is one count."""
    P = world[1]
    for r, (row, column, traffic) in enumerate(run(programs.grid, world, 2)):
        assert row == [s for s in range(P) if s // 2 == r // 2]
        assert column == [s for s in reversed(range(P)) if s % 2 == r % 2]
        others = len(row) + len(column) - 2
        assert traffic.get("all_gather", (0, 0)) == (8 * others, others)


def test_messages_keep_their_order(programs, run, world):
    P = world[1]
    for r, got in enumerate(run(programs.many_transfers, world)):
        assert got == ([] if P == 1 else [10.0 * ((r - 1) % P) + i for i in range(5)])


def test_what_is_sent_may_be_strided(programs, run, world):
    assert all(run(programs.strided, world))


def test_torch_keeps_the_copy_that_is_sent_until_it_is_waited_for(monkeypatch):
    """PyTorch does not, for NCCL: its allocator knows nothing of memory that came by DLPack."""
    sent: list[Any] = []
    under_way: list[weakref.ref[Any]] = []

    def begin(operations: Any) -> list[Any]:
        under_way.extend(weakref.ref(one.tensor) for one in operations)
        return [SimpleNamespace(wait=lambda: sent.extend(x().clone() for x in under_way))]

    dist = SimpleNamespace(
        group=SimpleNamespace(WORLD="all"),
        is_initialized=lambda: True,
        get_rank=lambda group: 0,
        get_world_size=lambda group: 2,
        get_backend_config=lambda group: "cpu:gloo,cuda:nccl",
        irecv=None,
        isend=None,
        P2POp=lambda call, tensor, **_: SimpleNamespace(tensor=tensor),
        batch_isend_irecv=begin,
    )
    monkeypatch.setattr(torch_distributed, "load", lambda: dist)
    # tensors, as of a GPU's memory
    monkeypatch.setattr(communicator, "as_bytes", lambda x: x.reshape(-1).view(torch.uint8))
    x = torch.arange(12.0).reshape(3, 4)
    transfer = torch_distributed.TorchCommunicator().exchange([(1, x[:, 1:3])], [])
    gc.collect()
    assert [kept() is not None for kept in under_way] == [True]
    transfer.wait()
    assert sent[0].view(torch.float32).tolist() == [1, 2, 5, 6, 9, 10]
    gc.collect()
    assert [kept() for kept in under_way] == [None]


@pytest.mark.mpi
def test_a_message_beyond_two_gibibytes(programs):
    assert launch(programs.huge, 2) == [True, True]


@pytest.mark.mpi
def test_a_library_of_small_counts_sends_pieces(programs):
    """What an MPI before version 4 needs, here with 7 bytes for 2³⁰."""
    check_primitives(programs, 3, launch(programs.in_pieces, 3, 7))


# --- wrong calls ---


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.all_to_all([], []), ValueError, "there must be 1 parts, one per rank, got 0"),
        (lambda c: c.all_gather(np.ones(2), []), ValueError, "must be 1 shapes, one per rank"),
        (lambda c: c.reduce_scatter([1, 2]), ValueError, "must be 1 parts, one per rank, got 2"),
        (
            lambda c: c.all_gather(np.ones(2), [(3,)]),
            ValueError,
            re.escape("shape 0 is (3,), but the own part has (2,)"),
        ),
        (
            lambda c: c.exchange([(0, np.ones(2))], []),
            ValueError,
            "rank 0 of 1 cannot exchange with rank 0",
        ),
        (lambda c: c.exchange([(5, np.ones(2))], []), ValueError, "cannot exchange with rank 5"),
    ],
)
def test_wrong_calls_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        simulate(call, 1)


def test_what_is_filled_must_be_contiguous():
    with pytest.raises(ValueError, match=r"filled must be contiguous, got shape \(2, 3\)"):
        simulate(lambda c: c.exchange([], [(1 - c.rank, np.ones((3, 2)).T)]), 2)
    with pytest.raises(TypeError, match="what is sent must be a NumPy array, a PyTorch tensor or"):
        simulate(lambda c: c.exchange([(1 - c.rank, [1.0])], []), 2)


# --- simulated: who waits for what ---


def test_a_rank_that_raises_ends_all_with_its_own_traceback(programs):
    with pytest.raises(ArithmeticError, match="the planted fault") as caught:
        simulate(programs.one_raises, 4)
    assert caught.value.__notes__ == ["raised by rank 3 of 4"]
    assert "in one_raises" in "".join(traceback.format_tb(caught.tb))


def test_a_deadlock_is_named(programs):
    expected = (
        "no rank can go on: rank 0 awaits exchange float64[3] from rank 1; "
        "rank 1 awaits exchange float64[3] from rank 2; rank 2 has returned"
    )
    for _ in range(20):  # whichever thread comes last
        with pytest.raises(DeadlockError, match=f"^{re.escape(expected)}$"):
            simulate(programs.in_a_circle, 3)


def test_waiting_to_send_is_a_deadlock_too():
    """A copy in a buffer would hide it, until messages are large."""

    def both_send(comm: Any) -> None:
        other = 1 - comm.rank
        comm.exchange([(other, np.ones(2))], []).wait()
        comm.exchange([], [(other, np.ones(2))]).wait()

    with pytest.raises(DeadlockError, match=r"rank 0 sends exchange .* rank 1 sends exchange"):
        simulate(both_send, 2)


def test_mismatched_calls_are_named(programs):
    expected = r"rank 0 sends all_gather float64\[1\], but rank 1 wants all_gather float64\[2\]"
    with pytest.raises(MismatchError, match=f"{expected}|rank 1 sends .* but rank 0 wants"):
        simulate(programs.other_lengths, 2)
    with pytest.raises(MismatchError, match=r"all_gather .* reduce_scatter|reduce_scatter .* all"):
        simulate(programs.other_operations, 2)


def test_a_message_for_nobody_is_an_error(programs):
    with pytest.raises(CommunicationError, match=r"left over .* rank 0 sends exchange float64"):
        simulate(programs.nobody_receives, 2)


def test_what_is_sent_is_what_it_is_when_it_arrives(programs):
    """A program that changes what it is sending shows it, when its receiver is late."""
    seen = {simulate(programs.changes_what_it_sends, 2)[1] for _ in range(50)}
    assert seen <= {1.0, 2.0}


def test_no_rank_is_no_job():
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        simulate(lambda comm: None, 0)


# --- all transports: faults end the job ---


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_disagree_are_told_how(programs, run, transport):
    expected = re.escape('strategy is "ring" on ranks 0, 2, "ulysses" on rank 1')
    with pytest.raises(CommunicationError, match=f"MismatchError.*{expected}|^[^L]*{expected}"):
        run(programs.disagree, (transport, 3))


@pytest.mark.mpi
@pytest.mark.parametrize(("sent", "words"), [(5, "sent more"), (2, "sent 16")])
def test_mpi_names_a_message_of_another_length(programs, sent, words):
    with pytest.raises(LaunchError, match=re.escape(f"rank 0, 24 bytes, but it {words}")):
        launch(programs.too_long, 2, sent)


# --- an environment that lacks something ---


def blocked(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Importing ``name`` raises ``error``."""
    real = __import__

    def fake(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted.partition(".")[0] == name:
            raise error
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", fake)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module", name="mpi4py"), "MPI ranks need mpi4py"),
        (RuntimeError("cannot load MPI library"), "no MPI library.*cannot load MPI library"),
        (ImportError("libmpi.so.12: cannot open"), "no MPI library.*libmpi.so.12"),
    ],
)
def test_what_is_missing_for_mpi_is_named(monkeypatch, error, words):
    blocked(monkeypatch, "mpi4py", error)
    with pytest.raises(ImportError, match=words) as caught:
        mpi.MPICommunicator()
    assert 'pip install "isoform[mpi]"' in str(caught.value)


def test_what_is_missing_for_torch_is_named(monkeypatch):
    blocked(monkeypatch, "torch", ModuleNotFoundError("No module", name="torch"))
    with pytest.raises(ImportError, match=re.escape('pip install "isoform[torch]"')):
        torch_distributed.TorchCommunicator()


def test_torch_needs_a_process_group():
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group before"):
        torch_distributed.TorchCommunicator()
