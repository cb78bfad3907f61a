"""What long-sequence training gains on one GPU: the longest sequence, time and memory, two schemes.

    python -m isoform.parallel.benchmark.genome --record genome.jsonl

Both schemes are :class:`~isoform.parallel.training.switches.Switches` of one model, measured in one
process under one limit of memory, in bfloat16, with AdamW on float32 copies: 16 bytes for each
parameter. A *step* is forward, backward and optimizer, of one sequence.

*Longest.* The largest length whose whole step fits. It is found by running steps: three short ones
say how memory grows, the length that follows is tried, and others around it until one that is a few
percent longer does not fit. For the new scheme a query looks back only :data:`WINDOW` positions
while this is done: every tensor is there in its size, and a step takes a minute instead of hours.
Its peak with and without a window is recorded at one length, by the same kernel. What it keeps on
the host has a limit too, and lengths end where a tensor has 2³¹ numbers.

*Time.* Of steps with whole attention: the median of some, after one that is not counted.
``model_flops`` are those of forward and backward without what is computed again: 6 for each weight
of a layer and each token, 6·L²·hidden for causal attention of each block; ``mfu`` is their rate
over the card's dense bfloat16 peak.

``--part step`` is a single step, of 2.5B parameters and 512K tokens by default. Its attention alone
is 2.7·10¹⁷ operations; all of it took an H200 eleven minutes: a line is written when each block is
done.

``--part shared`` gives each sequence to ``--ranks`` GPUs, each under the same limits: ring, zigzag,
parameters and optimizer states sharded. Lengths are those that are asked for, up to the first that
does not fit, with the window. Ranks are started for each, for one that is out of memory leaves the
others waiting. Pages are locked before the step, whose time is without that.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoform.parallel.communicator import Communicator
from isoform.parallel.launch import LaunchError, Transport, launch
from isoform.parallel.training.memory import Counted
from isoform.parallel.training.model import TrainingLM, build
from isoform.parallel.training.precision import MasterAdamW
from isoform.parallel.training.switches import BASELINE, EVERYTHING, Layout, Switches
from isoform.reference.torch.genome_lm import CONFIGURATIONS, Configuration

GIB = 2**30
WINDOW = 1024
"""Positions that a query looks back while the longest length is sought."""

EXACT = 2**21
"""Positions at which angles of the rotary embedding are exact."""

ELEMENTS = 2**31 - 1
"""Numbers in a tensor: not all that PyTorch does on a GPU has been seen to count further."""

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, by what the card's name contains."""

SCHEMES: dict[str, Switches] = {
    "baseline": BASELINE,
    "new": EVERYTHING.but(head_groups=4, tile=16384),
}
WITHOUT: dict[str, dict[str, Any]] = {
    "attention": {"attention": "stored"},
    "loss": {"loss": "whole"},
    "mlp": {"mlp": "whole"},
    "groups of heads": {"head_groups": 1},
    "offload": {"checkpointing": "blocks"},
    "checkpointing": {"checkpointing": "none", "head_groups": 1},
}
"""What is switched back, one at a time."""

PER_RANK = ("peak_bytes", "host_bytes")
"""What counts of the rank that has most."""


@dataclass(frozen=True)
class Limits:
    """What a run may have.

    Attributes:
        memory: Bytes of tensors on the device.
        host: Bytes of tensors on the host.
        deadline: Of ``time.monotonic()``; what would begin later is left out, and said.
    """

    memory: int
    host: int
    deadline: float


@dataclass(frozen=True)
class Step:
    """What one kind of step took.

    Attributes:
        length: Tokens.
        seconds: Forward, backward and optimizer.
        parts: Seconds of each of the three.
        peak_bytes: The most that PyTorch's tensors held on the device.
        host_bytes: The most that was kept on the host.
        loss: In nats.
    """

    length: int
    seconds: float
    parts: tuple[float, float, float]
    peak_bytes: int
    host_bytes: int
    loss: float


def model_flops(c: Configuration, length: int) -> float:
    """Operations of forward and backward of one sequence, nothing counted twice."""
    weights = c.layers * (4 * c.hidden**2 + 2 * c.hidden * c.ffn) + c.hidden * c.vocabulary
    return 6.0 * weights * length + 6.0 * c.layers * length**2 * c.hidden


