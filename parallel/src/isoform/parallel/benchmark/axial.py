"""A block of the Evoformer over GPUs that NCCL joins: its time and memory beside one GPU's.

    python -m isoform.parallel.benchmark.axial --ranks 2 --record axial.jsonl

The block is AlphaFold 2's, with the attention of :mod:`isoform.kernels`, its inputs and parameters
bfloat16; forward and backward. One GPU runs the reference's block. Times are of the rank that takes
longest, and of several rounds the median; memory is the peak above parameters and inputs of the
rank that takes most. Where nothing is sent (:class:`~.gpus.Silent`) shows what is exposed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
from isoform.parallel.job import Job
from isoform.parallel.sharding import Sharding

OURS = "axial"


@dataclass(frozen=True)
class Sizes:
    """Sequences S and residues R."""

    S: int
    R: int


@dataclass(frozen=True)
class Found:
    """What a rank found: seconds by round, and the most memory that it took."""

    timed: Timed
    peak: int


@dataclass(frozen=True)
class Record:
    """A line of the record.

    Attributes:
        surroundings: Where and when.
        transport: What joins the ranks.
        ranks: P.
        sizes: Of the inputs.
        competitor: Who.
        forward_s, backward_s: Median over rounds, of the rank that takes longest.
        efficiency: One GPU's time over P times this.
        exposed_s: Seconds more than where nothing is sent.
        peak_bytes: Of the rank that takes most.
        bytes, messages: That the rank sent that sends most.
        not_run: Why there is nothing else.
    """

    surroundings: Any
    transport: str
    ranks: int
    sizes: Sizes
    competitor: str
    forward_s: float | None = None
    backward_s: float | None = None
    efficiency: float | None = None
    exposed_s: float | None = None
    peak_bytes: int | None = None
    bytes: int = 0
    messages: int = 0
    not_run: str = ""


# --- on the ranks ---


def timed(
    comm: Communicator,
    sizes: Sizes,
    competitor: str,
    rounds: int,
    device: str = "cuda",
    warm: int = 1,
) -> Found:
    """Time a block on this rank: among the others, or the whole on rank 0's GPU."""
    import torch

    base, _, silent = competitor.partition(", ")
    if base == ONE and comm.rank:
        return Found(Timed(()), 0)
    ranks, rank = (1, 0) if base == ONE else (comm.size, comm.rank)
    inside: Communicator = Silent(rank, ranks) if silent or base == ONE else comm
    sequences, residues = (Sharding.contiguous(n, ranks) for n in (sizes.S, sizes.R))
    generator = torch.Generator(device).manual_seed(rank)

    def drawn(*shape: int) -> Any:
        x = torch.randn(shape, generator=generator, device=device)
        return x.to(torch.bfloat16)

    block = _block(device)
    msa = drawn(1, sequences.lengths[rank], sizes.R, 256).requires_grad_()
    pair = drawn(1, residues.lengths[rank], sizes.R, 128).requires_grad_()
    cotangents = [drawn(*msa.shape), drawn(*pair.shape)]
    leaves = [msa, pair, *block.parameters()]

    def forward() -> tuple[Any, Any]:
        if base == ONE:
            whole: tuple[Any, Any] = block(msa, pair)
            return whole
        from isoform.parallel.axial import evoformer_block

        return evoformer_block(
            block, msa, pair, comm=inside, sequences=sequences, residues=residues
        )

    found: list[Seconds] = []
    peak = 0
    try:
        for _ in range(warm + rounds):
            inside.traffic.clear()
            took, peak = _once(comm, forward, leaves, cotangents, alone=base == ONE)
            found.append(took)
    except torch.OutOfMemoryError as problem:
        return Found(Timed((), not_run=f"{type(problem).__name__}: {problem}".splitlines()[0]), 0)
    sent = inside.traffic
    bytes_, messages = sum(sent.bytes_by.values()), sum(sent.messages_by.values())
    return Found(Timed(tuple(found[warm:]), bytes_, messages), peak)


def _block(device: str) -> Any:
    import torch

    from isoform.kernels import evoformer_attention
    from isoform.reference.torch.evoformer_stack import EvoformerBlock

    torch.manual_seed(0)  # the same parameters on all ranks
    made = EvoformerBlock() if device == "cpu" else EvoformerBlock(attention=evoformer_attention)
    return made.to(device, torch.bfloat16)


def _once(
    comm: Communicator,
    forward: Callable[[], tuple[Any, Any]],
    leaves: Sequence[Any],
    cotangents: Sequence[Any],
    *,
    alone: bool,
) -> tuple[Seconds, int]:
    import torch

    clock = marks(3)
    on_gpu = leaves[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if not alone:
        comm.barrier()
    clock[0].record()
    outs = forward()
    clock[1].record()
    torch.autograd.grad(outs, leaves, cotangents)
    clock[2].record()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    took = (1e-3 * clock[n].elapsed_time(clock[n + 1]) for n in range(2))
    return Seconds(*took), peak


# --- here ---


def measure(
    job: Job, sizes: Sequence[Sizes], around: Any, rounds: int, device: str = "cuda"
) -> Iterator[Record]:
    """A record of one GPU and of all, for each of these sizes."""
    for each in sizes:
        one: Seconds | None = None
        for competitor, ranks in ((ONE, 1), (OURS, job.ranks)):
            found = job.run(timed, each, competitor, rounds, device, limit=300)
            taken = slowest(one.timed for one in found)
            blank = (around, job.transport, ranks, each, competitor)
            if taken is None:
                yield Record(*blank, not_run=why_not(one.timed for one in found))
                continue
            silent = None
            if competitor == OURS:
                quiet = job.run(timed, each, f"{competitor}, {EXPOSED}", rounds, device, limit=300)
                silent = slowest(one.timed for one in quiet)
            yield Record(
                *blank,
                forward_s=taken.forward,
                backward_s=taken.backward,
                efficiency=None if one is None else sum(one) / (ranks * sum(taken)),
                exposed_s=None if silent is None else sum(taken) - sum(silent),
                peak_bytes=max(f.peak for f in found),
                bytes=max(f.timed.bytes for f in found),
                messages=max(f.timed.messages for f in found),
            )
            one = taken if competitor == ONE else one


def _row(record: Record) -> str:
    at = record.sizes
    place = f"S={at.S:<5} R={at.R:<5} P={record.ranks} {record.competitor:8}"
    if record.not_run:
        return f"{place} not run: {record.not_run}"
    parts = [place, *figures(record)]
    if record.peak_bytes is not None:
        parts.append(f"{record.peak_bytes / 2**30:6.2f} GiB")
    return "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all sizes, print a line each, and record them."""
    line = command("axial", __doc__)
    line.add_argument(
        "--sequences", type=int, default=128, metavar="S", help="of the MSA (%(default)s)"
    )
    line.add_argument(
        "--residues", type=int, nargs="+", default=[384, 768], metavar="R", help="(%(default)s)"
    )
    asked = line.parse_args(arguments)
    if asked.ranks < 1 or asked.rounds < 1:
        line.error("--ranks and --rounds must be at least 1")
    if too_few(asked.ranks):
        return 3

    from isoform.kernels.benchmark.records import surroundings

    sizes = [Sizes(asked.sequences, R) for R in asked.residues]
    around = asdict(surroundings(asked.commit))
    with Job(asked.ranks, transport=asked.transport) as job:
        tell(measure(job, sizes, around, asked.rounds), _row, asked)
    return 0


if __name__ == "__main__":
    from isoform.parallel.benchmark.axial import main as started  # of the module that ranks import

    sys.exit(started())
