"""Adapters on disk: PEFT's two files, with lorafa's own entry in a header, checked in both directions when read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.offload import in_memory
from lorafa.config import CONFIG_NAME, LORAFA_ONLY, LoraConfig, read_config
from lorafa.errors import CheckpointError, ConfigError, shorten, warn
from lorafa.initializers.settings import START_SETTINGS
from lorafa.io.card import write_card
from lorafa.io.file_config import file_config
from lorafa.io.find import WEIGHTS_NAME, find_adapter_files
from lorafa.io.key_names import renamed
from lorafa.io.layouts import of_others
from lorafa.io.layouts.base import Raw
from lorafa.io.own_entry import own_entry
from lorafa.io.peft_format import PREFIX, file_tensors, has_start, in_state, pristine_tensors, without_prefix
from lorafa.io.strict import require_floats
from lorafa.io.tables import which_tables
from lorafa.layers.base import LoraLayer
from lorafa.storage.fingerprint import check_base, compare_fingerprints, fingerprint, to_metadata
from lorafa.storage.hub import HubOptions
from lorafa.storage.tensors import (
    can_be_gathered,
    is_part,
    read_header,
    read_tensors,
    require_values,
    whole,
    write_tensors,
)
from lorafa.storage.whole import make_folder, read_json, staged, write_json
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.available import require_available
from lorafa.surgery.walk import Place, hosts, lora_layers, places, pristine_of, uncompiled
from lorafa.variants import switches, variant_types
from lorafa.version import VERSION

if TYPE_CHECKING:
    from typing_extensions import Unpack

Convert = Callable[[Raw], "tuple[LoraConfig, dict[str, Tensor]] | None"]
"""Makes config and tensors of a file that is in another layout, or for other layers; None: it is as it should be."""
_CHANGED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", *START_SETTINGS)


def _changed() -> tuple[str, ...]:
    """Fields that the config in a file may have otherwise than the adapter's own."""
    return (*_CHANGED, *switches())


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from disk; no model has been touched."""

    path: Path
    """The file of tensors."""
    config: LoraConfig
    """The config the adapter was made from."""
    tensors: dict[str, Tensor]
    """Tensors by key, without the ``base_model.model.`` prefix."""
    base: dict[str, Any]
    """Fingerprint of the base it was made for; empty for files of other libraries."""
    fallbacks: dict[str, str]
    """Layer -> why it started as by default instead of as the config says."""
    with_start: bool
    """Whether the tensors include a frozen start A0, B0 (:func:`lorafa.io.peft_format.file_tensors`)."""
    quantized: dict[str, Any]
    """Fingerprint of the dequantized weight of every layer that the start has quantized."""


def base_fingerprint(
    model: nn.Module,
    names: Iterable[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    everything: Iterable[Place] | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Fingerprint of the pristine weights of the layers that carry ``adapter``, or of the layers called ``names``.

    Where neither is given it is that of all adapted layers. ``everything`` is every place of the model, where the
    caller knows them.

    A weight of which only a part is here is gathered by all processes, or taken from ``state_dict`` where that is
    given. Where neither gives all of it, it is recorded as not readable: a part is no description of the whole.
    """
    modules: Mapping[str, nn.Module]
    if names is None:
        modules = dict(_fingerprinted(model, adapter))
    else:
        wanted = set(names)
        everything = places(model) if everything is None else everything
        modules = {place.name: place.module for place in everything if place.name in wanted}
    origins = {name: m.origin for name, m in modules.items() if isinstance(m, LoraLayer) and m.origin is not None}
    weights = {name: _readable(module) for name, module in modules.items()}
    parts = {name: weight for name, weight in weights.items() if weight is not None and is_part(weight, 2)}
    if parts and state_dict is not None:
        live = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {name: in_state(state_dict, live.get(id(weight), "")) for name, weight in parts.items()}
        weights |= {name: None if weight is None else whole(weight, 2) for name, weight in found.items()}
    else:
        weights |= {name: whole(weight, 2) for name, weight in parts.items()}
    return fingerprint(weights.items()) | origins


def _fingerprinted(model: nn.Module, adapter: str | None = None) -> list[tuple[str, LoraLayer]]:
    """The layers that carry an adapter, by the names of their modules; of several on one module the last."""
    layers = lora_layers(model) if adapter is None else layers_alone(model, adapter)
    by_module = {id(pristine_of(place.module)): place.name for place in reversed(list(places(model)))}
    named = {by_module[id(layer.pristine)]: layer for _, layer in layers if id(layer.pristine) in by_module}
    return list(named.items())


