"""Exchange the values of an adapter for those of another one in place: PEFT's ``hotswap_adapter``."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, CheckpointError, ConfigError
from lorafa.io.adapter_files import check_fits_base
from lorafa.io.load import fitting, read
from lorafa.io.peft_format import has_start, load_tensors, named_as_in_files
from lorafa.io.state import parts_of
from lorafa.settings.checks import check_arguments
from lorafa.storage.hub import HubOptions
from lorafa.surgery.activate import require_adapters, require_unmerged
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.doubled import doubled
from lorafa.surgery.given import lora_config
from lorafa.surgery.hotswap import plan_swap
from lorafa.surgery.walk import lora_layers, places, require_module, uncompiled

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SwapOptions(HubOptions, total=False):
    """What may be said besides when an adapter is exchanged; they are those of :class:`lorafa.io.load.LoadOptions`."""

    subfolder: str | None
    allow_pickle: bool
    use_safetensors: bool | None
    ignore_base_mismatch: bool


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **options: Unpack[SwapOptions],
) -> None:
    """Put a saved adapter in the place of one that is on the model: other values and numbers, the same tensors.

    Values go into the tensors that are there, so that compiled code goes on; after
    :func:`lorafa.prepare_model_for_compiled_hotswap` with another rank or scaling, too. The adapter keeps its name,
    what is trained of it and whether it counts. Where the new one leaves a layer out, the adapter changes nothing there
    from then on, and its files leave the layer out.

    Args:
        model: a PeftModel or a model with injected adapters, compiled or not.
        model_name_or_path: folder or Hub repository of the new adapter.
        adapter_name: the adapter on the model.
        torch_device: not read: values go where the tensors are.
        key_mapping: regular expression -> replacement, applied to every key of the file in turn.
        options: see :class:`SwapOptions`.

    Raises:
        SourceError, CheckpointError: the new one cannot be found or read, or its tensors do not fit.
        ConfigError: its config does not go with that of the adapter (:func:`lorafa.check_hotswap_configs_compatible`).
        TargetError: it is on layers that the adapter is not on.
        AdapterError: no such adapter, it is merged, or the new one's rank has no room.

    After any of them the model is as it was.
    """
    check_arguments("hotswap_adapter", options, SwapOptions.__optional_keys__)
    inner, configs, _ = parts_of(uncompiled(require_module(model)))
    _require_free(inner, adapter_name)
    stored = read(
        model_name_or_path, "hotswap_adapter", inner, is_trainable=False, key_mapping=key_mapping, **options  # type: ignore[misc]
    )
    if not options.get("ignore_base_mismatch"):
        check_fits_base(inner, list(places(inner)), stored)
    _exchange(
        inner, configs, adapter_name, stored.config, stored.tensors, with_start=stored.with_start, path=stored.path
    )
    for key, layer in layers_alone(inner, adapter_name) if stored.fallbacks else ():
        if key in stored.fallbacks:
            layer.adapters[adapter_name].fallback = stored.fallbacks[key]


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """:func:`hotswap_adapter` for tensors in memory.

    Args:
        state_dict: all tensors of the new adapter, by the names they have in a file or on the model (with the adapter's
            name in them, as PEFT has them here).
        config: that of the new adapter.
        parameter_prefix: what names of an adapter's tensors begin with; ``"lora_"``, another one is refused.

    Raises:
        CheckpointError, ConfigError, TargetError, AdapterError: as :func:`hotswap_adapter`; nothing was changed.
    """
    if parameter_prefix != "lora_":
        raise ConfigError(f"parameter_prefix is 'lora_' for adapters of LoRA, found {parameter_prefix!r}. Drop it.")
    inner, configs, _ = parts_of(uncompiled(require_module(model)))
    _require_free(inner, adapter_name)
    named = named_as_in_files(inner, adapter_name, state_dict)
    config = lora_config(config)
    starts = config.start.initializer.moves_base  # a state dict of ours has what was taken from the base
    _exchange(inner, configs, adapter_name, config, named, with_start=starts, path="The state dict")


def _require_free(model: nn.Module, name: str) -> None:
    require_adapters(model, [name])
    require_unmerged(model, name, "exchanging it")


def _exchange(
    model: nn.Module,
    configs: MutableMapping[str, LoraConfig],
    name: str,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    *,
    with_start: bool,
    path: str | Path,
) -> None:
    if config.start.initializer.moves_base and not with_start:
        raise CheckpointError(
            f"{path} holds A and B, and not what init_lora_weights={config.init_lora_weights!r} took from the base "
            "they were trained on. load_adapter computes it again; save it from there for hot-swapping. Nothing was "
            "changed."
        )
    has_one = has_start(model, name)
    if with_start and not has_one:
        config, with_start = _as_whole(model, name, config, path), False
    elif has_one and not with_start:
        raise AdapterError(
            f"Adapter {name!r} subtracts a frozen start, and the new one brings none. Call "
            "prepare_model_for_compiled_hotswap(model, target_rank=...) with twice its rank first, which makes plain "
            "LoRA of it. Nothing was changed."
        )
    config = replace(config, inference_mode=configs[name].inference_mode)
    swap = plan_swap(model, name, configs[name], config)
    with swap.trying():
        fits = fitting(model, name, swap.config, tensors, with_start=with_start, path=path)
        load_tensors(model, name, swap.config, fits, with_start=with_start)
    swap.finish()
    configs[name] = swap.config


def _as_whole(model: nn.Module, name: str, config: LoraConfig, path: str | Path) -> LoraConfig:
    """The config of a file that holds a frozen start, for its whole update as plain LoRA of rank 2 r.

    Raises:
        CheckpointError: under the formula of the adapter it is none.
    """
    variants = [layer.adapters[name].variant for _, layer in lora_layers(model) if name in layer.adapters]
    if not all(variant.stacks_start and variant.takes_empty_ranks for variant in variants):
        raise CheckpointError(
            f"{path} holds a frozen start under {variants[0].name}, and adapter {name!r} has none. Load it with "
            "load_adapter under a name of its own. Nothing was changed."
        )
    return doubled(config)
