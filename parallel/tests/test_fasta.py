"""FASTA: every byte of a file is in a record, in letters or in a fault that says where it is."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.parallel.training import fasta
from isoform.parallel.training.fasta import BadFasta, Fault, Letters, Record, read

same_examples = settings(deadline=None, derandomize=True, max_examples=100)


def file(folder: Path, content: bytes, name: str = "genome.fa") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def records(path: Path) -> dict[str, bytes]:
    """The letters of every record, by name; nothing is wrong."""
    found: dict[str, bytes] = {}
    for event in read(path):
        assert not isinstance(event, Fault), str(event)
        if isinstance(event, Record):
            name = event.name
            found[name] = b""
        else:
            found[name] += event.letters
    return found


def faults(path: Path) -> list[str]:
    return [str(event) for event in read(path) if isinstance(event, Fault)]


def test_records_names_and_lines(tmp_path):
    path = file(
        tmp_path, b">one the first\r\nACgt\r\nnU \r\n\r\n>two\nRYSWKMBDHVN\n\n>3\tlast one\nA"
    )
    assert records(path) == {"one": b"ACGTNT", "two": b"RYSWKMBDHVN", "3": b"A"}
    heads = [event for event in read(path) if isinstance(event, Record)]
    assert [(head.name, head.description, head.line) for head in heads] == [
        ("one", "the first", 1),
        ("two", "", 5),
        ("3", "last one", 8),
    ]
    assert [event.line for event in read(path) if isinstance(event, Letters)] == [2, 3, 6, 9]


def test_gzip_is_known_by_its_bytes_and_may_have_several_members(tmp_path):
    content = gzip.compress(b">one\nACG") + gzip.compress(b"T\n>two\nTT\n")
    assert records(file(tmp_path, content, "genome.fa")) == {"one": b"ACGT", "two": b"TT"}
    assert records(file(tmp_path, b">x\nA\n", "plain.fa.gz")) == {"x": b"A"}


@same_examples
@given(
    lines=st.lists(st.text("ACGTNacgu", max_size=9), min_size=1, max_size=5),
    piece=st.integers(1, 6),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_pieces_of_any_size_give_the_same_letters(tmp_path_factory, lines, piece, end):
    whole = "".join(lines)
    path = file(tmp_path_factory.mktemp("fasta"), f">x{end}{end.join(lines)}{end}".encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "PIECE", piece + 3)  # the header must fit
        found = list(read(path))
    letters = b"".join(event.letters for event in found if isinstance(event, Letters))
    assert letters.decode() == whole.upper().replace("U", "T")
    assert any(isinstance(event, Fault) for event in found) == (not whole)


def test_a_piece_of_a_line_is_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta, "PIECE", 4)
    path = file(tmp_path, b">x\nACGTACGT>AC\nAC\n>y\nC\n")
    assert faults(path) == [f"{path}:2: record x: '>' stands for no base (8 before it)"]
    assert [event.line for event in read(path) if isinstance(event, Record)] == [1, 4]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ":1: the file has no record"),
        (b"\n\n", ":3: the file has no record"),
        (b"ACGT\n>x\nA\n", ":1: 'ACGT' comes before the first header, which begins with '>'"),
        (b"@read\nACGT\n+\nIIII\n", ":1: this looks like FASTQ: a header of FASTA begins with"),
        (b">x\nAC\n>\nACGT\n", ":3: record without a name: its header has no name"),
        (b">x\nA\n>y\nC\n>x\nG\n", ":5: record x: line 1 has begun a record of this name"),
        (b">x\n>y\nA\n", ":1: record x: it has no bases"),
        (b">y\nA\n>x\n\n", ":3: record x: it has no bases"),
        (b">x\nACGT\nAC-T\nA*\n", ":3: record x: '-' stands for no base (6 before it)"),
        (b">x\nACG TAC\n", ":2: record x: ' ' stands for no base (3 before it)"),
        (b">x\nMKV\xe9\n", ":2: record x: 'é' stands for no base (3 before it)"),
        (b">x\nMELP\n", ":2: record x: 'E' stands for no base (1 before it)"),
    ],
)
def test_what_is_wrong_is_said_once_with_file_and_line(tmp_path, content, said):
    path = file(tmp_path, content)
    (found,) = faults(path)
    assert found.startswith(f"{path}{said}")


def test_it_reads_on_after_a_fault(tmp_path):
    path = file(tmp_path, b">a\nA?\n>b\nCC\n>c\n>d\nGG1\nTT\n")
    assert len(faults(path)) == 3
    assert [e.letters for e in read(path) if isinstance(e, Letters)] == [b"A", b"CC", b"GG", b"TT"]


@pytest.mark.parametrize("cut", [5, 60])
def test_gzip_that_is_cut_off_or_damaged(tmp_path, cut):
    content = gzip.compress(b">x\n" + bytes(random.Random(0).choices(b"ACGT", k=4000)), mtime=0)
    (found,) = faults(file(tmp_path, content[:-cut]))
    assert "gzip is cut off or damaged here" in found
    spoilt = bytearray(content)
    spoilt[len(content) // 2] ^= 255
    assert "gzip is cut off or damaged here" in faults(file(tmp_path, bytes(spoilt)))[-1]


def test_an_error_lists_faults_and_counts_the_others(tmp_path):
    path = file(tmp_path, b"".join(b">%d\n" % n for n in range(25)))
    error = BadFasta(event for event in read(path) if isinstance(event, Fault))
    lines = str(error).splitlines()
    assert len(error.faults) == 25
    assert lines[0] == f"{path}:1: record 0: it has no bases"
    assert lines[fasta.SHOWN :] == ["and 5 more"]
