"""What transformers' own ``load_adapter`` asks PEFT: how tensors and config of an older model become those of this one.

transformers converts checkpoints by renamings and by converters of tensors. For a file of an adapter both are taken
over: single experts of transformers 4 become stacks, as in :mod:`lorafa.io.layouts.experts_stacked`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.adapter import scaling
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.io.layouts import as_peft
from lorafa.io.layouts.base import OWN_LAYER, A, B, Raw, block_diagonal, tidy
from lorafa.io.layouts.experts import EXPERTS, ONE_EXPERT, STACKS
from lorafa.io.layouts.names import BaseNames
from lorafa.io.layouts.written import stored_stack_A, stored_stack_B
from lorafa.io.peft_format import named_as_in_files
from lorafa.surgery.patterns import numbers_of
from lorafa.surgery.walk import PREFIX, user_model

_BARE = ("lora_magnitude_vector", "lora_diag", "lora_core")
"""Tensors that files call by their holder alone, where the model has ``.weight`` behind it."""
_STACKED = ("gate_up_proj", "down_proj")
"""Parameters in the order of their module: the adapter of the first is inside that of the second."""


class _Stacked:
    """A converter's operation: a factor of each expert's layers -> that of the stack, as files have it."""

    supports_many_to_many = False

    def __init__(self, factor: str) -> None:
        self.factor = factor

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """One matrix for the target, out of a list over the experts for each source.

        Raises:
            ConfigError: layers that are rows of one parameter do not all have an adapter.
        """
        absent = [pattern for pattern in source_patterns if pattern not in input_dict]
        if absent:
            raise ConfigError(
                f"{target_patterns[0]} holds the rows of several layers, and the file has no adapter on "
                f"{', '.join(absent)}. Load it by PeftModel.from_pretrained, which fills in zeros."
            )
        listed = [input_dict.pop(pattern) for pattern in source_patterns]
        by_expert = zip(*listed, strict=True)
        if self.factor == A:
            made = stored_stack_A(torch.stack([torch.cat(parts) for parts in by_expert]))
        else:
            made = stored_stack_B(torch.stack([block_diagonal(parts) for parts in by_expert]))
        return {target_patterns[0]: made}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.factor})"


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: LoraConfig | None = None
) -> list[Any]:
    """The renamings and converters of a model's checkpoints, for the files of an adapter.

    Args:
        weight_conversions: transformers' ``WeightRenaming`` and ``WeightConverter`` of the model.
        adapter_name: the name that the adapter has on the model.
        peft_config: that of the file, which says whether both stacks of a module are adapted.

    Returns:
        transformers' objects, in the order they are to be applied in.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    made: list[Any] = [WeightRenaming(rf"^{PREFIX}", "")]
    made += [WeightRenaming(rf"{holder}$", f"{holder}.weight") for holder in _BARE]
    made.append(WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"))
    for conversion in weight_conversions or ():
        if not isinstance(conversion, WeightConverter):
            made.append(conversion)
            continue
        parameter = next((name for name in _STACKED if _is_of(conversion, name)), None)
        if parameter is None:
            continue
        target = conversion.target_patterns[0].removesuffix(f".{parameter}")
        inside = parameter == _STACKED[0] and (peft_config is None or _has_both(peft_config))
        for factor in (A, B):
            kind = factor.partition(".")[0]
            made.append(
                conversion.copy(
                    [f"{pattern.rpartition('.')[0]}.{kind}.{adapter_name}.weight" for pattern in _sources(conversion)],
                    [f"{target}{OWN_LAYER if inside else ''}.{kind}.{adapter_name}.weight"],
                    operations=[_Stacked(factor)],
                )
            )
    return made


def _is_of(conversion: Any, parameter: str) -> bool:
    """Whether a converter makes a stack out of single experts."""
    (target, *others), sources = conversion.target_patterns, _sources(conversion)
    return not others and target.endswith(f".{parameter}") and all("*" in source for source in sources)


def _sources(conversion: Any) -> list[str]:
    return [pattern.removesuffix("$") for pattern in conversion.source_patterns]


def _has_both(config: LoraConfig) -> bool:
    wanted = {*_listed(config.target_modules), *(config.target_parameters or ())}
    leaves = {name.rpartition(".")[2] for name in wanted}
    return isinstance(config.target_modules, str) or bool(
        leaves & {_STACKED[1], *(leaf for group in STACKS[_STACKED[1]] for leaf in group)}
    )


def _listed(wanted: Any) -> list[str]:
    return [] if wanted is None or isinstance(wanted, str) else list(wanted)


def convert_peft_config_for_transformers(
    peft_config: LoraConfig, model: nn.Module, conversions: Sequence[Any] | None = None
) -> None:
    """Change a config that names layers of experts of transformers 4 to name the stacks that this model has.

    Args:
        conversions: PEFT's; the names in the model tell by themselves.

    Raises:
        ConfigError: of layers that are rows of one parameter it names some alone.
    """
    converted = on_stacks(peft_config, model)
    for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(peft_config, field, getattr(converted, field))


def on_stacks(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config with stacks of experts in the place of single layers that the model does not have.

    The rank of a stack is the sum of those of its layers, and its scaling theirs.

    Raises:
        ConfigError: of layers that are rows of one parameter it names some alone.
    """
    targets = _listed(config.target_modules)
    stacks = _stacks(model)
    if not targets or not stacks:
        return config
    names = [name for name, _ in model.named_modules()]
    modules = {name.rpartition(".")[2] for name in names}
    single = {match[3] for name in names if (match := ONE_EXPERT.match(name))}
    leaves = {target.rpartition(".")[2] for target in targets}
    ranks, alphas, parameters, gone = {}, {}, list(config.target_parameters or ()), set[str]()
    for parameter in stacks:
        group = next((one for one in STACKS[parameter] if leaves & set(one) - single), None)
        if group is None or parameter in parameters:
            continue
        if missing := [leaf for leaf in group if leaf not in leaves]:
            raise ConfigError(
                f"target_modules names {', '.join(sorted(leaves & set(group)))} without {', '.join(missing)}, and "
                f"both are rows of {parameter} in this model. Load the adapter by PeftModel.from_pretrained, which "
                "fills in zeros, or name both."
            )
        rank, alpha = numbers_of(config, next(t for t in targets if t.rpartition(".")[2] in group))
        wanted = scaling(rank, alpha, config.use_rslora)
        parameters.append(parameter)
        ranks[parameter] = rank * len(group)
        alphas[parameter] = tidy(wanted / scaling(ranks[parameter], 1, config.use_rslora))
        gone |= set(group) - modules
    if not ranks:
        return config
    return replace(
        config,
        target_modules=[target for target in targets if target.rpartition(".")[2] not in gone],
        target_parameters=parameters,
        rank_pattern={**config.rank_pattern, **ranks},
        alpha_pattern={**config.alpha_pattern, **alphas},
    )


def _stacks(model: nn.Module) -> list[str]:
    """The names of the stacked parameters of experts that the model has."""
    found = (name.split(".")[-2:] for name, parameter in model.named_parameters() if parameter.dim() == 3)
    names = {parts[1] for parts in found if len(parts) == 2 and EXPERTS.search(parts[0])}
    return [parameter for parameter in _STACKED if parameter in names]


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """The tensors of an adapter by PEFT's names in files, for the layers of a model; as they are where they fit.

    Raises:
        CheckpointError: they belong to a model that cannot be brought to this one.
    """
    inner = user_model(model)
    tensors = named_as_in_files(inner, adapter_name, adapter_state_dict)
    raw = Raw(Path("The state dict"), {}, peft_config, tensors, {})
    converted = as_peft(raw, BaseNames(inner))
    return {PREFIX + key: tensor for key, tensor in (tensors if converted is None else converted[1]).items()}
