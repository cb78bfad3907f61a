"""The benchmark of attention over a sequence, without a GPU: masks, floors, rankings, tables."""

from dataclasses import replace

import pytest

from isoform.kernels.benchmark import attention, calls, table
from isoform.kernels.benchmark.attention import BENCHMARK, CASES, FLEX, LIBRARIES, OURS
from isoform.kernels.benchmark.calls import Measured
from isoform.kernels.benchmark.floors import H100
from isoform.kernels.benchmark.records import Surroundings
from isoform.kernels.benchmark.timing import Sampled

torch = pytest.importorskip("torch")

AROUND = Surroundings("2026-11-24T00:00:00+00:00", "abc", "a card", "580", {})
BY_NAME = {case.name: case for case in CASES}
MASKED = [case for case in CASES if case.masked]


def tiny(case):
    """The same with few tokens."""
    lengths = tuple(length // 128 for length in case.documents)
    return replace(case, L=90, D=8, window=case.window and 10, documents=lengths)


def attended(case, segments):
    """The mask, written out."""
    i = torch.arange(case.L)
    mask = i[:, None] >= i if case.causal else torch.ones(case.L, case.L, dtype=torch.bool)
    if case.window:
        mask = mask & (i[:, None] - i < case.window)
    return mask if segments is None else mask & (segments[:, None] == segments)


class Burst:
    """A GPU that nothing runs on."""

    def warm_up(self):
        pass


@pytest.fixture
def processor(monkeypatch):
    monkeypatch.setattr(calls, "DEVICE", "cpu")
    monkeypatch.setattr(calls, "CudaBurst", Burst)
    monkeypatch.setattr(torch, "compile", lambda function, **asked: function)


def measured(forward, backward):
    ms = [[forward], [backward]]
    return Measured(Sampled(ms, ms), peak_bytes=7)


def ran(name="causal-128-8k", **times):
    found = {who.replace("_", "-"): measured(*ms) for who, ms in times.items()}
    return attention.records_of(BY_NAME[name], AROUND, found, H100)


def test_all_shapes_that_an_order_may_depend_on_are_there():
    assert {case.D for case in CASES} == {64, 96, 128, 256}
    assert {case.L for case in CASES} == {2048, 8192, 32768, 131072}
    assert {case.dtype for case in CASES} == {"bfloat16", "float16"}
    assert {case.causal for case in CASES} == {True, False}
    assert any(case.G < case.H for case in CASES)
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairs_are_those_that_the_mask_leaves(processor, case):
    case = tiny(case)
    _, segments = attention.drawn(case)
    assert case.pairs == attended(case, segments).sum()
    assert sum(case.spans) == case.L


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_flex_computes_what_ours_is_asked_for(processor, monkeypatch, case):
    from isoform.kernels import attention_torch
    from isoform.reference.torch import attention as reference

    def in_its_place(kernel, operands, options, scale, *, return_lse):
        assert kernel.name == OURS and options.right == 0 and not options.wide
        window = (options.left if case.window else -1, 0)
        return reference(**operands, window=window, scale=scale), None

    monkeypatch.setattr(attention_torch, "forward", in_its_place)
    case = replace(tiny(case), dtype="float32")
    (*operands, _), segments = attention.drawn(case)
    q, k, v = (x.detach() for x in operands)  # on a processor FlexAttention has no backward
    ours = attention.by_kernel(OURS, case, segments, q, k, v)
    assert torch.allclose(attention.flex(case, segments)(q, k, v), ours, atol=1e-5)


def test_libraries_are_timed_where_they_can_do_the_call():
    def names(case):
        return tuple(attention.makers(BY_NAME[case], [None] * 4, None))

    assert names("causal-128-8k") == names("grouped-64-8k") == (OURS, *LIBRARIES)
    assert names("causal-256-8k") == LIBRARIES
    assert names("window-4096-64-32k") == names("documents-64-32k") == (OURS, FLEX)


def test_floors_are_two_products_and_five():
    """An H100's tensor cores: 4096 operations · 132 · 1.98 GHz = 1.07e15 in a second."""
    case = BY_NAME["full-128-32k"]
    forward, backward = attention.floors(case, H100)
    assert forward.ms == forward.products == pytest.approx(4 * 8 * 32768**2 * 128 / 1.0706e12, 1e-3)
    assert backward.products == 2.5 * forward.products
    assert forward.bytes == pytest.approx(4 * 2 * 8 * 32768 * 128 / 3.352e9)
    assert attention.floors(case, replace(H100, architecture="sm_70")) is None


def test_the_fastest_is_first_by_each_pass_and_by_both():
    forward, backward, both = attention.rankings(
        ran(cuda_tensor=(2.0, 5.0), cuda_flash=(1.0, 4.0), cuda_cudnn=(1.5, 3.0))
    )
    assert [name for name, _ in forward.ms] == ["cuda-flash", "cuda-cudnn", OURS]
    assert backward.ms[0] == ("cuda-cudnn", 3.0)
    assert both.ms[0] == ("cuda-cudnn", 4.5)
    assert str(both).endswith("both: cuda-cudnn 4.5 ms, cuda-flash 1.11 ×, cuda-tensor 1.56 ×")


def test_what_ours_raises_is_raised(processor, monkeypatch):
    """And what a library raises is why it was not run."""

    def fails(name, *others):
        raise RuntimeError(f"{name} fails")

    monkeypatch.setattr(attention, "by_kernel", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(RuntimeError, match="cuda-tensor fails"):
        attention.run(tiny(BY_NAME["causal-128-8k"]), AROUND, 1, False)
    case = tiny(BY_NAME["causal-128-8k"])
    libraries = dict(list(attention.makers(case, *attention.drawn(case)).items())[1:])
    found = calls.measure(libraries, 0, ours=(OURS,))
    assert found["cuda-flash"].not_run == "RuntimeError: cuda-flash fails"


def test_who_was_not_run_is_not_ranked():
    found = {OURS: measured(1.0, 2.0), "cuda-flash": Measured(not_run="out of memory")}
    records = attention.records_of(BY_NAME["causal-128-8k"], AROUND, found, H100)
    assert all(len(one.ms) == 1 for one in attention.rankings(records))


def test_the_table_says_who_is_fastest():
    begin, end = table.marks("attention")
    text = table.filled(
        f"{begin}\n{end}\n", ran(cuda_tensor=(2.0, 5.0), cuda_flash=(1.0, 4.0)), "attention"
    )
    assert (
        "| causal-128-8k | 1,8192,16,16,128 | 2 / 5 | 1 / 4 | – | – | 0.257 / 0.642 | cuda-flash |"
        in text
    )


def test_quick_and_list_need_no_gpu(capsys):
    assert BENCHMARK.main(["--list", "--quick"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    with pytest.raises(SystemExit, match="2"):
        BENCHMARK.main(["--case", "square"])
