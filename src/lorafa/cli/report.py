"""`lorafa report`: read a run directory, print its result, write its page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Print the result of a run and write its report.html: the loss curve, the scores before and after, sample answers.

Reads a run directory that `lorafa train` made, finished or not; loads no model. The page needs no other file."""

EXAMPLES = """\
examples:
  lorafa report runs/20260101-120000-lora-r16
  lorafa report runs/*                             one after the other

exit status: 0 done, 1 a file of the run is damaged, 2 wrong arguments or not a run directory"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "report",
        help="print the result of a run and write its report.html",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="directory that `lorafa train` made")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.report.page import write_report
    from lorafa.report.tables import result_tables
    from lorafa.runs.record import RunDirectory

    for directory in [RunDirectory.open(path) for path in args.run_dirs]:
        if len(args.run_dirs) > 1:
            console.print(f"\n{directory.path}", style="bold", highlight=False, markup=False, soft_wrap=True)
        console.print(result_tables(directory))
        console.print(f"Report: {write_report(directory.path)}", highlight=False, markup=False, soft_wrap=True)
    return 0
