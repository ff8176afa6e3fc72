"""The config as a caller hands it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.settings.checks import found

_WRITE = "LoraConfig(init_lora_weights=..., target_modules=...)"


def lora_config(config: Any) -> LoraConfig:
    """The config that every function goes by: a LoraConfig as it is, and PEFT's own LoraConfig read field by field.

    PEFT is not imported for it: its config says by ``peft_type`` what it is and by ``to_dict`` what it holds. Settings
    of a start other than the config's own are left behind, as PEFT leaves them.

    Raises:
        ConfigError: it is something else, with what to write instead; or PEFT's sets a field this version does not
            know.
    """
    if isinstance(config, LoraConfig):
        return config
    kind, to_dict = getattr(config, "peft_type", None), getattr(config, "to_dict", None)
    if kind is None or not callable(to_dict) or isinstance(config, type):
        raise ConfigError(f"The config must be a LoraConfig, found {_described(config)}. {_instead(config)}")
    if getattr(kind, "value", kind) != "LORA":
        raise ConfigError(
            f"The config must be a LoraConfig, found a {type(config).__name__} of {_library(config)}, whose peft_type "
            f"is {getattr(kind, 'value', kind)!r}. lorafa has LoRA and its variants only: pass {_WRITE}."
        )
    if getattr(config, "_custom_modules", None):
        raise ConfigError(
            f"The {type(config).__name__} of {_library(config)} registers layers of its own, which lorafa does not "
            "read. Register a back end for them in lorafa.backends.BACKENDS, and pass a LoraConfig of lorafa."
        )
    try:
        ours = LoraConfig.from_dict(to_dict())
    except ConfigError as error:
        raise ConfigError(f"The {type(config).__name__} of {_library(config)} cannot be read: {error}") from error
    runtime = getattr(config, "runtime_config", None)
    known = is_dataclass(runtime) and not isinstance(runtime, type)
    return replace(ours, runtime_config=asdict(runtime)) if known else ours  # type: ignore[arg-type]


def _library(config: object) -> str:
    return type(config).__module__.partition(".")[0]


def _described(config: object) -> str:
    if config is None or isinstance(config, (str, Path, int, float)):
        return found(config)
    return f"the class {config.__name__}" if isinstance(config, type) else f"a {type(config).__name__}"


def _instead(config: object) -> str:
    if isinstance(config, dict):
        return (
            "Pass LoraConfig(**config), or LoraConfig.from_dict(config) for what an adapter_config.json holds."
            if "peft_type" not in config
            else "Pass LoraConfig.from_dict(config)."
        )
    if isinstance(config, (str, Path)):
        return f"Pass {_WRITE}, or LoraConfig.from_pretrained({str(config)!r}) for the config that is saved there."
    if isinstance(config, type):
        return f"Make one of it: {config.__name__}(...)." if issubclass(config, LoraConfig) else f"Pass {_WRITE}."
    return f"Pass {_WRITE}."


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """The config that a dict describes, with a ``peft_type`` in it: :meth:`LoraConfig.from_dict` by PEFT's name.

    Raises:
        ConfigError: as there.
    """
    return LoraConfig.from_dict(config_dict)
