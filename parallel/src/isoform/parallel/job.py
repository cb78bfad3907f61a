"""Ranks that stay: started once, given one function after the other.

A :class:`Job` does many times what :func:`~isoform.parallel.launch.launch` does once, without the
second that it takes to start ranks. It is what the conformance suite runs its cases on, and serves
a notebook alike::

    with Job(4) as job:
        job.run(function, x)      # function(comm, x) on every rank; what each returned, by rank
        job.run(other, y, limit=5)

The first rank that fails, or a call that is not done in time, ends all ranks, and the error shows
every rank's traceback. The next call starts new ones.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from isoform.parallel.communicator import Communicator
from isoform.parallel.launch import POLL, LaunchError, Named, Transport, ends_job_after, launch

Result = TypeVar("Result")

LONGEST = 24 * 3600.0
"""Seconds after which the ranks are ended, however busy."""


class Job:
    """P ranks on this machine, and a line to each. Started by the first call.

    Args:
        ranks: P, 1 or more.
        transport: ``"mpi"`` or ``"gloo"``, as for :func:`~isoform.parallel.launch.launch`.
        threads: Threads that numerical libraries may use in each rank.
    """

    def __init__(self, ranks: int, *, transport: Transport = "mpi", threads: int = 1) -> None:
        self.ranks = ranks
        self.transport = transport
        self.threads = threads
        self._lines: dict[int, Connection] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self, function: Callable[..., Result], *args: Any, limit: float = 60.0, **kwargs: Any
    ) -> list[Result]:
        """Run ``function(comm, *args, **kwargs)`` on every rank.

        Args:
            function: At the top level of a module.
            args: Given to every rank; must survive pickling.
            limit: Seconds after which all ranks are ended.
            kwargs: As args.

        Returns:
            What the function returned, by rank.

        Raises:
            TypeError: The function is not at the top level of a module.
            ValueError: ``ranks`` is less than 1 or the transport is unknown.
            ImportError: mpi4py, ``mpiexec`` or torch is missing; the message says what to install.
            LaunchError: A rank failed or did not return in time. All have been ended.
        """
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        named = pickle.dumps((limit, Named.of(function)))
        arguments = pickle.dumps((args, kwargs))
        try:
            if self._thread is None:
                self._start()
            for line in self._lines.values():
                line.send_bytes(named)
                line.send_bytes(arguments)
            return self._answers()
        except (EOFError, OSError):  # a rank is no longer there
            raise self._ended() from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks: those that wait for work at once, others when they have done theirs."""
        lines, self._lines = self._lines, {}
        for line in lines.values():
            line.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        self._failure = None
        with (
            tempfile.TemporaryDirectory(prefix="isoform-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door,
        ):
            path = str(Path(folder, "door"))  # in a folder that is ours alone
            door.bind(path)
            door.listen(self.ranks)
            door.settimeout(POLL)
            self._thread = threading.Thread(target=self._launch, args=(path,), daemon=True)
            self._thread.start()
            while len(self._lines) < self.ranks:
                try:
                    line = Connection(door.accept()[0].detach())
                except TimeoutError:
                    if not self._thread.is_alive():
                        raise EOFError from None
                    continue
                self._lines[line.recv()] = line

    def _launch(self, path: str) -> None:
        options: dict[str, Any] = {"transport": self.transport, "threads": self.threads}
        try:
            launch(_serve, self.ranks, path, limit=LONGEST, **options)
        except BaseException as error:
            self._failure = error

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        ranks = {line: rank for rank, line in self._lines.items()}
        while len(answers) < self.ranks:
            for line in wait([line for line, rank in ranks.items() if rank not in answers]):
                assert isinstance(line, Connection)
                answers[ranks[line]] = line.recv()
        return [answers[rank] for rank in range(self.ranks)]

    def _ended(self) -> BaseException:
        """What ended the ranks, when all have ended."""
        self.close()
        return self._failure or LaunchError("the ranks have left", {}, self.ranks)


def _serve(comm: Communicator, path: str) -> None:
    """On a rank: do what is asked for, until nobody is there any more to ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.connect(path)
        line = Connection(door.detach())
    with line:
        line.send(comm.rank)
        while True:
            try:
                limit, named = line.recv()
            except (EOFError, ConnectionError):
                return
            with ends_job_after(limit):
                function = named.find()
                args, kwargs = line.recv()  # only now: they may be of classes of its module
                answer = function(comm, *args, **kwargs)
            try:
                line.send(answer)
            except (BrokenPipeError, ConnectionError):
                return
