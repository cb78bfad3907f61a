"""The benchmark of fused operations, without a GPU: expressions, floors, verdicts, tables."""

from dataclasses import replace

import pytest

from isoform.kernels.benchmark import calls, command, fused, table
from isoform.kernels.benchmark.calls import Call, Measured
from isoform.kernels.benchmark.fused import (
    BENCHMARK,
    CASES,
    COMPILED,
    COPY,
    ELEMENTARY,
    LIBRARY,
    OURS,
    TUNED,
)
from isoform.kernels.benchmark.records import Record, Surroundings
from isoform.kernels.benchmark.timing import Sampled

torch = pytest.importorskip("torch")

from isoform.reference.torch import fused as reference  # noqa: E402

AROUND = Surroundings("2026-11-24T00:00:00+00:00", "abc", "a card", "580", {})
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def processor(monkeypatch):
    """Everything that a GPU gives, faked."""

    class Burst:
        def __call__(self, steps, count):
            for step in steps:
                step()
            return Sampled(*([[1.0] * count for _ in steps] for _ in range(2)))

        def warm_up(self):
            pass

    monkeypatch.setattr(calls, "DEVICE", "cpu")
    monkeypatch.setattr(calls, "CudaBurst", Burst)
    monkeypatch.setattr(torch, "compile", lambda function, **asked: function)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 58)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)


LENT = {
    fused.our_layer_norm: reference.layer_norm,
    fused.our_bias_gelu: reference.bias_gelu,
    fused.our_bias_dropout_residual: lambda *operands: reference.bias_dropout_residual(
        *operands, fused.DROPPED, seed=3
    ),
    fused.our_causal_softmax: lambda scores, _: reference.masked_softmax(
        scores, causal=True, scale=fused.SCALE
    ),
    fused.our_padded_softmax: lambda scores, attended: reference.masked_softmax(
        scores, mask=attended, scale=fused.SCALE
    ),
}
"""What a processor has for our kernels."""


def small(case):
    operation = replace(case.operation, ours=LENT.get(case.operation.ours))
    shape = (1, 2, 24, 24) if len(case.shape) == 4 else (500, 64)
    return replace(case, shape=shape, operation=operation)


def measured(forward, backward=None):
    ms = [[forward], *([[backward]] if backward else [])]
    return Measured(Sampled(ms, ms), peak_bytes=7)


def found(copy=1.0, **ran):
    """Records of a LayerNorm whose copy takes ``copy`` ms."""
    times = {COPY: measured(copy), **{name: measured(*ms) for name, ms in ran.items()}}
    return fused.records_of(BY_NAME["layer-norm-2560"], AROUND, times)


# --- What is timed --------------------------------------------------------------------------------


def test_all_shapes_of_the_issue_are_there():
    widths = {name.rpartition("-")[0] for name in BY_NAME if name.endswith("-8192")}
    assert widths == {"layer-norm", "rms-norm", "bias-gelu", "bias-dropout-residual"}
    assert {case.shape for case in CASES if len(case.shape) == 2} == {
        (131072, width) for width in (1024, 2560, 8192)
    }
    assert {case.dtype for case in CASES} == {"bfloat16", "float32"}
    assert {case.operation.masked for case in CASES} == {"", "causal", "padding"}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_competitor_computes_the_same(processor, name):
    ran = fused.run(small(BY_NAME[name]), AROUND, 2, quick=False)
    assert [one.not_run for one in ran] == [""] * len(ran)
    by_name = {one.competitor: one for one in ran}
    compiled = TUNED if BY_NAME[name].tuned else COMPILED
    assert {ELEMENTARY, compiled, COPY} <= set(by_name)
    assert (OURS in by_name) == ("rms-norm" not in name)
    assert {one.competitor for one in ran if one.ours} == {OURS} & set(by_name)
    assert (LIBRARY in by_name) == ("norm" in name)
    for one in ran:
        assert one.forward_ms.median == 1.0
        if one.competitor not in (ELEMENTARY, COPY):
            # on a processor, PyTorch sums some of LayerNorm's gradients in bfloat16
            assert one.difference < (1e-5 if one.dtype == "float32" else 0.05)
    assert by_name[COPY].backward_ms is None and by_name[COPY].forward_floor is None
    assert by_name[compiled].peak_bytes == 42


