"""The config of a combination of adapters: plain LoRA on the layers that any of them is on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError
from lorafa.surgery.patterns import any_of, exactly

Numbers = Mapping[str, tuple[int, float]]
"""Full name of a layer, or of a parameter -> rank and alpha."""
_WHERE = ("exclude_modules", "layers_to_transform", "layers_pattern")


def combined_config(
    configs: Mapping[str, LoraConfig], modules: Numbers, parameters: Numbers, *, lora_bias: bool
) -> LoraConfig:
    """The config of an adapter with these ranks and alphas on these layers, of a start that reads nothing.

    Args:
        configs: by adapter.
        modules, parameters: what the result is on.
        lora_bias: whether B has a bias.

    Raises:
        AdapterError: an adapter trains the base's biases, their layers are replicated in different ways, or more than
            one trains rows of an embedding.
    """
    listed = list(configs.values())
    _require_one_base(configs)
    (rank, alpha), _ = Counter([*modules.values(), *parameters.values()]).most_common(1)[0]
    every = {**modules, **parameters}
    saved = list(dict.fromkeys(name for config in listed for name in config.modules_to_save or ())) or None
    tokens = [config.trainable_token_indices for config in listed if config.trainable_token_indices is not None]
    return LoraConfig(
        task_type=_task_type(listed),
        base_model_name_or_path=next((c.base_model_name_or_path for c in listed if c.base_model_name_or_path), None),
        revision=listed[0].revision,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={exactly(name): r for name, (r, _) in every.items() if r != rank},
        alpha_pattern={exactly(name): a for name, (_, a) in every.items() if a != alpha},
        **_targets(listed, modules, parameters, saved),
        fan_in_fan_out=any(config.fan_in_fan_out for config in listed),
        modules_to_save=saved,
        trainable_token_indices=tokens[0] if tokens else None,
        layer_replication=listed[0].layer_replication,
        lora_bias=lora_bias,
        ensure_weight_tying=all(config.ensure_weight_tying for config in listed),
    )


def _require_one_base(configs: Mapping[str, LoraConfig]) -> None:
    """Raises AdapterError for what belongs to the base as one adapter has it, and to no combination."""
    for name, config in configs.items():
        if config.bias != "none":
            raise AdapterError(
                f"Adapter {name!r} trains biases of the base (bias={config.bias!r}), of which there is one set: they "
                "are no part of an update that could be weighted. Combine adapters with bias='none'. Nothing was "
                "changed."
            )
    replicated = [config.layer_replication for config in configs.values()]
    if any(ranges != replicated[0] for ranges in replicated):
        raise AdapterError(
            "The adapters were made for layers replicated in different ways (layer_replication), so they are on "
            "different models. Combine those of one. Nothing was changed."
        )
    rows = [name for name, config in configs.items() if config.trainable_token_indices is not None]
    if len(rows) > 1:
        raise AdapterError(
            f"Adapters {rows[0]!r} and {rows[1]!r} both train rows of an embedding (trainable_token_indices), and rows "
            "are no update that could be added up. Combine adapters of which one at most has them. Nothing was changed."
        )


def _task_type(configs: Sequence[LoraConfig]) -> Any:
    """The one they share; else that of an adapter with heads that were trained in full."""
    kinds = list(dict.fromkeys(config.task_type for config in configs if config.task_type is not None))
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    return next((config.task_type for config in configs if config.modules_to_save), None)


def _targets(
    configs: Sequence[LoraConfig], modules: Numbers, parameters: Numbers, saved: list[str] | None
) -> dict[str, Any]:
    """The fields that say which layers are meant.

    Where all adapters choose theirs in one way, their names are put together; else every layer is named in full: what
    one excludes, another may be on.
    """
    alike = all(getattr(c, field) == getattr(configs[0], field) for c in configs for field in _WHERE)
    alike = alike and all((c.modules_to_save or None) == saved for c in configs)
    named = [name for c in configs for name in c.target_parameters or ()]
    if alike and (wanted := _together(configs)) is not None:
        where = {field: getattr(configs[0], field) for field in _WHERE}
        return where | {"target_modules": wanted, "target_parameters": list(dict.fromkeys(named)) or None}
    return {
        "target_modules": any_of(modules) if modules else [],
        "target_parameters": sorted(parameters) or None,
    }


def _together(configs: Sequence[LoraConfig]) -> set[str] | str | None:
    """Their ``target_modules`` as one value; None where they are names and expressions, or one leaves it open."""
    wanted = [config.target_modules for config in configs]
    if all(isinstance(names, str) for names in wanted):
        expressions = list(dict.fromkeys(str(text) for text in wanted))
        return expressions[0] if len(expressions) == 1 else "|".join(f"(?:{text})" for text in expressions)
    if any(isinstance(names, str) or names is None for names in wanted):
        return None
    return {name for names in wanted for name in names or ()}
