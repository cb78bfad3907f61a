"""What the tests run on every rank. A rank of MPI imports this file, so it imports little."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isoform.parallel.communicator import Communicator, Traffic
from isoform.parallel.sharding import Sharding


def numbers(rank: int, part: int, shape: Any, dtype: Any = np.float64) -> Any:
    """Random numbers that every rank can make for every other."""
    rng = np.random.default_rng([rank, part, *shape])
    return rng.standard_normal(shape).astype(dtype)


def shape_of(source: int, to: int) -> tuple[int, int]:
    """Of what one rank sends another: all different, some empty."""
    return ((source + 2 * to + 1) % 4, 3)


def traffic_of(comm: Communicator) -> dict[str, tuple[int, int]]:
    traffic: Traffic = comm.traffic
    return {name: (n, traffic.messages_by[name]) for name, n in sorted(traffic.bytes_by.items())}


def as_it_is(x: Any) -> Any:
    return x


def primitives(
    comm: Communicator, dtype: Any, put: Any = as_it_is, get: Any = as_it_is
) -> dict[str, Any]:
    """Every operation once, with ragged shapes; ``put`` and ``get`` go to a device and back."""
    P, r = comm.size, comm.rank
    parts = [put(numbers(r, to, shape_of(r, to), dtype)) for to in range(P)]
    received = comm.all_to_all(parts, [shape_of(source, r) for source in range(P)])
    gathered = comm.all_gather(put(numbers(r, r, (r, 2), dtype)), [(s, 2) for s in range(P)])
    summed = comm.reduce_scatter([put(numbers(r, to, (to + 1, 2), dtype)) for to in range(P)])
    after, before = (r + 1) % P, (r - 1) % P
    passed = put(np.zeros((2, 5), dtype))
    if P > 1:
        transfer = comm.exchange([(after, put(numbers(r, 0, (2, 5), dtype)))], [(before, passed)])
        transfer.wait()
        transfer.wait()
    comm.barrier()
    comm.agree(length=7, dtype=str(dtype))
    return {
        "received": [get(x) for x in received],
        "gathered": [get(x) for x in gathered],
        "summed": get(summed),
        "passed": get(passed),
        "traffic": traffic_of(comm),
    }


def adjoints(comm: Communicator) -> dict[str, tuple[float, float]]:
    """⟨A x, y⟩ and ⟨x, Aᵀ y⟩ of this rank, for each A; their sums over ranks must agree."""
    P, r = comm.size, comm.rank
    to, back = [shape_of(r, s) for s in range(P)], [shape_of(s, r) for s in range(P)]
    x = [numbers(r, s, to[s]) for s in range(P)]
    y = [numbers(100 + r, s, back[s]) for s in range(P)]
    there = comm.all_to_all(x, back)
    home = comm.all_to_all(y, to)

    one, ones = numbers(r, r, (r + 1, 2)), [(s + 1, 2) for s in range(P)]
    many = [numbers(200 + r, s, ones[s]) for s in range(P)]
    gathered = comm.all_gather(one, ones)
    scattered = comm.reduce_scatter(many)
    return {
        "all_to_all": (dot(there, y), dot(x, home)),
        "all_gather": (dot(gathered, many), dot([one], [scattered])),
    }


def dot(a: Any, b: Any) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def bfloat16(comm: Communicator, library: str) -> Any:
    """A sum that bfloat16 cannot hold: 1 from every rank, after 256 from the first."""
    number = 256.0 if comm.rank == 0 else 1.0
    if library == "torch":
        import torch

        parts = [torch.full((3,), number, dtype=torch.bfloat16)] * comm.size
        gathered = comm.all_gather(parts[0], [(3,)] * comm.size)
        assert all(part.dtype == torch.bfloat16 for part in gathered)
        summed = comm.reduce_scatter(parts)
        assert summed.dtype == torch.float32
        return summed.numpy(), [float(part[0]) for part in gathered]
    import ml_dtypes

    parts = [np.full(3, number, ml_dtypes.bfloat16)] * comm.size
    gathered = comm.all_gather(parts[0], [(3,)] * comm.size)
    return comm.reduce_scatter(parts), [float(part[0]) for part in gathered]


def grid(comm: Communicator, columns: int) -> tuple[list[int], list[int], dict[str, Any]]:
    """Who is in this rank's row, and in its column (counted from the last row up)."""
    row = comm.split(comm.rank // columns)
    column = comm.split(comm.rank % columns, key=-comm.rank)
    own = np.array([comm.rank])
    met = [group.all_gather(own, [(1,)] * group.size) for group in (row, column)]
    assert int(met[0][row.rank][0]) == int(met[1][column.rank][0]) == comm.rank
    return *([int(r[0]) for r in ranks] for ranks in met), traffic_of(comm)


def many_transfers(comm: Communicator) -> list[Any]:
    """Several messages between the same two ranks arrive in order, read back to front."""
    if comm.size == 1:
        return []
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    filled = [np.empty(4) for _ in range(5)]
    transfers = [
        comm.exchange([(after, np.full(4, 10.0 * comm.rank + i))], [(before, filled[i])])
        for i in range(5)
    ]
    for transfer in reversed(transfers):
        transfer.wait()
    return [float(x[0]) for x in filled]


def strided(comm: Communicator) -> bool:
    """What is sent may lie in memory as it likes."""
    x = np.arange(12.0).reshape(3, 4).T[:, ::2]
    return all((y == x).all() for y in comm.all_gather(x, [x.shape] * comm.size))


def huge(comm: Communicator) -> bool:
    """One message of 2³¹ + 8 bytes."""
    x = np.empty(2**31 + 8, np.uint8)
    x[:3], x[-3:] = comm.rank + 1, comm.rank + 5
    if comm.rank == 0:
        comm.exchange([(1, x)], []).wait()
        return True
    comm.exchange([], [(0, x)]).wait()
    return bool((x[:3] == 1).all() and (x[-3:] == 5).all())


def in_pieces(comm: Any, largest: int) -> Any:
    """As if the library could send ``largest`` bytes at most."""
    comm._largest = largest
    return primitives(comm, np.float64)


# --- faults ---


def one_raises(comm: Communicator) -> None:
    if comm.rank == comm.size - 1:
        raise ArithmeticError("the planted fault")
    comm.barrier()


def one_exits(comm: Communicator) -> None:
    if comm.rank == comm.size - 1:
        sys.exit(3)
    comm.barrier()


def one_is_killed(comm: Communicator, pids: str = "") -> None:
    if pids:
        Path(pids, str(os.getpid())).touch()
        comm.barrier()
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()


def one_sleeps(comm: Communicator, pids: str) -> None:
    Path(pids, str(os.getpid())).touch()
    if comm.rank == comm.size - 1:
        time.sleep(1000)
    comm.barrier()


def in_a_circle(comm: Communicator) -> None:
    """All wait for the next one; the last has left."""
    if comm.rank < comm.size - 1:
        comm.exchange([], [(comm.rank + 1, np.empty(3))]).wait()


def other_lengths(comm: Communicator) -> None:
    comm.all_gather(np.zeros(comm.rank + 1), [(comm.rank + 1,)] * comm.size)


def other_operations(comm: Communicator) -> None:
    if comm.rank == 0:
        comm.all_gather(np.zeros(2), [(2,)] * comm.size)
    else:
        comm.reduce_scatter([np.zeros(2)] * comm.size)


def too_long(comm: Communicator, sent: int) -> None:
    if comm.rank == 0:
        comm.exchange([(1, np.zeros(sent))], []).wait()
    if comm.rank == 1:
        comm.exchange([], [(0, np.zeros(3))]).wait()


def disagree(comm: Communicator) -> None:
    comm.agree(L=8, dtype="float32", strategy="ulysses" if comm.rank == 1 else "ring")


def nobody_receives(comm: Communicator) -> None:
    if comm.rank == 0:
        comm.exchange([(1, np.zeros(3))], [])


def changes_what_it_sends(comm: Communicator) -> float:
    x = np.full(3, 1.0)
    if comm.rank == 0:
        transfer = comm.exchange([(1, x)], [])
        x[:] = 2.0
        comm.exchange([(1, np.zeros(1))], []).wait()
        transfer.wait()
    else:
        comm.exchange([], [(0, x)])
        comm.exchange([], [(0, np.empty(1))]).wait()
    return float(x[0])


# --- attention ---


@dataclass(frozen=True)
class Case:
    """One call of attention over ranks."""

    strategy: str = "ring"
    kind: str = "zigzag"
    L: int = 13
    block: int = 1
    near: int | None = None
    B: int = 2
    H: int = 4
    G: int = 2
    D: int = 4
    dtype: str = "float64"
    causal: bool = True
    window: Any = None
    scale: float | None = None
    documents: tuple[int, ...] | None = None  # lengths; what is left over is padding
    segments_by_example: bool = False
    library: str = "numpy"
    seed: int = 0
    topology: Any = None
    deterministic: bool = False

    def sharding(self, P: int) -> Sharding:
        return Sharding(self.kind, self.L, P, self.block)

    @property
    def segments(self) -> Any:
        if self.documents is None:
            return None
        found = np.full(self.L, -1)
        found[: sum(self.documents)] = np.repeat(range(len(self.documents)), self.documents)
        return np.stack([found, found[::-1]])[: self.B] if self.segments_by_example else found

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "scale": self.scale}

    def operands(self) -> dict[str, Any]:
        """q, k, v and dout of the whole sequence, as NumPy arrays in the dtype asked for."""
        rng = np.random.default_rng(self.seed)
        heads = {"q": self.H, "k": self.G, "v": self.G, "dout": self.H}
        dtype = self.dtype
        if dtype == "bfloat16":
            import ml_dtypes

            dtype = ml_dtypes.bfloat16
        return {
            name: rng.standard_normal((self.B, self.L, n, self.D)).astype(dtype)
            for name, n in heads.items()
        }


