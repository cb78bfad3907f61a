"""A genome on disk, and the batches that a step of training sees: a function of the step alone.

A FASTA file is read once, into a file with a byte for each base (:func:`load`). From there on
nothing is sequential. A :class:`Reading` is the genome as tokens, in one of ``width`` frames and
on one of two strands, and gives the tokens at any places; so every rank reads its own part of a
long sequence, and a run that is resumed at step 70,000 reads what it would have read.

An *epoch* is every reading once: each turned by a random number of tokens and cut into windows of
L, and the windows of all of them in random order, which follows from the seed and the epoch's
number. The last window of a reading is filled up from its beginning, so that all tokens are seen.
Every record is a segment: attention and labels stay within it.

Axes: B examples of a rank, L tokens of a window, L_r those that a rank holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isoform.parallel.arrays import Array
from isoform.parallel.sharding import IGNORE, Sharding
from isoform.parallel.training.fasta import BadFasta, Fault, Letters, Record, read
from isoform.reference.torch.genome_tokens import BASES, SPECIAL, Tokenizer

AMBIGUOUS = 4
"""The number of a base that is not known; A, C, G and T are 0 to 3."""

UNKNOWN = SPECIAL.index("[UNK]")

_NUMBERS = bytes(BASES.find(chr(letter)) % 5 for letter in range(256))  # −1 becomes 4

Left = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Span:
    """A stretch of bases that belong together.

    Attributes:
        name: Of the record; with a range of its bases where it is a part of one.
        start, stop: Where it lies in the bases of the genome.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Genome:
    """Bases by number, and what they belong to.

    Attributes:
        bases: ``uint8 [N]``: 0 to 3 for A, C, G, T; 4 where the base is not known.
        spans: One or more, none of them empty, one after the other.
        skipped: What was left out, and why.
    """

    bases: Array
    spans: tuple[Span, ...]
    skipped: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """How many bases the spans have."""
        return sum(span.stop - span.start for span in self.spans)

    def split(self, fraction: float) -> tuple[Genome, Genome]:
        """All but the last part of the genome, to train on, and that part, to be held out.

        A span that is cut becomes two, named by their bases, from 1.

        Args:
            fraction: Of the bases, how many are held out; more than 0, less than 1.

        Raises:
            ValueError: The fraction leaves one of the two without a base.
        """
        held = round(self.length * fraction)
        if not 0 < held < self.length:
            raise ValueError(
                f"the part held out must be more than none and less than all of {self.length} "
                f"bases, got a fraction of {fraction:g}"
            )
        parts: tuple[list[Span], list[Span]] = ([], [])
        left = self.length - held
        for span in self.spans:
            cut = min(max(left, 0), span.stop - span.start) + span.start
            for part, start, stop in ((parts[0], span.start, cut), (parts[1], cut, span.stop)):
                if start < stop:
                    whole = (start, stop) == (span.start, span.stop)
                    bases = f":{start - span.start + 1}-{stop - span.start}"
                    part.append(Span(span.name if whole else span.name + bases, start, stop))
            left -= span.stop - span.start
        return replace(self, spans=tuple(parts[0])), replace(self, spans=tuple(parts[1]))