def test_what_computes_something_else_is_not_timed(processor):
    case = small(BY_NAME["rms-norm-1024"])
    spoiled = replace(case.operation, library=lambda x, weight: fused.rms_norm(x, weight) * 1.2)
    by_name = {
        one.competitor: one for one in fused.run(replace(case, operation=spoiled), AROUND, 2, True)
    }
    assert "differ from the first's by 0.2" in by_name[LIBRARY].not_run
    assert by_name[LIBRARY].forward_ms is None
    assert by_name[ELEMENTARY].not_run == ""


def test_a_dropout_is_held_to_what_it_dropped(processor):
    """Draws differ, so that results cannot be compared; but forward and backward must agree."""
    case = small(BY_NAME["bias-dropout-residual-1024"])
    operands = fused.Operands.draw(case)
    call = Call(
        lambda: fused.bias_dropout_residual(*operands.leaves), operands.leaves, operands.dout
    )
    y, dx, dbias, dresidual = call.results()
    with torch.no_grad():
        held = fused.as_dropped((y, dx, dbias, dresidual), operands.leaves, operands.dout)
        assert max(map(calls.distance, (y, dx, dbias, dresidual), held)) < 0.02
        another = dx.roll(1, 0)  # as if the backward had drawn anew
        held = fused.as_dropped((y, another, dbias, dresidual), operands.leaves, operands.dout)
        assert calls.distance(y, held[0]) > 0.1
        with pytest.raises(ArithmeticError, match=r"0.0% are dropped, and not 10%"):
            fused.as_dropped((y, operands.dout, dbias, dresidual), operands.leaves, operands.dout)


def test_a_softmax_looks_at_nothing_that_is_masked(processor):
    for name in ("softmax-causal-4096", "softmax-padding-4096"):
        operands = fused.Operands.draw(small(BY_NAME[name]))
        (attended,) = operands.others
        weights = fused.masked_softmax(*operands.leaves, attended)
        assert not weights[~attended.expand_as(weights)].any()
        assert torch.allclose(weights.float().sum(-1), torch.ones(()), atol=0.02)
    assert attended.float().mean() == 21 / 24  # an eighth is padding


# --- What follows ---------------------------------------------------------------------------------


def test_floors_are_the_passes_at_the_rate_of_the_copy():
    """LayerNorm reads x and writes y; its backward reads x and dy and writes dx."""
    copy, compiled = found(1.0, compiled=(1.3, 2.0))
    assert copy.forward_floor is None
    assert (compiled.forward_floor.ms, compiled.backward_floor.ms) == (1.0, 1.5)
    assert compiled.memory_bytes == 2 * 2 * 131072 * 2560


@pytest.mark.parametrize(("ms", "room"), [(1.2, False), (1.22, False), (1.23, True), (2.0, True)])
def test_there_is_room_where_a_kernel_at_nine_tenths_of_a_copy_wins_by_a_tenth(ms, room):
    forward, _ = fused.verdicts(found(1.0, elementary=(9.0, 9.0), compiled=(ms, 1.5)))
    assert (forward.best, forward.ms, forward.room) == (COMPILED, ms, room)
    assert str(forward).endswith("room for a kernel" if room else "no room")


def test_the_fastest_of_each_pass_wins():
    forward, backward = fused.verdicts(found(1.0, library=(1.0, 3.0), compiled=(1.1, 2.0)))
    assert (forward.best, backward.best) == (LIBRARY, COMPILED)
    assert backward.share == 0.75


