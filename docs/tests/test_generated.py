"""The pages that are made, not written, have what they are made of; and one that is written is held
to the sources.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "tools"))

import generated  # noqa: E402

from isoform.conformance.cli import app  # noqa: E402

READS = re.compile(r"\b((?:ISOFORM|NOX)_[A-Z_]+)\b")


def test_the_command_line_has_every_command_and_option():
    page = generated.command_line()
    group = typer.main.get_command(app)
    with group.make_context("isoform", [], resilient_parsing=True) as context:
        names = group.list_commands(context)
        assert re.findall(r"^## isoform (.+)$", page, re.MULTILINE) == names
        parts = dict(zip(names, re.split(r"^## ", page, flags=re.MULTILINE)[1:], strict=False))
        for name, part in parts.items():
            for one in group.get_command(context, name).params:
                if one.param_type_name == "option" and one.name != "help":
                    assert f"`{one.opts[0]}`" in part
                    assert one.help, f"{name} {one.opts[0]} has no help"


def test_files_have_every_key():
    page = generated.files()
    for _, _, classes in generated.DOCUMENTS:
        for cls in classes:
            for field in dataclasses.fields(cls):
                assert f"| `{field.name}` |" in page


def test_a_key_that_is_not_documented_ends_the_build(monkeypatch):
    @dataclasses.dataclass
    class Bare:
        """Nothing is said of its key."""

        key: int

    monkeypatch.setattr(generated, "DOCUMENTS", (("x", "y", (Bare,)),))
    with pytest.raises(ValueError, match=r"Bare\.key"):
        generated.files()


def test_what_is_supported_is_what_is_declared_and_recorded():
    page = generated.support()
    for name in ("numpy", "torch-sdpa", "cuda", "cuda-plain", "parallel/*"):
        assert f"| `{name}` |" in page
    for operation in ("evoformer_attention", "rotary_embedding", "attention"):
        assert f"### {operation}\n" in page


def test_environment_variables_are_those_that_are_read():
    paths = [*ROOT.glob("*/src/**/*.py"), *ROOT.glob("docs/tools/*.py"), ROOT / "noxfile.py"]
    read = {name for path in paths for name in READS.findall(path.read_text("utf-8"))}
    page = (ROOT / "docs" / "reference" / "environment.md").read_text("utf-8")
    assert set(READS.findall(page)) == read
