"""`lorafa doctor`: what this machine, its versions and its packages allow, and what to install."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafa.cli.plain import Plain
    from lorafa.diagnosis.finding import Bench, Finding

DESCRIPTION = """\
Say what this machine, its versions and its packages allow: which commands and features work, and what to install for
those that do not.

Looks at cores, memory, accelerators, fast number formats, threads, the versions that lorafa works with, folders that
are written to, and names that mean another thing than they should. Each package is imported in another process, and
small trials are made there: one that fails, prints, hangs or ends the interpreter is reported and harms nothing. Needs
none of the packages itself, fetches nothing, and writes nothing."""

EXAMPLES = """\
examples:
  lorafa doctor
  lorafa doctor --quick           versions and folders alone; nothing is imported
  lorafa doctor --json            the same for programs

exit status: 0 training works here (something optional may not), 1 something that training needs is missing or broken"""

NARROWEST, WIDEST = 40, 120
"""Columns that lines are broken at, at least and at most."""
MARK = {"ok": "ok", "note": "note", "no": "no", "bad": "BAD"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine and its packages allow, and what to install",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="import nothing, try nothing: versions and folders alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run(args: argparse.Namespace, console: Plain) -> int:
    from lorafa.diagnosis import ORDER
    from lorafa.diagnosis.features import jobs
    from lorafa.diagnosis.finding import Bench

    bench = Bench(jobs(), quick=args.quick)
    found: dict[str, list[Finding]] = {}
    try:
        for name in ORDER:
            found[name] = []
            for finding in _findings(name, bench):
                if not args.json:
                    if not found[name]:
                        console.print(name)
                    _show(finding, console)
                found[name].append(finding)
    finally:
        bench.close()
    stopping = [finding for findings in found.values() for finding in findings if finding.stops_training]
    if args.json:
        checks = {name: [asdict(finding) for finding in findings] for name, findings in found.items()}
        reasons = [f"{finding.subject}: {finding.said}" for finding in stopping]
        report: dict[str, Any] = {"training_works": not stopping, "reasons": reasons, "checks": checks}
        console.print(json.dumps(report, indent=2))
    else:
        console.print("")
        for line in _verdict(stopping, quick=args.quick):
            console.print(_broken(line, console))
    return 1 if stopping else 0


def _findings(name: str, bench: Bench) -> Iterator[Finding]:
    """What a check finds; that it failed itself, where it did: the others go on."""
    from lorafa.diagnosis import CHECKS
    from lorafa.diagnosis.finding import Finding

    try:
        yield from CHECKS.get(name)(bench)
    except Exception as error:
        said = f"this check failed: {type(error).__name__}: {' '.join(str(error).split())}"
        yield Finding(subject=name, state="note", said=said)


def _show(finding: Finding, console: Plain) -> None:
    console.print(_broken(f"{MARK[finding.state]:<5}{finding.subject}: {finding.said}", console, "  ", 7))
    if finding.remedy:
        console.print(_broken(f"-> {finding.remedy}", console, " " * 7, 10))


def _broken(text: str, console: Plain, first: str = "", rest: int = 0) -> str:
    """The text in lines of the terminal's width; a path or a command without blanks stays whole."""
    width = min(max(console.width, NARROWEST), WIDEST)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=" " * rest, break_long_words=False, break_on_hyphens=False
    )


def _verdict(stopping: list[Finding], *, quick: bool) -> Iterator[str]:
    if not stopping:
        tried = "Training works here."
        yield "Training should work here: versions are right, and nothing was tried." if quick else tried
        return
    yield "Training does not work here:"
    for finding in stopping:
        yield f"  {finding.subject}: {finding.said}" + (f" -> {finding.remedy}" if finding.remedy else "")
