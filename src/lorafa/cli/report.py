"""`lorafa report`: read run directories, print their results, write a page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafa.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.report.runs import Report

DESCRIPTION = """\
Print the result of a run and write its report.html; or compare any number of runs on one page, runs.html.

Reads run directories that `lorafa train` made, finished or not; loads no model. A page needs no other file. Of several
runs, or of a folder that holds some (a comparison's, a sweep's, runs/), those that differ in the seed alone are one
method: a table with intervals and differences, curves, scores against parameters and memory, answers, settings and
commands. Runs that saw other samples stand in a section of their own; those that did not finish are part of no mean."""

EXAMPLES = """\
examples:
  lorafa report runs/20260101-120000-lora-r16     one run: its report.html
  lorafa report runs/optimizers                   all runs in a folder, one page: runs/optimizers/runs.html
  lorafa report runs/* --page all.html            several runs, one page
  lorafa report runs/optimizers --baseline lora/lr-0.004
                                                  differences to that method, by its name in the table

exit status: 0 done, 1 a file of a run is damaged (the page says which), 2 wrong arguments or not a run directory"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "report",
        help="print the result of a run and write its page, or one page for any number of runs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", metavar="RUN_OR_FOLDER", nargs="+", help="run directory, or a folder of some")
    parser.add_argument("--page", metavar="FILE", help="where the page of several runs goes; default: runs.html beside")
    parser.add_argument("--baseline", metavar="NAME", help="method that the others are measured against")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.report.found import find
    from lorafa.storage.paths import user_path

    found = find(args.run_dirs)
    if found == [user_path(path) for path in args.run_dirs] and len(found) == 1 and not args.page:
        if args.baseline:
            raise ConfigError("A single run is measured against nothing, found --baseline. Leave it out, or add runs.")
        return _one(args.run_dirs[0], console)
    from lorafa.report.runs import Report

    return _several(Report.of(args.run_dirs, args.baseline).sound(), args.page, console)


def _one(path: str, console: Console) -> int:
    from lorafa.report.page import write_report
    from lorafa.report.tables import result_tables
    from lorafa.runs.record import RunDirectory

    directory = RunDirectory.open(path)
    console.print(result_tables(directory), crop=False)
    console.print(f"Report: {write_report(directory.path)}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _several(report: Report, page: str | None, console: Console) -> int:
    from lorafa.cli.screen import writable
    from lorafa.report.fitted import Fitted
    from lorafa.report.runs import notes_of, status_of, table_of, title_of

    def say(text: str) -> None:
        console.print(writable(text, console.encoding), highlight=False, markup=False, soft_wrap=True)

    path = report.write(page)
    for text in report.summary():
        say(text)
    for section in report.sections:
        headings, rows = table_of(section)
        cells = [[writable(cell, console.encoding) for cell in row] for row in rows]
        console.print(Fitted(headings, cells, title_of(section)), crop=False)
        for text in notes_of(section):
            say(text)
    for entry in report.left_out:
        if not entry.chose:
            say(f"{entry.name}: {status_of(entry)}{f' ({entry.error})' if entry.error else ''}")
    say(f"Report: {path}")
    return int(bool(report.damaged))
