"""``isoform train-genome``: from FASTA to a model, as a user meets it; a killed rank, a rerun."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isoform.conformance import train_genome
from isoform.conformance.cli import app
from isoform.parallel.launch import mpiexec
from isoform.parallel.training import loop
from isoform.parallel.training.settings import parse

SETTINGS = """
[data]
fasta = "genome.fa"
length = 12
batch = 4
held_out = 0.2
markov = 3

[model]
layers = 2
hidden = 16
heads = 2

[training]
steps = 4
warmup = 2
evaluate_every = 2
checkpoint_every = 2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a genome and settings, to be in."""
    draw = random.Random(3)
    bases = "".join(draw.choices(["ACG", "ATG", "CCT", "GAT"], [4, 2, 1, 1], k=500))
    (tmp_path / "genome.fa").write_text(f">one of mine\n{bases}\n>two\n{bases[300:600]}\n")
    (tmp_path / "run.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str, width: int = 100) -> Result:
    return CliRunner().invoke(
        app, ["train-genome", *args], env={"COLUMNS": str(width), "NO_COLOR": "1"}
    )


def flat(text: str) -> str:
    return " ".join(text.split())


def losses(folder: Path) -> list[tuple[str, int, float]]:
    return [
        (event["event"], event["step"], event["loss"])
        for event in loop.read_log(folder / loop.LOG)
        if event["event"] != "begin"
    ]


def test_what_is_said(here):
    result = run("--config", "run.toml", "-o", "run")
    assert result.exit_code == 0, result.output
    said = flat(result.stdout)
    assert "model small with layers=2, hidden=16, heads=2: 8,800 parameters, on one rank" in said
    assert "genome.fa: 1,440 bases to train on (1 record), 360 held out; 4 windows of 12 " in said
    markov = loop.read_log(here / "run" / loop.LOG)[0]["markov_bits_per_base"]
    assert f"the Markov model of order 3 needs {markov:.4f} bits for a base held out" in said
    for step in (0, 2, 4):
        assert f"step {step} of 4: held out " in said
    last = losses(here / "run")[-1][2] / math.log(2) / 3
    assert f"after 4 steps: {last:.4f} bits a base, {last - markov:.4f} above the Markov " in said
    assert said.endswith("log: run/log.jsonl")
    assert "goes on" not in said


@pytest.mark.parametrize("width", [60, 80])
def test_it_fits_the_terminal(here, width):
    said = run("--config", "run.toml", width=width).stdout
    assert max(map(len, map(str.rstrip, said.splitlines()))) <= width


def test_going_on(here):
    assert run("--config", "run.toml", "-o", "run", "--steps", "4", "-q").exit_code == 0
    said = flat(run("--config", "run.toml", "-o", "run").stdout)
    assert "goes on from the checkpoint of step 4" in said
    changed = run("--config", "run.toml", "-o", "run", "--steps", "6")
    assert changed.exit_code == 2
    assert "is of another run: training.steps was 4, is 6" in flat(changed.stderr)


def test_outcome_as_json_and_picture(here):
    result = run("--config", "run.toml", "-o", "run", "--plot", "curve.png", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    last = losses(here / "run")[-1][2]
    assert found["held_out_bits_per_base"] == pytest.approx(last / math.log(2) / 3)
    assert (found["step"], found["markov_order"]) == (4, 3)
    assert found["held_out_bases"] > 300
    assert (here / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "plot: curve.png" in result.stderr
    quiet = run("--config", "run.toml", "-o", "other", "-q")
    assert len(quiet.stdout.splitlines()) <= 4
    assert "after 4 steps" in quiet.stdout


def test_what_is_drawn(here):
    from matplotlib.figure import Figure

    run("--config", "run.toml", "-o", "run")
    events = loop.read_log(here / "run" / loop.LOG)
    kept: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path: kept.append(self))
        train_genome.draw(here / "x.png", events)
    (axes,) = kept[0].axes
    training, tests, markov, nothing = axes.lines
    bits = {"step": [], "held out": []}
    for event in events[1:]:
        bits[event["event"]].append((event["step"], event["bits_per_base"]))
    for drawn, expected in ((training, bits["step"]), (tests, bits["held out"])):
        assert [*zip(*drawn.get_data(), strict=True)] == expected
    assert set(markov.get_ydata()) == {events[0]["markov_bits_per_base"]}
    assert set(nothing.get_ydata()) == {2.0}
    low, high = axes.get_ylim()
    assert low < min(y for _, y in bits["held out"])
    assert high > 2


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the package with the genome has no wheels for this Python"
)
def test_the_default_is_a_real_genome(here, monkeypatch):
    path = train_genome.embedded()
    found = train_genome.asked(None, (), 7)
    assert found.data.fasta == (path,)
    assert found.training.steps == 7
    assert train_genome.asked(Path("run.toml"), (), None).data.fasta == (Path("genome.fa"),)
    named = train_genome.asked(Path("run.toml"), (Path("a.fa"), Path("b.fa")), None)
    assert named.data.fasta == (Path("a.fa"), Path("b.fa"))
    from isoform.parallel.training.fasta import Letters, Record, read

    events = [*read(path)]
    assert [x.name for x in events if isinstance(x, Record)] == ["NC_007779.1"]
    assert sum(len(x.letters) for x in events if isinstance(x, Letters)) == 4_646_332

    monkeypatch.setattr(train_genome, "PACKAGE", "a-package-that-is-not-there")
    result = run()
    assert result.exit_code == 2
    assert "'pip install \"isoform[genome]\"'" in flat(result.stderr)


@pytest.mark.parametrize(
    ("change", "args", "code", "message"),
    [
        (("length", "lenght"), (), 2, "run.toml: there is no data.lenght; did you mean length?"),
        (("12", "1000"), (), 2, "data: a window has length=1000 tokens, more than the"),
        (("genome.fa", "none.fa"), (), 2, "none.fa: No such file or directory"),
        (("", ""), ("--plot", "x.txt"), 2, "--plot must be a .png, .svg, .pdf file, got x.txt"),
        (("", ""), ("--fasta", "run.toml"), 2, "run.toml:2: '[data]' comes before the first head"),
        (("", ""), ("-o", "genome.fa"), 2, "genome.fa"),
        (("[model]", "[switches]\nhead_groups = 2\n[model]"), (), 2, "groups of heads without"),
        (("warmup", "learning_rate = 1e30\nwarmup"), (), 1, "the loss is"),
    ],
)
def test_errors_say_what_is_wrong(here, change, args, code, message):
    (here / "run.toml").write_text(SETTINGS.replace(*change, 1))
    result = run("--config", "run.toml", *args)
    assert result.exit_code == code, result.output
    assert message in flat(result.stderr)
    assert "Traceback" not in result.stderr


def test_one_process_can_be_a_group_of_engines(here):
    (here / "run.toml").write_text(SETTINGS + "[switches]\noptimizer = 'offloaded'\n")
    assert run("--config", "run.toml", "-o", "run", "-q").exit_code == 0
    (here / "run.toml").write_text(SETTINGS)
    same_as_one_process(here / "run")


def test_bad_records_are_named_by_file_and_line(here):
    with (here / "genome.fa").open("a") as out:
        out.write(">three\nACGT\nAC-GT\n")
    result = run("--config", "run.toml")
    assert result.exit_code == 2
    assert "genome.fa:7: record three: '-' stands for no base (6 before it)" in flat(result.stderr)
    (here / "run.toml").write_text(SETTINGS.replace("[data]", "[data]\nbad_records = 'skip'"))
    result = run("--config", "run.toml")
    assert result.exit_code == 0
    assert "left out: genome.fa:7: record three: '-' stands" in flat(result.stdout)


def test_the_page_that_explains_it(here):
    """Its settings are read, its script is one, its figures are those of the run it shows."""
    page = Path(__file__).parents[2] / "docs/how-to/train-a-genome-model.md"
    text = page.read_text(encoding="utf-8")
    (settings,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    told = parse(tomllib.loads(settings))
    for table in (told.data, told.training):
        missing = [name for name in vars(table) if f"\n{name} = " not in settings]
        assert missing in ([], ["betas"]), missing
    assert told.switches.layout.ranks == 8
    (script,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (line,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert run("--config", "run.toml", "-o", "run", "-q").exit_code == 0
    assert json.loads(line).keys() == loop.read_log(here / "run" / loop.LOG)[2].keys()


# As programs.

ISOFORM = ("-m", "isoform.conformance.cli", "train-genome", "--config", "run.toml", "-o")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], limit: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def waited_for(folder: Path, step: int, process: subprocess.Popen[str]) -> dict:
    """The first line of the log, when it says of a step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / loop.LOG).exists():
            events = loop.read_log(folder / loop.LOG)
            if events and events[-1]["step"] >= step:
                return events[0]
        time.sleep(0.005)
    raise AssertionError(f"no step {step}: {ended(process)}")


