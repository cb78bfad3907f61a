"""``isoform plan``: what is asked in words, what is printed, written and drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from isoform.conformance import planning
from isoform.conformance.cli import app
from isoform.parallel.planner import Attended, Sizes, load_topology, plan
from isoform.parallel.sharding import Sharding

CALL = ("--length", "64K", "--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--ranks", "16")
MINE = """
name = "mine"

[flops]
bfloat16 = 1e12

[[levels]]
name = "bus"
ranks = 16
bandwidth = 1e9
latency = 1e-6
"""


def run(*args: str, width: int = 120) -> Result:
    return CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": str(width), "NO_COLOR": "1"})


def found(*args: str) -> dict:
    result = run(*CALL, *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_table():
    result = run(*CALL)
    assert result.exit_code == 0
    said = result.stdout
    assert "B=1 L=65536 H=8 G=2 D=64 bfloat16 on 16 ranks of: H100 nodes" in said
    assert re.search(
        r"^strategy +sharding +time +waiting +sent +messages +memory +balance", said, re.M
    )
    for name in ("ring", "hybrid near=2", "hybrid near=4", "hybrid near=8", "all_gather"):
        assert re.search(rf"^{name} +[a-z]", said, re.M), name
    assert "declined: ulysses: 16 ranks share 8 query heads, some would have none" in said
    assert 'take strategy="' in said


def test_best_first_and_what_to_write():
    read = found()
    times = [each["time"] for each in read["candidates"] if not each["declined"]]
    assert times == sorted(times)
    best = read["candidates"][0]
    near = "" if best["near"] is None else f", near={best['near']}"
    said = " ".join(run(*CALL).stdout.split())
    call = (
        f'strategy="{best["strategy"]}"{near}, sharding=Sharding.{best["sharding"]}(length, comm.'
    )
    assert call in said


def test_figures_are_the_planners():
    read = found("--sharding", "zigzag", "--full", "--window", "4K,-1", "--documents", "24K")
    expected = plan(
        [Sharding.zigzag(2**16, 16)],
        Sizes(1, 8, 2, 64, 2),
        dtype="bfloat16",
        attended=Attended(False, (4096, -1), (24576, 24576, 16384)),
        topology=load_topology("h100"),
    )
    by_name = {
        (c.strategy, c.near): json.loads(json.dumps(c.as_dict())) for c in expected.candidates
    }
    assert len(read["candidates"]) == len(by_name)
    for each in read["candidates"]:
        assert each == by_name[each["strategy"], each["near"]]
    assert read["window"] == [4096, -1]
    assert read["documents"] == [24576, 24576, 16384]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_terminal_and_says_what_does_not(width):
    said = run(*CALL, width=width).stdout
    assert max(map(len, map(str.rstrip, said.splitlines()))) <= width
    assert "…" not in said
    assert ("in a wider terminal also: messages" in said) == (width < 90)
    assert re.search(r"^hybrid near=8 .* [0-9.]+ [mµ]?s .*[0-9.]+ [MG]B", said, re.M)


def test_what_needs_too_much_memory_is_declined():
    result = run(*CALL, "--memory", "0.15")
    assert result.exit_code == 0
    assert re.search(
        r"declined: all_gather: needs 0\.\d+ GB a rank, which has 0\.15", result.stdout
    )
    result = run(*CALL, "--memory", "0.0001")
    assert result.exit_code == 1
    assert "no strategy will do" in result.stdout


def test_a_machine_in_a_file_or_on_the_command_line(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    of_file = found("--topology", str(path))
    given = found("--level", "16,1,1", "--tflops", "1")
    assert given["candidates"] == of_file["candidates"]
    faster = found("--topology", str(path), "--tflops", "2")
    for slow, fast in zip(
        sorted(of_file["candidates"], key=str), sorted(faster["candidates"], key=str), strict=True
    ):
        assert fast["strategy"] == slow["strategy"]
        ratio = slow["forward"]["time"]["compute"] / fast["forward"]["time"]["compute"]
        assert ratio == pytest.approx(2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--length", "1T"), "--length must be a number such as 4096, 512K or 1M, got '1T'"),
        (("--length", "0.3"), "--length must be a number such as 4096, 512K or 1M, got '0.3'"),
        (("--kv-heads", "3"), "--kv-heads must divide --heads, got 3 and 8"),
        (("--dtype", "int8"), "--dtype must be one of fp16, bf16, fp32, fp64, got 'int8'"),
        (("--window", "1,2,3"), "--window must be N or LEFT,RIGHT, got '1,2,3'"),
        (("--documents", "0"), "--documents must be at least 1 position long, got '0'"),
        (("--sharding", "spiral"), "--sharding must be one of contiguous, zigzag, striped, or"),
        (("--sharding", "zigzag:4"), "--sharding must be one of contiguous, zigzag, striped, or"),
        (("--sharding", "striped:0"), "--sharding: stripes must have 1 position at least"),
        (("--topology", "h200"), "no topology is called h200; there are h100, laptops"),
        (("--topology", "no.toml"), "cannot read no.toml: No such file or directory"),
        (("--level", "8,450,5"), "--level needs --tflops too: how fast a rank computes"),
        (("--level", "8;450", "--tflops", "1"), "--level must be RANKS,GB/s,MICROSECONDS"),
        (("--level", "4,1,1", "--tflops", "1"), "joins 4 ranks by level 1, asked for 16"),
        (("--level", "50,-1", "--tflops", "1"), "latency must not be negative"),
        (("--tflops", "0"), "flops of bfloat16 must be positive, got 0"),
        (("--memory", "-1"), "--memory must be positive, got -1"),
        (("--plot", "time.txt"), "--plot must be a .png, .svg, .pdf file, got time.txt"),
        (("--plot", "nowhere/time.svg", "--up-to", "2"), "cannot write nowhere/time.svg"),
    ],
    ids=" ".join,
)
def test_errors_name_the_option(args, message):
    result = run(*CALL, *args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not result.stdout


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("512K", 2**19), ("1m", 2**20), ("1.5M", 3 * 2**19), ("1_000", 1000)],
)
def test_lengths(text, number):
    assert planning.positions(text, "--length") == number


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.00 µs"), (2e-6, "2.00 µs"), (0.9996, "1.00 s"), (0.988, "988 ms"), (1234, "1234 s")],
)
def test_times_in_three_digits(seconds, said):
    assert planning._seconds(seconds) == said


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_plot_is_written(tmp_path, suffix):
    path = tmp_path / f"time{suffix}"
    result = run(*CALL, "--plot", str(path), "--up-to", "8")
    assert result.exit_code == 0
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert f"plot: {path}" in " ".join(result.stderr.split())


def test_what_is_drawn():
    """A line for each strategy, up to where it will do; each point is the best of its kind."""
    assert planning.world_sizes(8, 3) == [1, 2, 4, 8]
    assert planning.world_sizes(4, 6) == [1, 2, 4, 8]
    shardings = [Sharding.zigzag, Sharding.contiguous]
    plans = {
        P: plan(
            [make(2**16, P) for make in shardings],
            Sizes(1, 8, 2, 64, 2),
            dtype="bfloat16",
            attended=Attended(True),
            topology=load_topology("h100"),
        )
        for P in planning.world_sizes(32, 1)
    }
    lines = planning.series(plans)
    assert [*lines["ulysses"]] == [1, 2, 4, 8]
    assert [*lines["ring, zigzag"]] == [1, 2, 4, 8, 16, 32]
    assert [*lines["hybrid, best groups"]] == [4, 8, 16, 32]
    for P, best in lines["hybrid, best groups"].items():
        every = [
            c.time.total
            for c in plans[P].candidates
            if c.strategy == "hybrid" and not c.declined and c.time
        ]
        assert best.time is not None
        assert best.time.total == min(every)
    assert np.allclose(
        lines["ring, contiguous"][16].balance / lines["ring, zigzag"][16].balance, 2, atol=0.1
    )


def test_help_names_every_option_and_its_default(tmp_path: Path):
    said = run("--help", width=100).stdout
    for option in ("--length", "--kv-heads", "--documents", "--level", "--tflops", "--plot"):
        assert option in said
    assert "[default: h100]" in said
    assert "isoform plan --length 1M --heads 32" in said
