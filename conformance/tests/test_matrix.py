"""The matrix: cells say what was seen, and nothing else; records are read back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isoform.conformance.cli import app
from isoform.conformance.evoformer.mutants import MUTANTS
from isoform.conformance.implementations.numpy import NUMPY
from isoform.conformance.implementations.torch import FLEX
from isoform.conformance.matrix import BEHAVIOURS, Record, html, read, records
from isoform.conformance.operations import CASES
from isoform.conformance.run import Run, run

RECORD = Path(__file__).parents[2] / "ci/results/peers.jsonl"
NAMES = (
    "evoformer/operands/fp32/mask",
    "evoformer/operands/fp32/pair-bias",
    "evoformer/empty/fp32/no-keys",
)
MASK_IGNORED = next(each.implementation for each in MUTANTS if each.name == "mutant-mask-ignored")


@pytest.fixture(scope="module")
def seen() -> Run:
    chosen = [CASES[name] for name in NAMES]
    return run([NUMPY, MASK_IGNORED, FLEX], chosen, invalid_calls=(), memory=())


def test_a_cell_says_what_was_seen(seen: Run) -> None:
    found = {record.implementation: record for record in records(seen)}
    assert {*found} == {"numpy", "mutant-mask-ignored", "torch-flex"}
    numpy, wrong, flex = (
        found[name].cells for name in ("numpy", "mutant-mask-ignored", "torch-flex")
    )
    assert numpy["mask"].state == numpy["empty"].state == numpy["bias-gradients"].state == "pass"
    assert "fp16" not in numpy  # no such case was run
    assert wrong["mask"].state == "wrong"
    assert wrong["mask"].failed[0][0] == "evoformer/operands/fp32/mask"
    assert (
        "isoform check mutant-mask-ignored --case evoformer/operands/fp32/mask"
        in wrong["mask"].command
    )
    assert wrong["pair-bias"].state == "pass"
    assert flex["empty"].state == "declined"
    assert flex["bias-gradients"].state == "declined"


def test_the_grade_is_error_over_budget(seen: Run) -> None:
    found = {record.implementation: record.grade for record in records(seen)}
    assert 0 < found["numpy"]["p50"] < found["numpy"]["p99"] <= found["numpy"]["max"] <= 1
    assert found["mutant-mask-ignored"]["max"] > 1


def test_records_are_read_back(seen: Run, tmp_path: Path) -> None:
    whole = list(records(seen))
    path = tmp_path / "record.jsonl"
    path.write_text("".join(f"{record.as_json()}\n" for record in whole))
    assert [record.cells for record in read(path)] == [record.cells for record in whole]
    as_run = tmp_path / "run.json"
    as_run.write_text(seen.as_json())
    assert [record.cells for record in read(as_run)] == [record.cells for record in whole]
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        read(path)


def test_what_was_run_somewhere_is_not_called_not_run(seen: Run) -> None:
    run = list(records(seen))
    elsewhere = Record(run[0].implementation, run[0].operation, {}, not_run="it needs a GPU")
    other = Record(run[0].implementation, "rotary_embedding", {}, not_run="it needs hands")
    page = html([elsewhere, *run, other])
    assert "it needs a GPU" not in page
    assert "it needs hands" in page


def test_the_page_links_cells_and_names_what_was_not_run(seen: Run) -> None:
    absent = Record("elsewhere", "evoformer_attention", {}, not_run="it needs a GPU")
    page = html([*records(seen), absent])
    assert "<b>elsewhere</b>: it needs a GPU" in page
    assert page.count('<a href="#c1-') == page.count('<details id="c1-') > 10
    assert "declared unsupported" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # it loads nothing


def test_behaviours_have_names_of_their_own() -> None:
    assert len({behaviour.name for behaviour in BEHAVIOURS}) == len(BEHAVIOURS)
    asked = {
        behaviour.name
        for behaviour in BEHAVIOURS
        for case in CASES.values()
        if behaviour.group in ("sizes", "masks", "edges") and behaviour.asks(case, None)  # type: ignore[arg-type]  (it looks at the case alone)
    }
    assert asked == {x.name for x in BEHAVIOURS if x.group in ("sizes", "masks", "edges")}


def test_the_command_line_and_what_is_recorded(tmp_path: Path) -> None:
    target = tmp_path / "matrix.html"
    shown = CliRunner().invoke(app, ["report", "--matrix", str(RECORD), "-o", str(target)])
    assert shown.exit_code == 0, shown.output
    page = target.read_text()
    assert "openfold3-chunked" in page and "Not run here" in page
    both = ["report", "--matrix", str(RECORD), "--benchmarks", str(RECORD)]
    assert CliRunner().invoke(app, both).exit_code == 2