def to_torch(x: Any, dtype: str) -> Any:
    import torch

    return torch.from_numpy(np.asarray(x, np.float64)).to(getattr(torch, dtype))


def attend(comm: Communicator, case: Case) -> dict[str, Any]:
    """This rank's shards of out and of all gradients; and what was sent, forward and backward."""
    from isoform.parallel.attention import attention, attention_vjp

    sharding = case.sharding(comm.size)
    own = {name: sharding.shard(x, comm.rank) for name, x in case.operands().items()}
    segments = case.segments
    if segments is not None:
        segments = sharding.shard(segments, comm.rank, axis=-1)
    options = {
        **case.options,
        "comm": comm,
        "sharding": sharding,
        "strategy": case.strategy,
        "near": case.near,
        "topology": case.topology,
        "deterministic": case.deterministic,
    }
    comm.traffic.clear()
    if case.library == "torch":
        import torch

        own = {name: to_torch(x, case.dtype) for name, x in own.items()}
        segments = None if segments is None else torch.from_numpy(segments)
        inputs = [own[name].requires_grad_() for name in "qkv"]
        out = attention(*inputs, **options, segments=segments)
        forward = traffic_of(comm)
        gradients = torch.autograd.grad(out, inputs, own["dout"])
        assert all(dx.dtype == x.dtype for dx, x in zip(gradients, inputs, strict=True))
        found = [x.detach().double().numpy() for x in (out, *gradients)]
    else:
        kept = {name: x.copy() for name, x in own.items()}
        out, backward = attention_vjp(*(own[name] for name in "qkv"), **options, segments=segments)
        forward = traffic_of(comm)
        found = [out, *backward(own["dout"])]
        assert all((own[name] == kept[name]).all() for name in own)  # inputs are not written
        assert all(x.dtype == own["q"].dtype for x in found)
    results = dict(zip(("out", "dq", "dk", "dv"), found, strict=True))
    return {**results, "forward": forward, "both": traffic_of(comm)}


