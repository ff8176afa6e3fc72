"""A console of rich that is a good neighbour in a pipeline."""

from __future__ import annotations

from rich.console import Console

from lorafa.cli.pipes import OutputClosed, lead_nowhere


class Screen(Console):
    """Ends the command quietly where its pipe is closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        lead_nowhere(self.file)
        raise OutputClosed
