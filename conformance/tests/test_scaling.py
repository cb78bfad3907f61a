"""Attention over several GPUs in a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isoform.conformance.cli import app
from isoform.conformance.run import Run
from isoform.parallel.benchmark.gpus import ONE
from isoform.parallel.benchmark.scaling import Point, Record

AROUND = {"date": "2026-11-29T17:00:00", "commit": "abc", "device": "Card", "versions": {"x": "1"}}


@pytest.fixture
def records() -> list[Record]:
    found = []
    for L in (1024, 4096):
        blank = Record(AROUND, "torch-nccl", 2, Point(L, 8, 2, 64), "ring", 1.0, 2.0)
        found += [
            replace(blank, ranks=1, competitor=ONE, forward_s=1.5, backward_s=3.0),
            replace(blank, efficiency=0.75, exposed_s=0.25, predicted_s=2.5, bytes=1 << 20),
            replace(blank, competitor="peer", forward_s=None, backward_s=None, not_run="no card"),
        ]
    return found


@pytest.fixture
def path(records, tmp_path) -> Path:
    written = tmp_path / "records.jsonl"
    written.write_text("".join(one.as_json() + "\n" for one in records))
    return written


@pytest.fixture
def charts(path):
    return pytest.importorskip("isoform.conformance.scaling").charts(path)


def test_a_chart_for_each_kind_of_call(charts, records):
    (chart,) = charts
    assert (chart.ranks, chart.heads, chart.lengths) == (2, (8, 2, 64), (1024, 4096))
    assert chart.competitors == ("ring", "peer")
    assert list(chart.rows) == records
    assert "<svg" in chart.svg


def test_the_latest_counts(path, records, charts):
    scaling = pytest.importorskip("isoform.conformance.scaling")
    again = replace(records[1], efficiency=0.9)
    path.write_text(path.read_text() + again.as_json() + "\n")
    (chart,) = scaling.charts(path)
    assert len(chart.records) == len(records)
    assert again in chart.records
    assert scaling.headline([chart]) == "ring reaches 90% of ideal on 2 GPUs at 1,024 positions."
    assert scaling.headline(charts).startswith("ring reaches 75%")
    assert scaling.headline([]) == "Nothing was run on several GPUs."


def test_the_page_has_every_figure(charts):
    report = pytest.importorskip("isoform.conformance.report")
    page = report.html(Run(()), charts=charts)
    for text in ("75.0 %", "250.0", "2500.0 <small>of 3000.0", "not run: no card", "4,096"):
        assert text in page


def test_the_command(path, tmp_path):
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", "--scaling", str(path), "-o", str(page)])
    assert done.exit_code == 0, done.output
    assert "Over several GPUs" in page.read_text()
    path.write_text("{}\n")
    done = CliRunner().invoke(app, ["report", "--scaling", str(path)])
    assert done.exit_code == 2
    assert "no records of scaling" in done.output and "line 1" in done.output