def _readable(module: nn.Module) -> Tensor | None:
    """The dense weight of a layer as it is stored, wherever it rests, or None."""
    base = in_memory(pristine_of(module))
    backend, weight = backend_of(base), getattr(base, "weight", None)
    if backend is not None and backend.quantized:  # its codes may be stored as if they were numbers
        return None
    if isinstance(module, LoraLayer) and module.nests:  # a merged parameter is in the module itself
        weight = pristine_tensors(hosts(module)).get(id(weight), weight)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta else None


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

    A process that is not the main one writes nothing, and only helps to gather what is sharded.

    Raises:
        As :func:`save_adapter`.
    """
    values = model.parameters() if state_dict is None else state_dict.values()
    if not is_main_process and not any(map(can_be_gathered, values)):
        return
    for name, config in configs.items():
        folder = Path(directory) / ("" if name == "default" else name)
        save_adapter(
            model, name, config, folder, state_dict=state_dict, save_embedding_layers=save_embedding_layers,
            writes=is_main_process,
        )  # fmt: skip
    if is_main_process:
        write_card(directory, next(iter(configs.values())))


def save_adapter(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
    writes: bool = True,
) -> Path:
    """Write one adapter into ``directory``, each file whole or not at all, and return the directory.

    Raises:
        CheckpointError: a tensor is missing or has no values, or a file could not be written; what was there before is
            as it was.
        ConfigError: the config was changed since the adapter was made, and would not be that of its tensors.
    """
    folder, config = Path(directory), _of_trained(model, name, config)
    tables = which_tables(config, model, save_embedding_layers)
    tensors = file_tensors(model, name, config, state_dict=state_dict, tables=tables)
    written = replace(file_config(model, name, config), inference_mode=True)
    if written.task_type is None:
        kind = type(uncompiled(model))
        written.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    side = _side_entry(model, name, config, written, state_dict)
    require_values(folder / WEIGHTS_NAME, tensors)
    if writes:
        write_adapter(folder, written, tensors, side)
    return folder


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], side: Mapping[str, Any]) -> None:
    """Write the two files of an adapter, which take their places once both are written.

    Args:
        tensors: by their names in the user's model.
        side: what goes into the header of the tensors.

    Raises:
        CheckpointError: a file could not be written; what was there before is as it was.
    """
    public = {field: value for field, value in config.to_dict().items() if field not in LORAFA_ONLY}
    with staged(make_folder(folder)) as stage:
        write_tensors(stage / WEIGHTS_NAME, {PREFIX + key: value for key, value in tensors.items()}, to_metadata(side))
        write_json(stage / CONFIG_NAME, public)


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
    adapted = _fingerprinted(model, name)
    if unread := [path for path, layer in adapted if side["base"][path] is None and _is_spread(layer)]:
        warn(
            f"The file of adapter {name!r} does not say which base weights {len(unread)} of its layers belong to: only "
            f"parts of them are in this process, and state_dict has not the rest: {shorten(unread, 3)}. Gather frozen "
            "weights too, and loading can check them."
        )
    original, moved = config.to_dict(), has_start(model, name)
    public = written.to_dict()
    if moved or any(public.get(field) != original.get(field) for field in _changed()):
        side["start" if moved else "config"] = {field: original[field] for field in _changed() if field in original}
    if own := {field: original[field] for field in LORAFA_ONLY if field in original}:
        side["own"] = own
    if fallbacks := {key: layer.fallbacks[name] for key, layer in layers_alone(model, name) if name in layer.fallbacks}:
        side["fallbacks"] = fallbacks
    if config.start.initializer.quantizer is not None:
        side["quantized"] = fingerprint((path, layer.base_weight()) for path, layer in adapted if layer.origin)
    return side


def _is_spread(layer: LoraLayer) -> bool:
    weight = _readable(layer)
    return weight is not None and is_part(weight, 2)


def read_adapter(
    source: str | Path,
    *,
    subfolder: str | None = None,
    config: LoraConfig | None = None,
    allow_pickle: bool = False,
    use_safetensors: bool | None = None,
    weight_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    inference_mode: bool = True,
    convert: Convert = of_others,
    **hub: Unpack[HubOptions],
) -> StoredAdapter:
    """Read an adapter from a folder or the Hub, the config first; nothing of any model is touched.

    Args:
        config: use this config instead of the stored one.
        inference_mode: what the config says of it.
        allow_pickle: also read a ``.bin`` file (with ``weights_only=True``).
        use_safetensors: True reads no ``.bin`` file, False nothing else.
        weight_name: as for :func:`lorafa.io.find.find_adapter_files`.
        key_mapping: as for :func:`lorafa.io.key_names.renamed`.
        convert: makes of a file in the layout of another program, or for another version of the model, what PEFT
            would have for this one; None where there is nothing to do. By default PEFT's layout alone is read.

    Raises:
        SourceError: folder, repository or file missing, or the Hub cannot be reached.
        CheckpointError: the file is damaged, holds inf or nan, or is a pickle and ``allow_pickle`` is False.
        ConfigError, NotAvailableError: the stored config is not one lorafa can carry out.
        As ``convert``.
    """
    files = find_adapter_files(
        source, subfolder=subfolder, use_safetensors=use_safetensors, weight_name=weight_name, **hub
    )
    header = read_header(files.weights)
    side, given = own_entry(files.weights, header), config
    values = {} if files.config is None else read_json(files.config)
    if config is not None:
        config = replace(config, inference_mode=inference_mode)
    elif files.config is not None and "peft_type" in values:
        original, own = side.get("start", side.get("config", {})), side.get("own", {})
        changed = {key: original[key] for key in _changed() if key in original}
        changed |= {key: own[key] for key in LORAFA_ONLY if key in own}
        config = read_config(files.config, changed | {"inference_mode": inference_mode})
    if config is not None:
        require_available(config)
    tensors = without_prefix(renamed(read_tensors(files.weights, allow_pickle=allow_pickle)[0], key_mapping))
    require_floats(files.weights, tensors)
    found = convert(Raw(files.weights, values, given, tensors, header))
    if found is not None:
        return _converted(files.weights, *found, side, inference_mode)
    if config is None:
        config = read_config(files.require_config())
    return StoredAdapter(
        files.weights, config, tensors, side.get("base", {}), side.get("fallbacks", {}), "start" in side,
        side.get("quantized", {}),
    )  # fmt: skip


def _converted(
    path: Path, config: LoraConfig, tensors: dict[str, Tensor], side: Mapping[str, Any], inference_mode: bool
) -> StoredAdapter:
    """What a file holds for other layers than those it was made for: plain LoRA, of which no base is known."""
    if side.get("quantized"):
        raise CheckpointError(
            f"{path} was made with a start that quantizes the base, on layers that this model does not have. Merge it "
            "into the model it was made for. Nothing was loaded."
        )
    config = replace(config, inference_mode=inference_mode)
    require_available(config)
    return StoredAdapter(path, config, tensors, {}, {}, False, {})


def note_history(model: nn.Module, name: str, stored: StoredAdapter) -> None:
    """Enter what the file says of the layers of an adapter that was read, and its tensors do not.

    That is why layers did not start as the config says, and the dense weight of layers that the start has quantized.
    """
    for key, layer in layers_alone(model, name) if stored.fallbacks else ():
        if key in stored.fallbacks:
            layer.adapters[name].fallback = stored.fallbacks[key]
    if not stored.quantized:
        return
    for path, layer in _fingerprinted(model):
        if path in stored.quantized:
            layer.origin = stored.base[path]
    if different := compare_fingerprints(stored.quantized, _dequantized(places(model), stored)):
        warn(
            f"{len(different)} of {len(stored.quantized)} layers are quantized to other codes than those the adapter "
            f"was trained on: {shorten(different, 3)}. The base is in another dtype than it was then; load it in that "
            "one for equal outputs."
        )


def _dequantized(everything: Iterable[Place], stored: StoredAdapter) -> dict[str, Any]:
    """Fingerprint of the dequantized weights of those layers a start has quantized that are quantized here."""
    found: dict[str, Tensor | None] = {}
    for place in everything:
        if place.name in stored.quantized:
            base = pristine_of(place.module)
            backend = backend_of(base)
            found[place.name] = backend.weight(in_memory(base)) if backend is not None and backend.quantized else None
    return fingerprint(found.items())


def check_fits_base(
    model: nn.Module, everything: list[Place], stored: StoredAdapter, *, ignore_sizes: bool = False
) -> None:
    """Refuse an adapter that was made for other base weights.

    Args:
        everything: every place of the model.
        ignore_sizes: pass over layers whose weight has another shape here.

    Raises:
        CheckpointError: at least one adapted layer has other weights, or other codes, than it had when the adapter was
            saved.
    """
    brought = {key.removesuffix(".base_layer.weight") for key in stored.tensors}  # embeddings the file holds itself
    if stored.base:
        named = [name for name in stored.base if name not in brought]
        actual = base_fingerprint(model, named, everything=everything)
        known = {name: value for name, value in stored.base.items() if name in actual}
        if ignore_sizes:
            known = {name: value for name, value in known.items() if _same_shape(value, actual[name])}
        check_base(known, actual, stored.path, base_name=stored.config.base_model_name_or_path)
    quantized = _dequantized(everything, stored) if stored.quantized else {}
    if different := compare_fingerprints(stored.quantized, quantized):
        raise CheckpointError(
            f"{stored.path} was made for layers quantized otherwise: {len(different)} of {len(stored.quantized)} hold "
            f"other codes here: {shorten(different, 3)}. Load it on the dense model it was made for, in the dtype it "
            "had then: the layers are quantized on the way. Nothing was loaded."
        )


def _same_shape(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    return one is None or other is None or list(one["shape"]) == list(other["shape"])
