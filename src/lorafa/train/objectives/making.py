"""What a run does for an objective of TRL before it trains: what is refused, and the rows it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lorafa.data.sources import OpenData
from lorafa.errors import ConfigError, DataError
from lorafa.models.kinds.entry import Kind
from lorafa.processes import world_size
from lorafa.train.objectives.needs import require_trl
from lorafa.train.objectives.work import require_plain_head
from lorafa.train.settings.init import start_of
from lorafa.train.settings.model import ModelConfig

if TYPE_CHECKING:
    from lorafa.train.objectives.rows import Rows
    from lorafa.train.settings.run import RunConfig


def check_objective(config: RunConfig) -> None:
    """Raises ConfigError where the objective cannot be trained here at all; nothing is loaded for that."""
    name, entry = config.objective.name, config.objective.entry
    if entry.is_own:
        return
    require_trl(name)
    if entry.require is not None:
        entry.require(config.objective.own)
    if torch.cuda.device_count() > 1:
        raise ConfigError(
            f"objective={name} trains on one GPU, and this process sees {torch.cuda.device_count()}, among which TRL "
            "would divide batches. Show it one: CUDA_VISIBLE_DEVICES=0."
        )
    if world_size() > 1:
        raise ConfigError(
            f"objective={name} trains in one process, and this is one of {world_size()}. Start it alone; train."
            "accumulation makes larger batches of several passes."
        )


def kind_wanted(settings: ModelConfig, config: RunConfig) -> ModelConfig:
    """The settings of the model with the kind that the objective needs where no model is of it by itself."""
    wanted = config.objective.entry.loads_as
    return settings if wanted is None else replace(settings, kind=wanted)


def check_model(kind: Kind, config: RunConfig) -> None:
    """Raises ConfigError for a model of a kind that the objective does not train, or a start that it has no loss for.
    """
    entry = config.objective.entry
    needs = start_of(config.init).initializer.needs
    if not entry.answers and (needs or config.init.ranks is not None) and config.peft.adapter is None:
        chosen = f"init.mode={config.init.mode}" if needs else f"init.ranks={config.init.ranks}"
        raise ConfigError(
            f"{chosen} reads what a model does with answers it learns, and objective={config.objective.name} "
            "learns none. Take a start that reads no rows, such as init=kaiming or init=pissa."
        )
    if kind.objective not in (None, config.objective.name):
        raise ConfigError(
            f"model.kind={kind.name} is trained by objective={kind.objective}, found objective="
            f"{config.objective.name}. Set that, or leave model.kind out."
        )
    if entry.kind is not None and kind.name != entry.kind:
        raise ConfigError(
            f"objective={config.objective.name} ({entry.words}) trains models of the kind {entry.kind}, and "
            f"{config.model.name} is {kind.words} (model.kind={kind.name}). Give another model, or take objective=sft."
        )


def make_rows(data: OpenData, tokenizer: Any, config: RunConfig) -> Rows | None:
    """The rows that the objective is trained on; None where the samples of the run are.

    Raises:
        DataError: as the functions of :mod:`lorafa.train.objectives.rows`.
    """
    entry = config.objective.entry
    if entry.rows is None:
        return None
    rows: Rows = _function(entry.rows)(data.selection, tokenizer, config)
    return rows


def check_rows(rows: Rows, model: Any, config: RunConfig, console: Console) -> None:
    """Say what was left out and cut, and that dropout is off.

    Raises:
        ConfigError: an adapter is where the objective's trainer would pass it by.
    """
    name, entry = config.objective.name, config.objective.entry
    if entry.reads_head:
        require_plain_head(model, name)
    for text in rows.said:
        console.print(f"[yellow]{text}[/yellow]", highlight=False)
    if config.peft.lora_dropout and not config.objective.dropout:
        console.print(
            f"Dropout is off: the adapter's file has lora_dropout={config.peft.lora_dropout:g}, and objective={name} "
            "trains without (objective.dropout).",
            highlight=False,
        )
    if config.train.group_by_length and not entry.by_length:
        console.print(
            f"Rows stay in their order: objective={name} does not group them by length (train.group_by_length).",
            highlight=False,
        )


def samples_of_pass(rows: Rows, config: RunConfig) -> int:
    """How many samples a pass over the rows trains.

    Raises:
        DataError: the rows do not fill a step.
    """
    passes = config.objective.entry.passes
    count = len(rows.train) if passes is None else passes(config.objective.own, config.train, len(rows.train))
    if not count:
        raise DataError(
            f"The {len(rows.train)} rows to train on do not fill one step of objective={config.objective.name}. Lower "
            "train.batch_size or train.accumulation, or give more rows."
        )
    return count


def measured(model: Any, tokenizer: Any, rows: Rows, config: RunConfig) -> Mapping[str, float]:
    """What the objective measures on held-out rows, by name."""
    entry = config.objective.entry
    if entry.measure is None or not rows.heldout:
        return {}
    found: Mapping[str, float] = _function(entry.measure)(model, tokenizer, rows.heldout, config)
    return found


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
