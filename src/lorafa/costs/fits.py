"""Whether a run fits into the memory there is, asked before its weights are loaded."""

from __future__ import annotations

import torch

from lorafa.costs.memory import FORMATS, Memory, count, shape_of
from lorafa.costs.room import available_bytes, resident_bytes
from lorafa.costs.sizes import size
from lorafa.costs.teaching import model_of
from lorafa.errors import SourceError
from lorafa.models.load import DTYPES, resolve_model
from lorafa.storage.headers import StoredWeights, stored_weights
from lorafa.train.base_model import cache_of
from lorafa.train.settings.model import ModelConfig
from lorafa.train.settings.run import RunConfig

ASK_FROM = 0.5
"""A run whose weights are a smaller share of the memory there is goes on without anything being counted."""
NAMES = {
    "process": "Python and libraries",
    "weights": "weights",
    "adapter": "adapter",
    "state": "optimizer state",
    "activations": "activations",
    "gradients": "gradients",
    "workspace": "workspace",
    "teacher": "teacher",
    "evaluation": "evaluation",
    "gaps": "gaps between freed blocks",
    "loading": "loading",
}
"""The components of memory, in words."""


def require_room(config: RunConfig) -> None:
    """Nothing is allocated for it; a model whose files say nothing of their sizes is let pass.

    Raises:
        SourceError: what a run needs at least is more than what there is, with the figures by component.
    """
    if not config.model.check_memory or (available := available_bytes()) is None:
        return
    stored = _stored(config.model)
    if stored is None or _roughly(stored, config) + _roughly_of_teacher(config) < ASK_FROM * available:
        return
    least = count(shape_of(config.model, config.peft.adapter), config, None).memory
    if least.total - least.process > available:
        raise SourceError(
            f"The model {config.model.name!r} does not fit: the run needs at least {in_words(least)}, and "
            f"{size(available)} are available. Nothing was loaded. `lorafa plan` counts activations too. Take a "
            f"smaller model{_narrower(config)}, or go on all the same with model.check_memory=false."
        )


def _stored(settings: ModelConfig) -> StoredWeights | None:
    return stored_weights(resolve_model(settings.name, cache_dir=cache_of(settings), revision=settings.revision))


def _roughly_of_teacher(config: RunConfig) -> float:
    """Bytes of the weights of another model that teaches; 0 where none does, or its files do not say."""
    settings = model_of(config.align)
    stored = None if settings is None else _stored(settings)
    return 0.0 if settings is None or stored is None else _in_format(stored, DTYPES.get(settings.dtype))


def _roughly(stored: StoredWeights, config: RunConfig) -> float:
    """Bytes of the weights as they would be loaded, by the headers alone."""
    return _in_format(stored, torch.float32 if config.peft.full else DTYPES.get(config.model.dtype))


def _in_format(stored: StoredWeights, wanted: torch.dtype | None) -> float:
    found = FORMATS.get(stored.main_dtype)
    return stored.bytes if found is None or wanted is None else stored.bytes * wanted.itemsize / found.itemsize


def _narrower(config: RunConfig) -> str:
    return ", model.dtype=bfloat16" if config.model.dtype == "float32" else ""


def in_words(memory: Memory) -> str:
    """ "3.20 GiB (weights 3.00 GiB, adapter 0.20 GiB)"; the process, which is there already, is left out."""
    parts = {name: getattr(memory, key) for key, name in NAMES.items() if key != "process"}
    shown = ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part)
    return f"{size(memory.total - memory.process)} ({shown})"


def left_after(memory: Memory) -> int | None:
    """Bytes that are left of what is available once a run has its peak, below 0 where it has not; None if unknown."""
    available = available_bytes()
    return None if available is None else available + (resident_bytes() or 0) - memory.total
