"""`lorafa generate`: answer a file of prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from lorafa.cli.drawn import add_drawing
from lorafa.cli.pipes import OutputClosed, lead_nowhere

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.evals.answering import Answering
    from lorafa.train.settings.run import RunConfig

DESCRIPTION = """\
Answer a file of prompts with a model, an adapter or a run.

SUBJECT is a run directory, the folder or Hub id of an adapter, or a model (a name, a folder, a Hub id). FILE has a
prompt on each line (.txt), or rows (.jsonl, .json, .csv, .tsv, .parquet) with messages that end in a user's turn, or
with prompt, question, or instruction (and input). The chat template writes them.

Written is a JSON object a line, in the order of the file: prompt or messages, output, and cut, whether the answer was
still going on at its longest. A command that is killed keeps what is written. Several processes (torchrun, accelerate
launch) share the prompts out."""

EXAMPLES = """\
examples:
  lorafa generate runs/a prompts.txt --out answers.jsonl
  lorafa generate runs/a prompts.txt --out answers.jsonl --resume     after it was stopped, with the same options
  lorafa generate smollm2-135m rows.jsonl --max-new-tokens 64         to the terminal
  lorafa generate runs/a/adapter rows.jsonl --temperature 0.7 --top-p 0.9 --seed 1
  lorafa generate path/to/model rows.jsonl data.template=chatml model.dtype=float32

exit status: 0 done, 1 the work failed, 2 wrong arguments or settings, 130 interrupted"""

READ = ("data", "model", "threads")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        help="answer a file of prompts",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", metavar="SUBJECT", help="what answers")
    parser.add_argument("file", metavar="FILE", help="the prompts")
    parser.add_argument("--base", metavar="MODEL", help="base model of the adapter, in place of the one it names")
    parser.add_argument("--out", metavar="FILE", help="write there (default: the standard output)")
    parser.add_argument("--resume", action="store_true", help="continue the file of --out where it ends")
    add_drawing(parser, "0")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="answered at a time (default: 16)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="data.template, model settings")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.cli.screen import Screen
    from lorafa.cli.train import join_all
    from lorafa.conf.compose import compose
    from lorafa.data.templates import find_template
    from lorafa.data.unanswered import prompts_of
    from lorafa.errors import ConfigError
    from lorafa.evals.answering import answers
    from lorafa.launch import ending_together
    from lorafa.models.kinds.entry import TEXT
    from lorafa.models.kinds.found import kind_of
    from lorafa.processes import from_main, is_main
    from lorafa.runs.answers import AnswerFile
    from lorafa.runs.made_by import MadeBy
    from lorafa.runs.subjects import find
    from lorafa.train.memory import keep_freed_memory
    from lorafa.train.progress import progress_bar

    keep_freed_memory()
    join_all(console, "-m lorafa.cli.main generate")
    config, how = from_main(lambda: (settings_of(args.overrides), answering(args)))
    of_model = _of_model(args.overrides)
    template = from_main(lambda: find_template(config.data.template) if config.data.template else None)
    shown = Screen(stderr=True, quiet=console.quiet)
    with ending_together():
        prompts = from_main(lambda: prompts_of(args.file))
        subject = from_main(lambda: find(args.subject, args.base))
        subject.require_its_own(of_model)
        asked = compose([f"model={subject.base or subject.name}", *of_model])
        settings = asked.model
        if subject.run:
            trusted = asked.model.trust_remote_code
            settings = replace(subject.run.config().model, trust_remote_code=trusted)
        made_by = from_main(lambda: MadeBy.of(subject, settings, how, template))
        file = from_main(lambda: AnswerFile(args.out, prompts, made_by, resume=args.resume))
        done = file.done(how.window)
        if done == len(prompts):
            shown.print(f"All {done} prompts are answered already.", highlight=False)
            return 0
        with shown.status(f"Loading {subject.name}"):
            model, tokenizer = subject.load(settings)
        if TEXT not in (kind := kind_of(model)).offers:
            raise ConfigError(
                f"{subject.name} is {kind.words} (model.kind={kind.name}), which writes no text. Give a model that "
                "does."
            )
        tokenizer.chat_template = template or tokenizer.chat_template
        with closing(file), progress_bar(shown, f"{subject.name}: answering") as bar:
            written = answers(model, tokenizer, prompts, how, done, bar)
            some = next(written)  # what is wrong with any prompt is said before the file is touched
            from_main(lambda: file.open(done))
            while some:
                if is_main():
                    with _closed_output(args.out is None):
                        file.add(some)
                some = next(written, [])
    if args.out:
        shown.print(f"Answers: {args.out}", highlight=False, markup=False, soft_wrap=True)
    return 0


@contextmanager
def _closed_output(to_stdout: bool) -> Iterator[None]:
    """A pipe that nobody reads any more ends the command quietly, where the answers go into one."""
    try:
        yield
    except BrokenPipeError:
        if not to_stdout:
            raise
        lead_nowhere(sys.stdout)
        raise OutputClosed from None


def answering(args: argparse.Namespace) -> Answering:
    """How prompts are answered, checked.

    Raises:
        ConfigError: a number is out of its range, or says how to draw where nothing is drawn.
    """
    from lorafa.evals.answering import Answering
    from lorafa.evals.generation import sampling_of
    from lorafa.settings.checks import check_int

    check_int("--max-new-tokens", args.max_new_tokens, at_least=1)
    check_int("--batch-size", args.batch_size, at_least=1)
    sampling = sampling_of(args.temperature, args.top_p, args.seed, lambda name: f"--{name.replace('_', '-')}", " ")
    return Answering(args.max_new_tokens, args.batch_size, sampling)


def settings_of(overrides: list[str]) -> RunConfig:
    """The settings beside the options.

    Raises:
        ConfigError: one changes nothing that is answered.
    """
    from lorafa.conf.compose import compose, key_of, refuse_others
    from lorafa.errors import ConfigError

    refuse_others(overrides, READ, "lorafa generate", "changes no answer")
    for text in overrides:
        if key_of(text).partition(".")[0] == "data" and key_of(text) != "data.template":
            raise ConfigError(f"lorafa generate reads data.template of the group data, found {text!r}. Leave it out.")
        if key_of(text) in ("model", "model.name"):
            raise ConfigError(f"SUBJECT says which model answers, found {text!r} as well. Leave it out.")
    return compose(overrides)


def _of_model(overrides: list[str]) -> list[str]:
    from lorafa.conf.compose import key_of

    return [text for text in overrides if key_of(text).startswith("model.")]
