"""All starts as rows of one pipeline: what each decomposes, in which metric, and what it takes of it.

``python -m lorafa.initializers.unification`` prints the table of docs/unification.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import Initializer, Stages

_READS = {
    "gradient": "G", "whitened_gradient": "G", "second_moment": "C", "exact_moment": "C", "corda_moment": "C",
    "principal": "X", "output_moment": "Y", "teacher_change": "W_T",
}  # fmt: skip
"""What statistics are called in the table."""


def table() -> str:
    """The table in Markdown, a line for each start of the registry; a start that does not say its stages has none."""
    columns = ["start", "reads", *(field.name for field in fields(Stages))]
    lines = [_line(columns), _line(["---"] * len(columns))]
    return "\n".join([*lines, *(_line(row) for row in _rows())]) + "\n"


def _rows() -> Iterator[list[str]]:
    for name in INITIALIZERS.names():
        start = INITIALIZERS.get(name)
        if start.stages is not None:
            yield [f"`{name}`", _read(start), *(getattr(start.stages, field.name) for field in fields(Stages))]


def _read(start: Initializer) -> str:
    found = dict.fromkeys(_READS.get(need, need) for need in start.needs)
    return ", ".join([*(["W"] if _decomposes_weight(start) else []), *found]) or "-"


def _decomposes_weight(start: Initializer) -> bool:
    """Whether the weight's values go into A and B, and not its size alone."""
    return start.reads_weight and start.stages is not None and "W" in start.stages.target


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    print(table(), end="")
