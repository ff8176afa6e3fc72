"""Adapters read from disk: PEFT's two files, with lorafa's own entry in a header, checked in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.offload import in_memory
from lorafa.config import CONFIG_NAME, LORAFA_ONLY, LoraConfig, read_config
from lorafa.errors import CheckpointError, refuse, shorten, warn
from lorafa.io.base_prints import base_fingerprint, fingerprinted
from lorafa.io.belonging import accepted, differences, mismatch
from lorafa.io.find import AdapterFiles, find_adapter_files
from lorafa.io.key_names import renamed
from lorafa.io.layouts import of_others
from lorafa.io.layouts.base import Raw
from lorafa.io.own_entry import changed_fields, own_entry
from lorafa.io.peft_format import without_prefix
from lorafa.io.strict import require_floats
from lorafa.storage.fingerprint import check_base, compare_fingerprints, fingerprint
from lorafa.storage.hub import HubOptions
from lorafa.storage.tensors import read_header, read_tensors
from lorafa.storage.whole import read_json
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.available import require_available
from lorafa.surgery.walk import Place, places, pristine_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Convert = Callable[[Raw], "tuple[LoraConfig, dict[str, Tensor]] | None"]
"""Makes config and tensors of a file that is in another layout, or for other layers; None: it is as it should be."""
_READINGS = 20
"""How often an adapter is read that another process writes meanwhile."""


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


def read_adapter(
    source: str | Path,
    *,
    subfolder: str | None = None,
    config: LoraConfig | None = None,
    allow_pickle: bool = False,
    use_safetensors: bool | None = None,
    weight_name: str | None = None,
    ignore_config_mismatch: bool = False,
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
        ignore_config_mismatch: read it even if the config is not the one the tensors were saved with.
        key_mapping: as for :func:`lorafa.io.key_names.renamed`.
        convert: makes of a file in the layout of another program, or for another version of the model, what PEFT
            would have for this one; None where there is nothing to do. By default PEFT's layout alone is read.

    Raises:
        SourceError: folder, repository or file missing, or the Hub cannot be reached.
        CheckpointError: the file is damaged, holds inf or nan, is a pickle and ``allow_pickle`` is False, or is not of
            one save with the config.
        ConfigError, NotAvailableError: the stored config is not one lorafa can carry out.
        As ``convert``.
    """
    reading = partial(
        _read_files, config=config, allow_pickle=allow_pickle, key_mapping=key_mapping, inference_mode=inference_mode,
        ignore_config_mismatch=ignore_config_mismatch, convert=convert,
    )  # fmt: skip
    for left in reversed(range(_READINGS)):
        files = find_adapter_files(
            source, subfolder=subfolder, use_safetensors=use_safetensors, weight_name=weight_name, **hub
        )
        stamp = files.stamp()
        try:
            stored = reading(files)
        except CheckpointError:
            if not left or (files.stamp() == stamp and None not in stamp and not files.left):
                raise
        else:
            if files.stamp() == stamp:
                break
    else:
        raise CheckpointError(f"{files.weights} is written anew each time it is read. Load it when that has ended.")
    if files.left:
        warn(
            f"A save to {files.weights.parent} was killed before its end, and its {CONFIG_NAME} is read from "
            f"{files.config}, where other programs do not find it. Save the adapter again, or copy that file to its "
            "place."
        )
    return stored


def _read_files(
    files: AdapterFiles,
    *,
    config: LoraConfig | None,
    allow_pickle: bool,
    key_mapping: Mapping[str, str] | None,
    inference_mode: bool,
    ignore_config_mismatch: bool,
    convert: Convert,
) -> StoredAdapter:
    header = read_header(files.weights)
    side, given = own_entry(files.weights, header), config
    values = {} if files.config is None else read_json(files.config)
    of_peft = files.config is not None and "peft_type" in values
    edited = differences(values, side) if of_peft else {}
    if files.config is not None and edited and not ignore_config_mismatch:
        read_config(files.config)  # what is not allowed is said first
        raise mismatch(files.config, files.weights, edited)
    if config is not None:
        config = replace(config, inference_mode=inference_mode)
    elif files.config is not None and of_peft:
        original, own = side.get("start", side.get("config", {})), side.get("own", {})
        changed = {key: original[key] for key in changed_fields() if key in original}
        changed |= {key: own[key] for key in LORAFA_ONLY if key in own}
        changed = accepted(files.config, changed, edited)
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
    for path, layer in fingerprinted(model):
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
        try:
            check_base(known, actual, stored.path, base_name=stored.config.base_model_name_or_path)
        except CheckpointError as error:
            refuse(error, "It was loaded all the same: its update is added to the weights that are here.")
    quantized = _dequantized(everything, stored) if stored.quantized else {}
    if different := compare_fingerprints(stored.quantized, quantized):
        raise CheckpointError(
            f"{stored.path} was made for layers quantized otherwise: {len(different)} of {len(stored.quantized)} hold "
            f"other codes here: {shorten(different, 3)}. Load it on the dense model it was made for, in the dtype it "
            "had then: the layers are quantized on the way. Nothing was loaded."
        )


def _same_shape(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    return one is None or other is None or list(one["shape"]) == list(other["shape"])