def load(files: Sequence[Path], folder: Path, *, bad_records: Left = "refuse") -> Genome:
    """The genome of some FASTA files, whose bases are kept in ``folder`` in a file of their own.

    Read once: what is there from the same files (by path, size and time of change) is used again.

    Args:
        files: FASTA, gzip or not.
        folder: Where the file is written; made if need be. All ranks must see it: one of them
            calls this first, and the others afterwards.
        bad_records: ``"refuse"``: any fault is an error. ``"skip"``: a record that has one is left
            out and named in :attr:`Genome.skipped`.

    Raises:
        OSError: A file cannot be read or written.
        BadFasta: Records are wrong, all of which are named; or no record is left.
        ValueError: There are no files, or ``bad_records`` is neither.
    """
    if not files:
        raise ValueError("no FASTA file was given")
    if bad_records not in ("refuse", "skip"):
        raise ValueError(f"bad_records must be refuse or skip, got {bad_records!r}")
    states = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    identity = hashlib.sha256(json.dumps([1, bad_records, states]).encode()).hexdigest()[:16]
    bases, index = folder / f"{identity}.bases", folder / f"{identity}.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _written(bases) as unfinished:
            spans, skipped = _write_bases(files, unfinished, bad_records)
        with _written(index) as unfinished:  # last: where it is, the bases are whole
            unfinished.write_text(
                json.dumps({"spans": [asdict(span) for span in spans], "skipped": skipped})
            )
    known = json.loads(index.read_text())
    return Genome(
        np.memmap(bases, np.uint8, "r"),
        tuple(Span(**span) for span in known["spans"]),
        tuple(known["skipped"]),
    )


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A name to write under; the file has its own only when it is whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_bases(
    files: Iterable[Path], path: Path, bad_records: Left
) -> tuple[list[Span], list[str]]:
    """Write the bases of all records; where those lie that are kept, and what is wrong."""
    records: list[tuple[Record, int]] = []
    faults: list[Fault] = []
    with path.open("wb") as out:
        for file in files:
            for event in read(file):
                if isinstance(event, Letters):
                    out.write(event.letters.translate(_NUMBERS))
                elif isinstance(event, Record):
                    records.append((event, out.tell()))
                else:
                    faults.append(event)
        starts = [start for _, start in records]
        stops = [*starts, out.tell()][1:]
    bad = {fault.record for fault in faults}
    spans = [
        Span(record.name, start, stop)
        for (record, start), stop in zip(records, stops, strict=True)
        if record not in bad
    ]
    if faults and (bad_records == "refuse" or not spans):
        raise BadFasta(faults)
    return spans, [str(fault) for fault in faults]


