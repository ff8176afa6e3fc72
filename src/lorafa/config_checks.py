"""Which values a LoraConfig may have, field by field and together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorafa.checks import (
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_regex,
    check_text,
    found,
    indices,
    is_int,
    names,
)
from lorafa.errors import ConfigError
from lorafa.initializers import Start
from lorafa.method_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, from_nested
from lorafa.variants import variant_of

if TYPE_CHECKING:
    from lorafa.config import LoraConfig

BIASES = ("none", "all", "lora_only")
SETTINGS_OF_PEFT: Mapping[str, type[Any]] = {
    "loftq_config": LoftQConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
}
"""The nested configs of starts that PEFT has, each called after its start, and their classes."""
START_SETTINGS = (*SETTINGS_OF_PEFT, "init_config")
"""Those, and the one for all other starts."""
NO_SETTINGS: Mapping[str, Any] = {name: {} if name == "loftq_config" else None for name in START_SETTINGS}
"""The value of each of them that says nothing."""
FLAGS = (
    "inference_mode",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
    "attention_out_proj_twice",
    "freeze_A",
)


def settings_field(start: Start) -> str | None:
    """The field of LoraConfig with the settings of a start, None where it has none."""
    declared = start.initializer.settings
    own = declared if isinstance(declared, str) else f"{start.name}_config"
    if own in START_SETTINGS:
        return own
    return "init_config" if declared else None


def settings_class(start: Start) -> type[Any] | None:
    """The dataclass of a start's settings, None where it has none or takes any."""
    declared = start.initializer.settings
    return SETTINGS_OF_PEFT.get(settings_field(start) or "") or (declared if isinstance(declared, type) else None)


def check_config(config: LoraConfig) -> None:
    """Raises ConfigError for the first value that is not allowed."""
    _check_fields(config)
    _check_targets(config)
    _check_start(config)
    if config.use_dora and config.megatron_config:
        raise ConfigError("use_dora does not work on Megatron's layers. Drop megatron_config or set use_dora=False.")
    variant = variant_of(config)
    if config.lora_bias and not variant.takes_bias:
        asked = variant.switch or "init_lora_weights"
        raise ConfigError(f"lora_bias=True does not work with {asked}={getattr(config, asked)!r}. Drop one of the two.")


def _check_fields(config: LoraConfig) -> None:
    for name in FLAGS:
        check_flag(name, getattr(config, name))
    for name in ("peft_version", "base_model_name_or_path", "revision", "megatron_core"):
        check_text(name, getattr(config, name))
    for name in ("auto_mapping", "megatron_config"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name} must be a dict or None, found {found(value)}. Drop it or pass a dict.")
    check_int("r", config.r, at_least=1)
    check_int("qalora_group_size", config.qalora_group_size, at_least=1)
    check_number("lora_alpha", config.lora_alpha, "a number > 0", 0)
    check_number("lora_dropout", config.lora_dropout, "a probability in [0, 1)", 0, 1, closed="[")
    check_choice("bias", config.bias, BIASES)
    if config.init_seed is not None:
        check_int("init_seed", config.init_seed, at_least=0)
    tokens = config.alora_invocation_tokens
    if tokens is not None and not (isinstance(tokens, list) and all(is_int(token) and token >= 0 for token in tokens)):
        raise ConfigError(
            f"alora_invocation_tokens must be a list of token ids, found {found(tokens)}. Tokenize the text."
        )


def _check_targets(config: LoraConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        pattern = getattr(config, name)
        if isinstance(pattern, str):
            check_regex(name, pattern)
    for key, rank in config.rank_pattern.items():
        check_regex("rank_pattern", key)
        check_int(f"rank_pattern[{key!r}]", rank, at_least=1)
    for key, alpha in config.alpha_pattern.items():
        check_regex("alpha_pattern", key)
        check_number(f"alpha_pattern[{key!r}]", alpha, "a number > 0", 0)
    _check_layers(config)
    tokens = config.trainable_token_indices
    if tokens is not None:
        for name, rows in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
            indices("trainable_token_indices" + (f"[{name!r}]" if name else ""), rows)


def _check_layers(config: LoraConfig) -> None:
    if is_int(config.layers_to_transform):
        check_int("layers_to_transform", config.layers_to_transform, at_least=0)
    elif config.layers_to_transform is not None:
        indices("layers_to_transform", config.layers_to_transform)
    if config.layers_pattern is not None and not isinstance(config.layers_pattern, str):
        names("layers_pattern", config.layers_pattern)
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) not in (None, []):
            raise ConfigError(
                f"{name} needs a list of target_modules, found the text {config.target_modules!r}. Pass a list such "
                f"as ['q_proj', 'v_proj'], or put the layer numbers into the regular expression and drop {name}."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            f"layers_pattern={config.layers_pattern!r} says which list to count in, but layers_to_transform, which "
            "says what to pick, is None. Set layers_to_transform or drop layers_pattern."
        )


def _check_start(config: LoraConfig) -> None:
    start = config.start
    _check_settings(config, start)
    if config.freeze_A and start.initializer.trains == "A":
        raise ConfigError(
            f"freeze_A=True leaves nothing to train: init_lora_weights={start.value!r} trains A alone. Drop one of the "
            "two."
        )
    check_rank = start.initializer.check_rank
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()}
    for name, rank in ranks.items():
        if check_rank is not None:
            check_rank(rank, f"{name}={rank}")


def _check_settings(config: LoraConfig, start: Start) -> None:
    own = settings_field(start)
    for name in START_SETTINGS:
        if getattr(config, name) and name != own:
            owner = name.removesuffix("_config")
            instead = f"Set init_lora_weights={owner!r} or drop" if owner != "init" else "Drop"
            raise ConfigError(
                f"{name} is set but would be ignored: init_lora_weights is {start.value!r}. {instead} {name}."
            )
    if own == "loftq_config" and not config.loftq_config:
        raise ConfigError("init_lora_weights='loftq' needs loftq_config. Pass loftq_config=LoftQConfig(loftq_bits=4).")
    kind = settings_class(start)
    if own == "init_config" and kind is not None:
        from_nested(kind, config.init_config, own)
