"""PEFT's own layout, which Unsloth, LLaMA-Factory, axolotl, TRL and others write too."""

from __future__ import annotations

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError
from lorafa.io.layouts.base import OWN_LAYER, Contents, Factors, Layout, Raw, taken_apart
from lorafa.io.layouts.names import BaseNames
from lorafa.surgery.patterns import numbers_of


class PeftLayout(Layout):
    """``adapter_config.json`` with a ``peft_type``, and tensors called ``<layer>.lora_A.weight`` and so on."""

    written_by = "PEFT, Unsloth, LLaMA-Factory, axolotl"
    native = True

    def detect(self, raw: Raw) -> str | None:
        if raw.given is None and "peft_type" not in raw.values:
            return None
        return "peft_type" if raw.given is None else "config="

    def read(self, raw: Raw, base: BaseNames) -> Contents:
        try:
            config = LoraConfig.from_dict(raw.values) if raw.given is None else raw.given
        except ConfigError as error:
            raise CheckpointError(f"{raw.path}: {error}") from error
        layers, others = taken_apart(raw.tensors)
        factors = {}
        for name, tensors in layers.items():
            factors[name] = Factors(tensors, *numbers_of(config, name.partition(OWN_LAYER)[0]))
        return Contents(raw.path, config, factors, others)
