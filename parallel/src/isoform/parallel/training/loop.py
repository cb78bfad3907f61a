"""Training, from FASTA to the trained model, on one rank or many; and going on where it stopped.

A step is a function of its number and of the state before it: windows follow from the seed and the
number (:mod:`.data`), the learning rate from the number, and gradients are summed over ranks in the
order of ranks. So a run that was killed and goes on from its last checkpoint has the losses of one
that was not, bit for bit on as many ranks.

A run has a folder, which all ranks see::

    genome/          the bases of the FASTA files (:func:`isoform.parallel.training.data.load`)
    checkpoints/     see :mod:`.checkpoint`
    log.jsonl        a line each for the begin, every step and every evaluation
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from isoform.parallel.communicator import Communicator
from isoform.parallel.communicators.torch_distributed import TorchCommunicator
from isoform.parallel.sharding import IGNORE
from isoform.parallel.training import checkpoint, markov
from isoform.parallel.training.data import Batch, Genome, Window, Windows, batch, held_out, load
from isoform.parallel.training.engines import Engine
from isoform.parallel.training.model import TABLE, build
from isoform.parallel.training.optimizer import NamedAdamW
from isoform.parallel.training.position_table import PartitionedTable
from isoform.parallel.training.settings import Data, Settings, WrongSettings
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.contract import Unsupported

LOG, CHECKPOINTS, GENOME = "log.jsonl", "checkpoints", "genome"

Report = Callable[[dict[str, Any]], None]


class Diverged(FloatingPointError):
    """The loss or the gradient is no number any more; the message says at which step."""


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        step: Steps taken.
        bits: Of the held-out part, bits a base.
        markov: The Markov model's, of the same bases.
        bases: How many these are.
    """

    step: int
    bits: float
    markov: float
    bases: int


def train(
    settings: Settings,
    folder: Path,
    *,
    comm: Communicator | None = None,
    device: str = "cpu",
    report: Report | None = None,
) -> Outcome:
    """Train a model, from the newest checkpoint of the folder if there is one. Collective.

    Args:
        settings: What is read, and how it is trained.
        folder: The run's; made if need be.
        comm: All ranks, of ``torch.distributed``; None for one.
        device: ``"cpu"`` or ``"cuda"``.
        report: Called on rank 0 with every line of the log.

    Raises:
        WrongSettings: They do not fit the ranks or the genome.
        Unsupported: A technique is not for training by this loop.
        BadFasta: Records are wrong.
        WrongCheckpoint: The folder has checkpoints of another run.
        Diverged: The loss or the gradient is no number.
        OSError: A file cannot be read or written.
    """
    run = Run(settings, folder, comm=comm, device=device)
    log = Log(folder / LOG, report) if run.rank == 0 else None
    step = begun = run.resume()
    if log is not None:
        log.cut(step)
        log(run.begin(step))
    told = settings.training
    while True:
        if step % told.evaluate_every == 0 or step >= told.steps:
            found = run.evaluate(step)
            if log is not None and (step > begun or step == 0):  # else the log has it already
                log(found)
        if step > begun and (step % told.checkpoint_every == 0 or step >= told.steps):
            run.save(step)
        if step >= told.steps:
            return Outcome(step, found["bits_per_base"], run.markov_bits, run.markov_bases)
        line = run.step(step)
        step += 1
        if log is not None:
            log(line)


