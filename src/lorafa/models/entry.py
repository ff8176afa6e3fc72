"""A base model that is known by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A line of ``MODELS``."""

    shape: Mapping[str, Any]
    """Its config in transformers' own keys, with ``model_type`` and ``dtype``: nothing is fetched for it."""
    fetch: Callable[[Path], Path] | None = None
    """(cache folder) -> the folder of the model, made there if it is not yet; raises SourceError. None: its weights are
    not to be had by this name."""
