"""What a kind of model can be asked: which evaluation a run measures, and which settings it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lorafa.errors import ConfigError
from lorafa.evals import EVALS
from lorafa.evals.entry import Evaluation
from lorafa.models.kinds.entry import NEXT_TOKEN, Kind
from lorafa.train.settings.run import EvalConfig, RunConfig


@dataclass(frozen=True)
class Chosen:
    """An evaluation with its settings."""

    name: str
    entry: Evaluation
    own: Any
    instead: str | None = None
    """The default that does not fit this kind of model, in whose place it is."""


def evaluation_of(settings: EvalConfig, kind: Kind) -> Chosen:
    """The evaluation of a run. Where the settings are those that hold when nothing is said, and a model of this kind
    cannot be asked that, it is what is usual for the kind.

    Raises:
        ConfigError: one is named that a model of this kind cannot be asked.
    """
    entry = EVALS.get(settings.name)
    if entry.needs <= kind.offers:
        return Chosen(settings.name, entry, settings.own)
    if settings.name == EvalConfig.name and settings.own == EvalConfig().own:
        usual = EVALS.get(kind.usual_eval)
        return Chosen(kind.usual_eval, usual, usual.settings and usual.settings(), settings.name)
    raise ConfigError(not_for(settings.name, kind))


def not_for(name: str, kind: Kind, *, of_run: bool = True) -> str:
    """Why an evaluation is none for a kind of model, in words, with those that are.

    Args:
        of_run: it is asked for in a training (``eval=``); False: in `lorafa eval` (``task=``).
    """
    why = f"{'eval' if of_run else 'task'}={name} asks what {kind.words} (model.kind={kind.name}) has no answer to."
    if fit := fitting(kind, of_run=of_run):
        return f"{why} Give one of: {', '.join(fit)}."
    return f"{why} Such models are measured by the run that trains them (objective={kind.objective}), before and after."


def fitting(kind: Kind, *, of_run: bool) -> list[str]:
    """The evaluations that a kind of model has an answer to: those that a training measures on the rows it holds out,
    or those that `lorafa eval` measures by their names."""
    entries = {name: EVALS.get(name) for name in EVALS.names()}
    return [
        name
        for name, entry in entries.items()
        if entry.needs <= kind.offers and (entry.of_run if of_run else entry.read is not None)
    ]


def check_kind(
    kind: Kind, new_modules: Sequence[str], evaluation: Chosen, config: RunConfig, console: Console
) -> None:
    """Say what is new in a model, and what is measured in the place of the default.

    Raises:
        ConfigError: a setting asks what a model of this kind cannot do.
    """
    if config.train.packing and not kind.packs:
        raise ConfigError(
            f"train.packing=true puts several samples into one row, and in a batch of {kind.words} (model.kind="
            f"{kind.name}) each has its own. Leave it out; train.group_by_length pads little, too."
        )
    if config.eval.forgetting and NEXT_TOKEN not in kind.offers:
        raise ConfigError(
            f"eval.forgetting=true compares the next token of texts that the base writes, which {kind.words} "
            f"(model.kind={kind.name}) has not. Leave it out."
        )
    if new_modules and config.peft.adapter is None:  # which brings its own
        console.print(
            f"New in {kind.words}, since its files lack them: {', '.join(new_modules)}. They start at random, by "
            "train.seed, and are trained and saved with the adapter.",
            highlight=False,
        )
    if evaluation.instead is not None:
        console.print(
            f"Measured by eval={evaluation.name}: eval={evaluation.instead}, the default, asks what {kind.words} has "
            "no answer to.",
            highlight=False,
        )
