"""The benchmark over GPUs, as far as it needs none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from isoform.parallel import Sharding
from isoform.parallel.attention import attention_vjp
from isoform.parallel.benchmark import scaling
from isoform.parallel.benchmark.gpus import Seconds, Silent, Timed, slowest
from isoform.parallel.benchmark.scaling import Point
from isoform.parallel.communicators.simulated import simulate
from isoform.parallel.launch import LaunchError

POINT = Point(L=96, H=4, G=2, D=8)


def sent(comm, strategy: str) -> tuple[dict[str, int], dict[str, int]]:
    sharding = Sharding.zigzag(POINT.L, comm.size)
    length = sharding.lengths[comm.rank]
    rng = np.random.default_rng(comm.rank)
    q, k, v, dout = (
        rng.standard_normal((1, length, heads, POINT.D), np.float32)
        for heads in (POINT.H, POINT.G, POINT.G, POINT.H)
    )
    options = {"comm": comm, "sharding": sharding, "strategy": strategy, "causal": True}
    _, backward = attention_vjp(q, k, v, **options)
    backward(dout)
    return dict(comm.traffic.bytes_by), dict(comm.traffic.messages_by)


@pytest.mark.parametrize("strategy", scaling.STRATEGIES)
def test_where_nothing_is_sent_a_rank_does_all_the_same(strategy):
    real = simulate(sent, 2, strategy)
    for rank in range(2):
        silent = sent(Silent(rank, 2), strategy)
        for counted, counted_silently in zip(real[rank], silent, strict=True):
            assert {k: v for k, v in counted.items() if k != "split"} == {
                k: v for k, v in counted_silently.items() if k != "split"
            }


def test_a_round_is_as_long_as_on_the_slowest_rank_and_the_median_counts():
    rounds = [[(1.0, 5.0), (3.0, 4.0), (2.0, 9.0)], [(2.0, 4.0), (1.0, 4.5), (9.0, 1.0)]]
    by_rank = [Timed(tuple(Seconds(*one) for one in each)) for each in rounds]
    assert slowest(by_rank) == (3.0, 5.0)
    assert slowest([by_rank[0], Timed(())]) == (2.0, 5.0)
    assert slowest([Timed(()), Timed((), not_run="out of memory")]) is None


def test_points_of_weak_scaling_have_as_much_work_a_rank():
    strong = scaling.points_of([32768], 32, [32, 8], 128, 1)
    assert [(p.L, p.G) for p in strong] == [(32768, 32), (32768, 8)]
    small, large = scaling.points_of([32768], 32, [8], 128, 2)
    assert large.operations / (2 * small.operations) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("strategy", scaling.STRATEGIES)
def test_the_prediction_is_that_of_one_gpu_where_sending_costs_nothing(strategy):
    point = Point(32768, 32, 32, 128)
    one = Seconds(0.1, 0.3)
    free = scaling.predicted(point, 2, one, 1e18, strategy)
    slow = scaling.predicted(point, 2, one, 1e8, strategy)
    assert free == pytest.approx(0.2, rel=0.02)
    assert slow > 2 * free
    assert scaling.predicted(point, 2, None, 1e9, strategy) is None


def test_a_record_is_a_line_of_json():
    record = scaling.Record({"device": "a GPU"}, "torch-nccl", 2, POINT, "ring", 0.1, 0.2)
    read = json.loads(record.as_json())
    assert read["point"] == {"L": 96, "H": 4, "G": 2, "D": 8}
    assert read["forward_s"] == 0.1 and read["efficiency"] is None


def test_a_competitor_that_ends_its_ranks_is_recorded_and_the_others_run():
    class Ranks:
        ranks, transport = 2, "torch-nccl"

        def run(self, function, *args, limit):
            if function is scaling.bandwidth:
                return [1e11, 1e11]
            competitor = args[1]
            asked.append(competitor)
            if competitor in ("one GPU", "ring"):
                raise LaunchError("failed", {1: "Traceback\nRuntimeError: too large\n"}, 2)
            return [Timed((Seconds(1.0, 2.0),))] * 2

    asked: list[str] = []
    alone, ring, *others = scaling.measure(Ranks(), [POINT], {}, 1, (), exposed=False)
    assert alone.not_run == ring.not_run == "RuntimeError: too large"
    assert [one.forward_s for one in others] == [1.0, 1.0]
    assert all(one.efficiency is None and one.exposed_s is None for one in others)
    assert asked == ["one GPU", *scaling.STRATEGIES]


def test_too_few_gpus_are_told(capsys):
    assert scaling.main(["--ranks", "4096"]) == 3
    assert "4096 ranks need as many GPUs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scaling.main(["--ranks", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_the_axial_benchmark_runs_where_there_is_no_gpu(monkeypatch):
    """All but the kernels: what it times there is no use."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    axial = pytest.importorskip("isoform.parallel.benchmark.axial")

    class Threads:
        ranks, transport = 2, "simulated"

        def run(self, function, *args, limit):
            return simulate(function, 2, *args)

    one, ours = axial.measure(Threads(), [axial.Sizes(5, 7)], {}, 1, "cpu")
    assert (one.ranks, one.competitor, ours.ranks) == (1, "one GPU", 2)
    assert one.bytes == 0 < ours.bytes
    assert ours.efficiency > 0 and ours.exposed_s is not None
    assert axial.main(["--ranks", "4096"]) == 3
