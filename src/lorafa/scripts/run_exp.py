"""`run_exp.py` as published commands call it: its keys, its defaults, its meaning. The run is one of `lorafa train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from lorafa.cli.main import Parser, prepared, read_words
from lorafa.cli.main import main as framed
from lorafa.cli.sweeps import HELP, swept
from lorafa.errors import ConfigError
from lorafa.processes import from_main, world_size
from lorafa.scripts.published import PUBLISHED_KEYS

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.scripts.translate import Translated
    from lorafa.train.settings.run import RunConfig

WIDTH = 110
DESCRIPTION = """\
Fine-tune a model as the published run_exp.py of LoRA-GA and LoRA-One does, with its keys and its defaults.

The run directory is that of `lorafa train`; its config.yaml says what every key meant."""

EXAMPLES = """\
examples:
  python run_exp.py -m ++dataset_name=meta_math +init=gradient +peft=qv ++peft.lora_r=8 ++wandb.name=one
  python run_exp.py ++model.name=path/to/model ++dataset_name=mine.jsonl +peft=all ++peft.lora_r=8

exit status: 0 done, 1 the work failed, 2 wrong arguments or settings (nothing is written), 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return framed(argv, read=parse)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the script."""
    parser = Parser(
        prog="run_exp.py",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\n\nkeys (key=value):\n{keys_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", "--multirun", action="store_true", help=HELP)
    parser.add_argument("--dry-run", action="store_true", help="show settings, coverage and one sample; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="a key, see below")
    prepared(parser, run)
    return read_words(parser, "run_exp.py", argv)


def keys_help() -> str:
    """Every key with what it is here."""
    lines = []
    for name, key in PUBLISHED_KEYS.items():
        what = "; ".join(text for text in (key.ours, key.means) if text)
        line = f"  {name:31}{'changes nothing: ' if key.dead else ''}{what}"
        lines.append(fill(line, WIDTH, subsequent_indent=" " * 33))
    return "\n".join(lines)


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()  # before the first tensor
    from lorafa.cli.train import carry_out, join_all, show
    from lorafa.scripts.published import options

    join_all(console, "run_exp.py")
    said: set[str] = set()

    def make(words: Sequence[str]) -> RunConfig:
        translated, config = compose_published(words)
        for note in translated.notes:
            if note not in said:
                console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
        said.update(translated.notes)
        args.dry_run |= translated.dry_run
        return config

    if args.multirun and (status := swept(args, console, make, options)) is not None:
        return status
    config = make(args.overrides)
    config = from_main(lambda: placed(config, args.overrides))
    return show(config, None, console) if args.dry_run else carry_out(config, console, args.command)


def compose_published(words: Sequence[str]) -> tuple[Translated, RunConfig]:
    """What the words of a command mean, and the run they ask for.

    Raises:
        ConfigError: a key or a value is wrong.
        NotAvailableError: it asks for what is not here.
    """
    from lorafa.conf.compose import compose
    from lorafa.scripts.asked import read
    from lorafa.scripts.translate import translate

    asked = read(words)
    translated = translate(asked, world_size())
    try:
        config = compose(translated.overrides)
    except ConfigError as error:
        passed = {name: PUBLISHED_KEYS[name].passed for name in sorted(asked.given)}
        renamed = {name: ours for name, ours in passed.items() if ours not in (None, name)}
        said = [f"{name} is {ours} here." for name, ours in renamed.items() if str(ours) in str(error)]
        raise ConfigError(" ".join([str(error), *said])) from error
    return translated, config


def placed(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """The run in the first directory of its name that is free, or holds a run of the same settings, which goes on.

    Names of runs need not be different in the published scripts; a directory holds one run. Where the words say
    ``run_dir`` or ``if_exists``, that holds.
    """
    if config.run_dir is None or any(text.lstrip("+").startswith(("run_dir=", "if_exists=")) for text in words):
        return config
    from lorafa.runs import CONFIG
    from lorafa.runs.differences import differing
    from lorafa.runs.record import NUMBERS, RunDirectory
    from lorafa.settings.typed import plain

    first = Path(str(config.run_dir))
    for path in (first, *(first.with_name(f"{first.name}-{number}") for number in range(2, NUMBERS))):
        if not os.path.isfile(path / CONFIG):
            return replace(config, run_dir=str(path))
        if not differing(plain(config), plain(RunDirectory.open(path).config())):
            return replace(config, run_dir=str(path), if_exists="resume")
    raise ConfigError(f"All of {first} to {first.name}-{NUMBERS - 1} are taken. Give another wandb.name.")