class Log:
    """Lines of JSON, one for each event, on disk when the call returns.

    Args:
        path: The file; made if need be.
        report: Called with every event too.
    """

    def __init__(self, path: Path, report: Report | None = None) -> None:
        self.path, self.report = path, report

    def __call__(self, event: dict[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a") as out:
            out.write(json.dumps(event) + "\n")
        if self.report is not None:
            self.report(event)

    def cut(self, step: int) -> None:
        """Take out what was written of later steps, which are about to be taken again.

        A last line that a killed process has not finished goes with them.
        """
        if not self.path.exists():
            return
        kept = [event for event in read_log(self.path) if event["step"] <= step]
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text("".join(json.dumps(event) + "\n" for event in kept))
        unfinished.replace(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of the log at ``path``, without a last line that is not whole."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Run:
    """One rank's part of a run. All methods are collective.

    Args:
        settings, folder, comm, device: As for :func:`train`.

    Attributes:
        rank: Which this is.
        markov_bits, markov_bases: What the Markov model says of the held-out part, bits a base, and
            of how many bases. On rank 0 alone.
    """

    def __init__(
        self, settings: Settings, folder: Path, *, comm: Communicator | None, device: str
    ) -> None:
        if comm is not None and not isinstance(comm, TorchCommunicator):
            raise TypeError(f"ranks must be those of torch.distributed, got {type(comm).__name__}")
        self.folder, self.comm, self.device = folder, comm, device
        self.rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
        switches = _switches(settings, ranks, grouped=comm is not None)
        self.settings = replace(settings, switches=switches)
        data, model, training = settings.data, settings.model, settings.training
        genome = self._genome()
        try:
            self.training_part, self.held_out_part = genome.split(data.held_out)
            self.windows = Windows(
                self.training_part,
                data.tokenizer,
                data.length,
                data.batch,
                training.seed,
                data.strands,
            )
        except ValueError as problem:
            raise WrongSettings(f"data: {problem}") from problem
        self.skipped = genome.skipped
        self.markov_bits, self.markov_bases = math.nan, 0
        if self.rank == 0:
            parts = (self.training_part, self.held_out_part)
            self.markov_bits, self.markov_bases = markov_bits(*parts, data)
        torch.manual_seed(training.seed)
        dtype, seed = getattr(torch, training.dtype), training.seed
        self.engine: Engine | None = None
        if comm is None:
            self.model = build(model, switches, device=device, dtype=dtype, seed=seed)
        else:
            # where states are sharded, so are parameters, and 16 bits are for computing alone
            bits: dict[str, Any] = {"dtype": dtype}
            if switches.optimizer != "replicated":
                bits = {"dtype": torch.float32, "compute": dtype}
            self.engine = Engine(model, switches, device=device, seed=seed, **bits)
            self.model = self.engine.model
        self.copy = 0 if self.engine is None else self.engine.copies.rank
        self.sharding = self.model.sharding(data.length)
        self.optimizer = NamedAdamW(
            self.model, betas=training.betas, weight_decay=training.weight_decay
        )

    def _genome(self) -> Genome:
        """Rank 0 reads the files, and the others what it has written."""
        data = self.settings.data
        for turn in (True, False):
            if (self.rank == 0) == turn:
                found = load(data.fasta, self.folder / GENOME, bad_records=data.bad_records)
            if self.comm is not None:
                self.comm.barrier()
        return found

    def resume(self) -> int:
        """Go on from the newest checkpoint; the steps that it has taken, 0 where there is none."""
        path = checkpoint.latest(self.folder / CHECKPOINTS)
        if path is None:
            return 0
        return checkpoint.restore(
            path, self.model, self.optimizer, comm=self.comm, facts=self.settings.facts()
        )

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        checkpoint.save(
            self.folder / CHECKPOINTS,
            step,
            self.model,
            self.optimizer,
            comm=self.comm,
            facts=self.settings.facts(),
            keep=self.settings.training.keep,
        )

    def begin(self, step: int) -> dict[str, Any]:
        """What is known at the begin, as a line of the log. Not collective."""
        data, layout = self.settings.data, self.settings.switches.layout
        return {
            "event": "begin",
            "step": step,
            "steps": self.settings.training.steps,
            "model": self.settings.model.name,
            "parameters": self.settings.model.parameters,
            "layout": vars(layout),
            "device": self.device,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "files": [path.name for path in data.fasta],
            "records": len(self.training_part.spans),
            "skipped": list(self.skipped),
            "bases": self.training_part.length,
            "held_out_bases": self.held_out_part.length,
            "tokens": data.tokens,
            "length": data.length,
            "batch": data.batch,
            "steps_per_epoch": self.windows.epoch / data.batch,
            "markov_order": data.markov,
            "markov_bits_per_base": self.markov_bits,
        }

    def step(self, step: int) -> dict[str, Any]:
        """Take a step, counted from 0; what it was like, as a line of the log.

        Raises:
            Diverged: The loss or the gradient is no number. Parameters are as before.
        """
        began, sent = time.perf_counter(), self._sent()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = self.settings.training.rate(step)
        one = self._batch(self._own(self.windows.at(step)))
        count = self._count(one)
        mean = self._differentiated(one, count)
        norm, longest = self._norm(), self.settings.training.clip
        if not (math.isfinite(mean) and math.isfinite(norm)):
            kept = checkpoint.latest(self.folder / CHECKPOINTS)
            raise Diverged(
                f"step {step + 1}: the loss is {mean:g} and its gradient has norm {norm:g}; "
                f"the last checkpoint is {kept or 'none'}"
            )
        self.optimizer.step(rate, scale=longest / norm if norm > longest else 1.0)
        seconds = time.perf_counter() - began
        data = self.settings.data
        return {
            "event": "step",
            "step": step + 1,
            "loss": mean,
            "bits_per_base": mean / math.log(2) / data.tokenizer.width,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": count,
            "seconds": seconds,
            "tokens_per_second": data.batch * data.length / seconds,
            "sent_bytes": int(self._total(self._sent() - sent)),
            "peak_bytes": int(max(self._gathered(self._peak()))),
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, Any]:
        """Predict the held-out part, all of it; how well, as a line of the log."""
        began = time.perf_counter()
        data, own = self.settings.data, self.settings.switches.layout.data
        every = held_out(self.held_out_part, data.tokenizer, data.length)
        windows, size = every[self.copy :: own], data.batch // own
        total, count = 0.0, 0
        # All copies call equally often, with as many windows: where states are sharded they share
        # a call, and stages of a pipeline know shapes beforehand.
        for start in range(0, -(-len(every) // own), size):
            some = windows[start : start + size]
            one = self._batch([*some, *every[:1] * (size - len(some))], once=True)
            one.labels[len(some) :] = IGNORE
            total += self._summed_loss(one)
            count += int((one.labels != IGNORE).sum())
        nats = self._total(total) / self.settings.switches.layout.tensor
        labelled = round(self._total(count)) // self._same
        loss = nats / max(labelled, 1)
        if self.rank == 0 and labelled * data.tokenizer.width != self.markov_bases:
            raise AssertionError(
                f"the model predicts {labelled} tokens of {data.tokenizer.width} bases, "
                f"the Markov model {self.markov_bases} bases"
            )
        return {
            "event": "held out",
            "step": step,
            "loss": loss,
            "bits_per_base": loss / math.log(2) / data.tokenizer.width,
            "tokens": labelled,
            "bases": labelled * data.tokenizer.width,
            "seconds": time.perf_counter() - began,
        }

    # --- a rank's part ---

    @property
    def _parts(self) -> int:
        """How many times a copy computes in a step, one after the other."""
        data, layout = self.settings.data, self.settings.switches.layout
        return data.batch // layout.data // (data.at_once or data.batch // layout.data)

    @property
    def _same(self) -> int:
        """How many ranks have the same tokens."""
        return self.settings.switches.layout.tensor * self.settings.switches.layout.pipeline

    def _own(self, windows: Sequence[Window]) -> Sequence[Window]:
        """This copy's windows of a step."""
        each = len(windows) // self.settings.switches.layout.data
        return windows[self.copy * each : (self.copy + 1) * each]

    def _batch(self, windows: Sequence[Window], *, once: bool = False) -> Batch:
        rank = 0 if self.engine is None else self.engine.sequence.rank
        found = batch(windows, self.sharding, rank, once=once)
        segments = None if found.segments is None else found.segments.to(self.device)
        return Batch(found.tokens.to(self.device), found.labels.to(self.device), segments)

    def _count(self, one: Batch) -> int:
        """Labelled tokens of all copies and all ranks of a sequence."""
        return round(self._total(int((one.labels != IGNORE).sum()))) // self._same

    def _differentiated(self, one: Batch, count: int) -> float:
        """The mean loss, whose gradient parameters have afterwards."""
        parts = self._parts
        if self.engine is not None:
            return self.engine.differentiate(
                one.tokens,
                one.labels,
                sharding=self.sharding,
                segments=one.segments,
                microbatches=parts,
            )
        total = 0.0
        for some, segments in _cut(one, parts):
            loss = self.model(*some, segments=segments, count=count)
            loss.backward()
            total += loss.item()
        return total

    def _summed_loss(self, one: Batch) -> float:
        """The loss of this rank's tokens, as a sum; of stages the last has it."""
        parts = self._parts
        if self.engine is not None:
            return self.engine.summed_loss(
                one.tokens,
                one.labels,
                sharding=self.sharding,
                segments=one.segments,
                microbatches=parts,
            )
        return sum(float(self.model(*some, segments=at, count=1)) for some, at in _cut(one, parts))

    def _norm(self) -> float:
        """The norm of the gradient of all parameters."""
        layout = self.settings.switches.layout
        replicas = layout.data * layout.sequence * layout.tensor
        squares: dict[torch.device, list[Tensor]] = {}
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            gradient, parts = p.grad, 1
            if isinstance(gradient, DTensor):
                mesh = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
                parts = math.prod(size for size, how in mesh if not how.is_replicate())
                gradient = gradient.to_local()
            elif name == TABLE and isinstance(self.model.position_table, PartitionedTable):
                parts = layout.sequence
            # all ranks' are added up, as often as a part is there
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double()
            squares.setdefault(norm.device, []).append(norm.square() * parts / replicas)
        own = sum(float(torch.stack(some).sum()) for some in squares.values())
        return math.sqrt(self._total(own))

    def _gathered(self, x: float, comm: Communicator | None = None) -> list[float]:
        """A number of each rank."""
        comm = comm or self.comm
        if comm is None:
            return [x]
        found = comm.all_gather(np.array([x]), [(1,)] * comm.size, operation="figures")
        return [float(one[0]) for one in found]

    def _total(self, x: float) -> float:
        return sum(self._gathered(x))

    def _sent(self) -> int:
        """Bytes that this rank has sent by our communicators; PyTorch's engines do not say."""
        if self.comm is None or self.engine is None:
            return 0
        ours = (self.comm, self.engine.sequence, self.engine.copies, self.engine.sharers)
        return sum(sum(comm.traffic.bytes_by.values()) for comm in ours)

    def _peak(self) -> int:
        """The most bytes held: of a GPU's memory in this step, or of this process's so far."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _switches(settings: Settings, ranks: int, *, grouped: bool) -> Switches:
    """The switches for so many ranks: if no layout was given, all share the sequence."""
    switches, model, data = settings.switches, settings.model, settings.data
    if switches.layout.ranks == 1 < ranks:
        switches = switches.but(layout=Layout(sequence=ranks))
    layout = switches.layout
    if layout.ranks != ranks:
        raise WrongSettings(f"switches.layout is for {layout.ranks} ranks, but there are {ranks}")
    found = []
    if switches.optimizer != "replicated" and not grouped:
        found.append(f"optimizer={switches.optimizer} without a process group")
    if found:
        raise Unsupported(found, "isoform train-genome")
    try:
        switches.check(model)
    except ValueError as problem:
        raise WrongSettings(f"switches.layout: {problem}") from problem
    if data.batch % layout.data:
        raise WrongSettings(f"data.batch={data.batch} must be a multiple of {layout.data} copies")
    if data.at_once and data.batch // layout.data % data.at_once:
        raise WrongSettings(
            f"data.at_once={data.at_once} must divide the {data.batch // layout.data} windows that "
            "a copy has in a step"
        )
    own = data.batch // layout.data
    if layout.pipeline > max(1, own // (data.at_once or own)):
        raise WrongSettings(
            f"data.at_once={data.at_once}: the {own} windows that a copy has in a step must be at "
            f"least as many times so many as there are stages, {layout.pipeline}"
        )
    if model.positions == "learned" and model.max_length < data.length:
        raise WrongSettings(
            f"model.max_length={model.max_length} is less than data.length={data.length}"
        )
    return switches


def _cut(one: Batch, parts: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor | None]]:
    """Tokens and labels, and segments, of some windows at a time."""
    for number in range(parts):
        rows = slice(number * len(one.tokens) // parts, (number + 1) * len(one.tokens) // parts)
        segments = None if one.segments is None else one.segments[rows]
        yield (one.tokens[rows], one.labels[rows]), segments


def markov_bits(train: Genome, test: Genome, data: Data) -> tuple[float, int]:
    """The Markov model's cross entropy of the bases that a language model is asked for.

    Those are the bases of every word but the first of a span, if all of them are known. The Markov
    model sees the bases before a word whether or not they are in the same window.

    Returns:
        Bits a base, and of how many bases.
    """
    stretches = [train.bases[span.start : span.stop] for span in train.spans]
    model = markov.fit(stretches, data.markov, strands=data.strands)
    width, total, count = data.tokenizer.width, 0.0, 0
    for span in test.spans:
        bases = test.bases[span.start : span.stop]
        words = bases[: len(bases) // width * width].reshape(-1, width)
        asked = (words < 4).all(1) & (np.arange(len(words)) > 0)
        bits = model.bits(bases)[: words.size].reshape(-1, width)
        total += float(bits[asked].sum())
        count += int(asked.sum()) * width
    return total / max(count, 1), count