def attend_all(comm: Communicator, cases: list[Case]) -> list[dict[str, Any]]:
    return [attend(comm, case) for case in cases]


def held_at_most(comm: Communicator, cases: list[Case]) -> list[tuple[int, int]]:
    """The most memory that this rank holds in the forward, and in the backward, of each case."""
    import gc
    import tracemalloc

    from isoform.parallel.attention import attention_vjp

    def measure(case: Case) -> tuple[int, int]:
        gc.collect()
        tracemalloc.start()
        sharding = case.sharding(comm.size)
        held, dtype = sharding.lengths[comm.rank], case.dtype
        q, dout = (np.ones((case.B, held, case.H, case.D), dtype) for _ in range(2))
        k, v = (np.ones((case.B, held, case.G, case.D), dtype) for _ in range(2))
        options = {"strategy": case.strategy, "near": case.near, **case.options}
        out, backward = attention_vjp(q, k, v, comm=comm, sharding=sharding, **options)
        forward = tracemalloc.get_traced_memory()[1] - dout.nbytes  # which is there too early
        tracemalloc.reset_peak()
        backward(dout)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return forward, most

    for case in cases:  # imports, and groups of ranks, which are kept
        measure(replace(case, L=comm.size))
    return [measure(case) for case in cases]


def attend_twice(comm: Communicator, case: Case) -> bool:
    """Whether a second call, and a second backward, give the same bits."""
    first, second = attend(comm, case), attend(comm, case)
    return all(np.array_equal(first[name], second[name]) for name in ("out", "dq", "dk", "dv"))


