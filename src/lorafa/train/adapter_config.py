"""From the settings of a run to the LoraConfig of its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.entry import Kind
from lorafa.surgery.targets import takes_parameters
from lorafa.train.settings.init import start_fields, start_of
from lorafa.train.settings.run import RunConfig
from lorafa.variants import variant_types


def lora_config(
    config: RunConfig,
    model: nn.Module | None = None,
    rows: Mapping[str, list[int]] | None = None,
    kind: Kind = CAUSAL,
    new_modules: Sequence[str] = (),
) -> LoraConfig:
    """The adapter's settings as the library takes them; a dropout that was not set depends on the model's layers.

    Args:
        rows: of new tokens, by the name of their table: trained beside those that are asked for, unless the table is
            trained as a whole.

    Raises:
        ConfigError: a value is not allowed, two contradict each other, or there would be nothing to train.
    """
    names = [one.name for one in fields(config.peft) if one.name not in config.peft.in_its_place]
    peft = {name: getattr(config.peft, name) for name in names}
    of_the_run = {
        "task_type": kind.task_type,
        "revision": config.model.revision,
        "lora_dropout": _dropout(config),
        "init_seed": config.train.seed,
    }
    if new_modules:
        peft["modules_to_save"] = list(dict.fromkeys([*(config.peft.modules_to_save or ()), *new_modules]))
    whole = tuple(f".{name}" for name in config.peft.modules_to_save or ())
    if rows := {name: new for name, new in (rows or {}).items() if not f".{name}".endswith(whole)}:
        peft["trainable_token_indices"] = _together(config.peft.trainable_token_indices, rows)
    made = LoraConfig(**peft | of_the_run | start_fields(config.init))
    _require_own_update(made)
    if model is None or config.peft.lora_dropout is not None or not takes_parameters(model, made):
        return made
    return replace(made, lora_dropout=0.0)


def _together(asked: list[int] | dict[str, list[int]] | None, rows: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Rows that are asked for, of the embedding where no table is named, and those of new tokens."""
    embedding = next(iter(rows))
    by_name = asked if isinstance(asked, dict) else {embedding: asked or []}
    short = {name: full for full in rows for name in (full, full.rpartition(".")[2])}
    together = {full: list(new) for full, new in rows.items()}
    for name, indices in by_name.items():
        full = short.get(name, name)
        together[full] = sorted({*together.get(full, []), *indices})
    return together


def _require_own_update(config: LoraConfig) -> None:
    """Raises ConfigError where the formula is about other adapters: the model of a run has one."""
    for variant in variant_types(config):
        if not variant.has_own_update:
            raise ConfigError(
                f"peft.{variant.switch} asks for {variant.name}, which routes to other adapters and has no update of "
                "its own, and a run trains one adapter. Leave it out, train the adapters one by one, and put "
                f"{variant.name} over them in Python."
            )


def _dropout(config: RunConfig) -> float:
    given = config.peft.lora_dropout
    if given is not None:
        return given
    if not config.objective.entry.is_own and not config.objective.dropout:
        return 0.0
    start = start_of(config.init).initializer
    return 0.0 if start.moves_base and start.variant is None else 0.05
