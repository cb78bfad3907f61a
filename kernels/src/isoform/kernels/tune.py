"""Find the fastest geometries on this GPU, and keep them for it.

The tensor-core kernels cut their work into tiles, and which tiles are best depends on the GPU: on
its shared memory, its registers, and how fast its parts are beside each other. The built-in table
(:data:`isoform.kernels.tensor.GEOMETRIES`) was found on an H100. Here each pass and head dim is
tried with other tiles: beginning with the built-in one, one number of the geometry is changed at a
time, and the fastest is where the next round begins, until nothing is faster. What does not fit,
does not compile or spills registers is left out, as the compile gate would.

What was found is written to a file that this package reads from then on
(:mod:`isoform.kernels.geometries`)::

    python -m isoform.kernels.tune
    python -m isoform.kernels.tune --pass forward --head-dim 32 --json

Needs a GPU, PyTorch, CuPy and rich.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import exp, log
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from isoform.kernels import geometries, tensor
from isoform.kernels.arguments import View
from isoform.kernels.benchmark.cases import CASES
from isoform.kernels.benchmark.timing import Burst, CudaBurst, Quartiles, Steps, in_turns
from isoform.kernels.compiler import CompileError, compile_source, keep, resources
from isoform.kernels.gate import PRODUCTION
from isoform.kernels.launch import Work, prepared
from isoform.kernels.tensor import GEOMETRIES, PASSES, Geometry
from isoform.reference.contract import Shape

STEPS: Mapping[str, tuple[int, ...]] = {
    "m_tiles": (1, 2, 4),
    "warps": (1, 2, 4, 8),
    "rows": (1, 2, 4),
    "block": (16, 32, 64, 128),
    "blocks": (1, 2, 3, 4, 5, 6),
    "chunk": (16, 32, 64, 128),
    "unroll": (1, 2, 4),
}
"""What each number of a geometry may be; the next larger and smaller ones are tried."""

MOST_THREADS = 1024
FASTER = 0.01
"""By what share a geometry must be faster to take another's place: less is the clock's noise."""

ROUNDS = 3

OTHERS = (
    Shape(1, 64, 512, 512, 4, 4, 64),
    Shape(1, 64, 512, 512, 4, 4, 96),
    Shape(1, 64, 512, 512, 4, 4, 128),
)
"""What is timed for head dims that no case of the benchmarks has."""


@dataclass(frozen=True)
class Task:
    """One entry of the table: a pass, perhaps of gated operands, for one head dim."""

    entry: str
    head_dim: int

    @property
    def name(self) -> str:
        """The pass."""
        return self.entry.partition(",")[0]

    @property
    def gated(self) -> bool:
        """Whether operands have a gate."""
        return self.entry != self.name

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What is timed: the benchmarks' cases of this head dim."""
        all_shapes = (*(case.shape for case in CASES), *OTHERS)
        return tuple(shape for shape in all_shapes if tensor.head_dim(shape.D) == self.head_dim)


@dataclass(frozen=True)
class Found:
    """What came of a task.

    Attributes:
        task: The task.
        before: The built-in geometry.
        best: The fastest.
        speedup: How many times faster it is: the geometric mean over the shapes.
        tried: How many were timed.
        left_out: Why others were not, with how many there are of each reason.
    """

    task: Task
    before: Geometry
    best: Geometry
    speedup: float
    tried: int
    left_out: Mapping[str, int] = field(default_factory=dict)


class Machine(Protocol):
    """What tries a geometry."""

    def refuse(self, task: Task, candidates: Sequence[Geometry]) -> list[str]:
        """Of each candidate, why it cannot be used; empty if it can."""

    def time(self, task: Task, candidates: Sequence[Geometry]) -> dict[Geometry, tuple[float, ...]]:
        """Milliseconds of each candidate, for each of the task's shapes."""


# --- The search -----------------------------------------------------------------------------------


def tasks(passes: Iterable[str] = (), head_dims: Iterable[int] = ()) -> tuple[Task, ...]:
    """The entries of the table, of some passes and head dims; all, if none are given."""
    names, dims = set(passes), set(head_dims)
    every = (Task(entry, dim) for entry, by_dim in GEOMETRIES.items() for dim in by_dim)
    return tuple(
        task
        for task in every
        if (not names or task.name in names) and (not dims or task.head_dim in dims)
    )


