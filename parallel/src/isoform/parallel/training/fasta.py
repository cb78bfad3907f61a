"""FASTA as a stream: records, their letters in pieces, and everything that is wrong, by line.

A file is read once, in pieces of bounded size, however long its lines and records are; gzip (one
member or many, as bgzip writes) is known by its first bytes, not by its name. What comes is a
sequence of events, in the order of the file::

    Record    a header line was read
    Letters   bases of the latest record: upper case, U as T, no line ends
    Fault     something is wrong; it says in which file, line and record

Nothing is dropped: every byte of the file is in a record, in letters, or in a fault. The reader
goes on after a fault, so that all of them are found at once; what to do about them is the caller's.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

PIECE = 2**20
"""Bytes that are read at once."""

LETTERS = b"ACGTRYSWKMBDHVN"
"""The bases, and IUPAC's letters for those that are not known exactly."""

SHOWN = 20
"""Faults that an error lists; it counts the others."""

_READ = bytes.maketrans(b"acgtryswkmbdhvnuU", b"ACGTRYSWKMBDHVNTT")
_OTHER = re.compile(b"[^" + LETTERS + b"]")


@dataclass(frozen=True)
class Record:
    """One sequence of a file, as its header names it.

    Attributes:
        name: The header's first word.
        description: The rest of it.
        file: The file that it is in.
        line: The line of its header, from 1.
    """

    name: str
    description: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: record {self.name or 'without a name'}"


@dataclass(frozen=True)
class Letters:
    """Some of a record's bases.

    Attributes:
        letters: At least one of :data:`LETTERS`.
        line: The line that they are on.
    """

    letters: bytes
    line: int


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where.

    Attributes:
        file: In which file.
        line: In which line, from 1.
        record: In which record; None before the first.
        what: In words.
    """

    file: Path
    line: int
    record: Record | None
    what: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}"
        if self.record is None:
            return f"{where}: {self.what}"
        return f"{where}: record {self.record.name or 'without a name'}: {self.what}"


class BadFasta(ValueError):
    """A file is no FASTA, or some of its records are wrong; the message names all of them.

    Attributes:
        faults: What is wrong, in the order of the files.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [str(fault) for fault in self.faults[:SHOWN]]
        if (more := len(self.faults) - SHOWN) > 0:
            lines.append(f"and {more} more")
        super().__init__("\n".join(lines))


def read(path: Path) -> Iterator[Record | Letters | Fault]:
    """The events of a file.

    A record has one fault at most of each kind: that it has no name, that another has the same
    name, that it has no bases, and the first letter that is no base. A line with such a letter is
    given as far as that; the record is at fault anyway. White space at the end of a line is none.

    Args:
        path: A file, gzip or not.

    Raises:
        OSError: It cannot be read at all.
    """
    record: Record | None = None
    names: dict[str, int] = {}
    bases, bad, headless, line = 0, False, False, 1
    with path.open("rb") as plain:
        try:
            for start, piece in _pieces(_unpacked(plain)):
                text = piece.rstrip(b"\r\n")
                if start and piece.startswith(b">"):
                    yield from _without_bases(record, bases, bad)
                    words = text[1:].decode(errors="backslashreplace").split(maxsplit=1)
                    name, description = (*words, "", "")[:2]
                    record, bases, bad = Record(name, description, path, line), 0, False
                    yield record
                    if not name:
                        yield Fault(path, line, record, "its header has no name")
                    elif name in names:
                        what = f"line {names[name]} has begun a record of this name"
                        yield Fault(path, line, record, what)
                    names.setdefault(name, line)
                elif record is None:
                    if text.strip() and not headless:
                        headless = True
                        yield Fault(path, line, None, _before_header(text))
                elif record.line == line:  # a header longer than a piece
                    yield Fault(path, line, record, f"its header is longer than {PIECE} bytes")
                elif text:
                    letters = text.translate(_READ)
                    other = _OTHER.search(letters)
                    letters = letters[: other.start()] if other else letters
                    bases += len(letters)
                    if letters:
                        yield Letters(letters, line)
                    if other and not bad and text[other.start() :].strip():
                        shown = chr(text[other.start()])
                        bad = True
                        yield Fault(
                            path, line, record, f"{shown!r} stands for no base ({bases} before it)"
                        )
                line += piece.endswith(b"\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield Fault(path, line, record, f"gzip is cut off or damaged here: {error}")
            return
    yield from _without_bases(record, bases, bad)
    if record is None and not headless:
        yield Fault(path, line, None, "the file has no record")


def _unpacked(plain: IO[bytes]) -> IO[bytes]:
    """The file, unpacked where its first bytes are gzip's."""
    start = plain.read(2)
    plain.seek(0)
    return cast(IO[bytes], gzip.open(plain)) if start == b"\x1f\x8b" else plain


def _pieces(file: IO[bytes]) -> Iterator[tuple[bool, bytes]]:
    """Lines with their ends, long ones in pieces, each with whether a line begins with it."""
    start = True
    while piece := file.readline(PIECE):
        yield start, piece
        start = piece.endswith(b"\n")


def _without_bases(record: Record | None, bases: int, bad: bool) -> Iterator[Fault]:
    if record is not None and not bases and not bad:
        yield Fault(record.file, record.line, record, "it has no bases")


def _before_header(text: bytes) -> str:
    if text.startswith(b"@"):
        return "this looks like FASTQ: a header of FASTA begins with '>'"
    shown = text[:20].decode(errors="backslashreplace")
    return f"{shown!r} comes before the first header, which begins with '>'"