class Machine:
    """A device with a limit, its clock and its count of memory.

    Args:
        device: ``"cuda"`` or ``"cpu"``: there, memory is counted by
            :class:`~isoform.parallel.training.memory.Counted`.
        memory: Bytes that tensors may hold.
    """

    def __init__(self, device: str, memory: int) -> None:
        self.on_gpu = device == "cuda"
        # with its number, which a limit asks for
        self.device = torch.device(device, torch.cuda.current_device() if self.on_gpu else 0)
        self._counted = None if self.on_gpu else Counted(memory)
        if self.on_gpu:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), self.device)

    @property
    def peak_rate(self) -> float | None:
        """Operations a second at best; None where that is not known."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else ""
        return next((rate for part, rate in PEAKS.items() if part in name), None)

    def counting(self) -> Any:
        """Within, memory is counted and limited."""
        return self._counted or nullcontext()

    def begin(self) -> None:
        """The peak is counted from now on."""
        if self._counted is not None:
            self._counted.most = self._counted.now
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes since :meth:`begin`."""
        if self._counted is not None:
            return self._counted.most
        return torch.cuda.max_memory_allocated(self.device)

    def now(self) -> float:
        """Seconds, when all that was queued is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def tidy(self) -> None:
        """Give back all memory that nobody holds."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            # page-locked memory too: pieces of one length are not those of another
            getattr(torch._C, "_host_emptyCache", lambda: None)()


