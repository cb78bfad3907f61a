"""What the reference shows: every name that its pages take from docstrings, and what each must say.

A function says of each argument what it is, and of each array what shape it has; what it returns;
which errors it raises itself; and, where it computes what a paper defines, the source. A class says
what its attributes or its arguments are. "As in" another function will do where that is said.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = ("docs/reference/api.md", "docs/kernels.md")
PACKAGES = (
    "isoform.reference.numpy",
    "isoform.reference.torch",
    "isoform.kernels",
    "isoform.parallel",
)
"""Packages of which every name in ``__all__`` must be on a page."""

SECTIONS = ("Args", "Returns", "Raises", "Source", "Attributes", "Yields")
SHAPE = re.compile(r"\[[\w\s,./·×+*−()…-]*\]|[Ss]hape|[Aa]s in|[Ll]ikewise|[Ll]ike [a-z]|[Aa]s `")
ARRAYS = ("Array", "Tensor", "NDArray", "Shards")
COMPUTES = ("isoform.reference.numpy", "isoform.reference.torch", "isoform.kernels.")
"""Where functions that take arrays name the source of what they compute."""


@dataclass(frozen=True)
class Name:
    """A public name: where it is and what it is."""

    module: str
    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def shown() -> Iterator[Name]:
    """The names on the pages of the reference."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for kind, target, options in re.findall(
            r"^\.\. auto(\w+):: (\S+)\n((?: {3}.*\n)*)", text, re.MULTILINE
        ):
            if kind == "module":
                module = importlib.import_module(target)
                for name in _members(module, options):
                    yield Name(target, name, getattr(module, name))
            else:
                module_name, _, name = target.rpartition(".")
                module = importlib.import_module(module_name)
                yield Name(module_name, name, getattr(module, name))


def _members(module: ModuleType, options: str) -> list[str]:
    """The members that autodoc takes, as ``options`` ask."""
    given = dict(re.findall(r":([\w-]+):((?:(?!\n {3}:)[\s\S])*)", options))
    if "members" not in given:
        return []
    named = [name.strip() for name in given["members"].split(",") if name.strip()]
    left_out = [name.strip() for name in given.get("exclude-members", "").split(",")]
    if named:
        return named
    found = []
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and name not in left_out and value.__doc__:
            found.append(name)
    constants = re.findall(r'^(\w+)(?:: .*)? = .*\n"""', inspect.getsource(module), re.MULTILINE)
    return found + [name for name in constants if name not in left_out]


def sections(docstring: str) -> dict[str, str]:
    """A docstring's sections by name; what stands before them is ``""``."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring), flags=re.M)
    found = {"": parts[0]}
    found.update(zip(parts[1::2], parts[2::2], strict=True))
    return found


def entries(section: str) -> dict[str, str]:
    """The entries of a section ``name: text``, several names before one colon included."""
    found = {}
    for entry in re.split(r"^ {4}(?=\S)", section, flags=re.M)[1:]:
        names, _, text = entry.partition(":")
        for name in names.split(","):
            found[name.strip().lstrip("*")] = " ".join(text.split())
    return found


def faults(public: Name) -> Iterator[str]:
    """A line for each thing that the docstring of ``public`` leaves unsaid."""
    if not (inspect.isclass(public.value) or inspect.isroutine(public.value)):
        return  # a constant: its docstring stands behind it, or it would not be shown
    docstring = getattr(public.value, "__doc__", None)
    if not docstring:
        yield f"{public}: no docstring"
        return
    said = sections(docstring)
    if inspect.isclass(public.value):
        yield from _of_class(public, said)
    elif inspect.isfunction(public.value):
        yield from _of_function(public, said)


def _of_class(public: Name, said: dict[str, str]) -> Iterator[str]:
    if issubclass(public.value, Exception | enum.Enum):
        return
    documented = entries(said.get("Attributes", "")) | entries(said.get("Args", ""))
    if dataclasses.is_dataclass(public.value):
        fields = [field.name for field in dataclasses.fields(public.value)]
        axes = [name for name in fields if len(name) == 1]  # B, S, …: the module names them
        missing = [name for name in fields if name not in documented and name not in axes]
        if missing and len(said) > 1:
            yield f"{public}: says nothing of {', '.join(missing)}"
        elif missing and not all(f"{name}" in docstring_of(public) for name in missing):
            yield f"{public}: says nothing of its attributes {', '.join(missing)}"
    for name, method in vars(public.value).items():
        told = getattr(method, "__doc__", None) or _inherited(public.value, name)
        if inspect.isfunction(method) and not name.startswith("_") and not told:
            yield f"{public}.{name}: no docstring"


def _inherited(cls: type, name: str) -> bool:
    return any(getattr(vars(base).get(name), "__doc__", None) for base in cls.__mro__[1:])


def docstring_of(public: Name) -> str:
    """The docstring of ``public``."""
    return str(public.value.__doc__)


def _of_function(public: Name, said: dict[str, str]) -> Iterator[str]:
    signature = inspect.signature(public.value)
    documented = entries(said.get("Args", ""))
    parameters = [name for name in signature.parameters if not name.startswith("_")]
    text = docstring_of(public)
    plain = "Args" not in said
    for name in parameters:
        annotation = str(signature.parameters[name].annotation)
        if plain:
            if not re.search(rf"\b{re.escape(name)}\b", text) and "As in" not in text:
                yield f"{public}: says nothing of {name}"
        elif name not in documented:
            yield f"{public}: says nothing of {name}"
        elif _array(annotation) and not SHAPE.search(documented[name]):
            yield f"{public}: {name} is an array, of what shape?"
    returns = signature.return_annotation
    nothing = returns in (None, "None", signature.empty) or "NoReturn" in str(returns)
    told = said.keys() & {"Returns", "Yields"} or _says_what(said[""])
    if not nothing and not told:
        yield f"{public}: says nothing of what it returns"
    for error in sorted(_raised(public.value)):
        if error not in text and "Raises" not in said:
            yield f"{public}: raises {error}, which it does not say"
        elif "Raises" in said and error not in said["Raises"]:
            yield f"{public}: raises {error}, which is not among its Raises"
    takes_arrays = any(_array(str(signature.parameters[name].annotation)) for name in parameters)
    if takes_arrays and public.module.startswith(COMPUTES) and "Source" not in said:
        module = inspect.getmodule(public.value)
        if "Source" not in str(module.__doc__) and "arXiv" not in str(module.__doc__) + text:
            yield f"{public}: names no source"


def _array(annotation: str) -> bool:
    return any(kind in annotation for kind in ARRAYS) and "Callable" not in annotation


def _says_what(summary: str) -> bool:
    """Whether a summary is of a thing, which is then what is returned, and no order to do one."""
    first = summary.split(maxsplit=1)[0] if summary.split() else ""
    return first not in ("Make", "Run", "Compute", "Return", "Do", "Give", "Begin", "Read", "Start")


def _raised(function: Any) -> set[str]:
    """The names of errors that a function's own body raises."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            called = node.exc.func
            found.add(called.id if isinstance(called, ast.Name) else getattr(called, "attr", ""))
    return {name for name in found if name and name[0].isupper()}


def not_shown() -> list[str]:
    """Names in ``__all__`` of the packages that no page shows."""
    on_pages = {id(public.value) for public in shown()}
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if id(getattr(module, name)) not in on_pages:
                missing.append(f"{package}.{name}")
    return missing