@dataclass(frozen=True, eq=False)
class Reading:
    """A genome as tokens: T of them, every base in one.

    Attributes:
        genome: What is read, span by span, in order.
        tokenizer: Whose words.
        frame: How many bases of a span come before its first whole word: 0 to ``width`` − 1. They
            are an ``[UNK]``, as is a last word that is not full, and one with a base not known.
        reverse: Whether each span is read on its other strand.

    Raises:
        ValueError: There is no such frame.
    """

    genome: Genome
    tokenizer: Tokenizer
    frame: int = 0
    reverse: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.frame < self.tokenizer.width:
            raise ValueError(f"frame must be 0 to {self.tokenizer.width - 1}, got {self.frame}")

    @cached_property
    def _spans(self) -> tuple[Array, Array, Array]:
        """Starts and stops of the spans in bases ``[S]``, and their starts in tokens, T last."""
        starts = np.array([span.start for span in self.genome.spans], np.int64)
        stops = np.array([span.stop for span in self.genome.spans], np.int64)
        after = np.maximum(stops - starts - self.frame, 0)  # what comes after the first, short word
        tokens = -(-after // self.tokenizer.width) + (self.frame > 0)
        return starts, stops, np.append(0, np.cumsum(tokens))

    @property
    def length(self) -> int:
        """T."""
        return int(self._spans[2][-1])

    def segments(self, places: Array) -> Array:
        """The number of the span that each token is of, in the shape of ``places``, ``int64``.

        Args:
            places: 0 and on. After T − 1 the reading begins anew, with other segments.
        """
        lap, place = np.divmod(places, self.length)
        found = np.searchsorted(self._spans[2], place, side="right") - 1
        return np.asarray(found + lap * len(self.genome.spans))

    def tokens(self, places: Array) -> Array:
        """The tokens at ``places``, in their shape, ``int64``; after T − 1 from 0 again."""
        starts, stops, first = self._spans
        place = np.asarray(places) % self.length
        span = np.searchsorted(first, place, side="right") - 1
        width, bases = self.tokenizer.width, self.genome.bases
        begin = self.frame + (place - first[span] - (self.frame > 0)) * width
        words, known = np.zeros(place.shape, np.int64), np.ones(place.shape, bool)
        for offset in range(begin.size and width):
            at = begin + offset
            inside = (at >= 0) & (at < (stops - starts)[span])
            at = np.where(inside, at, 0)
            base = bases[stops[span] - 1 - at if self.reverse else starts[span] + at]
            known &= inside & (base != AMBIGUOUS)
            words = 4 * words + (3 - base.astype(np.int64) if self.reverse else base)
        return np.where(known, words + len(SPECIAL), UNKNOWN)


class Batch(NamedTuple):
    """What a rank is given in a step.

    Attributes:
        tokens: ``int64 [B, L_r]``.
        labels: ``int64 [B, L_r]``: the next token, wherever it lies; −100 where that is of another
            segment or a special token, which is nothing to learn.
        segments: ``int64 [B, L_r]``, or None where no window of the step has more than one.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None


class Window(NamedTuple):
    """L tokens of a reading, from ``start`` on."""

    reading: Reading
    start: int


def batch(windows: Sequence[Window], sharding: Sharding, rank: int, *, once: bool = False) -> Batch:
    """What ``rank`` holds of some windows.

    Args:
        windows: B, each of the sharding's length.
        sharding: Which positions each rank has.
        rank: Whose part.
        once: Past the end of a reading there is no label, so that none is counted twice.
    """
    positions = sharding.positions(rank)
    ends = np.array([0, sharding.length - 1])
    tokens, labels, segments = [], [], []
    several = False
    for reading, start in windows:
        places = start + positions
        segment, following = reading.segments(places), reading.segments(places + 1)
        label = reading.tokens(places + 1)
        none = (segment != following) | (label < len(SPECIAL))
        if once:
            none |= places + 1 >= reading.length
        tokens.append(reading.tokens(places))
        labels.append(np.where(none, IGNORE, label))
        segments.append(segment)
        first, last = reading.segments(start + ends)
        several |= bool(first != last)
    return Batch(
        torch.from_numpy(np.stack(tokens)),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(segments)) if several else None,
    )


@dataclass(frozen=True, eq=False)
class Windows:
    """Which windows each step of training sees.

    Attributes:
        genome: What to train on.
        tokenizer: Whose words.
        length: L.
        batch: Windows of a step, of all replicas together.
        seed: What the epochs are drawn from.
        strands: 1: as given; 2: the other strand is read too.

    Raises:
        ValueError: A number is out of range; the genome has fewer than L tokens.
    """

    genome: Genome
    tokenizer: Tokenizer
    length: int
    batch: int
    seed: int = 0
    strands: int = 2

    def __post_init__(self) -> None:
        for name in ("length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.strands not in (1, 2):
            raise ValueError(f"strands must be 1 or 2, got {self.strands}")
        if (shortest := min(reading.length for reading in self.readings)) < self.length:
            raise ValueError(
                f"a window has length={self.length} tokens, more than the {shortest} of the genome"
            )

    @cached_property
    def readings(self) -> list[Reading]:
        """All frames, of one strand or two."""
        frames = range(self.tokenizer.width)
        both = (False, True)[: self.strands]
        return [
            Reading(self.genome, self.tokenizer, f, reverse) for reverse in both for f in frames
        ]

    @cached_property
    def _each(self) -> int:
        """Windows of a reading: enough for every token of that which has most."""
        return -(-max(reading.length for reading in self.readings) // self.length)

    @property
    def epoch(self) -> int:
        """Windows in an epoch."""
        return len(self.readings) * self._each

    def at(self, step: int) -> list[Window]:
        """The windows of a step, from 0, those of the first replica first.

        Replica r of R takes ``windows[r * batch // R : (r + 1) * batch // R]``.
        """
        found = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(number, self.epoch)
            turns, order = _drawn(self, epoch)
            which, window = divmod(int(order[place]), self._each)
            found.append(Window(self.readings[which], turns[which] + window * self.length))
        return found


@lru_cache(maxsize=2)  # a step may have windows of two epochs
def _drawn(windows: Windows, epoch: int) -> tuple[list[int], Array]:
    """From which token on each reading is read in an epoch, and the order of all windows."""
    rng = np.random.default_rng([windows.seed, epoch])
    turns = [int(rng.integers(reading.length)) for reading in windows.readings]
    return turns, rng.permutation(windows.epoch)


def held_out(genome: Genome, tokenizer: Tokenizer, length: int) -> list[Window]:
    """Windows of ``length`` tokens that cover a genome, as ``tokenizer`` reads it, each token once:
    pass them to :func:`batch` with ``once``.
    """
    reading = Reading(genome, tokenizer)
    return [Window(reading, start) for start in range(0, reading.length, length)]