def same_as_one_process(folder: Path) -> None:
    assert run("--config", "run.toml", "-o", "one").exit_code == 0
    for a, b in zip(losses(Path("one")), losses(folder), strict=True):
        assert a[:2] == b[:2]
        assert a[2] == pytest.approx(b[2], rel=5e-6)


def test_a_rank_that_is_killed_under_torchrun(here):
    """torchrun starts the ranks again, and they go on from the last checkpoint."""
    (here / "run.toml").write_text(SETTINGS.replace("steps = 4", "steps = 16"))
    process = started(sys.executable, *TORCHRUN, "--max-restarts=1", *ISOFORM, "killed")
    first = waited_for(here / "killed", 5, process)
    os.kill(first["pid"], signal.SIGKILL)
    code, out, err = ended(process)
    assert code == 0, err
    assert "goes on from the checkpoint of step" in flat(out)
    begins = [e for e in loop.read_log(here / "killed" / loop.LOG) if e["event"] == "begin"]
    assert len(begins) == 2
    assert begins[0]["pid"] == first["pid"] != begins[1]["pid"]
    assert begins[1]["step"] >= 4
    assert begins[0]["layout"]["sequence"] == 2
    same_as_one_process(here / "killed")


def test_an_interrupt_says_how_to_go_on(here):
    # a job in the background begins with SIGINT ignored, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (here / "run.toml").write_text(SETTINGS.replace("steps = 4", "steps = 4000"))
    process = started(sys.executable, *ISOFORM, "run")
    waited_for(here / "run", 3, process)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130
    assert "interrupted; the same command goes on from the last checkpoint" in flat(err)


@pytest.mark.mpi
def test_ranks_of_mpiexec(here):
    code, out, err = ended(started(mpiexec(), "-n", "2", sys.executable, *ISOFORM, "two"))
    assert code == 0, err
    assert out.count("after 4 steps") == 1
    same_as_one_process(here / "two")
