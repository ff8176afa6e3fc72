"""What is evaluated by its name: a run, an adapter, or a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafa.config import CONFIG_NAME
from lorafa.data.classes import classes_beside
from lorafa.data.records import Record
from lorafa.data.templates import find_template
from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.io.find import find_adapter_files
from lorafa.models.kinds.found import kind_of
from lorafa.models.load import on_accelerator, resolve_model
from lorafa.models.vocabulary import tokenizer_beside
from lorafa.peft_model import PeftModel
from lorafa.runs.adapters import run_in
from lorafa.runs.record import RunDirectory
from lorafa.runs.trained import trained_model
from lorafa.storage.hub import locate
from lorafa.storage.paths import user_path
from lorafa.train.base_model import fetch_base, load_base, trained_whole, with_kind_of
from lorafa.train.objectives.making import make_rows
from lorafa.train.records import find_records, make_samples
from lorafa.train.settings.model import ModelConfig


@dataclass(frozen=True)
class Named:
    """A run, an adapter or a model that is found and not yet loaded."""

    name: str
    """As it was given."""
    run: RunDirectory | None = None
    adapter: str | None = None
    """Folder or Hub id of an adapter."""
    base: str | None = None
    """Its base model."""

    def require_its_own(self, of_model: Sequence[str]) -> None:
        """Raises ConfigError where this is a run and settings (key=value) say how a model is to be loaded; whether its
        code is trusted may be said."""
        others = [text for text in of_model if text.lstrip("+").partition("=")[0] != "model.trust_remote_code"]
        if self.run is not None and others:
            raise ConfigError(
                f"A run is loaded as it was trained, so {others[0]!r} would change nothing for {self.name}. Give its "
                "adapter (<run>/adapter) to load it in another way, or leave the setting out."
            )

    def load(self, settings: ModelConfig) -> tuple[Any, Any]:
        """The model, on this process's device, and its tokenizer.

        Args:
            settings: how a model is loaded, by another name than this one's; a run has its own, but for whether code
                of the model is trusted.

        Raises:
            SourceError: it cannot be found or read.
            ConfigError: a run has trained nothing yet; a setting does not fit.
            CheckpointError: an adapter was made for another base, or its files are damaged.
        """
        if self.run is not None:
            model, tokenizer = trained_model(self.run, trust_remote_code=settings.trust_remote_code)
            if template := self.run.config().data.template:
                tokenizer.chat_template = find_template(template)
        else:
            settings = with_kind_of(replace(settings, name=self.base or self.name), self.adapter)
            fetch_base(settings)
            classes = None if self.adapter is None else classes_beside(self.adapter)
            base = load_base(settings, classes=classes, whole=trained_whole(self.adapter))
            model, tokenizer = base.model, base.tokenizer
        if self.adapter is not None:
            beside = tokenizer_beside(self.adapter, model, trust_remote_code=settings.trust_remote_code)
            tokenizer = beside or tokenizer
            model = PeftModel.from_pretrained(model, self.adapter)
        return on_accelerator(model), tokenizer


def find(name: str, base: str | None = None) -> Named:
    """The run directory, the adapter or the model of that name.

    Args:
        base: the base model of an adapter, in place of the one its config names.

    Raises:
        ConfigError: an adapter does not name its base, or ``base`` is given for what has none.
        SourceError: there is nothing of that name here, and it is no Hub id.
    """
    path = user_path(name)
    run = run_in(name)
    if run is None and "/" in name and os.path.isdir(path.parent) and not os.path.lexists(path):
        raise SourceError(
            f"There is no run, adapter or model {name!r}: {path.parent} has nothing of that name. Check the path."
        )
    if base is not None and (run is not None or not _is_adapter(name, path)):
        what = "a run, which has its own base" if run is not None else "no adapter"
        raise ConfigError(f"--base {base} is the base model of an adapter, and {name!r} is {what}. Leave it out.")
    if run is not None:
        return Named(name, run=run)
    if not _is_adapter(name, path):
        resolve_model(name)
        return Named(name)
    if base is None and (config := find_adapter_files(name).peft_config()) is not None:
        base = config.base_model_name_or_path
    if base is None:
        raise ConfigError(f"The adapter {name!r} does not name its base model. Give it: --base <model>.")
    return Named(name, adapter=name, base=base)


def _is_adapter(name: str, path: Path) -> bool:
    if os.path.isdir(path):
        return os.path.isfile(path / CONFIG_NAME)
    if "/" not in name:
        return False
    try:
        locate(name, [CONFIG_NAME])
    except SourceError:  # a model, or nothing at all: loading it says so
        return False
    return True


def held_out(run: RunDirectory, model: Any, tokenizer: Any, console: Console) -> Sequence[Record]:
    """The records a run holds out.

    Args:
        model, tokenizer: the run's, with its chat template.

    Raises:
        DataError: it holds none out, or its data is not what it was.
    """
    config = run.config()
    objective = config.objective.entry
    data = find_records(config.data, objective.reading)
    encoding = objective.encoding or kind_of(model).encoding(model)
    samples = make_samples(data, tokenizer, config.data, console, encoding)
    own = make_rows(data, tokenizer, config)
    recorded = run.result().get("samples_sha256")
    if recorded not in (None, samples.sha256 if own is None else own.sha256):
        raise DataError(
            f"{samples.source} does not give the samples that the run {str(run.path)!r} was trained on, so what it "
            "holds out may not be what it held out then. Restore the records, or give others: data=<file>."
        )
    if not samples.records:
        raise DataError(f"The run {str(run.path)!r} holds no rows out. Give some: data=<file>.")
    return samples.records


def require_same_data(first: RunDirectory, others: Sequence[Named]) -> None:
    """Raises DataError for a run that was not trained on the data of the first: rows that one holds out another may
    have been trained on."""
    digest = first.result().get("samples_sha256")
    for other in others:
        if other.run is not None and other.run.result().get("samples_sha256") != digest:
            raise DataError(
                f"The runs {str(first.path)!r} and {other.name!r} were trained on other data, so what the first holds "
                "out the second may have seen. Give rows that both have not: data=<file>."
            )
