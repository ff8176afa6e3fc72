"""A base model with several adapters on it, as they are named on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorafa.chat.names import distinct, named
from lorafa.chat.speakers import Speaker, Speakers
from lorafa.conf.compose import compose
from lorafa.data.records import Message
from lorafa.data.templates import find_template
from lorafa.data.unanswered import Unanswered
from lorafa.errors import ConfigError
from lorafa.evals.answering import ends_of
from lorafa.evals.generation import end_ids
from lorafa.models.kinds.entry import TEXT
from lorafa.models.kinds.found import kind_of
from lorafa.models.load import on_accelerator, resolve_model
from lorafa.models.vocabulary import tokenizer_beside
from lorafa.peft_model import PeftModel
from lorafa.runs.subjects import Named, find
from lorafa.surgery.mixed import BASE
from lorafa.train.base_model import load_base, trained_whole, with_kind_of
from lorafa.train.settings.model import ModelConfig

_AS_TRAINED = ("revision", "dtype", "quantize", "attention")
"""Settings of a base model that change its numbers: runs on one base have the same."""


@dataclass(frozen=True)
class Found:
    """A run, an adapter or a model that is found and not yet loaded."""

    word: str
    """As it was given."""
    base: str
    adapter: str | None = None
    """Folder or Hub id; None for a model without one."""
    settings: ModelConfig | None = None
    """How its base was loaded in the training, where that is known."""
    template: str | None = None
    """The chat template it was trained with, where its settings name one."""


@dataclass(frozen=True)
class Asked:
    """Everything that is to be loaded, checked as far as it can be before."""

    found: Sequence[Found]
    names: Sequence[str]
    """What each of ``found`` is called."""
    settings: ModelConfig
    """How the base is loaded."""
    template: str | None = None
    """A chat template in place of everyone's own."""

    @property
    def adapters(self) -> list[tuple[str, Found]]:
        """(name, adapter) of those that are none of the base."""
        return [(name, one) for name, one in zip(self.names, self.found, strict=True) if one.adapter is not None]

    def load(self) -> Speakers:
        """The base with all adapters on it, on this process's device.

        Raises:
            SourceError: something cannot be fetched or read.
            CheckpointError, ConfigError, TargetError: an adapter does not fit the base; the model writes no text.
            DataError: a chat template has no place for an answer.
        """
        whole = sorted({module for _, one in self.adapters for module in trained_whole(one.adapter)})
        base = load_base(self.settings, whole=whole)
        model = base.model
        if TEXT not in (kind := kind_of(model)).offers:
            raise ConfigError(
                f"{self.settings.name!r} is {kind.words} (model.kind={kind.name}), which writes no text. Give a model "
                "that does."
            )
        rows = len(model.get_input_embeddings().weight)
        # First, for they may give the tables more rows, which they cannot get with an adapter on them.
        beside = partial(tokenizer_beside, model=model, trust_remote_code=self.settings.trust_remote_code)
        tokenizers = [beside(str(one.adapter)) or base.tokenizer for _, one in self.adapters]
        if self.adapters:
            model = PeftModel(model)
        for number, (_, one) in enumerate(self.adapters):
            model.load_adapter(str(one.adapter), f"adapter_{number}")
        name, template = self._base()
        speakers = {name: self._speaker(name, BASE, base.tokenizer, template, model, rows)}
        for number, ((name, one), tokenizer) in enumerate(zip(self.adapters, tokenizers, strict=True)):
            own = max(rows, len(tokenizer))
            speakers[name] = self._speaker(name, f"adapter_{number}", tokenizer, one.template, model, own)
        return Speakers(on_accelerator(model).eval(), speakers, self._base()[0])

    def _base(self) -> tuple[str, str | None]:
        """The name of the base and the chat template it was trained with, where it is named beside its adapters."""
        for name, one in zip(self.names, self.found, strict=True):
            if one.adapter is None:
                return name, one.template
        return distinct([(None, self.settings.name)], self.names)[0], None

    def _speaker(
        self, name: str, adapter: str, tokenizer: Any, template: str | None, model: Any, vocabulary: int
    ) -> Speaker:
        if template := self.template or template:
            tokenizer = copy(tokenizer)
            tokenizer.chat_template = template
        ends = set(end_ids(model, tokenizer, ()))
        if kind_of(model).own_template:
            ends |= ends_of(tokenizer, Unanswered((Message("user", "?"),)))
        return Speaker(name, adapter, tokenizer, frozenset(ends), vocabulary)


