"""The base model of an adapter that is exported: what its config says, and the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafa.auto import load_base
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, SourceError, first_line
from lorafa.models.sourced import refused_code
from lorafa.peft_model import PeftModel


@dataclass(frozen=True)
class BaseFacts:
    """What a model's config says of its tensors; no weight is read."""

    name: str
    """Folder or Hub id."""
    architecture: str
    """The class of transformers, "LlamaForCausalLM"."""
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    """Whether input embedding and output head are one table."""


def facts_of(config: LoraConfig, name: str | None = None, *, trust_remote_code: bool = False) -> BaseFacts:
    """What the config of an adapter's base says.

    Args:
        config: the adapter's; it names its base.
        name: another base in place of that one, as :func:`lorafa.models.load.resolve_model` takes it.
        trust_remote_code: as in :func:`~lorafa.models.load.load_model`.

    Raises:
        ConfigError: no base is named.
        SourceError: there is no such model, transformers does not know its kind, or it needs code of its own, which is
            not trusted.
    """
    name, revision = _named(config, name)
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise SourceError("Reading a model's config needs a package: pip install lorafa[train]") from error
    try:
        found: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        why = refused_code(error) or f"{first_line(error)}. Give its folder: --base."
        raise SourceError(f"The config of the base model {name!r} could not be read: {why}") from error
    text = found.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    return BaseFacts(
        name=name,
        architecture=next(iter(found.architectures or ()), ""),
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        tied=bool(getattr(found, "tie_word_embeddings", False)),
    )


def _named(config: LoraConfig, name: str | None) -> tuple[str, str | None]:
    """Where the base is, and its revision: one that is given by its name here, a folder or a Hub id."""
    if name is not None:
        from lorafa.models.load import resolve_model  # brings in what trains

        return str(resolve_model(name)), None
    if config.base_model_name_or_path is None:
        raise ConfigError("The adapter does not name its base model. Give it: --base <folder or Hub id>.")
    return config.base_model_name_or_path, config.revision


def load_adapted(
    source: str | Path, config: LoraConfig, name: str | None = None, *, trust_remote_code: bool = False
) -> PeftModel:
    """The base with the adapter on it, in eval mode.

    Raises:
        ConfigError: no base is named, or what to load it as cannot be told.
        SourceError: it cannot be found or loaded.
        LoraError: as :meth:`lorafa.PeftModel.from_pretrained`.
    """
    base = _named(config, name)[0] if name is not None or config.base_model_name_or_path is None else None
    return PeftModel.from_pretrained(load_base(source, base, trust_remote_code=trust_remote_code), source)