def neighbours(geometry: Geometry) -> Iterator[Geometry]:
    """What differs from ``geometry`` by one step in one number, and can be at all."""
    for name, steps in STEPS.items():
        now = getattr(geometry, name)
        smaller = [step for step in steps if step < now][-1:]
        larger = [step for step in steps if step > now][:1]
        for step in (*smaller, *larger):
            candidate = replace(geometry, **{name: step})
            if candidate.chunk <= candidate.block:
                yield candidate


def search(
    task: Task, before: Geometry, machine: Machine, told: Callable[[str], None] = lambda said: None
) -> Found:
    """The fastest geometry for ``task`` that is reached from ``before`` in faster and faster steps.

    Args:
        task: What it is for.
        before: Where to begin.
        machine: Tries them.
        told: Is told what is being done.

    Raises:
        RuntimeError: There one cannot begin: it cannot be used here.
    """
    if reason := machine.refuse(task, [before])[0]:
        raise RuntimeError(f"{task}: {before} cannot be used: {reason}")
    best, speedup, seen, tried = before, 1.0, {before}, 1
    left_out: dict[str, int] = {}
    while True:
        fresh = [candidate for candidate in neighbours(best) if candidate not in seen]
        seen.update(fresh)
        told(f"{len(fresh)} compiled")
        usable = []
        for candidate, reason in zip(fresh, machine.refuse(task, fresh), strict=True):
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                usable.append(candidate)
        if not usable:
            break
        told(f"{len(usable)} timed")
        tried += len(usable)
        times = machine.time(task, [best, *usable])
        gains = {one: _gain(times[best], times[one]) for one in usable if one in times}
        leader = max(gains, key=gains.__getitem__, default=best)
        if gains.get(leader, 0.0) < 1 + FASTER:
            break
        best, speedup = leader, speedup * gains[leader]
    return Found(task, before, best, speedup, tried, left_out)