class Trainer:
    """A model by one scheme, its optimizer, and steps.

    Args:
        configuration: The model's sizes.
        switches: The scheme.
        machine: Where.
    """

    def __init__(self, configuration: Configuration, switches: Switches, machine: Machine) -> None:
        self.machine = machine
        options: dict[str, Any] = {"device": machine.device, "dtype": torch.bfloat16}
        self.model: TrainingLM = build(configuration, switches, **options)
        self.optimizer = MasterAdamW(self.model.parameters(), lr=1e-4)
        self.step(16)  # moments are made by the first step, and kernels by their first call

    def step(self, length: int, window: int | None = None, kernel: str | None = None) -> Step:
        """One step, of a sequence of random tokens."""
        machine, model = self.machine, self.model
        model.attending.window, model.attending.kernel = window, kernel
        model.offload.most_held = 0
        vocabulary = model.configuration.vocabulary
        tokens = torch.randint(vocabulary, (1, length), device=machine.device)
        machine.begin()
        times = [machine.now()]
        loss = model(tokens)
        times.append(machine.now())
        loss.backward()
        times.append(machine.now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(machine.now())
        parts = (times[1] - times[0], times[2] - times[1], times[3] - times[2])
        host = model.offload.most_held
        return Step(length, times[3] - times[0], parts, machine.peak(), host, loss.item())

    def fits(
        self, length: int, window: int | None = None, kernel: str | None = None
    ) -> Step | None:
        """A step, or None where memory does not suffice."""
        try:
            return self.step(length, window, kernel)
        except torch.OutOfMemoryError:
            pass  # tidied up outside, where the error no longer holds on to anything
        self.optimizer.zero_grad()
        self.machine.now()  # copies that nobody waits for any more
        self.machine.tidy()
        return None

    def close(self) -> None:
        """Let go of everything, also for those who still have this object."""
        self.optimizer.zero_grad()
        del self.model, self.optimizer

    def timed(self, length: int, count: int) -> Step:
        """The step of median duration of ``count``, after one that is not counted."""
        self.step(length)
        found = sorted((self.step(length) for _ in range(count)), key=lambda one: one.seconds)
        return found[len(found) // 2]


def over_ranks(ranks: int) -> Switches:
    """The new scheme, each sequence shared by so many ranks."""
    return SCHEMES["new"].but(layout=Layout(sequence=ranks), strategy="ring", sharding="zigzag")


def shared_step(comm: Communicator, model: str, length: int, device: str, memory: int) -> Step:
    """On a rank: a step of a sequence that all ranks share, with the window. Collective."""
    from isoform.parallel.training.engines import Engine
    from isoform.parallel.training.optimizer import NamedAdamW

    machine, c = Machine(device, memory), CONFIGURATIONS[model]
    with machine.counting():
        states: dict[str, Any] = {"dtype": torch.float32, "compute": torch.bfloat16}
        engine = Engine(c, over_ranks(comm.size), device=machine.device.type, **states)
        optimizer = NamedAdamW(engine.model, betas=(0.9, 0.999), weight_decay=0.01)
        engine.model.attending.window = WINDOW
        times: list[float] = []
        engine.model.register_forward_hook(lambda *_: times.append(machine.now()))
        for tokens in (16 * comm.size, length):  # moments are made by the first step
            sharding = engine.model.sharding(tokens)
            own = sharding.lengths[comm.rank]
            engine.model.offload.reserve(2 * own * c.hidden, c.layers - 1, machine.device)
            x = torch.randint(c.vocabulary, (1, own), device=machine.device)
            machine.begin()
            times[:] = [machine.now()]
            loss = engine.differentiate(x, sharding=sharding)
            times.append(machine.now())
            optimizer.step(1e-4)
            times.append(machine.now())
    parts = (times[1] - times[0], times[2] - times[1], times[3] - times[2])
    host = engine.model.offload.most_held
    return Step(length, times[3] - times[0], parts, machine.peak(), host, loss)


@dataclass
class Search:
    """The longest length that fits.

    Attributes:
        fits: A step of some length, or None.
        memory: Bytes that it may take.
        grain: Lengths are multiples of this.
        ceiling: The largest length that is tried.
        precision: How much longer, relatively, the length may be that is shown not to fit.
        tried: What was found, by length.
    """

    fits: Callable[[int], Step | None]
    memory: int
    grain: int
    ceiling: int
    precision: float = 0.05
    tried: dict[int, Step | None] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """The longest that fitted."""
        return max((length for length, one in self.tried.items() if one), default=0)

    @property
    def bad(self) -> int | None:
        """The shortest that did not."""
        return min((length for length, one in self.tried.items() if not one), default=None)

    def run(self, start: int) -> int:
        """The longest length that fits; what was tried beside it is in :attr:`tried`."""
        self.grain = min(self.grain, self.ceiling)
        for length in (start, 2 * start, 4 * start):
            if not self._try(length):
                break
        for _ in range(8):
            if self._done():
                break
            self._try(self._next())
        return self.good

    def _done(self) -> bool:
        good, bad = self.good, self.bad
        if bad is None:
            return good >= self.ceiling
        return bad - good <= max(self.grain, self.precision * good)

    def _try(self, length: int) -> Step | None:
        length = max(self.grain, min(length, self.ceiling) // self.grain * self.grain)
        if length not in self.tried:
            self.tried[length] = self.fits(length)
        return self.tried[length]

    def _next(self) -> int:
        good, bad = self.good, self.bad
        longer = max(good + self.grain, int(good * (1 + self.precision)))
        return max(longer, self._expected()) if bad is None else min(longer, (good + bad) // 2)

    def _expected(self) -> int:
        """Where the parabola through the lengths that fitted reaches the limit."""
        points = sorted((length, one.peak_bytes) for length, one in self.tried.items() if one)
        if len(points) < 3:
            return 0
        (a, pa), (b, pb), (c, pc) = points[-3:]
        first, second = (pb - pa) / (b - a), (pc - pb) / (c - b)
        curve = max((second - first) / (c - a), 0.0)
        slope = max(second, 1.0)

        def peak(length: int) -> float:
            return pc + slope * (length - c) + curve * (length - c) * (length - b)

        low, high = c, self.ceiling
        while high - low > self.grain:
            middle = (low + high) // 2
            low, high = (middle, high) if peak(middle) <= self.memory else (low, middle)
        return high if peak(high) <= self.memory else low


class Benchmark:
    """All that is measured, written down line by line.

    Args:
        machine: Where.
        limits: What it may have.
        write: Takes each line.
        quick: Fewer lengths.
    """

    def __init__(
        self, machine: Machine, limits: Limits, write: Callable[[dict[str, Any]], None], quick: bool
    ) -> None:
        self.machine, self.limits, self.write, self.quick = machine, limits, write, quick

    def late(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is no time left for something, which is then said."""
        if time.monotonic() + seconds < self.limits.deadline:
            return False
        self.write({"kind": "left out", "what": what, "why": f"no {seconds:.0f} s are left"})
        return True

    @contextmanager
    def trainer(self, c: Configuration, switches: Switches) -> Iterator[Trainer]:
        """A trainer, and all its memory given back."""
        with self.machine.counting():
            one = Trainer(c, switches, self.machine)
            try:
                yield one
            finally:
                one.close()
        self.machine.tidy()

    def line(self, kind: str, c: Configuration, scheme: str, step: Step, **more: Any) -> None:
        """Write a step down.

        Raises:
            FloatingPointError: Its loss is not finite: what took that time was no training.
        """
        if not math.isfinite(step.loss):
            raise FloatingPointError(f"{c.name}, {step.length} tokens: the loss is {step.loss}")
        flops, best = model_flops(c, step.length), self.machine.peak_rate
        self.write(
            {
                "kind": kind,
                "model": c.name,
                "parameters": c.parameters,
                "scheme": scheme,
                **asdict(step),
                "tokens_per_s": step.length / step.seconds,
                "model_flops": flops,
                # flops are of whole attention, so with a window their rate says nothing
                "mfu": None if more.get("window") or not best else flops / step.seconds / best,
                **more,
            }
        )

    def ceiling(self, c: Configuration, switches: Switches) -> tuple[int, str]:
        """The largest length that is tried, and why no larger one."""
        found = [(EXACT, "positions"), (ELEMENTS // c.hidden, "elements of a tensor")]
        if switches.checkpointing == "offloaded":
            each = (c.layers - 1) * c.hidden * 2
            found.append((max(1, self.limits.host // each), "host"))
        return min(found)

    def longest(self, one: Trainer, c: Configuration, scheme: str, start: int) -> int:
        """The longest length of a scheme."""
        switches = SCHEMES[scheme]
        window = None if switches.attention == "stored" else WINDOW
        ceiling, bound = self.ceiling(c, switches)
        # windows are known to our kernels alone
        search = Search(
            lambda length: one.fits(length, window), self.limits.memory, start // 4, ceiling
        )
        found = search.run(start)
        for length, step in search.tried.items():
            if step is None:
                refused = {"kind": "does not fit", "model": c.name, "scheme": scheme}
                self.write({**refused, "length": length, "window": window})
            else:
                self.line("fits", c, scheme, step, window=window)
        more = {"limited_by": "memory" if search.bad else bound, "does_not_fit": search.bad}
        step = search.tried[found]
        assert step is not None, "not even the shortest sequence fits"
        self.line("longest", c, scheme, step, window=window, **more)
        return found

    def tried(self, what: str, part: Callable[[], None]) -> bool:
        """Whether a part went well; if not, the others still run, and why is written down."""
        try:
            part()
        except Exception:
            self.write({"kind": "failed", "what": what, "why": traceback.format_exc()})
            self.machine.tidy()
            return False
        return True

    def model(self, c: Configuration, start: int, lengths: list[int]) -> None:
        """Longest lengths, and times, of both schemes."""
        count = 1 if self.quick else 3
        with self.trainer(c, SCHEMES["baseline"]) as one:
            common = self.longest(one, c, "baseline", start)
            baseline = one.timed(common, count)
            self.line("time", c, "baseline", baseline)
            for length in lengths:
                if length < common:
                    self.line("time", c, "baseline", one.timed(length, count))
        with self.trainer(c, SCHEMES["new"]) as one:
            new = one.timed(common, count)
            self.line("time", c, "new", new)
            last = new
            longest = self.longest(one, c, "new", 4 * start)
            for length in lengths:
                expected = 2.2 * last.seconds * model_flops(c, length) / model_flops(c, last.length)
                if self.late(f"{c.name}, {length} tokens", expected):
                    continue
                last = one.timed(length, 1)
                self.line("time", c, "new", last)
            for window in (None, WINDOW):  # by one kernel, which knows windows
                kernel = "cuda-tensor" if self.machine.on_gpu else None
                probe = one.step(lengths[0], window, kernel)
                self.line("window", c, "new", probe, window=window, kernel=kernel)
        self.write(
            {
                "kind": "gain",
                "model": c.name,
                "longest": {"baseline": common, "new": longest, "ratio": longest / common},
                "seconds": {
                    "length": common,
                    "baseline": baseline.seconds,
                    "new": new.seconds,
                    "ratio": baseline.seconds / new.seconds,
                },
                "peak_bytes": {
                    "length": common,
                    "baseline": baseline.peak_bytes,
                    "new": new.peak_bytes,
                    "ratio": baseline.peak_bytes / new.peak_bytes,
                },
            }
        )

    def switches(self, c: Configuration, length: int) -> None:
        """What each technique is good for: without it, all others on."""
        for without, change in {"nothing": {}, **WITHOUT}.items():
            with self.trainer(c, SCHEMES["new"].but(**change)) as one:
                if one.fits(length) is None:
                    self.write({"kind": "does not fit", "model": c.name, "without": without})
                else:
                    step = one.timed(length, 1)
                    self.line("without", c, "new", step, without=without)

    def step(self, c: Configuration, length: int) -> None:
        """One whole step, a line for each block on the way."""
        with self.trainer(c, SCHEMES["new"]) as one:
            begun = self.machine.now()

            def done(phase: str, block: str) -> None:
                seconds = self.machine.now() - begun
                self.write({"kind": "progress", phase: int(block), "seconds": round(seconds, 3)})

            def hook(block: str) -> Callable[..., None]:
                def after(module: Any, given: Any, out: Tensor) -> None:
                    done("forward", block)
                    # known when what comes after the block has been differentiated
                    hooked: Any = out
                    hooked.register_hook(lambda gradient: done("backward of all after", block))

                return after

            handles = [m.register_forward_hook(hook(n)) for n, m in one.model.blocks.items()]
            begun = self.machine.now()
            one.model.offload.reserve(length * c.hidden * 2, c.layers - 1, self.machine.device)
            self.write({"kind": "host memory", "seconds": round(self.machine.now() - begun, 3)})
            begun = self.machine.now()
            step = one.step(length)
            for handle in handles:
                handle.remove()
        self.line("step", c, "new", step)

    def shared(self, c: Configuration, ranks: int, lengths: list[int]) -> None:
        """Steps of sequences that ranks share, up to the first that does not fit."""
        device, memory = self.machine.device.type, self.limits.memory
        transport: Transport = "torch-nccl" if self.machine.on_gpu else "gloo"
        more = {"window": WINDOW, "ranks": ranks}
        for length in sorted(lengths):
            if self.late(f"{c.name}, {length} tokens over {ranks} ranks"):
                return
            given = (c.name, length, device, memory)
            try:
                steps = launch(shared_step, ranks, *given, transport=transport, limit=400)
            except LaunchError as problem:
                if "OutOfMemoryError" not in str(problem):
                    raise
                refused = {"kind": "does not fit", "model": c.name, "scheme": "new"}
                self.write({**refused, "length": length, **more})
                return
            most = {name: max(getattr(one, name) for one in steps) for name in PER_RANK}
            step = replace(max(steps, key=lambda one: one.seconds), **most)
            self.line("shared", c, "new", step, **more)


def surroundings(commit: str, machine: Machine, limits: Limits) -> dict[str, Any]:
    """Where and when, and under which limits."""
    found: dict[str, Any]
    if machine.on_gpu:
        from isoform.kernels.benchmark.records import surroundings as of_gpu

        found = asdict(of_gpu(commit))
    else:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        found = {"date": date, "commit": commit, "device": platform.processor() or "cpu"}
        found["versions"] = {"torch": torch.__version__}
    found |= {"memory_limit": limits.memory, "host_limit": limits.host}
    schemes = {name: asdict(switches) for name, switches in SCHEMES.items()}
    return {"kind": "surroundings", **found, "dtype": "bfloat16", "schemes": schemes}


def table(line: dict[str, Any]) -> str:
    """A line for people."""
    if "tokens_per_s" not in line:
        return "  ".join(f"{name}={value}" for name, value in line.items() if name != "schemes")
    mfu = "" if line["mfu"] is None else f"{line['mfu']:7.1%} of peak"
    place = f"{line['kind']:8} {line['model']:5} {line['scheme']:9} L={line['length']:<8}"
    without = f"  without {line['without']}" if "without" in line else ""
    window = f"  window {line['window']}" if line.get("window") else ""
    return (
        f"{place} {line['seconds']:9.3f} s {line['tokens_per_s']:10.0f} tokens/s {mfu} "
        f"{line['peak_bytes'] / GIB:7.2f} GiB  host {line['host_bytes'] / GIB:6.1f} GiB"
        f"{window}{without}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        prog="python -m isoform.parallel.benchmark.genome",
        description=str(__doc__).partition("\n\n")[0],
    )
    line.add_argument("--record", type=Path, metavar="FILE", help="append the lines of JSON to it")
    line.add_argument("--commit", default="", help="what is checked out, if git cannot be asked")
    line.add_argument("--quick", action="store_true", help="fewer lengths, one step each")
    line.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    line.add_argument(
        "--memory-gb",
        type=float,
        default=78.0,
        help="GiB for tensors (%(default)s: an H100-80GB's 79.6, less what CUDA takes)",
    )
    line.add_argument("--host-gb", type=float, default=104.0, help="GiB on the host (%(default)s)")
    line.add_argument("--minutes", type=float, default=8.0, help="after which nothing is begun")
    line.add_argument("--part", choices=("models", "switches", "step", "shared"), nargs="+")
    line.add_argument("--models", nargs="+", default=["250M", "2.5B"], choices=[*CONFIGURATIONS])
    line.add_argument("--start", type=int, default=2048, help="the first length tried")
    line.add_argument("--lengths", type=int, nargs="+", help="at which the new scheme is timed")
    line.add_argument("--ranks", type=int, default=2, help="of --part shared (%(default)s)")
    line.add_argument("--length", type=int, default=2**19, help="of --part step (%(default)s)")
    return line


def main(given: list[str] | None = None) -> None:
    """Measure, print and record."""
    asked = arguments().parse_args(given)
    memory, host = int(asked.memory_gb * GIB), int(asked.host_gb * GIB)
    limits = Limits(memory, host, time.monotonic() + 60 * asked.minutes)
    # so that memory in pieces of many sizes is used again, by its name of now and of before
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.setdefault(name, "expandable_segments:True")
    machine = Machine(asked.device, memory)

    def write(line: dict[str, Any]) -> None:
        print(table(line), flush=True)  # noqa: T201
        if asked.record:
            asked.record.parent.mkdir(parents=True, exist_ok=True)
            with asked.record.open("a") as file:
                file.write(json.dumps(line) + "\n")

    around = surroundings(asked.commit, machine, limits)
    write(around)
    bench = Benchmark(machine, limits, write, asked.quick)
    lengths = asked.lengths or ([8192, 32768] if asked.quick else [8192, 32768, 131072])
    parts = asked.part or ["models", "switches"]
    todo: dict[str, Callable[[], None]] = {}
    for name in asked.models if "models" in parts else ():
        c = CONFIGURATIONS[name]
        todo[name] = partial(bench.model, c, asked.start, lengths)
    first, last = CONFIGURATIONS[asked.models[0]], CONFIGURATIONS[asked.models[-1]]
    if "switches" in parts:
        todo["switches"] = partial(bench.switches, first, lengths[0])
    if "step" in parts:
        todo["step"] = partial(bench.step, last, asked.length)
    if "shared" in parts:

        def shared() -> None:
            write(around | {"schemes": {"new": asdict(over_ranks(asked.ranks))}})
            bench.shared(last, asked.ranks, lengths)

        todo["shared"] = shared
    well = [bench.tried(what, part) for what, part in todo.items() if not bench.late(what)]
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    from isoform.parallel.benchmark.genome import main as started  # of the module that ranks import

    started()
