"""What the pages show can be run: every block of Python, every command."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from code_blocks import ROOT, Block, blocks, pages  # noqa: E402

import isoform.reference.numpy  # noqa: E402

BLOCKS = [block for page in pages() for block in blocks(page)]
USAGE = typer.BadParameter.__mro__[1]
"""What is raised of a wrong command line: that of click, or of the copy that typer has."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of(language: str, *how: str) -> list[Block]:
    return [
        block
        for block in BLOCKS
        if block.language == language and (not how or block.how.startswith(how))
    ]


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def importable(node: ast.stmt) -> bool:
    """Whether it is an import, of anything but what a GPU alone has."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return isinstance(node, ast.Import | ast.ImportFrom) and "cupy" not in names


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_blocks_of_python_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in of("python"):
        if block.page != page or block.how.startswith(("mpi", "signature")):
            continue
        how, _, before = block.how.partition("before")
        if before and (gpu() or not how):
            exec(compile(before, f"before {block}", "exec"), namespace)
        # numbered as on the page, for the traceback
        tree = compile("\n" * block.line + block.code, block.page, "exec", ast.PyCF_ONLY_AST)
        if how.startswith("gpu") and not gpu():
            tree.body = [node for node in tree.body if importable(node)]
        exec(compile(tree, block.page, "exec"), namespace)


@pytest.mark.mpi
@pytest.mark.parametrize("block", of("python", "mpi"), ids=str)
def test_programs_run_on_ranks(block, tmp_path):
    from isoform.parallel.launch import mpiexec

    program = tmp_path / "program.py"
    program.write_text(block.code, encoding="utf-8")
    ranks = block.how.split()[1]
    command = [mpiexec(), "-n", ranks, sys.executable, "-m", "mpi4py", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d+) sent [1-9]", done.stdout)) == [
        *map(str, range(int(ranks)))
    ]


@pytest.mark.parametrize("block", of("python", "signature"), ids=str)
def test_signatures_are_those_of_the_reference(block):
    call = ast.parse(f"def {block.code.strip()}: ...").body[0]
    assert isinstance(call, ast.FunctionDef)
    function = getattr(isoform.reference.numpy, call.name)
    named = {
        argument.arg: ast.literal_eval(default) if default is not None else inspect.Parameter.empty
        for argument, default in zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True)
    }
    has = inspect.signature(function).parameters
    assert [argument.arg for argument in call.args.args] == [
        name for name, one in has.items() if one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    assert (
        named.items()
        <= {name: one.default for name, one in has.items() if one.kind is one.KEYWORD_ONLY}.items()
    )
    assert set(has) - set(named) <= {"q", "k", "v", "x", "positions", "return_lse", "compute_dtype"}


# Commands.


def commands(block: Block) -> list[str]:
    joined = re.sub(r"\\\n\s*>?", " ", block.code)
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


COMMANDS = [(block, line) for block in of("console") for line in commands(block)]


def words(line: str) -> list[list[str]]:
    """The commands of a line, each as its words, without assignments in front."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    reader.whitespace_split = True
    split: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= set(";|&"):
            split.append([])
        else:
            split[-1].append(word)
    for part in split:
        while part and re.match(r"\w+=|do$|>", part[0]):
            del part[0]
    return [part for part in split if part]


def parsed(arguments: list[str]) -> None:
    """Fail where the command line ``isoform`` does not take ``arguments``; nothing is run."""
    from isoform.conformance.cli import app

    group = typer.main.get_command(app)
    with group.make_context("isoform", [], resilient_parsing=True) as context:
        context.resilient_parsing = False
        name, command, rest = group.resolve_command(context, list(arguments))
        try:
            command.make_context(name, list(rest), parent=context)
        except typer.BadParameter as error:
            if "does not exist" not in error.message:  # a file of the reader's
                raise


@pytest.mark.parametrize(
    ("block", "line"), COMMANDS, ids=[f"{b}:{n}" for n, (b, _) in enumerate(COMMANDS)]
)
def test_commands_are_there(block, line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in words(line):
        program, *arguments = command
        if program == "isoform":
            parsed([argument for argument in arguments if argument != "…"])
        if "nox" in (program, *arguments[:2]) and "-s" in command:
            session = command[command.index("-s") + 1]
            assert f"\ndef {session}(" in (ROOT / "noxfile.py").read_text() or (
                f'name="{session}"' in (ROOT / "noxfile.py").read_text()
            )
        if "-m" in command and command[command.index("-m") + 1].startswith("isoform."):
            assert importlib.util.find_spec(command[command.index("-m") + 1]), line
        for script in command:
            if script.startswith("ci/") and script.endswith(".py"):
                assert (ROOT / script).is_file()
        for extras in re.findall(r"isoform\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_a_command_that_is_not_there_is_seen():
    with pytest.raises(USAGE, match="--nosuch"):
        parsed(["check", "numpy", "--nosuch"])
    with pytest.raises(USAGE, match="chek"):
        parsed(["chek", "numpy"])


# Links of pages that are read in the repository.


def test_links_between_files_lead_somewhere():
    broken = []
    for page in pages():
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.partition("#")[0]
            if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