def ask_for(
    words: Sequence[str],
    base: str | None = None,
    dtype: str | None = None,
    template: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Asked:
    """Find what is named on a command line: runs, adapters and at most one model, each as ``name=path`` or ``path``.

    Args:
        base: the base model of the adapters, in place of the one they name; alone where no words are given.
        dtype: number format of the base; None as it was trained, or else as it is stored.
        template: name or file of a chat template in place of everyone's own.
        trust_remote_code: run code that comes with the base.

    Raises:
        ConfigError: nothing is named, two have other bases or other settings of it, a name is given twice; as
            :func:`lorafa.runs.subjects.find`.
        SourceError: there is nothing of that name.
    """
    if not words and base is None:
        raise ConfigError(
            "Nothing is named that could answer. Give adapters or runs, or a model: lorafa chat smollm2-135m."
        )
    given = [named(word) for word in words] or [(None, str(base))]
    found = [_found(find(place, base if words else None)) for _, place in given]
    _require_one_base(found)
    models = [one.word for one in found if one.adapter is None]
    if len(models) > 1:
        raise ConfigError(f"{models[0]!r} and {models[1]!r} are one model, which answers once. Leave one out.")
    settings = replace(_settings(found, dtype), trust_remote_code=trust_remote_code)
    return Asked(found, distinct(given), settings, None if template is None else _template(template))


def _found(subject: Named) -> Found:
    if subject.run is None:
        return Found(subject.name, subject.base or subject.name, subject.adapter)
    config = subject.run.config()
    settings = replace(config.model, kind=subject.run.result().get("kind", config.model.kind), add_tokens=None)
    template = find_template(config.data.template) if config.data.template else None
    if subject.run.model.is_dir():  # all of it was trained, so it is a model of its own
        settings = replace(settings, name=str(subject.run.model), revision=None)
        return Found(subject.name, settings.name, None, settings, template)
    return Found(subject.name, settings.name, str(subject.run.trained_adapter()), settings, template)


def _require_one_base(found: Sequence[Found]) -> None:
    first = found[0]
    for other in found[1:]:
        if _place(first.base) != _place(other.base):
            raise ConfigError(
                f"{first.word!r} and {other.word!r} have different bases: {first.base!r} and {other.base!r}. One chat "
                "has one base. Leave one out, or, if both names mean the same weights, give adapters and --base."
            )


def _place(model: str) -> Path | str:
    """Where a model is: the same for all names of one."""
    place = resolve_model(model)
    return place.resolve() if isinstance(place, Path) else place


def _template(name: str) -> str:
    try:
        return find_template(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.template", "--template")) from error


def _settings(found: Sequence[Found], dtype: str | None) -> ModelConfig:
    """How the base is loaded: as in the runs that are named, or else as a model is."""
    known = [one for one in found if one.settings is not None]
    for other in known[1:]:
        for name in _AS_TRAINED:
            one, two = getattr(known[0].settings, name), getattr(other.settings, name)
            if one != two and not (name == "dtype" and dtype is not None):
                raise ConfigError(
                    f"{known[0].word!r} and {other.word!r} were trained with different settings of their base: "
                    f"model.{name}={one} and {two}. One chat has one base. Give their adapters (<run>/adapter), or "
                    "leave one out."
                )
    settings = known[0].settings if known else compose([f"model={found[0].base}"]).model
    assert settings is not None
    adapter = next((one.adapter for one in found if one.adapter is not None), None)
    return with_kind_of(settings if dtype is None else replace(settings, dtype=dtype), adapter)  # type: ignore[arg-type]
