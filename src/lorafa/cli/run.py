"""`lorafa run`: a script that imports `peft`, with lorafa's objects in their places."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Run a Python script in which `import peft` gives lorafa's objects, unchanged: its arguments, traceback and exit status
are its own.

Methods of PEFT outside LoRA can be imported, and say so when they are used. Refusals that PEFT does not have (a pattern
of a list that matches no layer, extra keys in a file, another base, a second wrapping) are warnings that say what was
done instead, except where numbers would be wrong; --strict leaves them errors. Several processes: torchrun -m
lorafa.compat SCRIPT."""

EXAMPLES = """\
examples:
  lorafa run train.py --learning_rate 1e-4
  lorafa run --strict train.py
  torchrun --nproc_per_node=2 -m lorafa.compat train.py

exit status: that of the script; 2 where there is no such script"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "run",
        help="run a script that imports peft",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--strict", action="store_true", help="leave refusals that PEFT does not have as they are")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a folder with a __main__.py")
    parser.add_argument("words", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.compat.script import run_apart

    strict = {"LORAFA_STRICT": "1"} if args.strict else {}
    return run_apart([args.script, *args.words], {**os.environ, **strict})
