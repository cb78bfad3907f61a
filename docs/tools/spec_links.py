"""Sphinx: under each rule of the specification, what holds it and who cites it; a table of all.

The build ends with an error where a rule has no case, no check, no mutant, or is cited by nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isoform.conformance import rules

ROOT = Path(__file__).parents[2]
CITED = re.compile(r"\b((?:EVO|ROT|SEQ)-\d+)\b(?:(?:\s+to\s+)((?:EVO|ROT|SEQ)-\d+))?")
ENDS = (".py", ".cu", ".cuh", ".h")
NOT_CITATIONS = ("conformance/src/isoform/conformance/rules.py",)
MARK = "<!-- rules -->"

Lines = Mapping[str, Mapping[str, list[int]]]
"""By rule and file: the lines that cite it."""


def pages() -> dict[str, str]:
    """The pages of the specification by name."""
    return {path.stem: path.read_text("utf-8") for path in sorted(ROOT.glob("docs/spec/*.md"))}


def defined() -> dict[str, str]:
    """The rules by number, with the name of the page that defines each."""
    return {number: page for page, text in pages().items() for number in rules.numbers(text)}


def citations(root: Path = ROOT) -> Lines:
    """Where sources and tests cite each rule; "SEQ-1 to SEQ-3" cites all three."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(path for path in root.glob("*/*/**/*") if path.suffix in ENDS):
        name = path.relative_to(root).as_posix()
        if name.startswith("docs/") or name in NOT_CITATIONS or "/." in name:
            continue
        for n, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            for first, last in CITED.findall(line):
                family, begin = first.split("-")
                end = last.split("-")[1] if last else begin
                for number in range(int(begin), int(end) + 1):
                    found[f"{family}-{number}"][name].append(n)
    return found


def faults(cited: Lines) -> list[str]:
    """What is wrong with the rules: see :func:`isoform.conformance.rules.faults`."""
    known = defined()
    uncited = [f"{number}: no line of code cites it" for number in known if not cited.get(number)]
    unknown = [
        f"{number}: cited by {', '.join(files)}, but there is no such rule"
        for number, files in cited.items()
        if number not in known
    ]
    return [*rules.faults(known), *uncited, *unknown]


def held(number: str, cited: Mapping[str, list[int]]) -> str:
    """What stands under a rule."""
    rule = rules.RULES[number]
    cases = len(rules.cases_of(rule))
    patterns = ", ".join(f"`{pattern}`" for pattern in rule.cases)
    checks = ", ".join(f"`{check}`" for check in rule.checks)
    broken = "".join(
        f"  - {mutant.fault} (`{mutant.name}`, killed by `{mutant.killed_by.partition(':')[0]}`)\n"
        for mutant in rules.mutants_of(rule)
    )
    return (
        "::::{container} held\n"
        f"- **Cases**, {cases}: {patterns}\n"
        f"- **Checks**: {checks}\n"
        f"- **Broken by** these mutants, each of which fails:\n{broken}"
        f"- **Cited** in the sources by {_files(cited, '/src/')}\n"
        f"- **Cited** in tests by {_files(cited, '/tests/')}\n"
        "::::\n"
    )


def _files(cited: Mapping[str, list[int]], part: str) -> str:
    found = [(name, lines) for name, lines in cited.items() if part in name]
    if not found:
        return "none"
    return ", ".join(f"`{_short(name)}` {', '.join(map(str, lines))}" for name, lines in found)


def _short(name: str) -> str:
    return name.replace("src/isoform/", "…/")


def linked(text: str, cited: Lines) -> str:
    """A page of the specification with what holds each rule under it."""
    parts = re.split(r"(?=^\((?:evo|rot|seq)-\d+\)=$)", text, flags=re.MULTILINE)
    out = [parts[0]]
    for part in parts[1:]:
        (number,) = rules.numbers(part)
        out.append(f"{part.rstrip()}\n\n{held(number, cited[number])}\n")
    return "".join(out)


def table(cited: Lines) -> str:
    """All rules, a line each."""
    columns = "| rule | cases | checks | mutants that break it | lines that cite it |\n"
    rows = "".join(_row(number, page, cited) for number, page in defined().items())
    return f"{columns}|---|---|---|---|---|\n{rows}"


def _row(number: str, page: str, cited: Lines) -> str:
    rule = rules.RULES[number]
    (title,) = re.findall(rf"^## {number} (.*)$", pages()[page], re.MULTILINE)
    label = f"{{ref}}`{number} {title} <{number.lower()}>`"
    checks = ", ".join(f"`{check}`" for check in rule.checks)
    lines = sum(map(len, cited[number].values()))
    cells: Iterable[Any] = (
        label,
        len(rules.cases_of(rule)),
        checks,
        len(rules.mutants_of(rule)),
        lines,
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def setup(app: Any) -> dict[str, Any]:
    """Join Sphinx."""
    from sphinx.errors import ExtensionError  # here, since tests run without Sphinx

    cited = citations()
    if wrong := faults(cited):
        raise ExtensionError("rules that nothing holds:\n  " + "\n  ".join(wrong))

    def read(app: Any, name: str, source: list[str]) -> None:
        if name == "spec/index":
            source[0] = source[0].replace(MARK, table(cited))
        elif name.startswith("spec/"):
            source[0] = linked(source[0], cited)

    app.connect("source-read", read)
    return {"parallel_read_safe": True}
