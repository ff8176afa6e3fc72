"""`lorafa compare`: methods side by side, each with its learning rate swept, over several seeds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Run a comparison of methods and print its table.

The plan is a yaml file: methods with their settings and learning rates, seeds, a baseline (see recipes/). The first
seed (or those of `choose`) chooses every method's learning rate; the other seeds run at it, and they alone are
reported. All runs see the same samples, or the comparison stops. Each run has a directory of its own in FOLDER;
a comparison that was cut short goes on where it stopped, and the same command in several processes shares the runs
out. Writes comparison.json and comparison.html into FOLDER."""

EXAMPLES = """\
examples:
  lorafa compare recipes/optimizers_on_gsm8k.yaml runs/optimizers data=short.jsonl
  lorafa compare recipes/optimizers_on_gsm8k.yaml runs/optimizers data=short.jsonl threads=2

exit status: 0 done, 1 a run failed (what is finished stays) or no method has a result since all diverged, 2 wrong
arguments, plan or settings, 130 interrupted"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "compare",
        help="run methods side by side over learning rates and seeds",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", metavar="PLAN", help="yaml file of methods, rates and seeds")
    parser.add_argument("folder", metavar="FOLDER", help="where the runs and the table go")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="a setting of every run")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from pathlib import Path

    from lorafa.cli.screen import writable
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()  # before the first tensor
    from lorafa.errors import DivergedError
    from lorafa.report.comparison import HEADINGS, cells, notes, read_result, write_comparison
    from lorafa.report.fitted import Fitted
    from lorafa.runs.comparison import compare
    from lorafa.runs.plan import Plan

    rows = compare(Plan.read(args.plan, args.overrides), Path(args.folder), console, args.overrides)
    shown = [[writable(cell, console.encoding) for cell in cells(row)] for row in rows]
    console.print(Fitted(HEADINGS, shown), crop=False)
    for note in notes(read_result(Path(args.folder))):
        console.print(writable(note, console.encoding), highlight=False, markup=False, soft_wrap=True)
    console.print(f"Report: {write_comparison(args.folder)}", highlight=False, markup=False, soft_wrap=True)
    if all(row["diverged"] for row in rows):
        raise DivergedError("No method has a result: each has a run that diverged. Give the plan lower learning rates.")
    return 0
