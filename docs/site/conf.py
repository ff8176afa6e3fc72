"""Sphinx's settings for the site that `make docs` builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafa.version import VERSION

project = "lorafa"
author = "the lorafa authors"
copyright = author
version = release = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # links to headings, as a repository's pages have them
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

linkcheck_ignore = [r"http://127\.0\.0\.1[:/]"]  # the reader's own machine
linkcheck_timeout = 20
linkcheck_retries = 2

html_theme = "furo"
html_title = f"lorafa {VERSION}"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_copy_source = False
suppress_warnings = ["myst.header", "misc.highlighting_failure"]


def setup(app: Any) -> None:
    """Keep napoleon from docstrings of attributes, whose words before a colon it takes for a type."""
    kept: dict[str, list[str]] = {}

    def keep(_: Any, what: str, name: str, __: Any, ___: Any, lines: list[str]) -> None:
        kept[name] = list(lines) if what == "attribute" else []

    def put_back(_: Any, what: str, name: str, __: Any, ___: Any, lines: list[str]) -> None:
        if what == "attribute":
            lines[:] = kept.pop(name)

    connect: Callable[..., Any] = app.connect
    connect("autodoc-process-docstring", keep, priority=400)
    connect("autodoc-process-docstring", put_back, priority=600)
