"""From the settings of a run to the LoraConfig of its adapter."""

from __future__ import annotations

from lorafa.config import LoraConfig
from lorafa.train.init_config import start_fields, start_of
from lorafa.train.schema import RunConfig


def lora_config(config: RunConfig) -> LoraConfig:
    """The adapter's settings as the library takes them.

    Raises:
        ConfigError: a value is not allowed, or two contradict each other.
    """
    peft = config.peft
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=_dropout(config),
        target_modules=peft.target_modules,
        exclude_modules=peft.exclude_modules,
        layers_to_transform=peft.layers_to_transform,
        layers_pattern=peft.layers_pattern,
        rank_pattern=dict(peft.rank_pattern),
        alpha_pattern=dict(peft.alpha_pattern),
        use_rslora=peft.use_rslora,
        use_dora=peft.use_dora,
        bias=peft.bias,
        lora_bias=peft.lora_bias,
        freeze_A=peft.freeze_A,
        modules_to_save=peft.modules_to_save,
        target_parameters=peft.target_parameters,
        init_seed=config.train.seed,
        **start_fields(config.init),
    )


def _dropout(config: RunConfig) -> float:
    given = config.peft.lora_dropout
    if given is not None:
        return given
    start = start_of(config.init).initializer
    return 0.0 if start.moves_base and start.variant is None else 0.05
