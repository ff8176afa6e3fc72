"""A console of rich that is a good neighbour in a pipeline."""

from __future__ import annotations

from io import TextIOWrapper
from typing import TextIO

from rich.console import Console

from lorafa.cli.pipes import OutputClosed, lead_nowhere


def writable(text: str, encoding: str) -> str:
    """The text with +- for ± where a terminal's encoding has no such sign."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-")
    return text


def replacing(stream: TextIO) -> None:
    """Have a stream write ? for what its encoding does not have, where it would end the command."""
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


class Screen(Console):
    """Ends the command quietly where its pipe is closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        lead_nowhere(self.file)
        raise OutputClosed
