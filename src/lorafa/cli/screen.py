"""A console of rich that is a good neighbour in a pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lorafa.chat.printable import printable
from lorafa.cli.pipes import OutputClosed, lead_nowhere


def writable(text: str, encoding: str) -> str:
    """The text with +- for ± where a terminal's encoding has no such sign."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-")
    return text


class Screen(Console):
    """Ends the command quietly where its pipe is closed, and shows control characters as pictures: names and texts of
    files, and errors that quote them, are nothing that a terminal may obey."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        lead_nowhere(self.file)
        raise OutputClosed
