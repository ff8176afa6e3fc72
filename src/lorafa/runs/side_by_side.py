"""Runs, adapters and models measured side by side, on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from lorafa.conf.compose import compose
from lorafa.data.chat import WHOLE, encoded
from lorafa.data.records import Record
from lorafa.data.shares import names_of
from lorafa.data.templates import find_template
from lorafa.errors import ConfigError, DataError
from lorafa.evals.entry import Evaluation, Scores, Source, Subject
from lorafa.processes import main_first
from lorafa.runs.subjects import Named, held_out, require_same_data
from lorafa.train.evaluation import not_for
from lorafa.train.progress import progress_bar
from lorafa.train.settings.model import ModelConfig
from lorafa.train.settings.run import RunConfig


@dataclass(frozen=True)
class Task:
    """An evaluation with its settings."""

    name: str
    entry: Evaluation
    own: Any


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how."""

    config: RunConfig
    tasks: list[Task]
    named: bool
    """Whether ``task=`` says so; otherwise it is what a run measured."""
    data: str | None
    """What ``data=`` gives; None: nothing."""
    of_model: list[str]
    """The settings of how models are loaded."""
    max_length: int | None = None
    """What ``data.max_length`` says; None: nothing, so it is that of the run."""

    def loading(self, subject: Named) -> ModelConfig:
        """How the base model of a subject is loaded: as `lorafa train` loads it, but for what is said otherwise."""
        if subject.run is not None:
            return replace(subject.run.config().model, trust_remote_code=self.config.model.trust_remote_code)
        return compose([f"model={subject.base or subject.name}", *self.of_model]).model


def measured(subjects: Sequence[Named], asked: Asked, console: Console) -> dict[str, list[Scores]]:
    """Task -> the scores of each subject; one model is in memory at a time.

    Several are all loaded once before the first is measured: what is wrong with the last would else be said after the
    hours that those before it take.

    Raises:
        LoraError: of the kind that fits.
    """
    items = dict[str, list[Any]]()
    found: dict[str, list[Scores]] = {task.name: [] for task in asked.tasks}

    def ready(named: Named) -> list[Subject]:
        """The subject, loaded, as each task asks it."""
        nonlocal items
        model, tokenizer = _loaded(named, subjects, asked, console)
        items = items or _items(subjects, asked, model, tokenizer, console)
        of_tasks = [_subject(named, model, tokenizer, task, items, subjects, asked) for task in asked.tasks]
        for task, subject in zip(asked.tasks, of_tasks, strict=True):
            task.entry.check(subject, items[task.name], task.own)
        return of_tasks

    if len(subjects) > 1:
        for named in subjects:
            ready(named)
    for named in subjects:
        for task, subject in zip(asked.tasks, ready(named), strict=True):
            with progress_bar(console, f"{named.name}: {task.name}") as bar:
                batch_size = asked.config.eval.batch_size
                found[task.name].append(task.entry.measure(subject, items[task.name], task.own, batch_size, bar))
            del subject  # which holds the model, and the next one is to have its room
    return found


def _loaded(named: Named, subjects: Sequence[Named], asked: Asked, console: Console) -> tuple[Any, Any]:
    """The model and its tokenizer, with the chat template through which all are asked: before as after."""
    with console.status(f"Loading {named.name}"):
        model, tokenizer = named.load(asked.loading(named))
    runs = [subject.run.config() for subject in subjects if subject.run is not None]
    template = next((run.data.template for run in runs if run.data.template), None)
    if wanted := asked.config.data.template or (template if named.run is None else None):
        tokenizer.chat_template = find_template(wanted)
    return model, tokenizer


def _subject(
    named: Named,
    model: Any,
    tokenizer: Any,
    task: Task,
    items: Mapping[str, Sequence[Any]],
    subjects: Sequence[Named],
    asked: Asked,
) -> Subject:
    """What a task is asked of.

    Raises:
        ConfigError: a model of this kind has no answer to it.
    """
    bare = Subject(model, tokenizer)
    if not task.entry.needs <= bare.kind.offers:
        raise ConfigError(f"{named.name}: {not_for(task.name, bare.kind, of_run=False)}")
    records = [item for item in items[task.name] if isinstance(item, Record)]
    encoder = bare.kind.encoding(model).make(tokenizer, WHOLE)
    ends = encoded(records, encoder).ends if records else frozenset[int]()
    return Subject(model, tokenizer, ends, _max_length(named, subjects, asked))


def _max_length(named: Named, subjects: Sequence[Named], asked: Asked) -> int:
    """Tokens of a text that are read: as said, as the run was trained, or as the run beside it."""
    if asked.max_length is not None:
        return asked.max_length
    of_runs = [one.run.config() for one in (named, *subjects) if one.run is not None]
    return (of_runs[0] if of_runs else asked.config).data.max_length


def _items(
    subjects: Sequence[Named], asked: Asked, model: Any, tokenizer: Any, console: Console
) -> dict[str, list[Any]]:
    """What each task asks: of a file, of its own benchmark, or of what the first run holds out.

    Raises:
        ConfigError: a task has nothing of its own, and no file is given.
        DataError: there is nothing that could be asked.
    """
    config, own = asked.config, subjects[0].run
    heldout: Sequence[Any] | None = None
    items: dict[str, list[Any]] = {}
    for task in asked.tasks:
        if asked.data is None and own is not None and not asked.named:
            require_same_data(own, subjects)
            heldout = held_out(own, model, tokenizer, console) if heldout is None else heldout
            items[task.name] = task.entry.asks(heldout, task.own)
            if not items[task.name]:
                raise DataError(
                    f"{task.name} asks none of the {len(heldout)} rows that {subjects[0].name} holds out. Give others: "
                    "data=<file>."
                )
            continue
        if task.entry.read is None:
            raise ConfigError(f"task={task.name} measures the training of a run alone. Give another task.")
        names = [None] if asked.data is None else list(names_of(config.data.name))
        columns = {} if config.data.own is None else asdict(config.data.own)
        with main_first():
            read = [item for name in names for item in task.entry.read(Source(name, columns), task.own)]
        if not read:
            raise DataError(f"{asked.data or task.name} holds nothing that {task.name} could ask. Give other rows.")
        items[task.name] = read
    return items
