"""Attention over GPUs that NCCL joins: how much faster than one, by length and strategy.

    python -m isoform.parallel.benchmark.scaling --ranks 2 --record scaling.jsonl

Every rank has a GPU. A point is one call, bfloat16 and causal, its shards zigzag, forward and
backward; its time is that of the rank that takes longest, and of several rounds the median. Beside
each strategy, in the same run: one GPU with the whole sequence; the same program where ranks do not
send but copy their own arrays, so that the difference is the communication that is *exposed*; the
planner's prediction, from one GPU's speed and the bandwidth between two; and PyTorch's own
``context_parallel``.

With ``--simulated 8`` there is one GPU, and the ranks are threads that share it: they do one after
another what one call does at once, and what is more is the price of blocks and of their merging.

Strong scaling is the time of one GPU over P times that of P. For weak scaling ``--weak`` adds to
every length the one at which a rank of P computes what one GPU does at that length: √P times it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from math import isqrt
from pathlib import Path
from typing import Any, cast

from isoform.parallel.attention import Strategy, attention_vjp
from isoform.parallel.benchmark.gpus import (
    EXPOSED,
    ONE,
    Seconds,
    Silent,
    Timed,
    command,
    figures,
    marks,
    slowest,
    tell,
    too_few,
    why_not,
)
from isoform.parallel.communicator import Communicator
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.job import Job
from isoform.parallel.launch import LaunchError
from isoform.parallel.planner import Attended, Sizes, Topology, plan
from isoform.parallel.planner.topology import Level
from isoform.parallel.sharding import Sharding

STRATEGIES: tuple[Strategy, ...] = ("ring", "ulysses", "all_gather")
PEER = "context_parallel"
"""PyTorch's own, with its zigzag load balancing."""
DTYPE = "bfloat16"
STEP = 256
"""Lengths of weak scaling are multiples of it."""


@dataclass(frozen=True)
class Point:
    """A call: ``q [1, L, H, D]``, ``k`` and ``v`` ``[1, L, G, D]``."""

    L: int
    H: int
    G: int
    D: int

    @property
    def operations(self) -> float:
        """Floating-point operations of a causal forward; a backward has 2.5 times as many."""
        return 4.0 * self.H * self.D * self.L * (self.L + 1) / 2


# --- on the ranks ---


def timed(comm: Communicator, point: Point, competitor: str, rounds: int, warm: int = 1) -> Timed:
    """Time ``point`` on this rank, by a strategy, :data:`PEER`, or on one GPU of rank 0."""
    import torch

    base, _, silent = competitor.partition(", ")
    if base == ONE and comm.rank:
        return Timed(())
    sharding = Sharding.zigzag(point.L, 1 if base == ONE else comm.size)
    length = sharding.lengths[0 if base == ONE else comm.rank]
    generator = torch.Generator("cuda").manual_seed(comm.rank)
    q, k, v, dout = (
        torch.randn(
            1, length, heads, point.D, device="cuda", dtype=torch.bfloat16, generator=generator
        )
        for heads in (point.H, point.G, point.G, point.H)
    )
    inside = Silent(comm.rank, comm.size) if silent else comm
    forward = {ONE: _alone, PEER: _context_parallel}.get(
        base, partial(_over_ranks, comm=inside, sharding=sharding, strategy=base)
    )
    found = []
    try:
        for _ in range(warm + rounds):
            inside.traffic.clear()
            found.append(_once(comm, forward, (q, k, v), dout, alone=base == ONE))
    except Exception as problem:
        if base != PEER and not isinstance(problem, torch.cuda.OutOfMemoryError):
            raise
        said = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return Timed((), not_run=said)
    sent = inside.traffic
    return Timed(tuple(found[warm:]), sum(sent.bytes_by.values()), sum(sent.messages_by.values()))


def _once(
    comm: Communicator,
    forward: Callable[..., tuple[Any, Callable[[Any], Any]]],
    operands: tuple[Any, ...],
    dout: Any,
    *,
    alone: bool,
) -> Seconds:
    import torch

    clock = marks(3)
    torch.cuda.synchronize()
    if not alone:
        comm.barrier()
    clock[0].record()
    _, backward = forward(*operands)
    clock[1].record()
    backward(dout)
    clock[2].record()
    torch.cuda.synchronize()
    return Seconds(*(1e-3 * start.elapsed_time(end) for start, end in pairwise(clock)))


