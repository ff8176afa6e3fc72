"""`lorafa eval`: measure runs, adapters and models, side by side on the same items."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from lorafa.data.shares import names_of
from lorafa.evals import EVALS

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.evals.entry import Scores
    from lorafa.report.fitted import Fitted
    from lorafa.runs.side_by_side import Asked, Task
    from lorafa.runs.subjects import Named
    from lorafa.train.settings.run import RunConfig

DESCRIPTION = """\
Measure what a model, an adapter or a run scores, without training.

Each SUBJECT is a run directory, the folder or Hub id of an adapter, or a model (a name, a folder, a Hub id). task=
names an evaluation; data= gives it rows or a text in the place of its own. Without a task a run is measured as it was
after its training, on the rows it holds out. Several subjects answer the same items: their differences from the first
are paired, item by item. All are loaded once before the first is measured, to say early what is wrong. Several
processes (torchrun, accelerate launch) share the items out."""

EXAMPLES = """\
examples:
  lorafa eval runs/20260101-120000-lora-r16                what the run measured, again
  lorafa eval smollm2-135m runs/a runs/b task=perplexity data=text.txt
                                                            a text, before and after
  lorafa eval runs/a/adapter task=gsm8k                     the official test problems (from the Hub)
  lorafa eval runs/a/adapter task=gsm8k data=test.jsonl eval.size=100
                                                            the first hundred of a local copy
  lorafa eval runs/a task=perplexity data=rows.jsonl --json
  lorafa eval runs/a runs/b task=forgetting                 how far each has moved from its base
  lorafa eval runs/a task=humaneval eval.run_code=true data=HumanEval.jsonl.gz
                                                            runs what the model writes, with limits
  lorafa eval runs/a task=commonsense eval.task=boolq       the questions from the Hub
  lorafa eval runs/a task=commonsense eval.task=boolq data=test.json
                                                            those of the published file

tasks: {tasks}
(loss: in a training alone)

