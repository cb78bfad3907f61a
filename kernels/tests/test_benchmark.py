"""The benchmarks' own parts, without a GPU: cases, floors, turns, competitors, records, bars."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from isoform.kernels.benchmark import __main__ as command
from isoform.kernels.benchmark import calls, cases, competitors, records, table, timing
from isoform.kernels.benchmark.bars import bars, best_peer
from isoform.kernels.benchmark.cases import CASES, Case, Times
from isoform.kernels.benchmark.competitors import COMPETITORS, Competitor, Settings
from isoform.kernels.benchmark.floors import H100, floors, memory_bytes
from isoform.kernels.benchmark.records import Record, RecordError, Surroundings
from isoform.kernels.benchmark.timing import MOST, TURN_S, Quartiles, Sampled, in_turns

BY_NAME = {case.name: case for case in CASES}
TINY = Case("tiny", 2, 3, 24, 4, 8, Times(None, None), Times(None, None))


# --- Cases and floors -----------------------------------------------------------------------------


def test_cases_are_chosen_by_pattern():
    assert cases.select([]) == CASES
    assert [case.name for case in cases.select(["triangle-*", "single-768"])] == [
        *("triangle-256", "triangle-512", "triangle-1024"),
        "single-768",
    ]
    with pytest.raises(ValueError, match=r"no case square; there are triangle-256, "):
        cases.select(["square"])


def test_a_goal_is_beyond_its_bar():
    for case in CASES:
        assert case.goal.forward < case.must_beat.forward
        assert case.goal.backward < case.must_beat.backward


def test_floors_of_an_h100_are_as_reckoned_by_hand():
    """At triangle 512: 537 million logits, four operands of 67 MB; measured ceilings gave 0.13 ms,
    0.09 and 0.09, of which a copy reaches nine tenths and a product seven.
    """
    forward, backward = floors(BY_NAME["triangle-512"], "bfloat16", H100)
    assert forward.exponentials == pytest.approx(0.128, rel=0.01)
    assert forward.bytes == pytest.approx(0.9 * 0.09, rel=0.02)
    assert forward.products == pytest.approx(0.7 * 0.09, rel=0.03)
    assert forward.ms == forward.exponentials
    assert backward.products == pytest.approx(2.5 * forward.products)
    assert backward.bytes == pytest.approx(2 * forward.bytes, rel=0.03)


def test_no_goal_is_below_its_floor():
    for case in CASES:
        forward, backward = floors(case, "bfloat16", H100)
        assert forward.ms < case.goal.forward
        assert backward.ms < case.goal.backward


def test_a_card_that_is_not_known_has_no_floor():
    assert floors(CASES[0], "bfloat16", replace(H100, architecture="sm_70")) is None


def test_least_memory_is_out_gradients_two_numbers_a_query_and_a_wide_pair_bias():
    assert memory_bytes(BY_NAME["triangle-512"], "bfloat16") / 2**20 == pytest.approx(270)
    assert memory_bytes(BY_NAME["triangle-1024"], "bfloat16") / 2**20 == pytest.approx(1080)
    forward_only = replace(BY_NAME["triangle-512"], gradients=False)
    assert memory_bytes(forward_only, "bfloat16") == 2 * 512 * 512 * 4 * 32


# --- Turns ----------------------------------------------------------------------------------------


class FakeBurst:
    """A GPU whose clock runs slower and slower, each call by a thousandth."""

    def __init__(self, ms):
        self.ms, self.order, self.drift = ms, [], 1.0

    def __call__(self, steps, count):
        name = steps[0]()
        self.order.append(name)
        if self.ms[name] is None:
            raise TimeoutError(f"{name} waits")
        found = Sampled()
        for _ in range(count):
            self.drift *= 1.001
            ms = [[self.ms[name] * self.drift] for _ in steps]
            found.extend(Sampled(ms, [[10.0] for _ in steps]))
        return found


def steps(name):
    return (lambda: name, lambda: name)


def test_drift_is_the_same_for_all():
    """One after another, the second would seem a tenth slower."""
    burst = FakeBurst({"a": 1.0, "b": 1.0})
    sampled, failed = in_turns({name: steps(name) for name in "ab"}, 10, burst)
    assert failed == {}
    a, b = (Quartiles.of(sampled[name].gpu_ms[0]) for name in "ab")
    assert a.runs == b.runs == 10 * TURN_S * 1e3 / 2
    assert a.median == pytest.approx(b.median, rel=5e-3)
    assert a.high > 1.05 * a.low


def test_who_begins_changes_and_small_calls_are_made_oftener():
    burst = FakeBurst({"slow": 100.0, "quick": 1e-3})
    sampled, _ = in_turns({name: steps(name) for name in ("slow", "quick")}, 4, burst)
    assert burst.order[2:] == ["slow", "quick", "quick", "slow"] * 2
    assert [len(step) for step in sampled["slow"].gpu_ms] == [4, 4]
    assert [len(step) for step in sampled["quick"].host_us] == [4 * MOST, 4 * MOST]


def test_who_cannot_be_timed_has_no_further_turn_and_a_reason():
    burst = FakeBurst({"a": 1.0, "b": None})
    sampled, failed = in_turns({name: steps(name) for name in "ab"}, 3, burst)
    assert failed == {"b": "b waits"}
    assert burst.order.count("b") == 1
    assert sampled["b"] == Sampled()
    assert sampled["a"].gpu_ms


class FakeCuda:
    """A GPU and a host with one clock: calls take the host 1 ms and the GPU 0.1."""

    def __init__(self, monkeypatch, *, waits=False):
        self.now = self.free = 0.0
        self.waits, self.slept = waits, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def _sleep(self, cycles):
        self.slept.append(cycles / 2e9)
        self.free = max(self.free, self.now) + cycles / 2e9

    def synchronize(self):
        self.now = self.free = max(self.now, self.free)

    def step(self):
        if self.waits:
            self.synchronize()
        self.now += 1e-3
        self.free = max(self.free, self.now) + 1e-4

    def Event(self, enable_timing):  # noqa: N802  (the name is PyTorch's)
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = max(self.cuda.free, self.cuda.now)

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def cuda_burst(monkeypatch, **behaviour):
    pytest.importorskip("torch")
    burst = timing.CudaBurst()
    burst._cuda = FakeCuda(monkeypatch, **behaviour)
    return burst, (burst._cuda.step, burst._cuda.step)


def test_the_gpus_time_is_not_the_hosts(monkeypatch):
    """Though the host takes ten times as long; the first burst did not give it time enough."""
    burst, steps = cuda_burst(monkeypatch)
    sampled = burst(steps, 5)
    assert [len(step) for step in (*sampled.gpu_ms, *sampled.host_us)] == [5] * 4
    assert sampled.gpu_ms[0] == pytest.approx([0.1] * 5)
    assert sampled.host_us[1] == pytest.approx([1000.0] * 5)
    assert len(burst._cuda.slept) == 2
    burst(steps, 5)
    assert len(burst._cuda.slept) == 3  # it knows now


def test_a_call_that_waits_for_the_gpu_cannot_be_timed(monkeypatch):
    burst, steps = cuda_burst(monkeypatch, waits=True)
    with pytest.raises(TimeoutError, match="a call waits for the GPU"):
        burst(steps, 5)


def test_quartiles():
    assert Quartiles.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Quartiles(3.0, 2.0, 4.0, 5)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0, 1)


# --- Records --------------------------------------------------------------------------------------

AROUND = Surroundings("2026-01-02T03:04:05+00:00", "abc", "NVIDIA H100", "580", {"torch": "2.11"})


def record(competitor="isoform", forward=0.3, backward=1.0, **more):
    forward_floor, backward_floor = floors(BY_NAME["triangle-512"], "bfloat16", H100)
    fields = {
        "surroundings": AROUND,
        "case": "triangle-512",
        "shape": (1, 512, 512, 4, 32),
        "dtype": "bfloat16",
        "competitor": competitor,
        "biases": True,
        "ours": competitor.startswith("isoform"),
        "forward_ms": Quartiles(forward, forward, forward, 9),
        "backward_ms": Quartiles(backward, backward, backward, 9),
        "forward_floor": forward_floor,
        "backward_floor": backward_floor,
        "peak_bytes": 300 * 2**20,
        "memory_bytes": 270 * 2**20,
    }
    return Record(**fields | more)


def not_run(competitor="SDPA", reason="out of memory"):
    figures = dict.fromkeys(["forward_ms", "backward_ms", "peak_bytes"])
    return record(competitor, not_run=reason, **figures)


def test_a_record_is_read_as_it_was_appended(tmp_path):
    path = tmp_path / "new" / "benchmarks.jsonl"
    written = (record(), not_run(), record("eager", backward_ms=None))
    records.append(path, written[:1])
    records.append(path, written[1:])
    assert records.read(path) == written
    assert [json.loads(line)["date"] for line in path.read_text().splitlines()] == [AROUND.date] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no record of a benchmark"),
        ("[]", "line 2: no record of a benchmark"),
        ('{"schema": 9}', "line 2: schema 9, and this version reads 1"),
        ('{"schema": 1, "date": ""}', "line 2: no record of a benchmark: KeyError"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    path = tmp_path / "benchmarks.jsonl"
    path.write_text(f"{record().as_json()}\n{line}\n")
    with pytest.raises(RecordError, match=message):
        records.read(path)


def test_the_latest_that_ran_counts():
    old, new = record(forward=1.0), record(forward=0.5)
    assert records.latest([old, new]) == (new,)
    assert records.latest([old, not_run("isoform")]) == (old,)
    assert records.latest([not_run(reason="a"), not_run(reason="b")])[0].not_run == "b"


# --- Bars -----------------------------------------------------------------------------------------


def broken(*found):
    return {(bar.what, bar.against.partition(",")[0]) for bar in bars(found) if not bar.met}


def test_all_bars_are_met_by_good_figures():
    found = (
        *(record(), record("isoform, deterministic", 0.35, 1.1)),
        *(record("eager", 5.6, 4.3), record("FlexAttention", 0.38, 1.37)),
        record("cuDNN, no bias", 0.25, 0.95, biases=False),
        not_run(),
    )
    assert broken(*found) == set()
    assert len(bars(found)) == 2 * 3 + 1
    assert best_peer(found, "forward").competitor == "FlexAttention"


@pytest.mark.parametrize(
    ("others", "ours", "expected"),
    [
        ([], record(forward=0.361), ("forward", "which is to be beaten")),
        ([], record(backward=1.251), ("backward", "which is to be beaten")),
        ([record("FlexAttention", 0.29, 2)], record(), ("forward", "the best peer")),
        (
            [record("isoform, deterministic", 0.37, 1.0)],
            record(),
            ("forward", "deterministic=True"),
        ),
        (
            [record("eager", 0.59, 9.0, dtype="float32")],
            record(dtype="float32"),
            ("forward", "eager over 2"),
        ),
        ([], record(peak_bytes=406 * 2**20), ("memory", "1.5 times what cannot be done without")),
    ],
)
def test_each_bar_is_broken_by_its_fault(others, ours, expected):
    assert broken(ours, *others) == {expected}
    assert any("NOT MET" in str(bar) for bar in bars([ours, *others]))


def test_figures_of_an_h100_are_no_bar_for_another_card():
    other = replace(AROUND, device="NVIDIA A100-SXM4-80GB")
    assert broken(record(forward=9.0, surroundings=other)) == set()


# --- Competitors ----------------------------------------------------------------------------------


def test_a_competitor_that_is_not_there_has_a_reason():
    one = Competitor("x", competitors.eager, distribution="no-such-thing")
    assert one.missing("bfloat16") == "no-such-thing is not installed"
    other = Competitor("x", competitors.eager, dtypes=("float16",), remark="too wide")
    assert other.missing("float16") == ""
    assert other.missing("float32") == "too wide"


def test_competitors_are_chosen_by_name():
    assert competitors.select([]) == COMPETITORS
    assert [one.name for one in competitors.select(["sdpa", "isoform"])] == ["isoform", "SDPA"]
    with pytest.raises(ValueError, match="no competitor triton; there are 'isoform', "):
        competitors.select(["triton"])


def test_there_is_a_message_where_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(command, "no_gpu", lambda: "no GPU here")
    assert command.main(["--quick"]) == 3
    assert capsys.readouterr().err == "no GPU here\n"
    assert command.main(["--list", "--case", "single*"]) == 0
    assert "single-768           1,1,768,16,24" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--case", "square"])


# --- A whole run, on the processor ----------------------------------------------------------------


@pytest.fixture
def processor(monkeypatch):
    """Everything that a GPU gives, faked, and the reference in place of the kernels."""
    torch = pytest.importorskip("torch")
    from isoform.kernels.benchmark import run
    from isoform.reference.torch import evoformer_attention

    class Burst(FakeBurst):
        def __init__(self):
            super().__init__({})

        def __call__(self, steps, count):
            for step in steps:
                step()
            return Sampled(*([[1.0] * count for _ in steps] for _ in range(2)))

        def warm_up(self):
            pass

    def reference(*operands, deterministic=False, **named):
        return evoformer_attention(*operands, **named)

    peaks = itertools.count(100)
    monkeypatch.setattr(calls, "DEVICE", "cpu")
    monkeypatch.setattr(run, "CudaBurst", Burst)
    monkeypatch.setattr(run, "card_of_device", lambda: H100)
    monkeypatch.setattr(competitors, "evoformer_attention", reference)
    monkeypatch.setattr(torch, "compile", lambda function, **asked: function)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 58)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    return run


def ran(processor, *who, case=TINY, dtype="bfloat16"):
    found = processor.run(
        *(case, dtype, who, AROUND), settings=Settings(), rounds=2, say=lambda said: None
    )
    return {one.competitor: one for one in found}


def named(*names):
    return [one for one in COMPETITORS if one.name in names]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_competitor_computes_the_same(processor, dtype):
    """But the bound, which has no bias; and FlexAttention has no backward on a processor."""
    found = ran(
        processor, *named("isoform", "isoform, deterministic", "eager", "SDPA"), dtype=dtype
    )
    assert [one.not_run for one in found.values()] == [""] * 4
    assert found["isoform"].difference is None
    assert found["isoform"].peak_bytes == 42
    for name in ("isoform, deterministic", "eager", "SDPA"):
        assert found[name].difference < (2e-6 if dtype == "float32" else 0.02)
        assert found[name].forward_ms.runs == 2 * MOST / 2
        assert found[name].backward_ms.median == 1.0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_same(processor):
    forward_only = replace(TINY, gradients=False)
    found = ran(processor, *named("isoform", "FlexAttention"), case=forward_only)
    assert found["FlexAttention"].not_run == ""
    assert found["FlexAttention"].difference < 0.02
    assert found["FlexAttention"].settings == {"flex_mode": "max-autotune"}
    assert found["FlexAttention"].backward_ms is None


def test_another_setting_is_another_competitor():
    assert Settings().called("FlexAttention") == "FlexAttention"
    assert Settings(flex_mode="default").called("FlexAttention") == "FlexAttention, default"


def test_who_computes_something_else_is_not_timed(processor):
    def unmasked(settings):
        forward = competitors.eager(settings)
        return lambda q, k, v, mask, pair_bias: forward(q, k, v, None, pair_bias)

    found = ran(processor, *named("isoform"), Competitor("unmasked", unmasked))
    assert found["unmasked"].not_run.startswith("ArithmeticError: its results differ from ours by")
    assert found["unmasked"].forward_ms is None


def test_a_peer_that_fails_is_a_line_and_ours_an_error(processor):
    def failing(settings):
        raise RuntimeError("no such kernel\nand more")

    found = ran(processor, *named("isoform", "cuEquivariance"), Competitor("peer", failing))
    assert found["peer"].not_run == "RuntimeError: no such kernel"
    assert found["cuEquivariance"].not_run == "cuequivariance-torch is not installed"
    assert found["isoform"].forward_ms.median == 1.0
    with pytest.raises(RuntimeError, match="no such kernel"):
        ran(processor, Competitor("mine", failing, ours=True))


# --- The tables in the README ---------------------------------------------------------------------

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parents[2] / "ci" / "results"
BEGIN, END = table.marks("evoformer")


def test_a_table_has_a_row_for_each_case_that_ours_ran():
    found = [
        *(record(), record("eager", 5.6, 4.3), record("FlexAttention", 0.38, 4.5)),
        record("cuDNN, no bias", 0.25, 0.95, biases=False),
        record("eager", case="triangle-256"),
    ]
    text = table.filled(f"before\n{BEGIN}\nold\n{END}\nafter", found, "evoformer")
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter")
    (row,) = (line for line in text.splitlines() if line.startswith("| triangle"))
    assert row == (
        "| triangle-512 | 1,512,512,4,32 | 0.3 / 1 | 0.38 FlexAttention / 4.3 eager "
        "| 0.25 / 0.95 | 0.128 / 0.163 | – / – | 1.11 × least |"
    )
    assert "NVIDIA H100, bfloat16; forward / backward:" in text


def test_tables_are_filled_again_and_again(tmp_path):
    path, file = tmp_path / "records.jsonl", tmp_path / "README.md"
    records.append(path, [record()])
    file.write_text(f"{BEGIN}\n{END}\n")
    assert table.main([str(path), str(file)]) == 0
    once = file.read_text()
    assert table.main([str(path), str(file)]) == 0
    assert file.read_text() == once
    assert "| triangle-512 |" in once


def test_without_a_place_for_tables_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no place for tables"):
        table.filled("", [], "evoformer")
    (tmp_path / "records.jsonl").write_text("")
    (tmp_path / "README.md").write_text("")
    with pytest.raises(SystemExit, match="2"):
        table.main([str(tmp_path / "records.jsonl"), str(tmp_path / "README.md")])


@pytest.mark.parametrize("of", table.TABLES)
def test_the_readme_shows_what_is_recorded(of):
    record = RESULTS / ("benchmarks.jsonl" if of == "evoformer" else f"{of}_benchmarks.jsonl")
    found = records.read(record) if record.exists() else ()
    text = README.read_text("utf-8")
    anew = f"python -m isoform.kernels.benchmark.table --of {of} {record} kernels/README.md"
    assert table.filled(text, found, of) == text, f"the tables are old: {anew}"
