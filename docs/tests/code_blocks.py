"""The blocks of code in pages of Markdown, and what a page says of how they are to be run.

A block of Python is run after those before it on its page, in one namespace. A comment in front of
it, which readers do not see, says otherwise::

    <!-- code: gpu -->        run where there is a GPU; elsewhere compiled, and its imports done
    <!-- code: mpi 3 -->      a program of its own, run on 3 ranks of MPI
    <!-- code: signature -->  the head of a function: the reference's has the same arguments
    <!-- code: before
    ...
    -->                       lines that are run first: what the reader has, and we must make up
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKIPPED = {"_build", ".nox", ".git", "node_modules"}

BLOCK = re.compile(
    r"(?:<!-- code: (?P<how>.*?)-->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Its page, from the root of the repository.
        line: Where it begins there.
        language: As it is given: ``python``, ``console``, …
        code: What is in it.
        how: What the comment in front of it says.
    """

    page: str
    line: int
    language: str
    code: str
    how: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page of Markdown in the repository."""
    found = ROOT.rglob("*.md")
    return sorted(path for path in found if SKIPPED.isdisjoint(path.relative_to(ROOT).parts))


def blocks(page: Path) -> list[Block]:
    """The blocks of one page."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    return [
        Block(
            name,
            text.count("\n", 0, match.start("code")),
            match["language"],
            match["code"],
            (match["how"] or "").strip(),
        )
        for match in BLOCK.finditer(text)
    ]
