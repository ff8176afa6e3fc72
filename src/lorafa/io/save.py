"""Adapters written to disk: PEFT's two files, with lorafa's own entry in a header, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafa.config import CONFIG_NAME, LORAFA_ONLY, LoraConfig
from lorafa.errors import ConfigError, shorten, warn
from lorafa.io.base_prints import base_fingerprint, fingerprinted, readable
from lorafa.io.belonging import tied
from lorafa.io.card import README, card_of
from lorafa.io.file_config import file_config
from lorafa.io.find import WEIGHTS_NAME
from lorafa.io.own_entry import changed_fields
from lorafa.io.peft_format import PREFIX, file_tensors, has_start
from lorafa.io.tables import which_tables
from lorafa.layers.base import LoraLayer
from lorafa.storage.fingerprint import fingerprint, to_metadata
from lorafa.storage.tensors import can_be_gathered, is_part, put_tensors, require_finite, require_values
from lorafa.storage.together import Together, written_together
from lorafa.storage.whole import json_text
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.walk import lora_layers, uncompiled
from lorafa.variants import variant_types
from lorafa.version import VERSION


def save_adapters(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
) -> None:
    """Write adapters, each with its config of ``configs``: "default" into ``directory`` itself, others below it.

    All of them take their places together, with a model card unless the folder has a README.md already. A process that
    is not the main one writes nothing, and only helps to gather what is sharded.

    Raises:
        CheckpointError: a tensor is missing, has no values or holds nan or inf, or a file could not be written; what
            was there before is as it was.
        ConfigError: a config was changed since the adapter was made, and would not be that of its tensors.
    """
    values = model.parameters() if state_dict is None else state_dict.values()
    if not is_main_process and not any(map(can_be_gathered, values)):
        return
    with written_together() as together:
        for name, config in configs.items():
            folder = Path(directory) / ("" if name == "default" else name)
            parts = _parts(model, name, config, state_dict, save_embedding_layers)
            if is_main_process:
                _stage(together, folder, *parts)
        if is_main_process:
            _stage_card(together, Path(directory), next(iter(configs.values())))


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], side: Mapping[str, Any], *, card: bool = False
) -> None:
    """Write the two files of an adapter, which take their places once both are written.

    Args:
        tensors: by their names in the user's model.
        side: what goes into the header of the tensors.
        card: write a model card too, unless the folder has a README.md already.

    Raises:
        CheckpointError: a tensor holds nan or inf, or a file could not be written; what was there before is as it was.
    """
    with written_together() as together:
        _stage(together, folder, config, tensors, side)
        if card:
            _stage_card(together, folder, config)


_Parts = tuple[LoraConfig, dict[str, Tensor], dict[str, Any]]
"""The config as it is written, the tensors, and what goes into their header."""


def _parts(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    state_dict: Mapping[str, Tensor] | None,
    save_embedding_layers: str | bool,
) -> _Parts:
    config = _of_trained(model, name, config)
    tables = which_tables(config, model, save_embedding_layers)
    tensors = file_tensors(model, name, config, state_dict=state_dict, tables=tables)
    written = replace(file_config(model, name, config), inference_mode=True)
    if written.task_type is None:
        kind = type(uncompiled(model))
        written.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return written, tensors, _side_entry(model, name, config, written, state_dict)


def _stage(
    together: Together, folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], side: Mapping[str, Any]
) -> None:
    require_values(folder / WEIGHTS_NAME, tensors)
    require_finite(folder / WEIGHTS_NAME, tensors)
    public = {field: value for field, value in config.to_dict().items() if field not in LORAFA_ONLY}
    stage = together.stage(folder, last=CONFIG_NAME)
    named = {PREFIX + key: value for key, value in tensors.items()}
    put_tensors(stage / WEIGHTS_NAME, named, to_metadata({**side, **tied(public)}))
    (stage / CONFIG_NAME).write_text(json_text(public), encoding="utf-8")


def _stage_card(together: Together, folder: Path, config: LoraConfig) -> None:
    if not (folder / README).exists():
        (together.stage(folder, last=CONFIG_NAME) / README).write_bytes(card_of(config).encode(errors="replace"))


def _of_trained(model: nn.Module, name: str, config: LoraConfig) -> LoraConfig:
    """The config as it is saved; raises ConfigError where it asks for another formula than the layers have."""
    config = config.of_trained()
    wanted = " under ".join(variant.name for variant in variant_types(config))
    chains = (layer.adapters[name].variant.chain() for _, layer in lora_layers(model) if name in layer.adapters)
    found = {" under ".join(type(one).name for one in reversed(chain)) for chain in chains}
    problem = ""
    if other := sorted(found - {wanted}):
        problem = f"that and its switches ask for {wanted}, and the layers compute {', '.join(other)}"
    elif config.start.initializer.moves_base and not has_start(model, name):
        problem = "such a start takes something out of the base, and the layers have taken nothing"
    if problem:
        raise ConfigError(
            f"The config of adapter {name!r} was changed to init_lora_weights={config.init_lora_weights!r} after it "
            f"was made: {problem}, so its file would be read as what it is not. Set the config back as it was."
        )
    return config


def _side_entry(
    model: nn.Module, name: str, config: LoraConfig, written: LoraConfig, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What a file says that PEFT does not read: fingerprints, the fields PEFT lacks, and those written otherwise.

    "start" and "config" hold the fields that the file's config has changed; "start" says that the tensors hold one.
    """
    side: dict[str, Any] = {"version": VERSION, "base": base_fingerprint(model, None, state_dict, adapter=name)}
    adapted = fingerprinted(model, name)
    if unread := [path for path, layer in adapted if side["base"][path] is None and _is_spread(layer)]:
        warn(
            f"The file of adapter {name!r} does not say which base weights {len(unread)} of its layers belong to: only "
            f"parts of them are in this process, and state_dict has not the rest: {shorten(unread, 3)}. Gather frozen "
            "weights too, and loading can check them."
        )
    original, moved = config.to_dict(), has_start(model, name)
    public = written.to_dict()
    if moved or any(public.get(field) != original.get(field) for field in changed_fields()):
        side["start" if moved else "config"] = {one: original[one] for one in changed_fields() if one in original}
    if own := {field: original[field] for field in LORAFA_ONLY if field in original}:
        side["own"] = own
    if fallbacks := {key: layer.fallbacks[name] for key, layer in layers_alone(model, name) if name in layer.fallbacks}:
        side["fallbacks"] = fallbacks
    if config.start.initializer.quantizer is not None:
        side["quantized"] = fingerprint((path, layer.base_weight()) for path, layer in adapted if layer.origin)
    return side


def _is_spread(layer: LoraLayer) -> bool:
    weight = readable(layer)
    return weight is not None and is_part(weight, 2)
