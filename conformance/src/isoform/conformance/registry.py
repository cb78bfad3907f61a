"""Implementations by name: those registered as entry points, and anything as ``module:OBJECT``.

A package offers an implementation by an entry point in the group ``isoform.implementations``; those
that come with isoform use the same door. An entry may lead to a dictionary of several, by their
names. Nothing is imported until it is asked for, so that what is not installed (PyTorch, CuPy) is a
reason to report, not an error.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from isoform.conformance.case import UnknownName
from isoform.conformance.implementation import Implementation, adopt
from isoform.conformance.peers import PEERS

GROUP = "isoform.implementations"


class Unavailable(Exception):
    """An implementation is registered, but something that it needs is not installed."""

    def __init__(self, name: str, cause: ImportError) -> None:
        self.name = name
        missing = (cause.name or str(cause)).split(".")[0]
        remedy = f"'pip install {_remedy(missing)}'"
        if isinstance(cause, ModuleNotFoundError):
            super().__init__(f"{name} needs {missing}: install it with {remedy}")
        else:  # it is there, but not what it should be
            super().__init__(f"{name} needs another version of {missing} ({cause}): {remedy}")


class NotHere(Unavailable):
    """A peer cannot run here; the message says what it needs."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


def _remedy(missing: str) -> str:
    """What to install for a module that is missing."""
    extras = {"torch": "torch", "cupy": "cuda13", "mpi4py": "mpi"}
    return f'"isoform[{extras[missing]}]"' if missing in extras else missing


def registered() -> dict[str, EntryPoint]:
    """The entry points of all registered implementations, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP))}


def find(name: str, *, framework: str = "torch", operation: str | None = None) -> Implementation:
    """The implementation called ``name``, or the object that ``module:OBJECT`` names.

    Args:
        name: A registered name, or ``module:OBJECT``; modules in the current directory are found.
        framework: Whose arrays a bare function takes.
        operation: Which operation a bare function is; None for what its signature says.

    Raises:
        UnknownName: There is no such implementation, module or object.
        Unavailable: It needs something that is not installed.
        TypeError: The object is no implementation.
    """
    if ":" in name:
        return _load(name, framework, operation)
    entries = registered()
    if name in PEERS and name not in entries:
        if reason := PEERS[name].why_not():
            raise NotHere(f"{name} is not run here: it {reason}")
        return _load(PEERS[name].target, framework, operation)
    if name not in entries:
        near = get_close_matches(name, PEERS, n=1, cutoff=0.7)  # a peer, where one is meant
        raise UnknownName("implementation", name, [*entries, *near])
    try:
        found = entries[name].load()
        return adopt(found[name] if isinstance(found, Mapping) else found, name=name)
    except ImportError as cause:
        raise Unavailable(name, cause) from cause


def _load(path: str, framework: str, operation: str | None) -> Implementation:
    module_name, _, attribute = path.partition(":")
    if not module_name:
        raise UnknownName("module", module_name, ())
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the caller's own module
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if f"{module_name}.".startswith(f"{cause.name}."):
            raise UnknownName("module", module_name, ()) from cause
        raise Unavailable(path, cause) from cause
    for step in attribute.split("."):
        if not hasattr(found, step):
            raise UnknownName(f"object in {module_name}", attribute, dir(found))
        found = getattr(found, step)
    return adopt(found, framework=framework, operation=operation)