def in_whole_tiles(comm: Communicator, case: Case) -> dict[str, Any]:
    """An all-gather with ``deterministic=True``: lse too, and gradients not yet rounded."""
    from isoform.parallel import whole_tiles
    from isoform.parallel.local import Mask

    sharding = case.sharding(comm.size)
    own = {name: sharding.shard(x, comm.rank) for name, x in case.operands().items()}
    if case.library == "torch":
        own = {name: to_torch(x, case.dtype) for name, x in own.items()}
    segments = case.segments
    if segments is not None:
        segments = tuple(sharding.shard(segments, r, axis=-1) for r in range(comm.size))
    mask = Mask(sharding, segments=segments, **case.options)
    out, saved = whole_tiles.forward(*(own[name] for name in "qkv"), comm, mask)
    found = (out, saved.lse, *whole_tiles.backward(own["dout"], saved, comm, mask))
    if case.library == "torch":
        found = tuple(x.double().numpy() for x in found)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), found, strict=True))


def own_rank(comm: Communicator, x: Any) -> tuple[int, int, Any]:
    """Who answers: which rank, and which process."""
    return comm.rank, os.getpid(), x


def attend_at(comm: Communicator, case: Case, positions: Any) -> Any:
    """Attention where the tokens are said to lie at other positions than the sharding's."""
    from isoform.parallel.attention import attention_vjp

    sharding = case.sharding(comm.size)
    own = {name: sharding.shard(x, comm.rank) for name, x in case.operands().items()}
    out, backward = attention_vjp(
        *(own[name] for name in "qkv"),
        comm=comm,
        sharding=sharding,
        strategy=case.strategy,
        near=case.near,
        positions=sharding.shard(positions, comm.rank, axis=-1),
        **case.options,
    )
    return out, *backward(own["dout"])


def wrong_on_one(comm: Communicator, case: Case, change: dict[str, Any]) -> None:
    """One rank calls with another case than all others."""
    attend(comm, replace(case, **change) if comm.rank == 1 else case)


def label_shards(comm: Communicator, case: Case, library: str) -> tuple[Any, Any, Any]:
    """Labels without and with segments, and loss weights, from shards alone."""
    from isoform.parallel.labels import global_loss_weights, shift_labels

    sharding = case.sharding(comm.size)
    tokens = sharding.shard(np.arange(case.B * case.L).reshape(case.B, case.L) + 1000, comm.rank)
    segments = sharding.shard(case.segments, comm.rank, -1)
    if library == "torch":
        import torch

        tokens, segments = torch.from_numpy(tokens), torch.from_numpy(segments)
    plain = shift_labels(tokens, comm=comm, sharding=sharding)
    packed = shift_labels(tokens, comm=comm, sharding=sharding, segments=segments)
    weights = global_loss_weights(packed, comm=comm)
    return np.asarray(plain), np.asarray(packed), np.asarray(weights)


def told(comm: Communicator, case: Case, change: dict[str, Any]) -> str:
    """What this rank is told when rank 1 calls wrongly."""
    try:
        wrong_on_one(comm, case, change)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def all_label_shards(comm: Communicator, cases: list[Case]) -> list[Any]:
    return [label_shards(comm, case, "numpy") for case in cases]
