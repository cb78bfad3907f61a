"""A genome as tokens: what the tokenizer says of it, all of it, and at every step the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel.sharding import IGNORE, Sharding
from isoform.parallel.training.data import (
    Genome,
    Reading,
    Span,
    Window,
    Windows,
    batch,
    held_out,
    load,
)
from isoform.parallel.training.fasta import BadFasta
from isoform.reference.torch.genome_tokens import SPECIAL, codons, nucleotides

same_examples = settings(deadline=None, derandomize=True, max_examples=60)
RECORDS = ("ACGTTNGCA", "G", "TTTGACCATGCAGT")
OTHER = str.maketrans("ACGTN", "TGCAN")


def genome(*records: str) -> Genome:
    """One that is not on disk, with other bases between its records."""
    borders = np.cumsum([0, *(len(one) + 2 for one in records)])
    letters = "AA".join(records)
    numbers = np.array(["ACGTN".index(base) for base in letters], np.uint8)
    spans = [Span(f"{n}", int(b), int(b) + len(one)) for n, (b, one) in
             enumerate(zip(borders, records, strict=False))]  # fmt: skip
    return Genome(numbers, tuple(spans))


def expected(record: str, tokenizer, frame: int, reverse: bool) -> list[int]:
    """By the tokenizer of the reference; what comes before the frame is not known."""
    strand = record.translate(OTHER)[::-1] if reverse else record
    return [0] * (frame > 0) + tokenizer.encode(strand[frame:]).tolist()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("tokenizer", "frame"), [(nucleotides, 0), *((codons, f) for f in (0, 1, 2))]
)
def test_tokens_are_those_of_the_tokenizer(tokenizer, frame, reverse):
    reading = Reading(genome(*RECORDS), tokenizer, frame, reverse)
    by_record = [expected(record, tokenizer, frame, reverse) for record in RECORDS]
    whole = [token for tokens in by_record for token in tokens]
    places = np.arange(len(whole) * 2)
    assert reading.length == len(whole)
    assert reading.tokens(places).tolist() == whole * 2
    numbers = [n for n, tokens in enumerate(by_record) for _ in tokens]
    assert reading.segments(places).tolist() == numbers + [n + 3 for n in numbers]
    shuffled = np.random.default_rng(0).permutation(places).reshape(2, -1)
    np.testing.assert_array_equal(reading.tokens(shuffled), np.array(whole * 2)[shuffled])


def test_a_frame_that_is_none():
    with pytest.raises(ValueError, match="frame must be 0 to 2, got 3"):
        Reading(genome("ACGT"), codons, 3)


@same_examples
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    length=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_an_epoch_has_every_token_and_its_label(lengths, length, seed):
    rng = np.random.default_rng(seed)
    whole = genome(*("".join(rng.choice(list("ACGT"), n)) for n in lengths))
    shortest = min(Reading(whole, codons, frame).length for frame in range(3))
    if shortest < length:
        with pytest.raises(ValueError, match=f"length={length} tokens, more than the {shortest}"):
            Windows(whole, codons, length, 1)
        return
    windows = Windows(whole, codons, length, 1, seed)
    drawn = [windows.at(step)[0] for step in range(windows.epoch)]
    ways = {(window.reading.frame, window.reading.reverse) for window in drawn}
    assert ways == {(frame, reverse) for frame in range(3) for reverse in (False, True)}
    for way in ways:
        own = [w for w in drawn if (w.reading.frame, w.reading.reverse) == way]
        T = own[0].reading.length
        seen = np.concatenate([window.start + np.arange(length) for window in own]) % T
        assert set(seen.tolist()) == set(range(T))
    for window in drawn:
        found = batch([window], Sharding.contiguous(length, 1), 0)
        reading, places = window.reading, window.start + np.arange(length)
        np.testing.assert_array_equal(found.tokens[0], reading.tokens(places))
        segment = [reading.segments(places), reading.segments(places + 1)]
        label = reading.tokens(places + 1)
        label[(segment[0] != segment[1]) | (label < len(SPECIAL))] = IGNORE
        np.testing.assert_array_equal(found.labels[0], label)
        assert (found.segments is None) == (len(set(segment[0].tolist())) == 1)


def test_epochs_differ_and_steps_are_a_function_of_the_seed():
    whole = genome("ACGTTGCATTGACCATGCAGT" * 20)

    def seen(seed: int) -> list[tuple[int, bool, int]]:
        windows = Windows(whole, codons, 8, 4, seed)
        return [
            (w.reading.frame, w.reading.reverse, w.start) for s in range(40) for w in windows.at(s)
        ]

    assert seen(3) == seen(3)
    assert seen(3) != seen(4)
    windows = Windows(whole, codons, 8, 4, 3)
    assert [(w.reading.frame, w.reading.reverse, w.start) for w in windows.at(33)] == seen(3)[
        132:136
    ]
    one = Windows(whole, codons, 8, 4, 3, strands=1)
    assert not any(window.reading.reverse for step in range(40) for window in one.at(step))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_are_those_of_the_whole(kind, ranks):
    windows = Windows(genome(*RECORDS, *RECORDS), codons, 11, 3).at(1)
    whole = batch(windows, Sharding.contiguous(11, 1), 0)
    assert whole.segments is not None
    sharding = Sharding(kind, 11, ranks)
    shards = [batch(windows, sharding, rank) for rank in range(ranks)]
    for name in ("tokens", "labels", "segments"):
        found = sharding.unshard([getattr(shard, name) for shard in shards])
        assert torch.equal(found, getattr(whole, name)), name


def test_one_window_over_a_border_is_enough_to_have_segments():
    reading = Reading(genome("ACGACGACG", "TTTTTT"), codons)
    for starts, several in (((0, 1), False), ((2, 3), True), ((3, 2), True)):
        found = batch([Window(reading, s) for s in starts], Sharding.contiguous(2, 1), 0)
        assert (found.segments is not None) == several


def test_held_out_tokens_are_labelled_once():
    whole = genome(*RECORDS)
    windows = held_out(whole, codons, 4)
    found = batch(windows, Sharding.contiguous(4, 1), 0, once=True)
    labels = found.labels.flatten()
    known = [
        token
        for record in RECORDS
        for token in expected(record, codons, 0, False)[1:]
        if token >= len(SPECIAL)
    ]
    assert labels[labels != IGNORE].tolist() == known


@pytest.mark.parametrize("fraction", [0.04, 0.3, 0.5, 0.96])
def test_a_split_holds_out_the_last_bases(fraction):
    whole = genome(*RECORDS)
    train, test = whole.split(fraction)
    held = round(24 * fraction)
    letters = [
        "".join("ACGTN"[b] for s in part.spans for b in whole.bases[s.start : s.stop])
        for part in (train, test)
    ]
    assert letters == ["".join(RECORDS)[: 24 - held], "".join(RECORDS)[24 - held :]]
    assert all(span.start < span.stop for part in (train, test) for span in part.spans)


def test_a_span_that_is_cut_is_named_by_its_bases():
    train, test = genome(*RECORDS).split(0.5)
    assert [span.name for span in (*train.spans, *test.spans)] == ["0", "1", "2:1-2", "2:3-14"]
    with pytest.raises(ValueError, match="less than all of 24 bases, got a fraction of 1"):
        genome(*RECORDS).split(1.0)
    with pytest.raises(ValueError, match="more than none"):
        genome(*RECORDS).split(0.001)


def written(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{n}.fa" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_files_are_read_once(tmp_path):
    files = written(tmp_path, b">a\nACGTN\nT\n>b\nGG\n", b">a\nCCC\n")
    found = load(files, tmp_path / "store")
    assert found.bases.tolist() == [0, 1, 2, 3, 4, 3, 2, 2, 1, 1, 1]
    assert found.spans == (Span("a", 0, 6), Span("b", 6, 8), Span("a", 8, 11))
    assert len(list((tmp_path / "store").iterdir())) == 2
    (kept,) = (tmp_path / "store").glob("*.bases")
    before = kept.stat().st_mtime_ns
    load(files, tmp_path / "store")
    assert kept.stat().st_mtime_ns == before
    files[1].write_bytes(b">a\nCCG\n")
    os.utime(files[1], ns=(1, 1))
    assert load(files, tmp_path / "store").bases.tolist()[-1] == 2


def test_bad_records_are_refused_or_left_out_by_name(tmp_path):
    files = written(tmp_path, b">a\nAC\n>b\nA!\nC\n>c\nGT\n", b">d\nT\n>e\n")
    with pytest.raises(BadFasta) as caught:
        load(files, tmp_path / "store")
    b, e = str(caught.value).splitlines()
    assert b == f"{files[0]}:4: record b: '!' stands for no base (1 before it)"
    assert e == f"{files[1]}:3: record e: it has no bases"
    assert not list((tmp_path / "store").iterdir())
    found = load(files, tmp_path / "store", bad_records="skip")
    assert [span.name for span in found.spans] == ["a", "c", "d"]
    assert found.skipped == (b, e)
    assert [found.bases[s.start : s.stop].tolist() for s in found.spans] == [[0, 1], [2, 3], [3]]
    assert load(files, tmp_path / "store", bad_records="skip").skipped == (b, e)
    for content, said in (
        (b">a\n?\n", "stands for no base"),
        (b"ACGT\n", "before the first header"),
    ):
        (worthless,) = written(tmp_path, content)
        with pytest.raises(BadFasta, match=said):
            load([worthless], tmp_path / "store", bad_records="skip")


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match="no FASTA file was given"):
        load([], tmp_path)
    with pytest.raises(ValueError, match="bad_records must be refuse or skip, got 'drop'"):
        load([tmp_path / "x"], tmp_path, bad_records="drop")
    with pytest.raises(FileNotFoundError):
        load([tmp_path / "x"], tmp_path)
    whole = genome("ACGT" * 9)
    for field, value in (("length", 0), ("batch", 0), ("strands", 3)):
        with pytest.raises(ValueError, match=field):
            Windows(whole, codons, **{"length": 4, "batch": 1, field: value})


def test_a_window_of_a_long_genome_needs_no_whole_of_it():
    bases = np.broadcast_to(np.uint8(2), 3 * 10**9)  # as a memory map: nothing is there yet
    windows = Windows(Genome(bases, (Span("x", 0, len(bases)),)), codons, 2**20, 1)
    found = batch(windows.at(0), Sharding.zigzag(2**20, 64), 5)
    assert found.tokens.shape == (1, 2**14)
    assert isinstance(windows.at(0)[0], Window)
