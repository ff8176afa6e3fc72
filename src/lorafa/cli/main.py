"""`lorafa`: the table of commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorafa.chat.printable import printable
from lorafa.cli import (
    chat,
    combine,
    compare,
    doctor,
    eval,
    export,
    generate,
    inspect,
    merge,
    params,
    plan,
    report,
    run,
    train,
)
from lorafa.cli.pipes import OUTPUT_CLOSED, drop_what_is_left
from lorafa.cli.plain import Plain, replacing
from lorafa.diagnosis.packages import is_findable, of_extra
from lorafa.errors import ConfigError, LoraError, NotAvailableError, TargetError, bounded
from lorafa.launch import leave, require_alone
from lorafa.processes import is_from_other, is_main
from lorafa.version import VERSION

if TYPE_CHECKING:
    from rich.console import Console

COMMANDS = (train, eval, generate, chat, report, compare, combine, merge, export, inspect, params, plan, run, doctor)
"""Modules with ``add_parser(subparsers)``, which names the command, and ``run(args, console) -> int``."""
TOGETHER = (train, eval, generate, run)
"""Commands that several processes do together; others are refused where a launcher starts several of them."""
SHARED = (compare,)
"""Commands among those others that processes which know nothing of each other share out."""
PLAIN = (doctor,)
"""Commands that do without any package, so that they work where one is broken."""

DONE, FAILED, WRONG_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130
EXTRA = tuple(sorted({*(package.imported for package in of_extra("train")), "omegaconf"}))  # which is Hydra's
"""Modules that come with ``lorafa[train]``: the library does without them, commands do not."""


Reader = Callable[[Sequence[str] | None], argparse.Namespace]
"""Words of a command line -> its arguments, with ``run(args, console)``, ``traceback`` and ``command`` among them."""


def main(argv: Sequence[str] | None = None, read: Reader | None = None) -> int:
    """Run one command and return its exit status; argparse itself leaves with 2 on arguments it cannot read.

    Args:
        read: reads the words of a script that is no command of `lorafa`.
    """
    try:
        try:
            return _run((read or parse)(argv))
        except ImportError:
            if not (missing := _missing_extras()):
                raise
            print(f"error: {_not_installed(missing)}", file=sys.stderr)
            return FAILED
        finally:
            leave()
            for stream in (sys.stdout, sys.stderr):  # here, for as it ends the interpreter complains of a closed pipe
                print(end="", file=stream, flush=True)
    except BrokenPipeError:
        drop_what_is_left()
        return OUTPUT_CLOSED


def _run(args: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        replacing(stream)
    console, errors = _consoles(args)
    try:
        with _plain_warnings(errors), _stopped_like_interrupted():
            if args.alone is not None:
                require_alone(args.alone, shares=args.shares)
            status: int = args.run(args, console)
        return status
    except (ConfigError, NotAvailableError, TargetError) as error:
        return _report(error, str(error), WRONG_ARGUMENTS, args, errors)
    except LoraError as error:
        return _report(error, str(error), FAILED, args, errors)
    except KeyboardInterrupt as error:
        return _report(error, "Interrupted.", INTERRUPTED, args, errors)
    except Exception as error:
        if isinstance(error, ImportError) and _missing_extras():
            raise
        return _report(error, _refused_by_system(error) or _not_foreseen(error), FAILED, args, errors)


def _consoles(args: argparse.Namespace) -> tuple[Any, Any]:
    """For what is said, and for errors."""
    if args.plain:
        return Plain(), Plain(stderr=True)
    from lorafa.cli.screen import Screen  # rich: help and version do without

    return Screen(), Screen(stderr=True)


def _refused_by_system(error: Exception) -> str | None:
    """What to say where the system refuses a place: a name too long, a folder one may not enter, a full disk."""
    from lorafa.storage.refusals import refusal

    if isinstance(error, ConnectionError) or (refused := refusal(error)) is None or refused.errno is None:
        return None
    if refused.filename is None:  # of a file that was open already
        return f"{refused.strerror or refused}. The system refuses a file of this command: see to it, or make room."
    place = bounded(repr(refused.filename), 200)
    return f"{place}: {refused.strerror or refused}. The system refuses that place: name another one, or make room."


def _not_foreseen(error: Exception) -> str:
    said = bounded(str(error))
    return f"{type(error).__name__}: {said}. This was not foreseen; --traceback shows where it happened."


def _missing_extras() -> list[str]:
    return [name for name in EXTRA if not is_findable(name)]


def _not_installed(missing: Sequence[str]) -> str:
    return f"The commands need packages that are not installed ({', '.join(missing)}). Run: pip install lorafa[train]"


class Parser(argparse.ArgumentParser):
    """A parser whose help and errors are written like all output: argparse passes over a pipe that is closed."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of one command."""
    parser = Parser(
        prog="lorafa",
        description="Low-rank adaptation of PyTorch models: train adapters, measure them, read what came out.",
        epilog="`lorafa <command> --help` tells what a command needs, writes and returns.",
    )
    parser.add_argument("--version", action="version", version=f"lorafa {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for command in COMMANDS:
        made = command.add_parser(commands)
        alone = None if command in TOGETHER else made.prog
        prepared(made, command.run, alone=alone, shares=command in SHARED, plain=command in PLAIN)
    return read_words(parser, "lorafa", argv)


def prepared(
    parser: argparse.ArgumentParser,
    run: Callable[..., int],
    alone: str | None = None,
    *,
    shares: bool = False,
    plain: bool = False,
) -> None:
    """Give a parser what every command has.

    Args:
        alone: what the command is called, where it is no work for a group of processes.
        shares: whether several that are no group share its work out all the same.
        plain: whether it writes without any package.
    """
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it happened")
    parser.set_defaults(run=run, alone=alone, shares=shares, plain=plain)


def read_words(parser: argparse.ArgumentParser, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a program of this name; settings may stand before and after its options."""
    words = sys.argv[1:] if argv is None else list(argv)
    if odd := next((word for word in words if not _is_text(word)), None):
        parser.error(f"{odd!r:.200} is no text in UTF-8, which records and messages are written in. Rename it.")
    args, rest = parser.parse_known_args(words)
    args.command = [name, *words]
    stray = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _is_text(word: str) -> bool:
    """Whether a word of a command line can be written; bytes that are no UTF-8 come as halves of characters."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _plain_warnings(errors: Console) -> Iterator[None]:
    """Warnings as one line; the line of code they come from says nothing to who runs a command."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not is_main():  # the first of several processes says it
            return
        errors.print("warning:", style="bold yellow", end=" ")
        errors.print(" ".join(str(message).split()), markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]  # takes what it does not read as well
        yield


@contextmanager
def _stopped_like_interrupted() -> Iterator[None]:
    """A run that is told to stop (SIGTERM: `kill`, the time limit of a job queue) ends as by Ctrl-C: recorded."""
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(error: BaseException, text: str, status: int, args: argparse.Namespace, errors: Console) -> int:
    if is_from_other(error) and not is_main():  # that one says it
        return status
    if args.traceback:
        print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    errors.print("error:", style="bold red", end=" ")
    errors.print(" ".join(text.split()), markup=False, highlight=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
