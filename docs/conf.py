"""How the documentation is built: ``nox -s docs``."""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "tools"))

project = "isoform"
author = "The isoform authors"
copyright = author  # noqa: A001  (Sphinx's name for it)
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "generated",  # of docs/tools
    "spec_links",  # of docs/tools
]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = [
    "ref.python",  # two classes may have an attribute of the same name
    "myst-nb.lexer",  # unknown where cells are not run
]
exclude_patterns = ["_build", "tests", "tools", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = "isoform"
html_static_path = ["_static"]
html_css_files = ["isoform.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
smartquotes_action = "qe"  # not dashes: --impl is an option
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"


def setup(app):
    """Leave out "alias for field number 0", which is what a named tuple says of its fields."""

    def skip(app, what, name, value, skipped, options):
        return True if type(value).__name__ == "_tuplegetter" else None

    app.connect("autodoc-skip-member", skip)


# Lessons are run when they are built. What a cell gave is kept until a line of the sources, of the
# records or of the lessons' own modules changes.


def sources_digest() -> str:
    """A digest of everything that a cell may read."""
    found = [
        path
        for end in ("py", "cu", "cuh", "toml", "json")
        for path in ROOT.glob(f"*/src/**/*.{end}")
    ]
    found += [*ROOT.glob("ci/results/*.jsonl"), *ROOT.glob("kernels/*.jsonl")]
    found += ROOT.glob("docs/lessons/*.py")
    content = hashlib.sha256()
    for path in sorted(found):
        content.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:16]


nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "cells" / sources_digest())
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_excludepatterns = ["how-to/*"]
nb_merge_streams = True
nb_output_stderr = "warn"
nb_mime_priority_overrides = [("html", "image/svg+xml", 0)]