def _gain(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times faster: the geometric mean over shapes."""
    ratios = [log(was / now) for was, now in zip(before, after, strict=True)]
    return exp(sum(ratios) / len(ratios))


# --- The GPU --------------------------------------------------------------------------------------


def too_large(task: Task, geometry: Geometry, shared_limit: int) -> str:
    """Why a block of this geometry cannot be launched; empty if it can."""
    if geometry.threads > MOST_THREADS:
        return f"more than {MOST_THREADS} threads"
    with geometries.instead(task.entry, task.head_dim, geometry):
        size = tensor.shared_bytes(task.name, task.head_dim, gated=task.gated)
    return f"more than {shared_limit} bytes of shared memory" if size > shared_limit else ""


def refused_by_compiler(task: Task, architecture: str, geometry: Geometry) -> str:
    """Compile the variant into the disk cache; why it cannot be used, or nothing."""
    with geometries.instead(task.entry, task.head_dim, geometry):
        chosen = {**PRODUCTION, "GATED": int(task.gated)}
        defines = tensor.variant(task.name, "bfloat16", task.head_dim, chosen)
    source = f"evoformer_tensor_{task.name}"
    try:
        compiled = compile_source(source, architecture=architecture, defines=defines)
    except CompileError:
        return "does not compile"
    taken = resources(compiled.log).values()
    if any(one.spill_stores or one.spill_loads for one in taken):
        return "spills registers"
    keep(compiled)
    return ""


class Gpu:
    """The current GPU.

    Args:
        jobs: Processes that compile.
        burst: Times calls.
    """

    def __init__(self, jobs: int, burst: Burst) -> None:
        import cupy

        device = cupy.cuda.Device()
        runtime = cupy.cuda.runtime
        self.name: str = runtime.getDeviceProperties(device.id)["name"].decode()
        self.architecture = f"sm_{device.compute_capability}"
        self.shared_limit: int = device.attributes["MaxSharedMemoryPerBlockOptin"]
        self._burst = burst
        self._stack = ExitStack()
        context = get_context("spawn")
        self._pool = self._stack.enter_context(ProcessPoolExecutor(jobs, context))
        self._operands: tuple[Task, list[tuple[Shape, dict[str, Any]]]] | None = None

    def close(self) -> None:
        """End the processes that compile."""
        self._stack.close()

    def refuse(self, task: Task, candidates: Sequence[Geometry]) -> list[str]:
        """As :class:`Machine` says."""
        fits = [too_large(task, one, self.shared_limit) for one in candidates]
        asked = [one for one, reason in zip(candidates, fits, strict=True) if not reason]
        compile_one = partial(refused_by_compiler, task, self.architecture)
        answers = iter(self._pool.map(compile_one, asked))
        return [reason or next(answers) for reason in fits]

    def time(self, task: Task, candidates: Sequence[Geometry]) -> dict[Geometry, tuple[float, ...]]:
        """As :class:`Machine` says."""
        found: dict[Geometry, list[float]] = {one: [] for one in candidates}
        for shape, tensors in self._tensors(task):
            calls = {str(one): _call(task, one, shape, tensors) for one in candidates}
            sampled, failed = in_turns(calls, ROUNDS, self._burst)
            for one in candidates:
                if str(one) in failed:
                    raise TimeoutError(f"{task}: {failed[str(one)]}")
                launched = sampled[str(one)].gpu_ms[-1]
                found[one].append(Quartiles.of(launched).median)
        return {one: tuple(ms) for one, ms in found.items()}

    def _tensors(self, task: Task) -> list[tuple[Shape, dict[str, Any]]]:
        """What the pass is given, for each shape: kept until another task is asked for."""
        if self._operands is None or self._operands[0] != task:
            self._operands = None  # makes room
            self._operands = (task, [(shape, _draw(task, shape)) for shape in task.shapes])
        return self._operands[1]


WANTED = {
    "backward_query": ("dq", "dgate"),
    "backward_key": ("dk", "dv"),
    "backward_pair_bias": ("dpair_bias",),
}
"""The gradients that a pass computes, as far as it is timed."""


def _call(task: Task, geometry: Geometry, shape: Shape, tensors: Mapping[str, Any]) -> Steps:
    """What launches the task's kernel, and no other of its pass, cut by ``geometry``.

    The step before it does away with what the last call has counted in the scratch memory.
    """
    import torch

    def alone(shape: Shape, dtype: str, views: Mapping[str, View]) -> Work:
        with geometries.instead(task.entry, task.head_dim, geometry):
            if task.name == "forward":
                work = tensor.forward(shape, dtype, views)
            else:
                wanted = [name[1:] for name in WANTED[task.name] if name in views]
                work = tensor.backward(shape, dtype, views, wanted)
        kernel = f"evoformer_tensor_{task.name}"
        return replace(work, launches=tuple(one for one in work.launches if one.kernel == kernel))

    views = {name: View.of(x.data_ptr(), x.shape, x.stride()) for name, x in tensors.items()}
    key = ("tune", task, geometry, shape)
    ready = prepared(key, alone, lambda: (shape, "bfloat16", views), shape.D**-0.5)
    scratch = {
        name: torch.zeros(size, dtype=torch.float32, device="cuda")
        for name, size in ready.scratch.items()
    }
    pointers = [x.data_ptr() for x in (*tensors.values(), *scratch.values())]
    stream = torch.cuda.current_stream().cuda_stream
    counters = scratch.get("turns")

    def reset() -> None:
        if counters is not None:
            counters.zero_()

    return reset, lambda: ready.launch(pointers, stream)


def _draw(task: Task, shape: Shape) -> dict[str, Any]:
    """Operands, results and what the forward keeps, in bfloat16, on the GPU."""
    import torch

    from isoform.kernels import torch_op
    from isoform.kernels.choice import BY_NAME

    names = ("q", "k", "v", "mask", "mask_bias", "pair_bias", *(["gate"] if task.gated else []))
    operands: dict[str, Any] = {
        name: torch.randn(shape.of(name), device="cuda").to(torch.bfloat16) for name in names
    }
    operands["mask"] = torch.rand(shape.of("mask"), device="cuda") > 0.1
    kernel, scale = "cuda-tensor", shape.D**-0.5
    given = [operands.get(name) for name in (*names[:6], "gate")]
    out, _, saved = torch_op.attention(*given, scale, kernel, False, True)
    tensors = {**operands, "out": out, **torch_op._parts(BY_NAME[kernel], saved)}
    for name in WANTED.get(task.name, ()):
        if name[1:] in operands:
            tensors[name] = torch.empty_like(operands[name[1:]])
    if task.name != "forward":
        tensors["dout"] = torch.randn_like(out)
    return tensors


# --- The command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m isoform.kernels.tune",
        description="Find the fastest tiles of the tensor-core kernels on this GPU, and keep them "
        "in a file that isoform reads from then on. Takes some minutes, most of them to compile.",
        epilog="ISOFORM_GEOMETRIES names another file to be read, or 'builtin' to read none. "
        "Exit codes: 0 done, 2 usage, 3 no GPU.",
    )
    made.add_argument(
        "--pass",
        dest="passes",
        action="append",
        choices=PASSES,
        default=[],
        help="only this one; may be given several times",
    )
    made.add_argument(
        "--head-dim",
        dest="head_dims",
        action="append",
        type=int,
        choices=tensor.HEAD_DIMS,
        default=[],
        help="only this one; may be given several times",
    )
    made.add_argument(
        "--output", type=Path, metavar="FILE", help="another file than the one isoform reads"
    )
    made.add_argument("--dry-run", action="store_true", help="find and show, but write no file")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    made.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that compile (%(default)s)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from isoform.kernels.benchmark.__main__ import no_gpu

    line = parser()
    asked = line.parse_args(arguments)
    target = asked.output or geometries.file()
    if target is None and not asked.dry_run:
        line.error(f"ISOFORM_GEOMETRIES is {geometries.BUILTIN}: say --output FILE, or --dry-run")
    if why := no_gpu() or _no_rich():
        print(why, file=sys.stderr)  # noqa: T201
        return 3
    burst = CudaBurst()
    burst.warm_up()
    gpu = Gpu(asked.jobs, burst)
    try:
        found = run(tasks(asked.passes, asked.head_dims), gpu)
    finally:
        gpu.close()
    if not asked.dry_run and target is not None:
        geometries.write(target, gpu.name, table_of(found))
    show(found, gpu.name, None if asked.dry_run else target, as_json=asked.json)
    return 0


def run(chosen: Sequence[Task], machine: Machine) -> list[Found]:
    """Do the tasks, with a progress bar on the standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(chosen))
        found = []
        for task in chosen:
            place = f"{task.entry}, head dim {task.head_dim}"
            progress.update(bar, description=place)

            def told(said: str, place: str = place) -> None:
                progress.update(bar, description=f"{place}: {said}")

            found.append(search(task, GEOMETRIES[task.entry][task.head_dim], machine, told))
            progress.advance(bar)
    return found


