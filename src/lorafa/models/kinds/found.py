"""Which kind a model is of."""

from __future__ import annotations

from typing import Any

from lorafa.models.kinds import AUTO, KINDS
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.entry import Kind
from lorafa.models.wrapped import inner_model


def kind_of(model: Any) -> Kind:
    """The kind of a loaded model, with or without adapters; what no other kind recognizes is causal."""
    base = inner_model(model)
    return next((kind for kind in _kinds() if kind.is_of(base)), CAUSAL)


def kind_named(name: str, config: Any) -> Kind:
    """The kind of that name, or with ``"auto"`` the one that a model with this config is of.

    Raises:
        ConfigError: there is no such kind.
    """
    if name != AUTO:
        return KINDS.get(name)
    return next((kind for kind in _kinds() if kind.is_made_for(config)), CAUSAL)


def kind_for_task(task_type: str | None) -> str:
    """The name of the kind whose adapters say this; ``"auto"`` where none does."""
    return next((kind.name for kind in _kinds() if kind.task_type == task_type), AUTO)


def _kinds() -> list[Kind]:
    return [KINDS.get(name) for name in KINDS.names()]
