"""Diffusers' layouts: ``pytorch_lora_weights.safetensors`` with the adapters of a pipeline, by names of three ages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError, shorten
from lorafa.io.layouts.base import A, B, Contents, Factors, Layout, Raw, taken_apart
from lorafa.io.layouts.components import Part, alpha_of, assumed_config, choose, rank_of, require_all_or_none
from lorafa.io.layouts.names import BaseNames
from lorafa.storage.parsed import from_json
from lorafa.surgery.patterns import lookup
from lorafa.surgery.walk import PREFIX

METADATA = "lora_adapter_metadata"
"""The entry of the header in which diffusers says rank and alpha, each with the model's name before it."""
COMPONENTS = (
    *("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_one"),
    *("controlnet", "prior", "image_encoder", "connectors"),
)
"""What pipelines call the models in them."""
_OLD = (
    (re.compile(r"^(.*)\.lora\.(down|up)\.weight$"), ""),
    (re.compile(r"^(.*)\.lora_linear_layer\.(down|up)\.weight$"), ""),
    (re.compile(r"^(.*\.to_[qkv])_lora\.(down|up)\.weight$"), ""),
    (re.compile(r"^(.*\.to_out)_lora\.(down|up)\.weight$"), ".0"),
)
"""Names of A (down) and B (up) in older files, and what the layer's own name has behind what they say."""
_FACTOR = {"down": A, "up": B}
_OLD_NAMES_OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
"""What the oldest files call the layers of a text encoder's attention."""


class DiffusersLayout(Layout):
    """A and B of PEFT, or ``lora.down`` and ``lora.up``, behind ``unet.``, ``transformer.``, ``text_encoder.``.

    Read from ``loaders/lora_base.py`` and ``utils/state_dict_utils.py`` of diffusers. There is no config: ranks are
    those of the tensors, alpha is the rank, unless the header or tensors called ``<layer>.alpha`` say another.
    """

    written_by = "diffusers"
    weights = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

    def detect(self, raw: Raw) -> str | None:
        old = next((key for key in raw.tensors if any(pattern.match(key) for pattern, _ in _OLD)), None)
        if old is not None or raw.values or raw.given is not None:
            return old
        return next((key for key in raw.tensors if key.endswith((".lora_A.weight", ".lora_B.weight"))), None)

    def read(self, raw: Raw, base: BaseNames) -> Contents:
        renamed = {_new_name(key): tensor for key, tensor in raw.tensors.items()}
        alphas = {key.removesuffix(".alpha"): renamed.pop(key) for key in list(renamed) if key.endswith(".alpha")}
        layers, others = taken_apart(renamed)
        if others:
            raise CheckpointError(
                f"{raw.path} holds {len(others)} tensors that are no A or B and would be ignored: "
                f"{shorten(others, 3)}. Load it with the pipeline it was made for. Nothing was loaded."
            )
        parts: dict[str, Part] = {}
        for name, tensors in layers.items():
            component, name_there = _component(name)
            parts.setdefault(component, {})[name_there] = tensors
        named = {c: {_text_name(n, base): tensors for n, tensors in part.items()} for c, part in parts.items()}
        chosen = choose(raw, named, base, A)
        component = next(name for name, part in named.items() if part is chosen)
        before = f"{component}." if component else ""
        placed = ((*_component(name), alpha) for name, alpha in alphas.items())
        own = {_text_name(name, base): alpha for where, name, alpha in placed if where == component}
        if stray := sorted(own.keys() - chosen.keys()):
            raise CheckpointError(f"{raw.path} has alphas of layers it has no A of: {shorten(stray, 3)}.")
        require_all_or_none(raw, list(own), list(chosen))
        config = _config(raw, before, chosen)
        factors = {name: _factors(raw, name, tensors, own.get(name), config) for name, tensors in chosen.items()}
        if config is None:
            config = assumed_config(factors)
        return Contents(raw.path, replace(config, target_modules=sorted(factors)), factors, {})


def _new_name(key: str) -> str:
    key = key.replace(".processor.", ".")
    for pattern, behind in _OLD:
        if match := pattern.match(key):
            return f"{match[1]}{behind}.{_FACTOR[match[2]]}"
    return key


def _component(name: str) -> tuple[str, str]:
    """(what the pipeline calls the model, the layer's name there)."""
    first, _, rest = name.partition(".")
    inner = rest if first in COMPONENTS else name
    return (first if first in COMPONENTS else ""), inner.removeprefix(PREFIX)


def _text_name(name: str, base: BaseNames) -> str:
    """The name of a text encoder's layer where the oldest files have that of an image model's."""
    if base.home(name) is None:
        for old, new in _OLD_NAMES_OF_TEXT.items():
            other = f"{name.removesuffix(old)}{new}"
            if name.endswith(f".{old}") and base.home(other) is not None:
                return other
    return name


def _config(raw: Raw, before: str, layers: Part) -> LoraConfig | None:
    """The config that the header has for this model of the pipeline; None where it has none."""
    text = raw.header.get(METADATA)
    if text is None:
        return None
    try:
        given: Any = from_json(text)
        mine = {key.removeprefix(before): value for key, value in given.items() if key.startswith(before)}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{raw.path}: {METADATA} in its header is no json of settings: {error}. Nothing was loaded."
        ) from error
    if not mine:
        return None
    try:
        return LoraConfig.from_dict({"peft_type": "LORA", "target_modules": sorted(layers), **mine})
    except ConfigError as error:
        raise ConfigError(f"{raw.path}: {METADATA} in its header: {error}") from error


def _factors(
    raw: Raw, name: str, tensors: Mapping[str, Tensor], alpha: Tensor | None, config: LoraConfig | None
) -> Factors:
    if missing := [key for key in (A, B) if key not in tensors]:
        raise CheckpointError(f"{raw.path}: {name} has no {' and no '.join(missing)}. Nothing was loaded.")
    rank = rank_of(raw, name, tensors[A], tensors[B])
    if config is not None:
        return Factors(dict(tensors), rank, lookup(config.alpha_pattern, name, config.lora_alpha))
    return Factors(dict(tensors), rank, alpha_of(raw, name, alpha, rank))