def _alone(q: Any, k: Any, v: Any) -> tuple[Any, Callable[[Any], Any]]:
    from isoform.kernels.attention import attention

    return _by_autograd(lambda *rows: attention(*rows, causal=True), q, k, v)


def _over_ranks(
    q: Any, k: Any, v: Any, *, comm: Communicator, sharding: Sharding, strategy: str
) -> tuple[Any, Callable[[Any], Any]]:
    chosen = cast(Strategy, strategy)
    return attention_vjp(q, k, v, comm=comm, sharding=sharding, strategy=chosen, causal=True)


def _context_parallel(q: Any, k: Any, v: Any) -> tuple[Any, Callable[[Any], Any]]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cuda", (torch.distributed.get_world_size(),))
    repeats = q.shape[2] // k.shape[2]  # its attention knows no grouped heads

    def attend(*rows: Any) -> Any:
        query, key, value = (x.transpose(1, 2) for x in rows)
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return found.transpose(1, 2)

    # The shards are made already; that they lie zigzag it tells from a buffer that it may cut.
    cut = torch.empty(mesh.size() * q.shape[1], device="cuda")
    context = context_parallel(mesh, buffers=[cut], buffer_seq_dims=[0], no_restore_buffers={cut})
    context.__enter__()  # the backward is dispatched by it too
    out, backward = _by_autograd(attend, q, k, v)

    def leave(dout: Any) -> Any:
        try:
            return backward(dout)
        finally:
            context.__exit__(None, None, None)

    return out, leave


def _by_autograd(
    function: Callable[..., Any], q: Any, k: Any, v: Any
) -> tuple[Any, Callable[[Any], Any]]:
    import torch

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return out, lambda dout: torch.autograd.grad(out, leaves, dout)


def in_turns(point: Point, ranks: int, strategy: Strategy, rounds: int, warm: int = 1) -> Seconds:
    """Time ``ranks`` threads that share this GPU: the median of a forward, and of a backward."""
    import torch

    sharding = Sharding.zigzag(point.L, ranks)
    generator = torch.Generator("cuda").manual_seed(0)
    shards = [
        [
            torch.randn(
                1, length, heads, point.D, device="cuda", dtype=torch.bfloat16, generator=generator
            )
            for heads in (point.H, point.G, point.G, point.H)
        ]
        for length in sharding.lengths
    ]
    options: dict[str, Any] = {"sharding": sharding, "strategy": strategy, "causal": True}
    found = simulate(_in_thread, ranks, shards, options, warm + rounds)[0]
    return Seconds(*map(statistics.median, zip(*found[warm:], strict=True)))


def _in_thread(
    comm: Communicator, shards: list[list[Any]], options: dict[str, Any], rounds: int
) -> list[Seconds]:
    """Seconds of each round. The threads stay for all of them, as do the plans that cuDNN keeps for
    each.
    """
    import torch

    def moment() -> float:
        comm.barrier()
        torch.cuda.synchronize()
        comm.barrier()
        return time.perf_counter()

    *rows, dout = shards[comm.rank]
    found = []
    for _ in range(rounds):
        start = moment()
        _, backward = attention_vjp(*rows, comm=comm, **options)
        middle = moment()
        backward(dout)
        found.append(Seconds(middle - start, moment() - middle))
    return found


def bandwidth(comm: Communicator, size: int = 1 << 28) -> float:
    """Bytes a second that this rank sends to the next, while it gets as many."""
    import torch

    if comm.size == 1:
        return float("inf")
    sent = torch.empty(size, dtype=torch.uint8, device="cuda")
    got = torch.empty_like(sent)
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize()
        comm.barrier()
        clock = marks(2)
        clock[0].record()
        after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        comm.exchange([(after, sent)], [(before, got)]).wait()
        clock[1].record()
        torch.cuda.synchronize()
        best = max(best, size / (1e-3 * clock[0].elapsed_time(clock[1])))
    return best


# --- here ---


