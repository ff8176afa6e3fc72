"""`eval_gsm8k.py` as published commands call it: a trained run answers the test problems of GSM8K."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafa.cli.main import Parser, prepared, read_words
from lorafa.cli.main import main as framed
from lorafa.errors import ConfigError, did_you_mean
from lorafa.processes import from_main, is_main, main_first
from lorafa.storage.paths import user_path

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.data.records import Record
    from lorafa.evals.gsm8k import EvalResult
    from lorafa.runs.record import RunDirectory

DESCRIPTION = """\
Measure what a run of run_exp.py has learnt on the test problems of GSM8K.

The run is found by its name, in runs/. Its base model with its adapter (or the whole model, where that was trained)
is asked as the published script asks: "Q: <question>", a new line, "A: ". The result is printed, and written into
the run as gsm8k.json. Several processes share the problems out."""

EXAMPLES = """\
examples:
  python eval_gsm8k.py --wandb_name=one
  torchrun --nproc_per_node=2 eval_gsm8k.py --wandb_name=one
  python eval_gsm8k.py --model_name=path/to/model --test_file=test.jsonl

exit status: 0 done, 1 the work failed, 2 wrong arguments, 130 interrupted"""

RESULT = "gsm8k.json"
"""What the run directory has afterwards."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return framed(argv, read=parse)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the script."""
    parser = Parser(
        prog="eval_gsm8k.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--wandb_name", metavar="NAME", help="the run: its name in runs/, or its directory")
    add("--model_name", metavar="MODEL", help="a folder or Hub id to ask in the place of what the run has trained")
    add("--test_file", metavar="FILE", help="a copy of the official test file, or other rows of its form")
    add("--temperature", type=float, help="draw answers at this temperature; without it the most likely is taken")
    add("--top_p", type=float, help="draw among the likeliest tokens that have this probability together")
    add("--seed", type=int, default=0, help="of drawn answers (default: 0)")
    add("--max_new_tokens", type=int, default=512, help="longest answer in tokens (default: 512)")
    add("--batch_size", type=int, default=32, help="problems answered at a time (default: 32)")
    add("--limit", type=int, help="only the first so many problems")
    prepared(parser, run)
    return read_words(parser, "eval_gsm8k.py", argv)


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.cli.train import join_all
    from lorafa.evals.generation import Sampling
    from lorafa.settings.checks import check_int
    from lorafa.train.memory import keep_freed_memory

    for name in ("max_new_tokens", "batch_size", *(["limit"] if args.limit is not None else [])):
        check_int(f"--{name}", getattr(args, name), at_least=1)
    if args.wandb_name is None and args.model_name is None:
        raise ConfigError("Nothing says what is to be measured. Give --wandb_name=<run>, or --model_name=<model>.")
    drawn = {name: value for name in ("temperature", "top_p") if (value := getattr(args, name)) is not None}
    sampling = Sampling(**drawn, seed=args.seed) if drawn else None
    keep_freed_memory()
    join_all(console, "eval_gsm8k.py")
    directory = from_main(lambda: None if args.wandb_name is None else named(args.wandb_name))
    with main_first():
        records = problems(args.test_file)[: args.limit]
    model, tokenizer = _ready(args, directory)
    with _bar(console) as progress:
        found = _asked(model, tokenizer, records, args, sampling, progress)
    if not is_main():
        return 0
    if directory is not None and args.model_name is None:
        console.print(f"Run: {directory.path}", highlight=False, markup=False, soft_wrap=True)
    say(found, records, args.max_new_tokens, console)
    if directory is not None and args.model_name is None:
        _keep(directory, found, records, args)
        console.print(f"Written: {directory.path / RESULT}", highlight=False, markup=False, soft_wrap=True)
    return 0


def named(name: str) -> RunDirectory:
    """The run of that name in ``runs/``, or in that directory.

    Raises:
        ConfigError: there is none.
    """
    from lorafa.runs import CONFIG
    from lorafa.runs.record import RunDirectory

    if not name.strip():
        raise ConfigError("--wandb_name= is followed by nothing. Was a variable of the shell not set?")
    first = Path("runs") / name
    for place in (first, user_path(name)):
        if os.path.isfile(place / CONFIG):
            return RunDirectory.open(_last_of(first) if place == first else place)
    known = sorted(path.parent.name for path in Path("runs").glob(f"*/{CONFIG}"))
    raise ConfigError(
        f"There is no run {name!r} in {Path('runs').absolute()}.{did_you_mean(name, known)} Give the wandb.name it was "
        "trained under, or its directory."
    )


