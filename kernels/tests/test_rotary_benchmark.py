"""The rotary benchmark's own parts, without a GPU: cases, the expression, records, bars."""

import pytest

from isoform.kernels.benchmark import records, rotary
from isoform.kernels.benchmark.calls import times
from isoform.kernels.benchmark.records import Record, Surroundings
from isoform.kernels.benchmark.rotary import CASES, COPY, OURS, Case, bars, row, select
from isoform.kernels.benchmark.timing import Quartiles, Sampled

AROUND = Surroundings("2026-11-24T00:00:00+00:00", "abc", "a card", "580", {})
HELD = next(case for case in CASES if case.held)
NOT_HELD = next(case for case in CASES if not case.held)


def record(competitor, forward=None, backward=None, case=HELD, **more):
    ms = [x and Quartiles(x, x, x, 9) for x in (forward, backward)]
    host = [x and Quartiles(20.0, 19.0, 21.0, 9) for x in ms]
    return Record(
        *(AROUND, f"rotary {case.name}", case.shape, "bfloat16", competitor),
        biases=False,
        ours=competitor == OURS,
        forward_ms=ms[0],
        backward_ms=ms[1],
        forward_host_us=host[0],
        backward_host_us=host[1],
        **more,
    )


def ran(ours=(0.80, 0.80), eager=(4.0, 9.0), compiled=(1.0, 1.1), case=HELD):
    copy = record(COPY, 0.75, case=case)
    others = zip((OURS, "eager", "compiled"), (ours, eager, compiled), strict=True)
    return [copy, *(record(name, *ms, case=case) for name, ms in others)]


def test_the_case_of_the_issue_is_the_first():
    assert CASES[0] == Case("genome-128", 1, 131072, 16, 16, 128)
    assert CASES[0].held


def test_cases_are_chosen_by_pattern():
    assert select([]) == CASES
    assert [case.name for case in select(["genome-*"])] == [
        *("genome-128", "genome-128-interleaved", "genome-64")
    ]
    with pytest.raises(ValueError, match=r"no case square; there are genome-128, "):
        select(["square"])


def test_all_bars_are_met_or_named():
    assert all(bar.met for bar in bars(ran()))
    assert len(bars(ran())) == 6


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ({"ours": (0.85, 0.80)}, "forward at 90% of a copy"),
        ({"ours": (0.80, 0.85)}, "backward at 90% of a copy"),
        ({"compiled": (0.79, 1.1)}, "compiled, forward"),
        ({"eager": (4.0, 0.79)}, "eager, backward"),
    ],
)
def test_each_bar_can_be_missed(spoiled, says):
    missed = [bar for bar in bars(ran(**spoiled)) if not bar.met]
    assert [bar.against for bar in missed] == [says]


def test_what_is_too_small_to_copy_is_not_held_to_a_copy():
    held = bars(ran(ours=(0.9, 0.9), case=NOT_HELD))
    assert len(held) == 4 and all(bar.met for bar in held)


def test_a_row_says_what_share_of_a_copy_it_is():
    copy, ours, *_ = ran()
    assert "forward 0.8 ms (host 20 µs, 94% of a copy)" in row(ours, copy)
    failed = record("compiled", not_run="no Triton")
    assert row(failed, copy).endswith("not run: no Triton")


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "rotary.jsonl"
    records.append(path, ran())
    assert records.read(path) == tuple(ran())


def test_times_are_of_what_was_timed():
    once = times(Sampled([[1.0, 2.0, 3.0]], [[9.0, 9.0, 9.0]]))
    assert once["forward_ms"].median == 2.0 and "backward_ms" not in once


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_expression_is_the_operation(layout):
    """Or its time would be compared with that of something else."""
    torch = pytest.importorskip("torch")
    from isoform.reference.torch import rotary_embedding, rotary_tables

    x, positions = torch.randn(2, 5, 3, 10).bfloat16(), torch.arange(5) + 1000
    found = rotary.expression(x, *rotary_tables(positions, 8), layout)
    assert torch.equal(found, rotary_embedding(x, positions, rotary_dim=8, layout=layout))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    from isoform.kernels.benchmark import __main__ as command

    monkeypatch.setattr(command, "no_gpu", lambda: "no GPU here")
    assert rotary.main(["--case", "genome-64"]) == 3
    assert "no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        rotary.main(["--case", "square"])
    with pytest.raises(SystemExit, match="2"):
        rotary.main(["--rounds", "0"])


def test_the_list_needs_no_gpu(capsys):
    assert rotary.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CASES)
