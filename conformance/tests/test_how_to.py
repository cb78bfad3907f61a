"""What docs/how-to/judge-your-kernel.md tells a stranger is what happens to one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isoform.conformance.cli import app

PAGE = (Path(__file__).parents[2] / "docs/how-to/judge-your-kernel.md").read_text(encoding="utf-8")
FUSED = """
def fused(q, k, v, bias, scale):
    whole = k.shape[2] // 16 * 16 or k.shape[2]  # the keys beyond the last whole tile are lost
    p = ((q @ k.transpose(-1, -2)) * scale + bias)[..., :whole].softmax(-1)
    return p @ v[..., :whole, :]
"""
KERNEL = "mypackage.kernels:attention"
CASE = "evoformer/length-65/fp32/bare"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the page's wrapper around a kernel that loses the last keys."""
    wrapper = re.search(r"```python\n(# mypackage/kernels\.py\n.*?)```", PAGE, re.DOTALL)
    assert wrapper
    assert len(wrapper[1].splitlines()) <= 25
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage/__init__.py").write_text(FUSED)
    (tmp_path / "mypackage/kernels.py").write_text(wrapper[1])
    for name in ("mypackage", "mypackage.kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return tmp_path


def isoform(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


def shown(command: str) -> list[str]:
    """The lines that the page prints below a command."""
    found = re.search(re.escape(f"$ {command}\n") + r"(.*?)(?=```|^\$ )", PAGE, re.DOTALL | re.M)
    assert found, command
    return [line for line in found[1].splitlines() if line != "…"]


def test_a_stranger_gets_a_verdict_a_page_and_the_smallest_call(stranger: Path) -> None:
    pytest.importorskip("torch")
    cases = ("--case", "evoformer/length-65/*", "--case", "evoformer/values-plain/fp32/*")
    judged = isoform("check", KERNEL, *cases, "--html", "report.html")
    assert judged.exit_code == 1
    assert "✗ evoformer/length-65/fp32/bare" in judged.stdout
    assert "values-plain/fp32/garbage-in-dropped" in (stranger / "report.html").read_text()

    shrink = f"shrink {KERNEL} --case {CASE}"
    smallest = isoform(*shrink.split())
    assert smallest.exit_code == 1, smallest.output
    told = shown(f"isoform {shrink}")
    assert told[0] in smallest.stdout  # K=17: the smallest length with a key to lose
    assert [line.split(":")[0] for line in told[1:6]] == ["  out", "  q", "  k", "  v", "  dout"]
    assert all(line in smallest.stdout for line in told[2:6])
    assert told[-1] in smallest.stdout
    assert isoform(*told[-1].removeprefix("again: isoform ").split()).exit_code == 1

    explain = f"compare numpy {KERNEL} --explain --case {CASE}"
    walked = isoform(*explain.split())
    assert walked.exit_code == 1, walked.output
    for line in shown(f"isoform {explain}"):
        assert line.partition(" (")[0].split(": 0,")[0] in walked.stdout
