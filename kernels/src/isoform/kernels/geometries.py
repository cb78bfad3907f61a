"""Geometries that were found on a user's own GPU, instead of the built-in ones.

``python -m isoform.kernels.tune`` measures which tiles are fastest on a GPU and writes them, by the
device's name, into a file. It is read when a pass is first prepared on a device. Where it has
nothing, the built-in geometry stands. Results depend on it in the order of sums alone.

Environment:
    ISOFORM_GEOMETRIES: the file, instead of ``geometries.json`` in isoform's cache directory; where
        there is to be one and is none, that is an error. ``builtin``: the built-in ones, whatever
        there is.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from isoform.kernels import compiler, warpgroup
from isoform.kernels.launch import MULTIPROCESSORS, setting
from isoform.kernels.tensor import (
    GEOMETRIES,
    GROUPED,
    NOTHING_SPECIAL,
    PASSES,
    ROOM,
    SPECIAL,
    TABLE,
    WARPGROUPS,
    WHOLE,
    Geometry,
    Special,
)

SCHEMA = 1
BUILTIN = "builtin"
TUNE = "python -m isoform.kernels.tune"

Table = Mapping[str, Mapping[int, Geometry]]
"""As :data:`isoform.kernels.tensor.GEOMETRIES`, or a part of it."""


class GeometriesError(ValueError):
    """A file of geometries is damaged or missing; the message has its name and the remedy."""


class OutdatedGeometries(UserWarning):
    """A file of geometries is of other kernels, and not used."""


@dataclass(frozen=True)
class Tuned:
    """What a file holds.

    Attributes:
        isoform: The version of the package that it was made with.
        kernels: Which sources of the kernels, :func:`kernels_hash`.
        devices: What was found, by the device's name.
    """

    isoform: str
    kernels: str
    devices: Mapping[str, Table]


def file() -> Path | None:
    """The file that is to be used, which need not be there; None for the built-in geometries."""
    chosen = os.environ.get("ISOFORM_GEOMETRIES", "")
    if chosen == BUILTIN:
        return None
    return Path(chosen) if chosen else compiler.cache_root() / "geometries.json"


@contextmanager
def of_device(name: str, room: int, multiprocessors: int, architecture: str) -> Iterator[None]:
    """While this lasts, passes are cut as was found best on the device ``name``, if anything was,
    and for blocks that may have ``room`` bytes of shared memory.

    Raises:
        GeometriesError: There is a file, and it cannot be read.
    """
    chosen = file()
    table = merged(_for(chosen, name) if chosen else {})
    hopper = architecture == WARPGROUPS
    special = Special(
        WHOLE if room >= ROOM else {},
        GROUPED if hopper else {},
        warpgroup.BACKWARD if hopper else {},
    )
    with (
        setting(TABLE, table),
        setting(MULTIPROCESSORS, multiprocessors),
        setting(SPECIAL, special),
    ):
        yield


@contextmanager
def instead(name: str, head_dim: int, geometry: Geometry) -> Iterator[None]:
    """While this lasts, one pass is cut by ``geometry`` for one head dim, and passes that have
    geometries do what other kernels would do in their place.
    """
    table = merged({name: {head_dim: geometry}})
    with setting(TABLE, table), setting(SPECIAL, NOTHING_SPECIAL):
        yield


def merged(found: Table) -> Table:
    """The built-in table with what was ``found`` in place of its own."""
    return {name: {**builtin, **found.get(name, {})} for name, builtin in GEOMETRIES.items()}


@cache
def _for(path: Path, device: str) -> Table:
    """What the file has for a device, or nothing; it is read once in a process."""
    if not path.exists():
        if os.environ.get("ISOFORM_GEOMETRIES"):
            raise GeometriesError(
                f"ISOFORM_GEOMETRIES names {path}, which does not exist: make it with '{TUNE}', or "
                f"set ISOFORM_GEOMETRIES={BUILTIN}"
            )
        return {}
    tuned = read(path)
    if tuned.kernels != kernels_hash():
        warnings.warn(
            f"{path} was made for other kernels (isoform {tuned.isoform}) and is not used: run "
            f"'{TUNE}' again, or remove it",
            OutdatedGeometries,
            stacklevel=2,
        )
        return {}
    return tuned.devices.get(device, {})


def read(path: Path) -> Tuned:
    """The content of a file.

    Raises:
        GeometriesError: That is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise GeometriesError(f"its schema is {content['schema']}, and this isoform's {SCHEMA}")
        devices = {
            device: {
                name: {int(dim): _geometry(name, int(dim), given) for dim, given in by_dim.items()}
                for name, by_dim in table.items()
            }
            for device, table in content["devices"].items()
        }
        return Tuned(str(content["isoform"]), str(content["kernels"]), devices)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        what = problem if isinstance(problem, GeometriesError) else repr(problem)
        raise GeometriesError(
            f"{path} is no file of geometries ({what}): run '{TUNE}' again, or remove it"
        ) from problem


def write(path: Path, device: str, found: Table) -> None:
    """Put what was found for a device into a file, beside what it has for the same kernels."""
    devices: dict[str, Table] = {}
    if path.exists():
        before = read(path)
        if before.kernels == kernels_hash():
            devices.update(before.devices)
    table = {name: dict(by_dim) for name, by_dim in devices.get(device, {}).items()}
    for name, by_dim in found.items():
        table.setdefault(name, {}).update(by_dim)
    devices[device] = table
    content = {
        "schema": SCHEMA,
        "isoform": _version(),
        "kernels": kernels_hash(),
        "devices": {device: as_plain(table) for device, table in devices.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    _for.cache_clear()


def as_plain(table: Table) -> dict[str, dict[str, dict[str, int]]]:
    """A table as JSON has it."""
    return {
        name: {str(dim): asdict(geometry) for dim, geometry in by_dim.items()}
        for name, by_dim in table.items()
    }


@cache
def kernels_hash() -> str:
    """What the sources of the tensor-core kernels are: what was found for others may not fit."""
    texts = {name: compiler.sources(f"evoformer_tensor_{name}") for name in PASSES}
    return sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def _geometry(name: str, dim: int, given: dict[str, Any]) -> Geometry:
    """One geometry, if it can be one."""
    if name not in GEOMETRIES or dim not in GEOMETRIES[name]:
        raise GeometriesError(f"there is no pass {name!r} with head dim {dim}")
    expected = {field.name for field in fields(Geometry)}
    if given.keys() != expected:
        raise GeometriesError(f"{name}, {dim}: fields {sorted(given)}, not {sorted(expected)}")
    for field, number in given.items():
        if type(number) is not int or number < 1:
            raise GeometriesError(f"{name}, {dim}: {field} is {number!r}, not a positive integer")
    return Geometry(**given)


def _version() -> str:
    try:
        return version("isoform")
    except PackageNotFoundError:  # run from a source tree
        return "not installed"
