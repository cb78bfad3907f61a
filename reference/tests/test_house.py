"""The layout that every component stands on: one namespace, typed, importing in one direction."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
UPWARD = ["reference", "kernels", "parallel", "conformance"]


def test_every_source_root_is_packaged_and_checked():
    roots = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/src")}
    tool = PYPROJECT["tool"]
    wheel = tool["hatch"]["build"]["targets"]["wheel"]
    assert roots == {f"{component}/src" for component in UPWARD}
    assert roots == set(tool["hatch"]["build"]["dev-mode-dirs"])
    assert roots == set(wheel["only-include"])
    assert roots == set(wheel["sources"])
    assert roots == set(tool["mypy"]["files"])
    assert roots == set(tool["mypy"]["mypy_path"].split(":"))


@pytest.mark.parametrize("component", UPWARD)
def test_no_component_hides_the_others(component):
    """An ``isoform/__init__.py`` would end the namespace, and with it every other component."""
    inside = [path.name for path in (ROOT / component / "src" / "isoform").iterdir()]
    assert [name for name in inside if name != "__pycache__"] == [component]


@pytest.mark.parametrize("component", UPWARD)
def test_every_component_is_typed(component):
    assert (ROOT / component / "src" / "isoform" / component / "py.typed").is_file()


def test_imports_may_not_go_upward():
    linter = PYPROJECT["tool"]["importlinter"]
    packages = [f"isoform.{component}" for component in UPWARD]
    layers = [rule["layers"] for rule in linter["contracts"] if rule["type"] == "layers"]
    assert sorted(linter["root_packages"]) == sorted(packages)
    assert layers == [packages[::-1]]


def test_commits_and_checks_use_the_same_ruff():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pins = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8")
    revs = re.findall(r"ruff-pre-commit\s+rev: v(\S+)", hooks)
    assert revs == re.findall(r"^ruff==(\S+)$", pins, re.MULTILINE)
