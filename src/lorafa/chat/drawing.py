"""Answers on a terminal while they are written: in columns side by side, or one below the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafa.chat.printable import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

NARROWEST = 28
"""Columns of the screen that an answer takes at least, beside others."""
REST = 4
"""Lines of the screen that answers leave free while they are written."""
BETWEEN = 3
"""Columns between two answers."""


class Drawing(ABC):
    """Shows the answers to one question. Use it as a with-block; what is shown stays."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        """Begin with an empty answer for each name."""
        self.console, self.names = console, [printable(name) for name in names]

    def __enter__(self) -> Drawing:
        return self

    @abstractmethod
    def add(self, place: int, text: str) -> None:
        """Go on with the answer of that number."""

    @abstractmethod
    def end(self, place: int) -> None:
        """The answer of that number is over."""

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...


class Stacked(Drawing):
    """One below the other, each under its name: the first as it comes, the next when those before it are over.

    An answer that is alone has no name above it.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        super().__init__(console, names)
        self._waiting = [""] * len(names)
        self._over = [False] * len(names)
        self._at = -1
        self._next()

    def add(self, place: int, text: str) -> None:
        if place == self._at:
            self._write(printable(text))
        else:
            self._waiting[place] += printable(text)

    def end(self, place: int) -> None:
        self._over[place] = True
        while self._at < len(self.names) and self._over[self._at]:
            self._write("\n\n" if len(self.names) > 1 else "\n")
            self._next()

    def __exit__(self, *_: object) -> None:
        for place in range(max(self._at, 0), len(self.names)):
            self.end(place)

    def _next(self) -> None:
        """Go over to the next answer, with what has come of it already."""
        self._at += 1
        if self._at < len(self.names):
            if len(self.names) > 1:
                self._write(f"--- {self.names[self._at]}\n")
            self._write(self._waiting[self._at])

    def _write(self, text: str) -> None:
        self.console.out(text, end="", highlight=False)
        self.console.file.flush()


class SideBySide(Drawing):
    """In columns. While they are written their ends are shown, as many lines as the screen has; then all of them."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        super().__init__(console, names)
        self._texts = [""] * len(names)
        self._live: Live | None = None

    def __enter__(self) -> Drawing:
        from rich.live import Live

        self._live = Live(
            console=self.console, get_renderable=self._ends, transient=True, refresh_per_second=8, screen=False
        )
        self._live.start()
        return self

    def add(self, place: int, text: str) -> None:
        self._texts[place] += printable(text)

    def end(self, place: int) -> None:
        """Nothing changes where each has its own column."""

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self.console.print(self._table(self._texts))

    def _ends(self) -> RenderableType:
        from rich.text import Text

        width = self._width()
        height = max(self.console.height - REST, 1)
        shown = []
        for text in list(self._texts):
            lines = Text(text).wrap(self.console, width)
            shown.append("\n".join(line.plain for line in lines[-height:]))
        return self._table(shown)

    def _width(self) -> int:
        count = len(self.names)
        return (self.console.width - BETWEEN * (count - 1)) // count

    def _table(self, texts: Sequence[str]) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, BETWEEN, 0, 0), pad_edge=False)
        for _ in self.names:
            table.add_column(width=self._width(), overflow="fold")
        table.add_row(*(Text(name, style="bold") for name in self.names))
        table.add_row(*(Text(text) for text in texts))
        return table


def drawing(console: Console, names: Sequence[str]) -> Drawing:
    """Answers of these names: in columns where it is a terminal that is wide enough."""
    room = NARROWEST * len(names) + BETWEEN * (len(names) - 1)
    columns = len(names) > 1 and console.is_terminal and console.width >= room
    return (SideBySide if columns else Stacked)(console, names)
