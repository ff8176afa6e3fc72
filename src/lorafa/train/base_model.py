"""The base model of a run, as its settings ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from lorafa.models.load import load_model, resolve_model
from lorafa.models.vocabulary import add_tokens
from lorafa.processes import main_first, world_size
from lorafa.train.settings.run import ModelConfig


@dataclass(frozen=True)
class BaseModel:
    """A model without an adapter, and its tokenizer."""

    model: Any
    """A causal language model of transformers."""
    tokenizer: Any
    new_tokens: list[int] = field(default_factory=list)
    """The ids of the texts of ``model.add_tokens``, in their order."""


def fetch_base(settings: ModelConfig) -> None:
    """Have the first of several processes fetch a model, so that the others find it in the cache; all call this.

    Raises:
        SourceError: the model cannot be found or fetched.
    """
    if world_size() > 1:
        with main_first():
            resolve_model(settings.name, cache_dir=cache_of(settings), revision=settings.revision)


def load_base(settings: ModelConfig) -> BaseModel:
    """Load a model with its tokenizer, and give both the new tokens.

    Raises:
        SourceError: the model cannot be found, fetched or read.
        ConfigError: a setting does not fit it, or a text cannot be a new token.
    """
    with _without_bars():
        model, tokenizer = load_model(
            settings.name,
            settings.dtype,
            attention=settings.attention,
            cache_dir=cache_of(settings),
            revision=settings.revision,
        )
    texts = settings.add_tokens
    return BaseModel(model, tokenizer, add_tokens(model, tokenizer, texts) if texts else [])


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
