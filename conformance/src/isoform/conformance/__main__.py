"""The command ``isoform``; ``python -m isoform.conformance`` is the same.

It is installed with the package, what it needs with the extra ``conformance`` alone: a module of
its own, for what is missing to be named before it is imported.
"""

from __future__ import annotations

import sys

NEEDS = (
    "hypothesis",
    "jinja2",
    "matplotlib",
    "ml_dtypes",
    "pytest",
    "rich",
    "safetensors",
    "typer",
)
"""Modules that the extra brings."""


def main() -> None:
    """Run the command line."""
    try:
        from isoform.conformance.cli import main as run

        run()
    except ModuleNotFoundError as missing:
        module = (missing.name or "").partition(".")[0]
        if module not in NEEDS:
            raise
        sys.stderr.write(
            f"isoform: {module} is not installed, and the command line needs it: "
            "'pip install \"isoform[conformance]\"'\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
