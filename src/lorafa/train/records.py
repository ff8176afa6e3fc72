"""The records of a run: found before its model is loaded, made samples, and shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.panel import Panel

from lorafa.data.classes import class_of
from lorafa.data.encoding import CHAT, Encoding
from lorafa.data.prepared import Progress, SampleSet, is_cached, prepare_samples
from lorafa.data.rows import ANSWERS, Reading
from lorafa.data.selection import Division
from lorafa.data.shares import names_of
from lorafa.data.sources import Choice, OpenData, open_data
from lorafa.errors import ConfigError
from lorafa.train.progress import progress_bar
from lorafa.train.settings.data import DataConfig

MANY = 10_000
"""Rows whose tokenizing takes long enough for a bar."""


def find_records(data: DataConfig, reading: Reading = ANSWERS) -> OpenData:
    """The records the settings name. They are read here already, unless the cache may have their tokens: so what is
    wrong with them is said before a model is loaded."""
    division = Division(data.train_size, data.eval_size, data.seed, None if data.weights is None else (*data.weights,))
    own = {} if data.own is None else asdict(data.own)
    choice = Choice(
        names=names_of(data.name), division=division, eval_file=data.eval_file, settings=own, reading=reading
    )
    found = open_data(choice)
    if not is_cached(found, data.cache):
        _ = found.selection
    return found


def answers_of(found: OpenData) -> list[str]:
    """The answers of the rows to train on, for models that choose among them.

    Raises:
        DataError: a row does not end with an answer.
    """
    return [class_of(record) for _, record in found.selection.training()]


def make_samples(
    found: OpenData, tokenizer: Any, data: DataConfig, console: Console, encoding: Encoding = CHAT
) -> SampleSet:
    """The samples of records, tokenized or from the cache.

    Raises:
        DataError: as :func:`lorafa.data.prepared.prepare_samples`.
        ConfigError: a chat template is named and writes none of them.
    """
    with _bar_of_rows(console, found.count()) as bar:
        samples = prepare_samples(found, tokenizer, data.max_length, data.cache, bar, encoding)
    if data.template is not None and not samples.templated:
        raise ConfigError(
            f"data.template={data.template} would change nothing: the records of {samples.source} are plain texts, "
            "which no chat template writes. Leave it out."
        )
    return samples


@contextmanager
def _bar_of_rows(console: Console, count: int) -> Iterator[Progress | None]:
    """A bar from the first rows that are tokenized on, where there are many; none for those that are in the cache."""
    with ExitStack() as begun:
        shown: list[Progress] = []

        def update(done: int, total: int) -> None:
            if not shown:
                shown.append(begun.enter_context(progress_bar(console, "Tokenizing")))
            shown[0](done, total)

        yield update if count >= MANY else None


def show_samples(
    data: SampleSet, tokenizer: Any, console: Console, encoding: Encoding = CHAT, *, learnt: bool = True
) -> None:
    """One sample, how much of the data is trained on, and what was left out.

    Args:
        learnt: whether the tokens of answers are what is learnt, one by one.
    """
    train, heldout = data.train, data.heldout
    first = train.samples[0]
    of_tokens = f"One sample: {first.trained} of {len(first.input_ids)} tokens are trained (green)"
    title = of_tokens if learnt else "One sample"
    share = f"; {data.trained / data.tokens:.1%} of the training tokens are trained" if learnt else ""
    console.print(Panel(encoding.shown(first, tokenizer), title=title, title_align="left"))
    console.print(
        f"{data.source}: {len(train.samples):,} samples to train on, {len(heldout.samples):,} held out{share}.",
        highlight=False,
        markup=False,
    )
    if data.found is not None:
        console.print(f"Their tokens were in the cache: {data.found}", highlight=False, markup=False, soft_wrap=True)
    if not heldout.samples:
        console.print("No rows are held out: nothing is measured before and after.")
    left_out = {
        "answer a question of a held-out row and were left out": data.repeated,
        "have no answer within data.max_length and were left out": train.dropped + heldout.dropped,
        "were cut at data.max_length": train.truncated + heldout.truncated,
    }
    for what, count in left_out.items():
        if count:
            console.print(f"[yellow]{count:,} samples {what}.[/yellow]", highlight=False)
