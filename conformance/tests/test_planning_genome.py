"""``isoform plan genome``: what is asked in words, what is printed, written and drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isoform.conformance import planning_genome
from isoform.conformance.cli import app
from isoform.conformance.planning import WrongRequest
from isoform.parallel.training.plan import Machine, Run, of_scheme, schemes
from isoform.parallel.training.switches import Layout, Switches
from isoform.reference.torch.genome_lm import CONFIGURATIONS

CALL = ("--model", "2.5B", "--gpus", "4", "--memory", "40GB", "--host", "64GiB")


def run(*args: str, width: int = 160) -> Result:
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["plan", "genome", *args], env=environment)


def test_figures_are_the_plans():
    result = run(*CALL, "--json")
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    machine = Machine(40 * 10**9, 64 * 2**30)
    assert (read["memory"], read["host"], read["gpus"]) == (machine.memory, machine.host, 4)
    c = CONFIGURATIONS["2.5B"]
    for name, scheme in schemes(c).items():
        expected = of_scheme(scheme, Run(c, Switches(), 0), 4, machine)
        one = read["schemes"][name]
        assert one["length"] == expected.run.length
        assert one["bytes"] == expected.peak.bytes == sum(one["parts"].values())
        assert one["bytes"] == sum(item["bytes"] for item in one["items"]) <= machine.memory
        assert all(item["why"] for item in one["items"])
        assert Layout(**one["switches"]["layout"]).ranks == 4


@pytest.mark.parametrize("width", [50, 80, 320])
def test_it_fits_the_terminal_and_says_what_does_not(width):
    result = run(*CALL, width=width)
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert max(map(len, map(str.rstrip, said.splitlines()))) <= width
    for name in ("baseline", "everything", "… without offload"):
        assert re.search(rf"^{name} .*\d[KM]", said, re.M), name
    assert "parameters" in said and "mask and scores" in said
    assert ("in a wider terminal" in said) == (width < 320)


def test_plan_is_still_there():
    result = CliRunner().invoke(app, ["plan", "--length", "64K", "--heads", "8", "--ranks", "4"])
    assert result.exit_code == 0 and "take strategy=" in result.stdout
    result = CliRunner().invoke(app, ["plan"], env={"NO_COLOR": "1"})
    assert result.exit_code == 2 and "Missing option" in result.output
    said = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    assert "plan genome" in said


def test_one_length_and_given_degrees():
    read = json.loads(run(*CALL, "--length", "16K", "--sequence", "2", "--json").stdout)
    everything = read["schemes"]["everything"]
    assert everything["length"] == 16384 and everything["fits"]
    assert everything["switches"]["layout"]["sequence"] == 2
    assert read["schemes"]["baseline"] is None  # which has no sequence over ranks
    said = run(*CALL, "--length", "16K", "--sequence", "2").stdout
    assert re.search(r"^baseline +– .*no layout", said, re.M)
    read = json.loads(run(*CALL, "--length", "512K", "--json").stdout)
    assert not read["schemes"]["baseline"]["fits"]
    assert read["schemes"]["baseline"]["limited_by"] == "memory"


def test_nothing_fits():
    result = run("--model", "33B", "--memory", "1GB")
    assert result.exit_code == 1
    assert re.search(r"^everything +– ", result.stdout, re.M)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "9B"), "--model must be one of tiny, 25M, 250M, 2.5B, 25B, 33B, got '9B'"),
        (("--memory", "40XB"), "--memory must be a size such as 40GB or 80GiB, got '40XB'"),
        (("--host", "much"), "--host must be a size such as 40GB or 80GiB, got 'much'"),
        (("--dtype", "int8"), "--dtype must be one of fp16, bf16, fp32, fp64, got 'int8'"),
        (("--positions", "none"), "--positions must be rotary or learned, got 'none'"),
        (("--tensor", "3"), "no layout of 4 GPUs for 2.5B has --tensor 3"),
        (("--length", "1T"), "--length must be a number such as 4096, 512K or 1M, got '1T'"),
        (("--plot", "a.txt"), "--plot must be a .png, .svg, .pdf file, got a.txt"),
        (("--plot", "nowhere/a.svg"), "cannot write nowhere/a.svg"),
        (("--paper", "--plot", "a.svg"), "--paper, --record and --plot do not go together"),
        (("--record", "nowhere.jsonl"), "cannot read nowhere.jsonl: No such file"),
    ],
    ids=" ".join,
)
def test_errors_name_the_option(args, message):
    result = run(*CALL, *args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_sizes():
    assert planning_genome.size("40GB", "--memory") == 40 * 10**9
    assert planning_genome.size("1.5 GiB", "--memory") == 3 * 2**29
    assert planning_genome.size("1e11", "--memory") == 10**11
    with pytest.raises(WrongRequest, match="--memory must be a size"):
        planning_genome.size("-1GB", "--memory")


def test_the_plot(tmp_path):
    path = tmp_path / "memory.svg"
    result = run(*CALL, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_text().count("<path") > 20


def test_beside_what_was_reported():
    result = run("--paper", width=100)
    assert result.exit_code == 0, result.output
    read = json.loads(run("--paper", "--json").stdout)
    reported = [(x["model"], x["gpus"], x["old"], x["megatron"], x["new"]) for x in read]
    assert reported[0] == ("25B", 16, 36, 26, 192) and reported[-1] == ("33B", 64, 32, 52, 448)
    assert len(read) == 6
    for row in read:
        planned = row["planned"]
        assert planned["old"]["switches"]["attention"] == "stored"
        assert planned["new"]["switches"]["layout"]["sequence"] == row["gpus"]
        assert planned["old_on_host"]["length"] > planned["old"]["length"]
        assert planned["new_offloaded"]["length"] >= planned["new"]["length"]
        if planned["new"]["fits"]:
            assert planned["new"]["length"] > 10 * planned["old"]["length"]
        said = f"{planned['old']['length'] // 1024}"
        assert re.search(rf"^{row['model']} +{row['gpus']} .* {said} ", result.stdout, re.M)


def test_a_record(tmp_path: Path):
    """Of a step that the plan knows, and of one that it does not."""
    c, switches = CONFIGURATIONS["25M"], Switches()
    planned = of_scheme(
        schemes(c)["baseline"], Run(c, switches, 0), 1, Machine(10**11, 0), length=2048
    )
    layout = {"pipeline": 1, "data": 1, "sequence": 1, "tensor": 1}
    scheme = {"attention": "stored", "checkpointing": "blocks", "layout": layout}
    first = {"kind": "surroundings", "dtype": "bfloat16", "versions": {"nvrtc": "12.9"}}
    first["schemes"] = {"baseline": scheme}
    step = {"kind": "time", "model": "25M", "scheme": "baseline", "length": 2048, "host_bytes": 0}
    path = tmp_path / "record.jsonl"

    def written(peak: float) -> Result:
        lines = [first, step | {"peak_bytes": int(peak)}]
        path.write_text("\n".join(map(json.dumps, lines)))
        return run("--record", str(path))

    good = written(1.05 * planned.peak.bytes)
    assert good.exit_code == 0 and "25M baseline, 2048 tokens" in good.stdout
    assert "1 steps, 0 off by more than 10 %" in good.stdout
    bad = written(1.2 * planned.peak.bytes)
    assert bad.exit_code == 1 and "1 off by more than 10 %" in bad.stdout
    assert run("--record", str(path), "--within", "20").exit_code == 0
    (read,) = json.loads(run("--record", str(path), "--json").stdout)
    assert read["error"] == pytest.approx(1 / 1.2 - 1, rel=1e-3)
    assert read["planned"]["bytes"] == sum(item["bytes"] for item in read["planned"]["items"])
    path.write_text("{}")
    assert run("--record", str(path)).exit_code == 2
