"""Tables for the terminal that cut no word: as wide as their content or the screen, or else a line for each value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

BORDERS, EACH = 1, 3
"""Columns of the screen that the frame of a table takes, and what it takes beside each of its columns."""
APART = 2
"""Blanks between a name and its value."""


@dataclass(frozen=True)
class Fitted:
    """A table. Print it with ``crop=False``, for a file or a pipe has no edge where it would have to end.

    On a screen where its longest words do not stand side by side it is no table: each row is a block, with a line for
    each value.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    left: int | None = None
    """How many columns are set flush left, after which those of numbers follow; None: all."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        longest = [max(map(_longest_word, column)) for column in self._columns()]
        widest = [max(map(_longest_line, column)) for column in self._columns()]
        frame = BORDERS + EACH * len(self.headings)
        if _has_no_edge(console):
            whole = frame + sum(widest)
            yield from console.render(self._table(widest), options.update(width=whole, max_width=whole, no_wrap=False))
        elif frame + sum(longest) <= options.max_width:
            yield self._table(shared(longest, widest, options.max_width - frame))
        else:
            yield from self._blocks()

    def _columns(self) -> list[tuple[str, ...]]:
        return list(zip(self.headings, *self.rows, strict=True))

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(title=Text(self.title) if self.title else None, title_justify="left")
        for number, (heading, width) in enumerate(zip(self.headings, widths, strict=True)):
            flush_left = self.left is None or number < self.left
            table.add_column(Text(heading), width=width, justify="left" if flush_left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _blocks(self) -> list[Text]:
        lines = [self.title, ""] if self.title else []
        for row in self.rows:
            first, *others = zip(self.headings, row, strict=True)
            lines.append(": ".join(filter(None, first)))
            lines += [f"  {heading}: {value}" for heading, value in others]
            lines.append("")
        return [Text(line, overflow="fold") for line in lines]


@dataclass(frozen=True)
class Facts:
    """Names with a value each. Print it with ``crop=False``, as :class:`Fitted`."""

    rows: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, APART))
        for name, value in self.rows:
            table.add_row(Text(name, overflow="fold"), Text(value, overflow="fold"))  # an error may hold [brackets]
        if _has_no_edge(console):
            whole = sum(max(map(_longest_line, column), default=0) + APART for column in zip(*self.rows, strict=True))
            options = options.update(width=whole, max_width=whole)
        yield from console.render(table, options)


def shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths between the least and the most that columns need, which fill the room: what is left over the least goes
    to the narrowest that want more, one by one."""
    widths = list(least)
    for _ in range(min(room, sum(most)) - sum(least)):
        wanting = [number for number, width in enumerate(widths) if width < most[number]]
        widths[min(wanting, key=widths.__getitem__)] += 1
    return widths


def _has_no_edge(console: Console) -> bool:
    """Whether what is printed goes into a file or a pipe, and nobody has said how wide it is to be."""
    return not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit()


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=1)


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.splitlines()), default=1)
