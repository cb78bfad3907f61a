"""How the documentation is built: ``nox -s docs``."""

project = "isoform"
author = "The isoform authors"
copyright = author  # noqa: A001  (Sphinx's name for it)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
myst_enable_extensions = ["deflist", "dollarmath"]
suppress_warnings = ["ref.python"]  # two classes may have an attribute of the same name
exclude_patterns = ["_build"]
html_theme = "furo"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