@dataclass(frozen=True)
class Record:
    """A line of the record: a competitor at a point.

    Attributes:
        surroundings: Where and when, as of :mod:`isoform.kernels.benchmark.records`.
        transport: What joins the ranks.
        ranks: P.
        point: Of the call.
        competitor: Who.
        forward_s, backward_s: Median over rounds, of the rank that takes longest.
        efficiency: One GPU's time over P times this, or over this where the ranks share one; None
            where one GPU was not timed.
        exposed_s: Seconds more than where nothing is sent, both passes together.
        predicted_s: What the planner says of both passes.
        bytes, messages: That the rank sent that sends most.
        not_run: Why there is nothing else.
    """

    surroundings: Any
    transport: str
    ranks: int
    point: Point
    competitor: str
    forward_s: float | None = None
    backward_s: float | None = None
    efficiency: float | None = None
    exposed_s: float | None = None
    predicted_s: float | None = None
    bytes: int = 0
    messages: int = 0
    not_run: str = ""

    @property
    def seconds(self) -> float | None:
        """Of both passes."""
        if self.forward_s is None or self.backward_s is None:
            return None
        return self.forward_s + self.backward_s

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Record:
        """Of :meth:`as_json`; ValueError or TypeError where it is none."""
        found = json.loads(line)
        if not isinstance(found, dict) or not isinstance(found.get("point"), dict):
            raise ValueError("no record of scaling")
        return Record(**found | {"point": Point(**found["point"])})


def read(path: Path) -> tuple[Record, ...]:
    """All records of a file, oldest first.

    Raises:
        ValueError: A line is none; the message names it.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(Record.from_json(line))
        except (ValueError, TypeError) as problem:
            raise ValueError(f"{path}, line {number}: {problem}") from problem
    return tuple(found)


def measure(
    job: Job,
    points: Iterable[Point],
    around: Any,
    rounds: int,
    peers: Sequence[str],
    *,
    warm: int = 1,
    exposed: bool = True,
) -> Iterator[Record]:
    """A record of one GPU, of each strategy and each peer at every point.

    Args:
        job: The ranks.
        points, around, rounds: What is timed, where, and how often.
        peers: Who else.
        warm: Rounds before those that count.
        exposed: Also run each strategy where nothing is sent.
    """
    ranks = job.ranks
    rate = min(job.run(bandwidth, limit=120))
    for point in points:

        def ask(competitor: str, point: Point = point) -> list[Timed]:
            try:
                return job.run(timed, point, competitor, rounds, warm, limit=300)
            except LaunchError as problem:  # the next call starts new ranks
                return [Timed((), not_run=_last_words(problem))]

        alone = ask(ONE)
        one = slowest(alone)
        blank = partial(Record, around, job.transport, point=point)
        if one is None:
            yield blank(ranks=1, competitor=ONE, not_run=why_not(alone))
        else:
            yield blank(ranks=1, competitor=ONE, forward_s=one.forward, backward_s=one.backward)
        for competitor in (*STRATEGIES, *peers):
            found = ask(competitor)
            taken = slowest(found)
            if taken is None:
                yield blank(ranks=ranks, competitor=competitor, not_run=why_not(found))
                continue
            ours = competitor in STRATEGIES
            quiet = ours and exposed
            silent = slowest(ask(f"{competitor}, {EXPOSED}")) if quiet else None
            yield blank(
                ranks=ranks,
                competitor=competitor,
                forward_s=taken.forward,
                backward_s=taken.backward,
                efficiency=None if one is None else sum(one) / (ranks * sum(taken)),
                exposed_s=None if silent is None else sum(taken) - sum(silent),
                predicted_s=predicted(point, ranks, one, rate, competitor) if ours else None,
                bytes=max(each.bytes for each in found) if ours else 0,
                messages=max(each.messages for each in found) if ours else 0,
            )


def _last_words(problem: LaunchError) -> str:
    """What the rank that failed first said last."""
    said = next(iter(problem.tracebacks.values()), str(problem)).strip()
    return said.splitlines()[-1]


def measure_simulated(
    points: Iterable[Point], ranks: int, around: Any, rounds: int
) -> Iterator[Record]:
    """A record of one call, and of each strategy's ranks one after another, at every point."""
    for point in points:
        alone = timed(Silent(0, 1), point, ONE, rounds)
        one = slowest([alone])
        assert one is not None, alone.not_run
        blank = partial(Record, around, "simulated", point=point)
        yield blank(ranks=1, competitor=ONE, forward_s=one.forward, backward_s=one.backward)
        for strategy in STRATEGIES:
            taken = in_turns(point, ranks, strategy, rounds)
            yield blank(
                ranks=ranks,
                competitor=strategy,
                forward_s=taken.forward,
                backward_s=taken.backward,
                efficiency=sum(one) / sum(taken),
            )


