"""What a run has trained, ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafa.errors import ConfigError
from lorafa.models.load import load_model
from lorafa.models.vocabulary import add_tokens
from lorafa.peft_model import PeftModel
from lorafa.runs.record import RunDirectory
from lorafa.train.settings.run import RunConfig


def trained_model(run: RunDirectory) -> tuple[Any, Any]:
    """The model of a run with its tokenizer: its base with the adapter on, or the whole model it has trained.

    The adapter stays apart also where the run has a merged model: merging rounds.

    Raises:
        ConfigError: the run has trained nothing yet.
        SourceError: the base model, or a file of the run, cannot be read.
    """
    config = run.config()
    if run.model.is_dir():
        return _loaded(config, str(run.model), None)
    if not run.adapter.is_dir():
        status = run.result().get("status", "not begun")
        raise ConfigError(f"The run {str(run.path)!r} has no adapter yet (status: {status}). Let it finish first.")
    model, tokenizer = _loaded(config, config.model.name, config.model.revision)
    if config.model.add_tokens:
        add_tokens(model, tokenizer, config.model.add_tokens)
    return PeftModel.from_pretrained(model, run.adapter), tokenizer


def _loaded(config: RunConfig, name: str, revision: str | None) -> tuple[Any, Any]:
    model, cache = config.model, config.model.cache_dir
    return load_model(
        name, model.dtype, attention=model.attention, cache_dir=Path(cache) if cache else None, revision=revision
    )
