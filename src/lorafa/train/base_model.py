"""The base model of a run, as its settings ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from lorafa.data.encoding import Encoding
from lorafa.errors import ConfigError
from lorafa.io.find import find_adapter_files
from lorafa.models.kinds import AUTO
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.entry import Kind
from lorafa.models.kinds.found import kind_for_task
from lorafa.models.load import load, resolve_model
from lorafa.models.quantize import Quantized, quantize_linears
from lorafa.models.vocabulary import add_tokens
from lorafa.processes import main_first, world_size
from lorafa.train.settings.model import ModelConfig


@dataclass(frozen=True)
class BaseModel:
    """A model without an adapter, and its tokenizer."""

    model: Any
    """A language model of transformers."""
    tokenizer: Any
    kind: Kind = CAUSAL
    new_tokens: list[int] = field(default_factory=list)
    """The ids of the texts of ``model.add_tokens``, in their order."""
    new_modules: tuple[str, ...] = ()
    """Modules that started at random, such as the head of a classifier: they are trained whole."""
    quantized: Quantized | None = None
    """What ``model.quantize`` has done to its linear layers."""

    @property
    def encoding(self) -> Encoding:
        """How records become samples for it."""
        return self.kind.encoding(self.model)


def with_kind_of(settings: ModelConfig, adapter: str | None) -> ModelConfig:
    """The settings with the kind of model that an adapter (folder or Hub id) was made for, where they leave it open.

    Raises:
        LoraError: its config cannot be read.
    """
    if adapter is None or settings.kind != AUTO:
        return settings
    config = find_adapter_files(adapter).peft_config()
    return replace(settings, kind=kind_for_task(None if config is None else config.task_type))


def fetch_base(settings: ModelConfig) -> None:
    """Have the first of several processes fetch a model, so that the others find it in the cache; all call this.

    Raises:
        SourceError: the model cannot be found or fetched.
    """
    if world_size() > 1:
        with main_first():
            resolve_model(settings.name, cache_dir=cache_of(settings), revision=settings.revision)


def load_base(
    settings: ModelConfig,
    seed: int = 0,
    answers: Callable[[], Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
    whole: Sequence[str] = (),
) -> BaseModel:
    """Load a model with its tokenizer, give both the new tokens, and quantize its linear layers, each where asked.

    Args:
        seed: of weights that start at random.
        answers: those of the training rows, for a kind of model that chooses among them; None takes what the model has.
        classes: these themselves, in the order of its outputs, in place of ``answers``.
        whole: names of modules that are, or were, trained whole (``modules_to_save``): they are not quantized.

    Raises:
        SourceError: the model cannot be found, fetched or read.
        ConfigError: a setting does not fit it, or a text cannot be a new token.
        DataError: the answers are no classes.
    """
    with _without_bars():
        loaded = load(
            settings.name,
            settings.dtype,
            kind=settings.kind,
            attention=settings.attention,
            cache_dir=cache_of(settings),
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            seed=seed,
            answers=answers,
            classes=classes,
        )
    model, tokenizer, texts = loaded.model, loaded.tokenizer, settings.add_tokens
    if texts and not loaded.kind.adds_tokens:
        raise ConfigError(
            f"model.add_tokens makes rows of a table for new tokens, which {loaded.kind.words} (model.kind="
            f"{loaded.kind.name}) is not given here. Leave it out."
        )
    new_tokens = add_tokens(model, tokenizer, texts) if texts else []
    way, kept = settings.quantize, (*whole, *loaded.new)
    quantized = None if way is None else quantize_linears(model, way, kept)
    return BaseModel(model, tokenizer, loaded.kind, new_tokens, loaded.new, quantized)


def trained_whole(adapter: str | Path | None) -> list[str]:
    """The modules that an adapter (folder or Hub id) holds whole.

    Raises:
        LoraError: its config cannot be read.
    """
    config = None if adapter is None else find_adapter_files(adapter).peft_config()
    return [] if config is None else list(config.modules_to_save or [])


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading without the bar of transformers, which runs into the one of the console."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cache_of(settings: ModelConfig) -> Path | None:
    """The folder for fetched models that the settings name; None for the user's own."""
    return Path(settings.cache_dir) if settings.cache_dir else None