def predicted(
    point: Point, ranks: int, one: Seconds | None, rate: float, strategy: str
) -> float | None:
    """The planner's seconds of both passes, from one GPU's speed and the links' bandwidth."""
    if one is None:
        return None
    flops = 3.5 * point.operations / sum(one)
    links = Topology("measured", (Level("GPU to GPU", rate, 1e-5),), {DTYPE: flops})
    sizes = Sizes(1, point.H, point.G, point.D, 2)
    sharding = Sharding.zigzag(point.L, ranks)
    found = plan([sharding], sizes, dtype=DTYPE, attended=Attended(causal=True), topology=links)
    chosen = next(each for each in found.candidates if each.strategy == strategy)
    return None if chosen.time is None else chosen.time.total


def points_of(
    lengths: Iterable[int], heads: int, groups: Iterable[int], head_dim: int, weak_ranks: int
) -> list[Point]:
    """All points; with ``weak_ranks`` > 1 also those of weak scaling."""
    wanted = sorted(
        {
            length
            for L in lengths
            for length in (L, isqrt(weak_ranks * L * L) // STEP * STEP)
            if length
        }
    )
    return [Point(L, heads, G, head_dim) for G, L in product(groups, wanted)]


def _row(record: Record) -> str:
    at = record.point
    place = f"L={at.L:<8} H={at.H} G={at.G:<3} P={record.ranks} {record.competitor:18}"
    if record.not_run:
        return f"{place} not run: {record.not_run}"
    parts = [place, *figures(record)]
    if record.predicted_s is not None:
        parts.append(f"predicted {1e3 * record.predicted_s:.2f} ms")
    return "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all points, print a line for each competitor, and record it."""
    line = command("scaling", __doc__)
    line.add_argument(
        *("--lengths", "-L"),
        type=int,
        nargs="+",
        default=[32768, 131072],
        metavar="L",
        help="positions of the whole sequence (%(default)s)",
    )
    line.add_argument("--heads", type=int, default=32, help="of queries (%(default)s)")
    line.add_argument(
        "--groups", type=int, nargs="+", default=[32, 8], metavar="G", help="of keys (%(default)s)"
    )
    line.add_argument("--head-dim", type=int, default=128, help="(%(default)s)")
    line.add_argument("--weak", action="store_true", help="lengths of weak scaling too")
    line.add_argument(
        "--simulated", type=int, default=0, metavar="P", help="P threads that share one GPU instead"
    )
    line.add_argument("--warm", type=int, default=1, help="rounds before those (%(default)s)")
    line.add_argument(
        "--no-exposed",
        action="store_true",
        help="not also where nothing is sent, which takes as long again",
    )
    asked = line.parse_args(arguments)
    if asked.warm < 0:
        line.error("--warm must not be negative")
    if asked.ranks < 1 or asked.rounds < 1 or asked.simulated < 0:
        line.error("--ranks and --rounds must be at least 1, --simulated not negative")
    if too_few(1 if asked.simulated else asked.ranks):
        return 3

    from isoform.kernels.benchmark.records import surroundings

    around = asdict(surroundings(asked.commit))
    weak = asked.ranks if asked.weak else 1
    points = points_of(asked.lengths, asked.heads, asked.groups, asked.head_dim, weak)
    with ExitStack() as until_done:
        if asked.simulated:
            records = measure_simulated(points, asked.simulated, around, asked.rounds)
        else:
            job = until_done.enter_context(Job(asked.ranks, transport=asked.transport))
            peers = (PEER,) if asked.transport == "torch-nccl" else ()
            how: dict[str, Any] = {"warm": asked.warm, "exposed": not asked.no_exposed}
            records = measure(job, points, around, asked.rounds, peers, **how)
        tell(records, _row, asked)
    return 0


if __name__ == "__main__":
    from isoform.parallel.benchmark.scaling import (
        main as started,  # of the module that ranks import
    )

    sys.exit(started())