def table_of(found: Iterable[Found]) -> dict[str, dict[int, Geometry]]:
    """The best geometries, as a table."""
    table: dict[str, dict[int, Geometry]] = {}
    for one in found:
        table.setdefault(one.task.entry, {})[one.task.head_dim] = one.best
    return table


def show(found: Sequence[Found], device: str, target: Path | None, *, as_json: bool) -> None:
    """Print what was found, for people or for scripts."""
    if as_json:
        entries = [{**asdict(one), "task": asdict(one.task)} for one in found]
        said = {"device": device, "file": str(target) if target else None, "found": entries}
        print(json.dumps(said, indent=1))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Geometries for {device}", title_justify="left")
    for head in ("pass", "head dim", "before", "best", "faster", "tried", "left out"):
        table.add_column(
            head, justify="right" if head in ("head dim", "faster", "tried") else "left"
        )
    for one in found:
        same = one.best == one.before
        table.add_row(
            one.task.entry,
            str(one.task.head_dim),
            _brief(one.before, one.before),
            "the same" if same else _brief(one.best, one.before),
            "" if same else f"{100 * (one.speedup - 1):.0f} %",
            str(one.tried),
            ", ".join(f"{n} {reason}" for reason, n in one.left_out.items()),
        )
    console = Console()
    console.print(table)
    console.print(f"written to {target}" if target else "nothing was written", highlight=False)


def _brief(geometry: Geometry, before: Geometry) -> str:
    """The numbers of a geometry, or those of it that are not as ``before``."""
    changed = {
        name: number
        for name, number in asdict(geometry).items()
        if geometry is before or number != getattr(before, name)
    }
    return " ".join(f"{name}={number}" for name, number in changed.items())


def _no_rich() -> str:
    """What to install for the table and the progress bar; empty if it is there."""
    try:
        import rich  # noqa: F401
    except ImportError:
        return "tuning shows its progress with rich: pip install rich"
    return ""


if __name__ == "__main__":
    sys.exit(main())
