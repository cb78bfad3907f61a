"""Every rule of the specification is held by cases, checks and mutants, and cited by code."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import spec_links

from isoform.conformance import rules


def test_every_rule_is_held_and_cited():
    assert spec_links.faults(spec_links.citations()) == []


def test_every_mutant_of_the_operations_breaks_a_rule():
    """But those of linear memory, which only a capability promises."""
    used = {mutant.name for rule in rules.RULES.values() for mutant in rules.mutants_of(rule)}
    promised = {"mutant-not-linear", "rotary-mutant-not-linear"}
    assert set(rules.mutants()) - used == promised


def test_a_rule_that_nothing_holds_is_a_fault():
    defined = spec_links.defined()
    without = {number: rule for number, rule in rules.RULES.items() if number != "ROT-9"}
    assert list(rules.faults(defined, without)) == ["ROT-9: no case and no check is named for it"]
    bare = replace(rules.RULES["EVO-4"], cases=("evoformer/nowhere/*",), mutants=())
    assert list(rules.faults(defined, {**rules.RULES, "EVO-4": bare})) == [
        "EVO-4: it has no mutants",
        "EVO-4: no case is called evoformer/nowhere/*",
    ]
    other = replace(rules.RULES["SEQ-13"], checks=("out/condition",))
    (fault,) = rules.faults(defined, {**rules.RULES, "SEQ-13": other})
    assert "its mutants fail by ['determinism']" in fault
    assert list(rules.faults({**defined, "EVO-99": "evoformer"})) == [
        "EVO-99: no case and no check is named for it"
    ]


def test_citations_are_found_by_line(tmp_path):
    source = tmp_path / "reference" / "src" / "a.py"
    source.parent.mkdir(parents=True)
    source.write_text("# rule EVO-3\n\n# rules SEQ-1 to SEQ-3, EVO-3\n")
    found = spec_links.citations(tmp_path)
    assert found["EVO-3"] == {"reference/src/a.py": [1, 3]}
    assert set(found) == {"EVO-3", "SEQ-1", "SEQ-2", "SEQ-3"}
    assert "ROT-1: no line of code cites it" in spec_links.faults(found)


def test_pages_show_what_holds_each_rule():
    cited = spec_links.citations()
    page = spec_links.linked(spec_links.pages()["rotary"], cited)
    assert page.count("{container} held") == 11
    assert "the scaling is ignored (`rotary-mutant-yarn-ignored`" in page
    assert spec_links.table(cited).count("\n| {ref}") == len(spec_links.defined()) == 37
