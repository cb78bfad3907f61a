"""What a run is told: read from TOML, every wrong key and value named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isoform.parallel.training.settings import SMALL, Settings, WrongSettings, load, parse
from isoform.parallel.training.switches import Layout
from isoform.reference.torch.genome_lm import CONFIGURATIONS, GenomeLM

TOML = """
[data]
fasta = ["a.fa", "/there/b.fa.gz"]
tokens = "nucleotides"
length = 4096
held_out = 0.1

[model]
name = "25M"
positions = "learned"
max_length = 4096

[switches]
loss = "tiled"
strategy = "ring"

[switches.layout]
sequence = 4
data = 2

[training]
steps = 10
learning_rate = 1
betas = [0.9, 0.99]
"""


def test_a_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    found = load(path)
    assert found.data.fasta == (tmp_path / "a.fa", Path("/there/b.fa.gz"))
    assert (found.data.length, found.data.held_out, found.data.batch) == (4096, 0.1, 16)
    expected = replace(
        CONFIGURATIONS["25M"],
        name="25M with positions=learned, max_length=4096",
        vocabulary=9,
        positions="learned",
        max_length=4096,
    )
    assert found.model == expected
    assert found.switches.layout == Layout(data=2, sequence=4)
    assert (found.switches.loss, found.switches.strategy) == ("tiled", "ring")
    assert (found.training.steps, found.training.learning_rate) == (10, 1.0)
    assert found.training.betas == (0.9, 0.99)


def test_nothing_said_is_a_small_model():
    assert parse({}) == Settings()
    assert parse({"data": {"fasta": "one.fa"}}).data.fasta == (Path("one.fa"),)
    assert sum(p.numel() for p in GenomeLM(SMALL).parameters()) == SMALL.parameters == 811_008


def test_sizes_that_follow_from_others_are_not_those_of_the_model_named():
    found = parse({"model": {"name": "25M", "hidden": 64, "heads": 4}}).model
    assert (found.ffn, found.rotary_dim, found.layers) == (256, 4, 8)
    assert parse({"model": {"name": "25M", "layers": 2}}).model.ffn == 2048


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"date": {}}, "there is no date; did you mean data?"),
        ({"zzz": {}}, "there is no zzz; there are data, model, switches, training"),
        ({"data": 3}, "data must be a table, got 3"),
        ({"data": {"lenght": 3}}, "there is no data.lenght; did you mean length?"),
        ({"data": {"length": "3"}}, "data.length must be a whole number, got '3'"),
        ({"data": {"length": True}}, "data.length must be a whole number, got True"),
        ({"data": {"length": 0}}, "data: length must be at least 1, got 0"),
        ({"data": {"tokens": "words"}}, "data: tokens must be one of codons, nucleotides, got 'w"),
        ({"data": {"held_out": 1}}, "data: held_out must be more than 0 and less than 1: 1"),
        ({"data": {"fasta": 3}}, "data.fasta must be a list, got 3"),
        ({"data": {"strands": 3}}, "data: strands must be 1 or 2, got 3"),
        ({"data": {"markov": 13}}, "data: markov must be 0 to 12, got 13"),
        ({"model": {"name": "7B"}}, "model.name must be one of tiny, 25M, 250M, 2.5B, 25B, 33B, "),
        ({"model": {"vocabulary": 9}}, "model.vocabulary follows from data.tokens: 69; leave it"),
        ({"model": {"head": 3}}, "there is no model.head; did you mean heads?"),
        ({"model": {"heads": 5}}, "model: heads=5 must divide hidden=128"),
        ({"switches": {"loss": "tilde"}}, "switches: loss must be one of whole, tiled, got 'tilde"),
        ({"switches": {"layout": {"sequence": 0}}}, "switches.layout: sequence must be at least 1"),
        ({"switches": {"layout": 3}}, "switches.layout must be a table, got 3"),
        ({"training": {"steps": 0}}, "training: steps must be at least 1, got 0"),
        ({"training": {"clip": 0}}, "training: clip must be more than 0, got 0"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate must be a number, got"),
        ({"training": {"betas": [0.9]}}, "training: betas must be two numbers from 0 to less"),
        ({"training": {"decay": "linear"}}, "training: decay must be one of cosine, constant"),
    ],
)
def test_what_has_no_meaning_is_named(given, message):
    with pytest.raises(WrongSettings) as caught:
        parse(given)
    assert message in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[data\n")
    with pytest.raises(WrongSettings, match=r"run\.toml is no TOML: "):
        load(path)
    path.write_text("[data]\nlength = 0\n")
    with pytest.raises(WrongSettings, match=r"run\.toml: data: length must be at least 1"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.toml")


def test_what_a_run_must_have_in_common_with_its_checkpoint():
    told = Settings()
    same = replace(
        told,
        data=replace(told.data, at_once=3, markov=2),
        switches=told.switches.but(layout=Layout(sequence=4), loss="tiled"),
        training=replace(told.training, checkpoint_every=7, evaluate_every=9, keep=1),
    )
    assert same.facts() == told.facts()
    for table, change in (
        ("data", {"length": 64}),
        ("data", {"batch": 3}),
        ("data", {"fasta": (Path("other.fa"),)}),
        ("data", {"tokens": "nucleotides"}),
        ("data", {"held_out": 0.1}),
        ("data", {"strands": 1}),
        ("data", {"bad_records": "skip"}),
        ("model", {"layers": 5}),
        ("model", {"base": 500.0}),
        ("training", {"steps": 7}),
        ("training", {"seed": 1}),
        ("training", {"clip": 0.5}),
        ("training", {"learning_rate": 0.1}),
    ):
        other = replace(told, **{table: replace(getattr(told, table), **change)})
        (name,) = change
        assert other.facts()[f"{table}.{name}"] != told.facts()[f"{table}.{name}"]
    longer = replace(told.training, decay="constant")
    runs = [replace(told, training=replace(longer, steps=n)).facts() for n in (10, 20)]
    assert runs[0] == runs[1]