def _last_of(first: Path) -> Path:
    """The directory of the run of this name that was begun last: run_exp.py numbers those that are called the same."""
    from lorafa.runs.record import NUMBERS, RunDirectory

    numbered = (first.with_name(f"{first.name}-{number}") for number in range(2, NUMBERS))
    named = [path for path in numbered if path.is_dir() and _is_called(RunDirectory(path).environment(), first.name)]
    return [first, *named][-1]


def _is_called(environment: Mapping[str, Any], name: str) -> bool:
    """Whether the command of a run named it so."""
    words = [str(word).lstrip("+").partition("=") for word in environment.get("command") or ()]
    return any(key == "wandb.name" and value == name for key, _, value in words)


def problems(file: str | None) -> list[Record]:
    """The test problems, of a file or the Hub, as the published script asks them.

    Raises:
        SourceError: they cannot be read or fetched.
        DataError: a row has no question, or no number as its answer.
    """
    from lorafa.evals.gsm8k import as_published, official_problems

    return [as_published(record) for record in official_problems(file, "--test_file=test.jsonl")]


def _ready(args: argparse.Namespace, directory: RunDirectory | None) -> tuple[Any, Any]:
    """The model that is asked, on this process's device, and its tokenizer with the published way to write a text."""
    from lorafa.data.templates import find_template
    from lorafa.evals.gsm8k import BARE
    from lorafa.models.load import load_model, on_accelerator
    from lorafa.runs.trained import trained_model

    if args.model_name is not None:
        model, tokenizer = load_model(args.model_name, "auto")
    else:
        assert directory is not None
        model, tokenizer = trained_model(directory)
    tokenizer.chat_template = find_template(BARE)
    return on_accelerator(model), tokenizer


def _asked(
    model: Any, tokenizer: Any, records: list[Record], args: argparse.Namespace, sampling: Any, progress: Any
) -> EvalResult:
    from lorafa.evals.gsm8k import evaluate
    from lorafa.launch import ending_together

    with ending_together():
        return evaluate(
            model,
            tokenizer,
            records,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            progress=progress,
        )


def _bar(console: Console) -> Any:
    from lorafa.train.progress import progress_bar

    return progress_bar(console, "Answering")


def published_accuracy(found: EvalResult, records: Sequence[Record]) -> float:
    """The share of right answers by the rule of the published script, for answers and gold answers alike."""
    from lorafa.evals.gsm8k import extract_upstream

    golds = [extract_upstream(record.messages[-1].content) for record in records]
    right = [extract_upstream(one.output) == gold for one, gold in zip(found.samples, golds, strict=True)]
    return sum(right) / len(right)


def say(found: EvalResult, records: Sequence[Record], longest: int, console: Console) -> None:
    """Print the result."""
    low, high = found.interval
    lines = [
        f"Accuracy: {found.accuracy:.2%} ({found.correct} of {found.total} right; 95 % interval {low:.2%} to "
        f"{high:.2%})",
        f"By the rule of the published script: {published_accuracy(found, records):.2%}",
    ]
    if found.unparsed:
        lines.append(f"{found.unparsed} answers have no number after '####' (answers end after {longest} tokens).")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _keep(directory: RunDirectory, found: EvalResult, records: Sequence[Record], args: argparse.Namespace) -> None:
    from lorafa.storage.whole import write_json

    asked = {name: getattr(args, name) for name in ("test_file", "temperature", "top_p", "seed", "max_new_tokens")}
    values = {name: value for name, value in asdict(found).items() if name != "samples"}
    answers = [
        {"question": record.question[-1].content, "gold": one.gold, "output": one.output, "correct": one.correct}
        for one, record in zip(found.samples, records, strict=True)
    ]
    accuracy = published_accuracy(found, records)
    write_json(directory.path / RESULT, {**values, "published_accuracy": accuracy, "asked": asked, "answers": answers})
