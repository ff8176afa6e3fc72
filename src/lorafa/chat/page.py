"""The page of the server, which needs nothing from anywhere else."""

from __future__ import annotations

from lorafa.chat.options import Options
from lorafa.chat.speakers import Speakers


def page(speakers: Speakers, options: Options, system: str | None) -> str:
    """The page as HTML. Names and texts stand in it escaped; what models write is put in as text by its script."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=ChoiceLoader([PackageLoader("lorafa", "chat"), PackageLoader("lorafa", "report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    names = list(speakers.by_name)
    html: str = templates.get_template("chat.html").render(
        names=names, base=speakers.base, system=system or "", options=options
    )
    return html.lstrip()