exit status: 0 done, 1 the work failed, 2 wrong arguments or settings, 130 interrupted"""

READ = ("data", "eval", "model", "threads")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "eval",
        help="measure runs, adapters and models on a task or a file",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(tasks=", ".join(EVALS.names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", metavar="MODEL", help="base model of the adapters, in place of the one they name")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--out", metavar="FILE", help="write the scores there too, with the answers to all items")
    parser.add_argument(
        "overrides", nargs="*", metavar="SUBJECT | key=value", default=[], help="what is measured, and settings"
    )
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.cli.screen import Screen
    from lorafa.cli.train import join_all
    from lorafa.launch import ending_together
    from lorafa.processes import from_main, is_main
    from lorafa.runs.side_by_side import measured
    from lorafa.runs.subjects import find
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()
    join_all(console, "-m lorafa.cli.main eval")
    words = [text for text in args.overrides if "=" not in text]
    if args.out:
        from_main(lambda: require_new(args.out))
    subjects = from_main(lambda: [find(word, args.base) for word in words])
    asked = settings_of(subjects, [text for text in args.overrides if "=" in text])
    with ending_together():  # bars and what is being loaded: no part of what a file or a pipe is given
        found = measured(subjects, asked, Screen(stderr=True, quiet=console.quiet))
    if not is_main():
        return 0
    rows = [row for task, scores in found.items() for row in rows_of(task, subjects, scores)]
    _say(rows, subjects, found, args.json, console)
    if args.out:
        _write(args.out, subjects, found, rows)
    return 0


def _say(
    rows: Sequence[Mapping[str, Any]],
    subjects: Sequence[Named],
    found: Mapping[str, Sequence[Scores]],
    as_json: bool,
    console: Console,
) -> None:
    if as_json:
        from lorafa.report.values import finite

        console.print_json(data=finite(rows))
        return
    console.print(table(rows), crop=False)
    comparisons = max((row.get("comparisons", 1) for row in rows), default=1)
    if comparisons > 1:
        text = (
            f"Intervals of the differences are corrected for {comparisons} comparisons with the first (Bonferroni): "
            "with 95 % those of a task all hold at once."
        )
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for name, scores in found.items():
        for subject, score in zip(subjects, scores, strict=True):
            text = f"{subject.name}, {name}: {score.words}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def require_new(file: str) -> None:
    """Raises ConfigError for a file that is there already, or whose folder is not."""
    from lorafa.errors import ConfigError
    from lorafa.storage.paths import user_path

    path = user_path(file)
    if path.exists():
        raise ConfigError(f"--out {file} is there already, and nothing is overwritten. Name another file.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {file} lies in no folder that is there. Make the folder, or name another file.")


def settings_of(subjects: Sequence[Named], overrides: Sequence[str]) -> Asked:
    """The settings, and the tasks: the one that is named, or those of the first run.

    Raises:
        ConfigError: nothing says what is to be measured, or a setting is not read.
    """
    from lorafa.conf.compose import compose, key_of, refuse_others
    from lorafa.errors import ConfigError
    from lorafa.models.kinds import KINDS
    from lorafa.runs.side_by_side import Asked, Task
    from lorafa.train.evaluation import evaluation_of

    if not subjects:
        raise ConfigError("Nothing is named that could be measured. Give a run directory, an adapter or a model.")
    words = [f"eval={text[5:]}" if text.startswith("task=") else text for text in overrides]
    _refuse_unknown([text.partition("=")[2] for text in words if key_of(text) == "eval"])
    refuse_others(words, READ, "lorafa eval", "changes nothing that is measured")
    config, keys = compose(words), [key_of(text) for text in words]
    if config.eval.forgetting:
        raise ConfigError("eval.forgetting=true is a setting of a training. Here give task=forgetting.")
    _refuse_unread(subjects, config, words, keys)
    data = ",".join(names_of(config.data.name)) if "data" in keys or "data.name" in keys else None
    of_model = [text for text, key in zip(words, keys, strict=True) if key.startswith("model.")]
    if "eval" in keys:
        own = config.eval.own
        if "eval.size" not in keys and hasattr(own, "size"):
            own = replace(own, size=None)  # a training measures some, this command all
        tasks = [Task(config.eval.name, EVALS.get(config.eval.name), own)]
        return Asked(config, tasks, True, data, of_model, _max_length(config, keys, tasks))
    if any(key.startswith("eval.") and key != "eval.batch_size" for key in keys):
        raise ConfigError("Settings of an evaluation need its name. Give task=<name> beside them.")
    first = next((subject.run for subject in subjects if subject.run is not None), None)
    if first is None:
        raise ConfigError(f"Nothing says what is to be measured. Give task=<{'|'.join(_tasks())}>.")
    if subjects[0].run is None and data is None:
        raise ConfigError(
            f"Without a task and data= the rows are those that a run holds out, and the first subject, "
            f"{subjects[0].name}, is none. Put the run {first.path} first."
        )
    kind = KINDS.get(first.result().get("kind", "causal"))
    own = evaluation_of(first.config().eval, kind)
    likely = EVALS.get("perplexity")
    tasks = [] if own.name == "perplexity" or not likely.needs <= kind.offers else [_usual("perplexity")]
    if own.name != "loss":
        tasks.append(Task(own.name, own.entry, own.own))
    return Asked(config, tasks, False, data, of_model, _max_length(config, keys, tasks))


def _refuse_unknown(names: Sequence[str]) -> None:
    """Raises ConfigError for what is no task: `eval=` of a training takes its files of settings as well."""
    from lorafa.errors import ConfigError, did_you_mean

    for name in names:
        if name not in EVALS:
            known = _tasks()
            raise ConfigError(f"There is no task {name!r}.{did_you_mean(name, known)} Give one of: {', '.join(known)}.")


def _tasks() -> list[str]:
    """The evaluations that are measured by their names."""
    return [name for name in EVALS.names() if EVALS.get(name).read is not None]


def _max_length(config: RunConfig, keys: Sequence[str], tasks: Sequence[Task]) -> int | None:
    """What data.max_length says; None: nothing.

    Raises:
        ConfigError: it is given, and no task goes by it.
    """
    from lorafa.errors import ConfigError

    if "data.max_length" not in keys:
        return None
    if not any(task.entry.cuts for task in tasks):
        raise ConfigError(
            f"data.max_length={config.data.max_length} cuts no text of task={','.join(task.name for task in tasks)}, "
            "so it would change nothing. Leave it out."
        )
    return config.data.max_length


def _refuse_unread(
    subjects: Sequence[Named], config: RunConfig, words: Sequence[str], keys: Sequence[str]
) -> None:
    """Raises ConfigError for a setting that would change nothing."""
    from lorafa.errors import ConfigError

    may_cut = "data.max_length"  # whether a task goes by it is known later
    named = {"data", "data.name"} & {*keys}
    own = [] if config.data.own is None or not named else [f"data.{one.name}" for one in fields(config.data.own)]
    read = ("data", "data.name", "data.template", *own)
    for text, key in zip(words, keys, strict=True):
        if key.partition(".")[0] == "data" and key not in (*read, may_cut):
            raise ConfigError(
                f"lorafa eval measures every row that data= gives, and reads of its settings {', '.join(read[2:])}, "
                f"found {text!r}. Leave it out (eval.size takes the first so many)."
            )
        if key in ("model", "model.name"):
            raise ConfigError(f"A subject says which model is measured, found {text!r} as well. Leave it out.")
    for subject in subjects:
        subject.require_its_own([text for text, key in zip(words, keys, strict=True) if key.startswith("model.")])


def _usual(name: str) -> Task:
    """An evaluation with the settings that hold where nothing is said."""
    from lorafa.runs.side_by_side import Task

    entry = EVALS.get(name)
    return Task(name, entry, entry.settings and entry.settings())


def rows_of(task: str, subjects: Sequence[Named], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """One row a subject: the mean with its interval, and the paired difference from the first, whose interval is
    corrected for the number of differences."""
    from lorafa.evals.paired import mean_interval, paired_difference

    comparisons = sum(score.measured is not None for score in scores[1:])
    rows: list[dict[str, Any]] = []
    for subject, score in zip(subjects, scores, strict=True):
        row: dict[str, Any] = {"subject": subject.name, "task": task, **score.numbers}
        if score.measured is not None:
            one, first = score.measured, scores[0].measured
            mean, low, high = mean_interval(one)
            row |= {"measure": one.name, "items": len(one.values), "mean": mean}
            row["interval"] = list(score.numbers.get("interval", (low, high)))
            if first is not None and first is not one:
                row["difference"], *bounds = paired_difference(one, first, comparisons)
                row["difference_interval"] = bounds
                row |= {"comparisons": comparisons} if comparisons > 1 else {}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Fitted:
    """The rows for the terminal. Print it with ``crop=False``."""
    from lorafa.report.fitted import Fitted

    headings = ("subject", "measure", "items", "mean", "95 % interval", "minus the first", "95 % interval")
    shown = []
    for row in rows:
        difference = f"{row['difference']:+.4f}" if "difference" in row else "-"
        shown.append((
            row["subject"], row.get("measure", row["task"]), str(row.get("items", "-")), _number(row.get("mean")),
            _bounds(row.get("interval")), difference, _bounds(row.get("difference_interval"), "+"),
        ))  # fmt: skip
    return Fitted(headings, shown, left=1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bounds(bounds: Sequence[float] | None, sign: str = "") -> str:
    if bounds is None or not all(map(math.isfinite, bounds)):
        return "-"
    return f"{bounds[0]:{sign}.4f} to {bounds[1]:{sign}.4f}"


def _write(
    file: str, subjects: Sequence[Named], found: Mapping[str, Sequence[Scores]], rows: Sequence[Mapping[str, Any]]
) -> None:
    from lorafa.report.values import finite
    from lorafa.storage.paths import user_path
    from lorafa.storage.whole import write_json

    of_items = [
        {
            "subject": subject.name,
            "task": task,
            "values": [] if score.measured is None else list(score.measured.values),
            "answers": list(score.answers),
        }
        for task, scores in found.items()
        for subject, score in zip(subjects, scores, strict=True)
        if score.measured is not None or score.answers
    ]
    write_json(user_path(file), finite({"rows": list(rows), "items": of_items}))
