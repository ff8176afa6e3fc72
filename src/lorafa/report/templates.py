"""The pages' templates, and what stands in them beside text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorafa.report.styles import Style, swatch
from lorafa.storage.whole import written_whole


@dataclass(frozen=True)
class Drawing:
    """A drawing with its title and the methods on it."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    """(mark as SVG, name) of each method."""
    note: str = ""


def marked(style: Style, name: str) -> Markup:
    """A name behind its mark, as a cell of a table."""
    return Markup(swatch(style)) + name


def legend_of(methods: Sequence[tuple[Style, str]]) -> list[tuple[str, str]]:
    return [(swatch(style), name) for style, name in methods]


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page that needs no other file, whole or not at all.

    Raises:
        CheckpointError: it could not be written.
    """
    templates = Environment(
        loader=PackageLoader("lorafa", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = templates.get_template(template).render(**values).lstrip()
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
