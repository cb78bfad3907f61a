"""Boards of benchmark records, and the pages that draw them."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isoform.conformance import benchmark_plots, benchmarks, report
from isoform.conformance.cli import app
from isoform.conformance.run import Run
from isoform.kernels.benchmark.cases import CASES
from isoform.kernels.benchmark.floors import H100, floors, memory_bytes
from isoform.kernels.benchmark.records import Record, Surroundings, append
from isoform.kernels.benchmark.timing import Quartiles

AROUND = Surroundings("2000-01-02T03:04:05+00:00", "abc", H100.name, "580", {"torch": "2.11.0"})
SPEEDS = {"isoform": 0.5, "FlexAttention": 1.0, 'peer <b>&"': 2.0, "cuDNN, no bias": 0.25}
"""Times what is to be beaten."""

HEADLINE = "isoform is faster than the best peer in 16 of 16 timings."


def words_of(page: str) -> str:
    """What can be read on it."""
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def record(case, competitor, dtype="bfloat16", **more):
    forward, backward = floors(case, dtype, H100)
    times = {}
    for what in ("forward", "backward"):
        ms = SPEEDS[competitor] * getattr(case.must_beat, what)
        times[f"{what}_ms"] = Quartiles(ms, ms, ms, 9)
        times[f"{what}_host_us"] = Quartiles(20.0, 20.0, 20.0, 9)
    fields = {
        "surroundings": AROUND,
        "case": case.name,
        "shape": (case.B, case.S, case.L, case.H, case.D),
        "dtype": dtype,
        "competitor": competitor,
        "biases": "no bias" not in competitor,
        "ours": competitor == "isoform",
        "peak_bytes": 2 * memory_bytes(case, dtype),
        "memory_bytes": memory_bytes(case, dtype),
        "forward_floor": forward,
        "backward_floor": backward,
    }
    return Record(**fields | times | more)


def not_run(case, competitor, reason):
    figures = ("forward_ms", "backward_ms", "forward_host_us", "backward_host_us", "peak_bytes")
    return record(case, competitor, not_run=reason, **dict.fromkeys(figures))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Everything in bfloat16, one case in float16, and someone who did not run."""
    found = [record(case, name) for case in CASES for name in SPEEDS]
    found = [x for x in found if (x.case, x.competitor) != ("single-768", "FlexAttention")]
    found.append(not_run(CASES[-2], "FlexAttention", "out of memory"))
    found.append(record(CASES[0], "isoform", "float16"))
    written = tmp_path_factory.mktemp("records") / "benchmarks.jsonl"
    append(written, found)
    return written


@pytest.fixture(scope="module")
def boards(path):
    return benchmarks.boards(path)


@pytest.fixture(scope="module")
def page(boards) -> str:
    return report.html(Run(()), boards=boards)


def test_a_board_for_each_device_and_dtype(boards):
    assert [board.name for board in boards] == [
        f"{H100.name}, {d}" for d in ("bfloat16", "float16")
    ]
    first = boards[0]
    assert first.cases == tuple(case.name for case in CASES)
    assert first.competitors == ("isoform", "FlexAttention", "cuDNN, no bias", 'peer <b>&"')
    assert first.absent == {("FlexAttention", "out of memory"): ("single-768",)}
    assert first.of("single-768", "FlexAttention") is None


def test_the_best_peer_does_the_biases(boards):
    mine = boards[0].of("triangle-512", "isoform")
    assert boards[0].ratio(mine, "forward") == pytest.approx(0.5)
    alone = boards[1].of("triangle-256", "isoform")
    assert boards[1].ratio(alone, "forward") is None


def test_lengths_of_the_same_shape_are_a_family(boards):
    family = {"B=1, S=L, H=4, D=32": ("triangle-256", "triangle-512", "triangle-1024")}
    assert boards[0].families == family
    assert boards[1].families == {}


def test_the_headline_counts_whom_ours_beat(boards):
    assert (
        benchmarks.headline(boards) == "isoform is faster than the best peer in 16 of 16 timings."
    )
    assert benchmarks.headline(boards[1:]).endswith("without anyone to be compared with.")


def test_every_question_has_its_panel(boards):
    first, second = (list(benchmark_plots.panels(board)) for board in boards)
    assert first == [
        "Forward against L, B=1, S=L, H=4, D=32",
        "Backward against L, B=1, S=L, H=4, D=32",
        "Forward, milliseconds",
        "Backward, milliseconds",
        "Forward, times the best peer's",
        "Backward, times the best peer's",
        "Forward, fraction of the floor",
        "Backward, fraction of the floor",
        "Peak memory, times what cannot be done without",
    ]
    assert "Forward, times the best peer's" not in second  # nobody to be compared with
    assert "best peer" in benchmark_plots.panels(boards[0])["Forward, times the best peer's"]


def test_competitors_look_different(boards):
    looks = benchmark_plots.styles(boards[0])
    assert len({look.colour for look in looks.values()}) == len(looks)
    assert len({look.letter for look in looks.values()}) == len(looks)


def test_a_page_of_benchmarks_alone(page):
    words = words_of(page)
    assert "Verdicts" not in words
    assert HEADLINE in words
    assert "0.18 / 0.625" in words  # half of what is to be beaten at triangle 512
    assert "FlexAttention: out of memory (single-768)" in words
    assert "2000-01-02, abc, driver 580, torch 2.11.0" in words
    assert 'peer <b>&"' in words and "<b>&" not in page
    assert "which is to be beaten: met" in words
    assert page.count("<figure") == page.count("<svg") == 9 + 2 + 2 + 1
    assert page.count("<caption") == page.count("<table") == 2
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0[12]0[0-9a-f]{3}", page), "a colour that the page does not know"


def test_bars_that_are_not_met_are_shown_first(path, tmp_path):
    slow = tmp_path / "slow.jsonl"
    slow.write_text(path.read_text())
    case = CASES[1]
    late = Quartiles(case.must_beat.forward * 1.5, 0.0, 0.0, 9)
    append(slow, [record(case, "isoform", forward_ms=late)])
    words = words_of(report.html(Run(()), boards=benchmarks.boards(slow)))
    assert "triangle-512 bfloat16 forward: 0.54 of 0.36 ms, which is to be beaten: NOT MET" in words
    assert words.index("bars are not met") < words.index("bars are met")


def test_benchmarks_stand_beside_a_run(page, boards):
    from isoform.conformance.implementations.numpy import NUMPY
    from isoform.conformance.operations import CASES as CALLS
    from isoform.conformance.run import run

    call = CALLS["evoformer/length-17/fp32/all-operands"]
    both = report.html(run([NUMPY], [call], memory=()), boards=boards)
    words = words_of(both)
    assert "numpy passes." in words and "Verdicts" in words and "Benchmarks" in words


# The command.


def test_the_command_draws_records(path, tmp_path):
    target = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", "--benchmarks", str(path), "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert "faster than the best peer" in target.read_text()


def test_the_command_says_what_is_wrong(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    done = CliRunner().invoke(app, ["report", "--benchmarks", str(broken)])
    assert done.exit_code == 2
    assert "broken.jsonl, line 1: no record of a benchmark" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["report"])
    assert done.exit_code == 2
    assert "nothing to report" in done.output
