"""`-m` of the commands that train: a run for each combination of several values, and a table of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafa.processes import from_main

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.train.settings.run import RunConfig

HELP = "a run for each combination of several values: optim.lr=1e-3,2e-3 train.seed='range(3)'"


def swept(
    args: argparse.Namespace,
    console: Console,
    make: Callable[[Sequence[str]], RunConfig],
    options: Callable[[str], Sequence[str]],
) -> int | None:
    """The exit status of a sweep; None where the settings name a single run, whose words ``args`` has then.

    Args:
        make: settings with one value each -> the run.
        options: group of settings -> its options.

    Raises:
        ConfigError: a setting of one of the runs is wrong.
    """
    from lorafa.runs.sweep import planned, points_of, rows, split, sweep

    words, launch = split(args.overrides)
    points = points_of(words, options)
    if len(points) == 1 and not launch:
        args.overrides = list(points[0].words)  # choice(a), or one value twice, is one value here
        return None
    plan = from_main(lambda: planned(points, [make(point.words) for point in points], launch))
    if args.dry_run:
        console.print(_table(rows(plan)))
        text = f"Dry run: nothing was trained, nothing was written. {len(points)} runs in {plan.folder}."
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return 0
    found = sweep(plan, console, args.command)
    console.print(_table(found))
    failed = [f"Failed: {row['directory']}: {row['error']}." for row in found if row["error"] is not None]
    for text in [*failed, f"Sweep: {plan.folder}"]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return int(any(row["status"] != "finished" for row in found))


def _table(found: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("settings", "status", "final loss")
    table.add_column("directory", overflow="fold")
    for row in found:
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        table.add_row(*map(Text, ("\n".join(row["settings"]), row["status"], loss, row["directory"])))
    return table
