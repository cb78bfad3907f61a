"""Implementations are found by name and by path, or it is said why not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from isoform.conformance import registry
from isoform.conformance.case import UnknownName
from isoform.conformance.implementations.numpy import NUMPY
from isoform.conformance.registry import GROUP, Unavailable, find, registered

ENTRIES = {
    "right": "isoform.conformance.implementations.numpy:NUMPY",
    "tiled": "isoform.conformance.implementations.numpy:NUMPY_TILED",
    "torch-something": "isoform.conformance.implementations.torch:REFERENCE",
    "broken": "no_such_package_of_theirs.kernels:KERNEL",
    "no-implementation": "isoform.conformance.registry:GROUP",
}


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other entry points than those installed."""

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == GROUP
        return [EntryPoint(name, value, group) for name, value in ENTRIES.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, an empty one; modules imported from it are forgotten."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


# By name


def test_ours_are_registered() -> None:
    assert set(registered()) >= {"numpy", "numpy-tiled", "torch-reference", "torch-sdpa"}
    assert find("numpy") is not None
    assert find("numpy").forward is NUMPY.forward


@pytest.mark.usefixtures("entries")
def test_registered_ones_are_found_in_order_and_called_by_their_name() -> None:
    assert list(registered()) == sorted(ENTRIES)
    found = find("right")
    assert found.name == "right"  # whatever the object calls itself
    assert (found.forward, found.framework) == (NUMPY.forward, "numpy")
    assert find("right", framework="torch").framework == "numpy"


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rihgt", "no implementation 'rihgt'. Did you mean right?"),
        ("torch-someting", "no implementation 'torch-someting'. Did you mean torch-something?"),
        ("xyzzy", "no implementation 'xyzzy'."),
        ("", "no implementation ''."),
    ],
)
def test_an_unknown_name_is_answered_with_those_near(name: str, said: str) -> None:
    with pytest.raises(UnknownName) as raised:
        find(name)
    assert str(raised.value) == said


@pytest.mark.usefixtures("entries")
def test_what_is_not_installed_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable) as raised:
        find("broken")
    assert raised.value.name == "broken"
    assert str(raised.value) == (
        "broken needs no_such_package_of_theirs: "
        "install it with 'pip install no_such_package_of_theirs'"
    )

    for module in [name for name in sys.modules if name.startswith("isoform.") and "torch" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Unavailable) as raised:
        find("torch-something")
    said = "torch-something needs torch: install it with 'pip install \"isoform[torch]\"'"
    assert str(raised.value) == said
    assert find("tiled").name == "tiled"  # the others do not need it


@pytest.mark.usefixtures("entries")
def test_listing_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: EntryPoint) -> object:
        raise AssertionError("imported")

    monkeypatch.setattr(EntryPoint, "load", load)
    assert "broken" in registered()


@pytest.mark.usefixtures("entries")
def test_what_is_registered_and_no_implementation() -> None:
    with pytest.raises(TypeError, match="is no implementation"):
        find("no-implementation")


# By path


def test_an_object_of_an_installed_module() -> None:
    assert find("isoform.conformance.implementations.numpy:NUMPY") is NUMPY


def test_a_module_in_the_current_directory_and_what_is_nested_in_it(here: Path) -> None:
    (here / "kernels_of_mine.py").write_text(
        "class Box:\n"
        "    class Inner:\n"
        "        @staticmethod\n"
        "        def fast(q, k, v, mask=None):\n"
        "            return q\n"
        "\n"
        "def plain(q, k, v, **operands):\n"
        "    return q\n"
    )
    assert find("kernels_of_mine:plain").name == "plain"
    nested = find("kernels_of_mine:Box.Inner.fast", framework="numpy")
    assert (nested.name, nested.framework) == ("fast", "numpy")
    assert nested.capabilities.operands == {"mask"}
    assert find("kernels_of_mine:plain").framework == "torch"


def test_a_package_in_the_current_directory(here: Path) -> None:
    (here / "package_of_mine").mkdir()
    (here / "package_of_mine" / "deep.py").write_text("def f(q, k, v): return q\n")
    assert find("package_of_mine.deep:f").name == "f"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_module:OBJECT", "no module 'no_such_module'."),
        ("isoform.no_such:OBJECT", "no module 'isoform.no_such'."),
        (":OBJECT", "no module ''."),
        (
            "isoform.conformance.implementations.numpy:NUMPI",
            "no object in isoform.conformance.implementations.numpy 'NUMPI'. Did you mean NUMPY",
        ),
        ("isoform.conformance.implementations.numpy:", "no object in"),
        (
            "isoform.conformance.implementations.numpy:NUMPY.forwards",
            "no object in isoform.conformance.implementations.numpy 'NUMPY.forwards'. "
            "Did you mean forward",
        ),
        ("isoform.conformance.registry:GROUP.nothing", "no object in isoform.conformance.registry"),
        ("math:pi.no", "no object in math 'pi.no'."),
    ],
)
def test_what_is_not_there_is_named(path: str, said: str) -> None:
    with pytest.raises(UnknownName) as raised:
        find(path)
    assert str(raised.value).startswith(said)


def test_a_module_that_needs_something_else_is_unavailable_not_unknown(here: Path) -> None:
    (here / "needs_more.py").write_text("import no_such_package_of_theirs.deep\n")
    with pytest.raises(Unavailable, match="needs_more:f needs no_such_package_of_theirs: install"):
        find("needs_more:f")
    # nor where its own name begins like that of what is missing
    (here / "absent_kernels.py").write_text("import absent\n")
    with pytest.raises(Unavailable, match="absent_kernels:f needs absent: install it with"):
        find("absent_kernels:f")


def test_an_error_in_the_module_is_not_hidden(here: Path) -> None:
    (here / "faulty.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        find("faulty:f")


def test_an_object_that_is_no_implementation() -> None:
    with pytest.raises(TypeError, match="is no implementation"):
        find("math:pi")
