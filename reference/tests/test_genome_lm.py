"""The genome language model: published sizes, causality, positions, and its tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isoform.reference.torch.genome_lm import (
    CONFIGURATIONS,
    Configuration,
    GenomeLM,
    codons,
    nucleotides,
)

TINY = CONFIGURATIONS["tiny"]
PUBLISHED = {"25M": 25_290_752, "2.5B": 2_533_931_008}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    assert CONFIGURATIONS[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_formula_counts_the_parameters(positions, tied: bool) -> None:
    configuration = replace(TINY, positions=positions, tied=tied)
    model = GenomeLM(configuration)
    assert sum(p.numel() for p in model.parameters()) == configuration.parameters
    assert (model.head.weight is model.embedding.weight) == tied


@pytest.mark.parametrize("parallel_residual", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_no_logit_depends_on_a_later_token(positions, parallel_residual: bool) -> None:
    torch.manual_seed(0)
    model = GenomeLM(replace(TINY, positions=positions, parallel_residual=parallel_residual))
    tokens = torch.randint(69, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 69
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert ((before - after)[:, 7:].abs().amax(-1) > 0).all()


def test_order_of_positions_does_not_matter_and_segments_part() -> None:
    torch.manual_seed(1)
    model = GenomeLM(TINY).double()
    tokens, order = torch.randint(69, (1, 10)), torch.randperm(10)
    torch.testing.assert_close(model(tokens[:, order], order), model(tokens)[:, order])
    segments, places = torch.arange(10) // 5, torch.arange(10) % 5
    parted = model(tokens, places, segments)
    torch.testing.assert_close(parted[:, 5:], model(tokens[:, 5:]))


def test_the_loss_is_the_mean_over_labelled_tokens() -> None:
    torch.manual_seed(2)
    model, tokens = GenomeLM(TINY), torch.randint(69, (2, 6))
    labels = tokens.roll(-1, 1)
    labels[0, :4] = -100
    chosen = model(tokens).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model.loss(tokens, labels), -chosen[labels >= 0].mean())
    nothing = model.loss(tokens, torch.full_like(labels, -100))
    assert nothing.item() == 0


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="heads=64 must divide hidden=8196"):
        Configuration("as published", 64, 8196, 64)
    with pytest.raises(ValueError, match="positions must be 0 to 3"):
        GenomeLM(replace(TINY, positions="learned", max_length=4))(torch.zeros(1, 5).long())


def test_tokens_of_both_strands() -> None:
    assert (len(codons.vocabulary), len(nucleotides.vocabulary)) == (69, 9)
    for tokenizer in (codons, nucleotides):
        tokens = tokenizer.encode("atgGCUaaa")
        assert tokenizer.decode(tokens) == "ATGGCTAAA"
        assert tokenizer.decode(tokenizer.reverse_complement(tokens)) == "TTTAGCCAT"
    assert codons.decode(codons.encode("ATGNCTAA")) == "ATGNNNNNN"
    assert codons.encode("").shape == (0,)
    with pytest.raises(ValueError, match="'x' at base 4"):
        codons.encode("ATGAxC")
