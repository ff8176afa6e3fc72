"""The end of a command whose output nobody reads any more: quiet, and with the status other tools have."""

from __future__ import annotations

import os
import sys
from typing import IO

OUTPUT_CLOSED = 128 + 13
"""What a shell says of a tool that SIGPIPE (13) ended. Python ignores that signal, for sockets close as well."""


class OutputClosed(SystemExit):
    """Leaves the command from wherever it writes; a thread that only draws ends without a word."""

    def __init__(self) -> None:
        super().__init__("nobody reads the output any more")
        self.code = OUTPUT_CLOSED


def drop_what_is_left() -> None:
    """Empty the buffers of closed streams, or the interpreter would complain of them as it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            lead_nowhere(stream)


def lead_nowhere(stream: IO[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
