"""From the settings of a run to the LoraConfig of its adapter."""

from __future__ import annotations

from dataclasses import fields

from lorafa.config import LoraConfig
from lorafa.train.settings.init import start_fields, start_of
from lorafa.train.settings.run import RunConfig


def lora_config(config: RunConfig) -> LoraConfig:
    """The adapter's settings as the library takes them.

    Raises:
        ConfigError: a value is not allowed, or two contradict each other.
    """
    peft = {field.name: getattr(config.peft, field.name) for field in fields(config.peft)}
    of_the_run = {
        "task_type": "CAUSAL_LM",
        "revision": config.model.revision,
        "lora_dropout": _dropout(config),
        "init_seed": config.train.seed,
    }
    return LoraConfig(**peft | of_the_run | start_fields(config.init))


def _dropout(config: RunConfig) -> float:
    given = config.peft.lora_dropout
    if given is not None:
        return given
    start = start_of(config.init).initializer
    return 0.0 if start.moves_base and start.variant is None else 0.05
