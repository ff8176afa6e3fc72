"""What a run has trained, ready to use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorafa.peft_model import PeftModel
from lorafa.runs.record import RunDirectory
from lorafa.train.base_model import fetch_base, load_base, trained_whole


def trained_model(run: RunDirectory, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model of a run with its tokenizer: its base with the adapter on, or the whole model it has trained.

    The adapter stays apart also where the run has a merged model: merging rounds. Every process of a group calls it.

    Args:
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: the run has trained nothing yet.
        SourceError: the base model, or a file of the run, cannot be read.
    """
    config, classes = run.config(), run.result().get("classes")
    seed, kind = config.train.seed, run.result().get("kind", config.model.kind)
    settings = replace(config.model, kind=kind, trust_remote_code=trust_remote_code)
    if run.model.is_dir():  # its tokenizer knows the new tokens
        whole = load_base(replace(settings, name=str(run.model), revision=None, add_tokens=None))
        return whole.model, whole.tokenizer
    adapter = run.trained_adapter()
    fetch_base(settings)
    base = load_base(settings, seed, classes=classes, whole=trained_whole(adapter))
    return PeftModel.from_pretrained(base.model, adapter), base.tokenizer
