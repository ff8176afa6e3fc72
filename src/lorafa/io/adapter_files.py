"""Adapters on disk: PEFT's two files, lorafa's side entry beside them, checked in both directions when read."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.offload import in_memory
from lorafa.config import CONFIG_NAME, LoraConfig, read_config
from lorafa.config_checks import START_SETTINGS
from lorafa.errors import CheckpointError, shorten, warn
from lorafa.fingerprint import check_base, compare_fingerprints, fingerprint, from_metadata, to_metadata
from lorafa.io.files import WEIGHTS_NAME, find_adapter_files, read_tensors, require_values, write_tensors
from lorafa.io.peft_format import PREFIX, file_config, file_tensors, has_start, without_prefix
from lorafa.layers.base import LoraLayer
from lorafa.storage import HubOptions, make_folder, write_json
from lorafa.surgery.walk import lora_layers, places
from lorafa.version import VERSION

if TYPE_CHECKING:
    from typing_extensions import Unpack

SIDE_NAME = "lorafa.json"
_CHANGED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", *START_SETTINGS)


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


def base_fingerprint(model: nn.Module, names: list[str] | None = None) -> dict[str, Any]:
    """Fingerprint of the pristine weights of the adapted layers, or of the layers called ``names``."""
    modules: Mapping[str, nn.Module]
    if names is None:
        modules = dict(_fingerprinted(model))
    else:
        wanted = set(names)
        modules = {place.name: place.module for place in places(model) if place.name in wanted}
    origins = {name: m.origin for name, m in modules.items() if isinstance(m, LoraLayer) and m.origin is not None}
    return fingerprint((name, _readable(module)) for name, module in modules.items()) | origins


def _fingerprinted(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    by_module = {id(place.module): place.name for place in reversed(list(places(model)))}
    return [(by_module[id(layer)], layer) for _, layer in lora_layers(model) if id(layer) in by_module]


def _readable(module: nn.Module) -> Tensor | None:
    """The dense weight of a layer as it is stored, wherever it rests, or None."""
    weight = getattr(in_memory(module.pristine if isinstance(module, LoraLayer) else module), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta else None


def save_adapter(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: bool = False,
) -> Path:
    """Write one adapter into ``directory``, each file whole or not at all, and return the directory.

    Raises:
        CheckpointError: a tensor is missing or has no values, or a file could not be written; what was there before is
            as it was.
    """
    folder = Path(directory)
    tensors = file_tensors(model, name, config, state_dict=state_dict, embeddings=embeddings)
    written = replace(file_config(model, name, config), inference_mode=True)
    if written.task_type is None:
        written.auto_mapping = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    side: dict[str, Any] = {"version": VERSION, "base": base_fingerprint(model)}
    if has_start(model, name) or written.init_lora_weights != config.init_lora_weights:
        original = config.to_dict()
        key = "start" if has_start(model, name) else "config"
        side[key] = {field: original[field] for field in _CHANGED if field in original}
    fallbacks = {path: layer.fallbacks[name] for path, layer in lora_layers(model) if name in layer.fallbacks}
    if fallbacks:
        side["fallbacks"] = fallbacks
    if config.start.initializer.quantizer is not None:
        layers = [(path, layer) for path, layer in _fingerprinted(model) if name in layer.adapters and layer.origin]
        side["quantized"] = fingerprint((path, layer.base_weight()) for path, layer in layers)
    require_values(folder / WEIGHTS_NAME, tensors)
    with _staged(make_folder(folder)) as stage:
        write_tensors(stage / WEIGHTS_NAME, {PREFIX + key: value for key, value in tensors.items()}, to_metadata(side))
        write_json(stage / CONFIG_NAME, written.to_dict())
        write_json(stage / SIDE_NAME, side)
    return folder


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places in ``folder`` together, once all of them are written."""
    stage = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        make_folder(stage)
        yield stage
        for path in stage.iterdir():
            os.replace(path, folder / path.name)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(stage), str(folder))) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def read_adapter(
    source: str | Path,
    *,
    subfolder: str | None = None,
    config: LoraConfig | None = None,
    allow_pickle: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Unpack[HubOptions],
) -> StoredAdapter:
    """Read an adapter from a folder or the Hub; nothing of any model is needed or touched.

    Args:
        config: use this config instead of the stored one.
        allow_pickle: also read a ``.bin`` file (with ``weights_only=True``).
        key_mapping: regular expression -> replacement, applied to every key in turn.

    Raises:
        SourceError: folder, repository or file missing, or the Hub cannot be reached.
        CheckpointError: the file is damaged, holds inf or nan, or is a pickle and ``allow_pickle`` is False.
        ConfigError: the stored config is not one lorafa can carry out.
    """
    files = find_adapter_files(source, subfolder=subfolder, **hub)
    tensors, metadata = read_tensors(files.weights, allow_pickle=allow_pickle)
    side = from_metadata(metadata)
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    if config is None:
        config = read_config(files.config)
        original = side.get("start", side.get("config", {}))
        config = replace(config, **{key: original[key] for key in _CHANGED if key in original})
    return StoredAdapter(
        files.weights, config, without_prefix(tensors), side.get("base", {}), side.get("fallbacks", {}),
        "start" in side, side.get("quantized", {}),
    )  # fmt: skip


def note_history(model: nn.Module, name: str, stored: StoredAdapter) -> None:
    """Enter what the file says of the layers of an adapter that was read, and its tensors do not.

    That is why layers did not start as the config says, and the dense weight of layers that the start has quantized.
    """
    for path, layer in lora_layers(model):
        if path in stored.fallbacks:
            layer.fallbacks[name] = stored.fallbacks[path]
    for path, layer in _fingerprinted(model):
        if path in stored.quantized:
            layer.origin = stored.base[path]
    if different := compare_fingerprints(stored.quantized, _dequantized(model, stored)):
        warn(
            f"{len(different)} of {len(stored.quantized)} layers are quantized to other codes than those the adapter "
            f"was trained on: {shorten(different, 3)}. The base is in another dtype than it was then; load it in that "
            "one for equal outputs."
        )


def _dequantized(model: nn.Module, stored: StoredAdapter) -> dict[str, Any]:
    """Fingerprint of the dequantized weights of those layers a start has quantized that are quantized here."""
    found: dict[str, Tensor | None] = {}
    for place in places(model):
        if place.name in stored.quantized:
            base = place.module.pristine if isinstance(place.module, LoraLayer) else place.module
            backend = backend_of(base)
            found[place.name] = backend.weight(in_memory(base)) if backend is not None and backend.quantized else None
    return fingerprint(found.items())


def check_fits_base(model: nn.Module, stored: StoredAdapter) -> None:
    """Refuse an adapter that was made for other base weights.

    Raises:
        CheckpointError: at least one adapted layer has other weights, or other codes, than it had when the adapter was
            saved.
    """
    brought = {key.removesuffix(".base_layer.weight") for key in stored.tensors}  # embeddings the file holds itself
    if stored.base:
        actual = base_fingerprint(model, [name for name in stored.base if name not in brought])
        known = {name: value for name, value in stored.base.items() if name in actual}
        check_base(known, actual, stored.path, base_name=stored.config.base_model_name_or_path)
    if different := compare_fingerprints(stored.quantized, _dequantized(model, stored)):
        raise CheckpointError(
            f"{stored.path} was made for layers quantized otherwise: {len(different)} of {len(stored.quantized)} hold "
            f"other codes here: {shorten(different, 3)}. Load it on the dense model it was made for, in the dtype it "
            "had then: the layers are quantized on the way. Nothing was loaded."
        )