@pytest.mark.parametrize(("ms", "kept"), [(1.5, "kept"), (1.81, "kept"), (1.9, "not to be kept")])
def test_ours_is_kept_where_it_is_faster_by_a_tenth(ms, kept):
    """It is no reason to say that there is no room."""
    forward, _ = fused.verdicts(found(1.0, compiled=(2.0, 2.0), isoform=(ms, 1.0)))
    assert (forward.best, forward.room, forward.ours_ms) == (COMPILED, True, ms)
    assert str(forward).endswith(f"faster by {2 / ms - 1:.0%}, {kept}")


def test_a_copy_that_was_not_timed_gives_no_floor():
    times = {COPY: Measured(not_run="waits"), COMPILED: measured(1.0, 1.0)}
    ran = fused.records_of(BY_NAME["layer-norm-2560"], AROUND, times)
    assert fused.verdicts(ran) == ()


def test_the_table_says_who_wins_and_where_there_is_room():
    begin, end = table.marks("fused")
    ran = found(1.0, elementary=(9.0, 9.0), library=(1.0, 3.0), compiled=(1.1, 2.0))
    text = table.filled(f"{begin}\n{end}\n", ran, "fused")
    assert (
        "| layer-norm-2560 | 9 / 9 | 1 / 3 | 1.1 / 2 | – | – | 1 / 1.5 "
        "| library, 100% | compiled, 75%, room |" in text
    )


# --- The command line -----------------------------------------------------------------------------


def test_quick_is_some_of_the_cases(capsys):
    assert BENCHMARK.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CASES)
    assert BENCHMARK.main(["--list", "--quick"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 5 and all("bfloat16" in line for line in listed)
    with pytest.raises(SystemExit, match="2"):
        BENCHMARK.main(["--quick", "--case", "*-8192"])
    assert "--quick leaves none" in capsys.readouterr().err


def test_a_run_is_recorded_and_told(processor, monkeypatch, tmp_path, capsys):
    from isoform.kernels.benchmark import __main__, records

    monkeypatch.setattr(__main__, "no_gpu", lambda: "")
    monkeypatch.setattr(command, "surroundings", lambda commit: AROUND)
    tiny = replace(BENCHMARK, cases=[small(BY_NAME["bias-gelu-2560"])])
    path = tmp_path / "fused.jsonl"
    assert tiny.main(["--record", str(path), "--quick"]) == 0
    assert {one.competitor for one in records.read(path)} == {ELEMENTARY, COMPILED, OURS, COPY}
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4
    assert said.err.splitlines()[-1].startswith("bias-gelu-2560 backward: ")
    assert tiny.main(["--json", "--rounds", "1"]) == 0
    for line in capsys.readouterr().out.splitlines():
        Record.from_json(line)


def test_every_operation_comes_before_any_comes_twice(capsys):
    first = CASES[: len({case.operation for case in CASES}) - 1]  # softmax with padding comes last
    assert len({case.operation for case in first}) == len(first)
    assert all(case.tuned for case in first) and not any(case.tuned for case in CASES[len(first) :])


def test_no_case_is_begun_late(processor, monkeypatch, tmp_path, capsys):
    from isoform.kernels.benchmark import __main__, records

    monkeypatch.setattr(__main__, "no_gpu", lambda: "")
    monkeypatch.setattr(command, "surroundings", lambda commit: AROUND)
    names = ("rms-norm-2560", "bias-gelu-2560", "rms-norm-1024")
    some = replace(BENCHMARK, cases=[small(BY_NAME[name]) for name in names], seconds=90)
    clock = iter([0.0, 0.0, 89.0, 91.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    path = tmp_path / "fused.jsonl"
    assert some.main(["--record", str(path)]) == 0
    assert {one.case for one in records.read(path)} == set(names[:2])
    assert "not begun after 90 s: rms-norm-1024" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    from isoform.kernels.benchmark import __main__

    monkeypatch.setattr(__main__, "no_gpu", lambda: "no GPU here")
    assert BENCHMARK.main(["--quick"]) == 3
    assert "no GPU here" in capsys.readouterr().err
    for wrong in (["--case", "square"], ["--rounds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            BENCHMARK.main(wrong)
