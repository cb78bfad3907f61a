"""Start ranks, run one function on all of them, and bring back what it returned.

What :func:`~isoform.parallel.communicators.simulated.simulate` does with threads, :func:`launch`
does with processes that MPI or ``torch.distributed`` join, so that a test or a notebook runs the
same function on either. Arguments and results travel as pickles in a temporary folder.

Nothing is left running and nothing waits for ever: the first rank that fails ends the others, a
time limit ends all of them, and in both cases the error shows every rank's traceback, or where the
rank was when time was up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO, TypeVar, get_args

from isoform.parallel.communicator import CommunicationError, Communicator

Result = TypeVar("Result")
Transport = Literal["mpi", "gloo", "torch-nccl", "cupy-nccl"]

GRACE = 5.0
"""Seconds that processes have to end after they were asked to, before they are killed."""

MARGIN = 0.5
"""Seconds before the limit at which ranks write down where they are."""

POLL = 0.01
"""Seconds between two looks at the ranks."""

_said: TextIO = sys.stderr
"""In a rank: where it writes what went wrong."""


class LaunchError(CommunicationError):
    """A rank failed, or time was up.

    Attributes:
        tracebacks: By rank, what the ranks that failed or were stopped had to say; the rank that
            failed first is first.
    """

    def __init__(self, message: str, tracebacks: Mapping[int, str], ranks: int) -> None:
        self.tracebacks = dict(tracebacks)
        shown = [f"--- rank {r} of {ranks} ---\n{text}" for r, text in tracebacks.items()]
        super().__init__("\n".join([message, *shown]))


class Named(NamedTuple):
    """A function by where it is, so that another process finds it."""

    module: str
    file: str | None
    name: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Named:
        """Raise TypeError unless the function is at the top level of a module."""
        if "<" in function.__qualname__:
            raise TypeError(f"{function.__qualname__} is not at the top level of a module")
        module = function.__module__
        return cls(module, sys.modules[module].__file__, function.__qualname__)

    def find(self) -> Callable[..., Any]:
        """The function."""
        found: Callable[..., Any] = getattr(self._module(), self.name)
        return found

    def _module(self) -> Any:
        """Its module: by the module's name where that leads to the same file, else by the file."""
        with contextlib.suppress(ImportError):
            found = importlib.import_module(self.module)
            if found.__file__ == self.file:
                return found
        spec = self.file and importlib.util.spec_from_file_location(self.module, self.file)
        if not spec or spec.loader is None:
            raise ImportError(f"{self.file} is no module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.module] = module
        spec.loader.exec_module(module)
        return module


def launch(
    function: Callable[..., Result],
    ranks: int,
    *args: Any,
    transport: Transport = "mpi",
    limit: float = 60.0,
    threads: int = 1,
    **kwargs: Any,
) -> list[Result]:
    """Run ``function(comm, *args, **kwargs)`` on ``ranks`` processes of this machine.

    Args:
        function: At the top level of a module, so that other processes can find it. Called with a
            :class:`~isoform.parallel.Communicator` first.
        ranks: P, 1 or more; more than there are cores is legal.
        args: Given to every rank; must survive pickling.
        transport: ``"mpi"`` (started by ``mpiexec``), or ``"gloo"`` of ``torch.distributed``. On
            GPUs, one for each rank: ``"torch-nccl"``, NCCL of ``torch.distributed``, or
            ``"cupy-nccl"``, NCCL through CuPy; what lies in the host's memory goes by gloo then.
        limit: Seconds after which all ranks are ended.
        threads: Threads that numerical libraries may use in each rank.
        kwargs: As args.

    Returns:
        What the function returned, by rank.

    Raises:
        ValueError: ``ranks`` is less than 1 or the transport is unknown.
        TypeError: The function is not at the top level of a module.
        ImportError: mpi4py, ``mpiexec`` or torch is missing; the message says what to install.
        LaunchError: A rank failed or did not return in time.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if transport not in get_args(Transport):
        raise ValueError(f"transport must be one of {', '.join(get_args(Transport))}")
    named = Named.of(function)
    with tempfile.TemporaryDirectory(prefix="isoform-") as name:
        folder = Path(name)
        deadline = time.time() + limit  # by the clock that all processes share
        (folder / "job").write_bytes(pickle.dumps((transport, deadline, named)))
        (folder / "arguments").write_bytes(pickle.dumps((args, kwargs)))
        status = _run(_commands(transport, ranks, folder), folder, limit, threads)
        return _results(folder, ranks, status, limit)


def mpiexec() -> str:
    """The program that starts MPI ranks: that beside this Python, or else the first on the path.

    Raises:
        ImportError: There is none; the message says what to install.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpiexec", path=beside) or shutil.which("mpiexec")
    if found is None:
        raise ImportError("no mpiexec is found: install one with 'pip install \"isoform[mpi]\"'")
    return found


def _commands(transport: Transport, ranks: int, folder: Path) -> list[tuple[list[str], str]]:
    """The processes to start, each with the rank it is told to be, if it is told."""
    program = ["-m", "isoform.parallel.launch", str(folder)]
    if transport == "mpi":
        command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", *program]
        return [(command, "")]
    return [([sys.executable, *program], f"{rank}/{ranks}") for rank in range(ranks)]


def _run(
    commands: Sequence[tuple[list[str], str]], folder: Path, limit: float, threads: int
) -> str:
    """Run all until they end, one fails or time is up; an empty string if all went well."""
    started: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + limit
    with (folder / "output").open("wb") as output, _ended(started):
        started += (_start(command, rank, output, threads) for command, rank in commands)
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            if time.monotonic() > deadline:
                return "time"
            time.sleep(POLL)
        if any(codes):
            return "failed"
        started.clear()  # all have ended by themselves
        return ""


def _start(
    command: list[str], rank: str, output: BinaryIO, threads: int
) -> subprocess.Popen[bytes]:
    """One process; the tests put another in its place, whose ranks need not import torch anew."""
    count = str(threads)
    env = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    env |= {"MKL_NUM_THREADS": count, "ISOFORM_RANK": rank}
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that all it starts can be ended with it
    )


