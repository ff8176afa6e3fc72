"""`lorafa chat`: talk to a base model and its adapters side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from lorafa.cli.drawn import add_drawing
from lorafa.cli.plain import replacing
from lorafa.cli.trusted import add_trust

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.chat.engine import Engine
    from lorafa.chat.options import Options

DESCRIPTION = """\
Talk to a base model and adapters on it side by side: each question is answered by all of them, in one batch that mixes
adapters, and each remembers its own answers.

ADAPTER is the folder or Hub id of an adapter, a run directory, or a model; all have one base, which answers too.
name=path says what it is called here. The chat template writes what is asked; models without one read each text on a
line of its own. Standard input may be a pipe or a file: a question a line.

--serve opens a local page that does the same, and answers requests of the OpenAI protocol under /v1: the name of an
adapter, or of the base, is the name of a model there. It listens on this machine alone (127.0.0.1)."""

EXAMPLES = """\
examples:
  lorafa chat runs/a                                        a run, beside its base
  lorafa chat german=runs/a french=runs/b/adapter           two adapters and their base
  lorafa chat smollm2-135m --system "Answer in one word."   a model alone
  lorafa chat runs/a --temperature 0.7 --top-p 0.9 --seed 1
  lorafa chat runs/a < questions.txt > answers.txt
  lorafa chat runs/a runs/b --serve                         a page, and the protocol at http://127.0.0.1:8000/v1

commands in a chat:
  /adapters [NAME ...]   who answers, or who is to (all: everyone)
  /system [TEXT]         another system prompt, and begin anew
  /reset                 begin anew
  /quit                  leave, as Ctrl-D does; Ctrl-C stops an answer

exit status: 0 done, 1 the work failed, 2 wrong arguments, 130 interrupted"""

PORT = 8000
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "chat",
        help="talk to a base and its adapters side by side",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help="who answers, beside the base")
    parser.add_argument("--base", metavar="MODEL", help="base model of the adapters, in place of the one they name")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--template", metavar="NAME", help="chat template (a name, a file) in place of everyone's own")
    add_drawing(parser, "another one each time")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the base (default: its own)")
    parser.add_argument("--serve", action="store_true", help="answer a local page and the OpenAI protocol")
    parser.add_argument("--port", type=int, metavar="N", help=f"port of --serve (default: {PORT}; 0: any free one)")
    add_trust(parser)
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from rich.text import Text

    from lorafa.chat.engine import Engine
    from lorafa.chat.loading import ask_for
    from lorafa.chat.printable import printable
    from lorafa.cli.screen import Screen
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()
    options = options_of(args)
    notices = Screen(stderr=True, quiet=console.quiet)
    asked = ask_for(
        args.adapters, args.base, args.dtype, args.template, trust_remote_code=args.trust_remote_code
    )
    with notices.status(Text(f"Loading {printable(asked.settings.name)}")):
        speakers = asked.load()
    with Engine(speakers) as engine:
        if args.serve:
            return _serve(engine, options, args, console, notices)
        return _talk(engine, options, args.system, console, notices)


def _talk(engine: Engine, options: Options, system: str | None, console: Console, notices: Console) -> int:
    from lorafa.chat.session import Session
    replacing(sys.stdin)
    by_hand = sys.stdin.isatty()
    session = Session(engine, options, system, console, notices, strict=not by_hand)
    if by_hand:
        names = ", ".join(engine.speakers.by_name)
        notices.print(f"{names}. /help lists commands.", style="dim", markup=False, highlight=False, soft_wrap=True)
    session.run(_typed(console) if by_hand else sys.stdin)
    return 0


def _typed(console: Console) -> Iterator[str]:
    """Lines as they are typed, until Ctrl-D."""
    if console.is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines with it
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        yield line


def _serve(engine: Engine, options: Options, args: argparse.Namespace, console: Console, notices: Console) -> int:
    from lorafa.chat.server import serving

    port = PORT if args.port is None else args.port
    with serving(engine, options, port, args.system) as server:
        console.print(server.address, highlight=False, soft_wrap=True)
        console.file.flush()
        notices.print(f"The OpenAI protocol is at {server.address}v1. Ctrl-C ends.", style="dim", highlight=False)
        with suppress(KeyboardInterrupt):  # the way in which it ends
            server.serve_forever()
    return 0


def options_of(args: argparse.Namespace) -> Options:
    """What is asked of every answer, checked.

    Raises:
        ConfigError: a number is out of its range, or an option changes nothing.
    """
    from lorafa.chat.options import Options
    from lorafa.errors import ConfigError
    from lorafa.evals.generation import sampling_of
    from lorafa.settings.checks import check_int

    check_int("--max-new-tokens", args.max_new_tokens, at_least=1)
    sampling_of(args.temperature, args.top_p, args.seed, lambda name: f"--{name.replace('_', '-')}", " ")
    if args.port is not None:
        if not args.serve:
            raise ConfigError(f"--port {args.port} is that of --serve. Add --serve, or leave it out.")
        if not 0 <= args.port < 2**16:
            raise ConfigError(f"--port {args.port} is no port. Give a number from 0 to 65535.")
    return Options(args.max_new_tokens, args.temperature, args.top_p, args.seed)
