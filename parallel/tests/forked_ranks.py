"""Ranks that need not import torch: forks of processes that have.

Importing torch and its engines takes three to six seconds of a core from every rank, a fork takes
none. A fork is a process of its own, with a session and memory of its own, which runs what
``python -m isoform.parallel.launch`` runs and ends as an interpreter ends. What it has not is a
fresh interpreter: tests of ``test_launch.py`` start ranks as users do.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from isoform.parallel import launch as launching

PRELOADED = (
    "isoform.parallel.axial",
    "isoform.parallel.training.engines",
    "isoform.parallel.training.loop",
)
"""What ranks would import; of the tests' own files nothing."""

SERVERS = 2
"""Neighbours come from different ones, so that strings have different hashes in them, as in ranks
that are started one by one, and sets of strings different orders."""

usual_start = launching._start


def start(command: list[str], rank: str, output: BinaryIO, threads: int) -> Any:
    """In the place of ``isoform.parallel.launch._start``: of gloo's ranks of one thread, a fork."""
    folder = Path(command[-1])
    transport = pickle.loads((folder / "job").read_bytes())[0]
    if transport != "gloo" or threads != 1:
        return usual_start(command, rank, output, threads)
    while len(_servers) < SERVERS:  # all at the first rank, since they import at the same time
        _servers.append(Server())
    server = _servers[int(rank.partition("/")[0]) % SERVERS]
    return Fork(
        server, server.ask(str(folder), {**os.environ, "ISOFORM_RANK": rank}, str(Path.cwd()))
    )


def end() -> None:
    """End the processes that fork."""
    while _servers:
        _servers.pop().close()


class Server:
    """A process that forks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a Job starts its ranks on a thread of its own
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, **dict.fromkeys(THREADS, "1")},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt is for whoever asks
            )
        self._line = Connection(ours.detach())

    def ask(self, *question: Any) -> Any:
        """Its answer."""
        with self._lock:
            self._line.send(question)
            return self._line.recv()

    def close(self) -> None:
        """End it."""
        self._line.close()
        self._process.wait()


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_servers: list[Server] = []


class Fork:
    """As much of a ``subprocess.Popen`` as ``launch`` uses."""

    def __init__(self, server: Server, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        if self._code is None:
            self._code = self._server.ask(self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        """The same; TimeoutExpired if it has not ended by then."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(launching.POLL)
        return code


# --- in a process that forks, and in its forks ---


def _serve(line: Connection) -> str | None:
    """Answer: in a fork the folder of its job, and None when nobody asks any more."""
    while True:
        try:
            question = line.recv()
        except (EOFError, ConnectionError):
            return None
        if len(question) == 1:
            pid, status = os.waitpid(question[0], os.WNOHANG)
            line.send(os.waitstatus_to_exitcode(status) if pid else None)
        elif pid := os.fork():
            line.send(pid)
        else:
            line.close()
            return _become(*question)


def _become(folder: str, env: dict[str, str], cwd: str) -> str:
    """What ``subprocess`` does between its fork and its exec; returns the folder."""
    os.setsid()
    output = str(Path(folder, "output"))
    for to, path, how in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_APPEND)):
        opened = os.open(path, how)
        os.dup2(opened, to)
        os.close(opened)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    return folder


def _main(line: Connection) -> None:
    for name in PRELOADED:
        import_module(name)
    gc.freeze()  # what is there already is nobody's garbage, and stays shared
    if (folder := _serve(line)) is not None:
        launching._main(Path(folder))


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])))
