"""What a command writes with that cannot rely on any package."""

from __future__ import annotations

import shutil
import sys
from io import TextIOWrapper
from typing import Any, TextIO

from lorafa.chat.printable import printable
from lorafa.cli.pipes import OutputClosed, lead_nowhere


def replacing(stream: TextIO) -> None:
    """Have a stream write ? for what its encoding does not have, where it would end the command."""
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


class Plain:
    """As much of rich's console as errors, warnings and `lorafa doctor` take: text, without colours."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none and COLUMNS does not say."""
        return shutil.get_terminal_size().columns

    def print(self, text: str, *, end: str = "\n", **_: Any) -> None:
        """Write a text, control characters as pictures; how it looks is left to the terminal.

        Raises:
            OutputClosed: nobody reads it any more.
        """
        stream = sys.stderr if self._stderr else sys.stdout
        try:
            print(printable(text), end=end, file=stream, flush=True)
        except BrokenPipeError:
            lead_nowhere(stream)
            raise OutputClosed from None