@contextlib.contextmanager
def _ended(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever happens within, no process outlives it."""
    try:
        yield
    finally:
        for send in (signal.SIGTERM, signal.SIGKILL):
            for process in started:
                # the group, not the process: what mpiexec has started is in it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, send)
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)


def _results(folder: Path, ranks: int, status: str, limit: float) -> list[Any]:
    """What all ranks returned, or the LaunchError that says what went wrong."""
    paths = [folder / f"result-{rank}" for rank in range(ranks)]
    missing = [rank for rank, path in enumerate(paths) if not path.exists()]
    if not status and not missing:
        return [pickle.loads(path.read_bytes()) for path in paths]

    errors = [folder / f"error-{rank}" for rank in range(ranks)]
    said = [path for path in errors if path.exists() and path.stat().st_size]
    said.sort(key=lambda path: path.stat().st_mtime_ns)  # others may fail because the first did
    tracebacks = {errors.index(path): path.read_text() for path in said}
    message = f"not done after {limit:g} s" if status == "time" else "failed"
    message += f": no result of ranks {', '.join(map(str, missing))} of {ranks}"
    if not said:  # killed, or never begun: then what was printed is all there is
        message += f"\n{(folder / 'output').read_text(errors='replace').strip()}"
    raise LaunchError(message, tracebacks, ranks)


# --- in a rank ---


@contextlib.contextmanager
def ends_job_after(seconds: float) -> Iterator[None]:
    """What takes longer within ends this rank, and with it the job; it says where it was.

    However it hangs: in a call of MPI, or holding Python's lock.
    """
    faulthandler.dump_traceback_later(seconds, file=_said)
    before = signal.alarm(math.ceil(seconds + MARGIN))  # in time for all ranks to have spoken
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(before)


def _main(folder: Path) -> None:
    global _said
    transport, deadline, named = pickle.loads((folder / "job").read_bytes())
    # Should nobody be there any more to end this:
    signal.alarm(max(1, math.ceil(deadline - time.time() + 2 * GRACE)))
    comm, ours = _communicators(transport, folder)
    with (folder / f"error-{comm.rank}").open("w") as errors:
        _said = errors
        # Shortly before the limit every rank writes down where it is.
        left = deadline - MARGIN - time.time()
        faulthandler.dump_traceback_later(max(left, POLL), file=errors)
        try:
            function = named.find()
            # Only now, since they may be of classes that the module defines.
            args, kwargs = pickle.loads((folder / "arguments").read_bytes())
            result = function(comm, *args, **kwargs)
        except BaseException:
            errors.write(traceback.format_exc())
            errors.flush()
            raise
        ours.barrier()  # a rank that leaves early may take others' messages with it
        faulthandler.cancel_dump_traceback_later()
    unfinished = folder / f"unfinished-{comm.rank}"
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(folder / f"result-{comm.rank}")


def _communicators(transport: Transport, folder: Path) -> tuple[Communicator, Communicator]:
    """One for the function, and one for us, whose messages the function's cannot meet."""
    if transport == "mpi":
        from isoform.parallel.communicators.mpi import MPICommunicator

        return MPICommunicator(), MPICommunicator()
    from isoform.parallel.communicators.torch_distributed import TorchCommunicator, load

    rank, ranks = map(int, os.environ["ISOFORM_RANK"].split("/"))
    if transport != "gloo":
        _take_gpu(rank, ranks)
    backend = "cpu:gloo,cuda:nccl" if transport == "torch-nccl" else "gloo"
    store = f"file://{folder / 'store'}"
    load().init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    comm: Communicator = TorchCommunicator()
    if transport == "cupy-nccl":
        from isoform.parallel.communicators.nccl import NCCLCommunicator

        comm = NCCLCommunicator(comm)
    return comm, TorchCommunicator(load().new_group(backend="gloo"))


def _take_gpu(rank: int, ranks: int) -> None:
    """Make the rank's own GPU the current one: NCCL joins no two ranks of one GPU."""
    import torch

    if (there := torch.cuda.device_count()) < ranks:
        raise CommunicationError(f"{ranks} ranks of NCCL need as many GPUs, and here are {there}")
    torch.cuda.set_device(rank)


if __name__ == "__main__":
    from isoform.parallel.launch import _main as main  # of the module that others import

    main(Path(sys.argv[1]))
