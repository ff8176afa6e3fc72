"""Models without their weights: built from a config alone, on the meta device, where a tensor is only its shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafa.errors import SourceError
from lorafa.models import MODELS
from lorafa.models.kinds import AUTO, KINDS
from lorafa.models.kinds.found import kind_named
from lorafa.models.load import resolve_model
from lorafa.models.sourced import as_source_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shape_model(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    cache_dir: Path | None = None,
    revision: str | None = None,
    kind: str = AUTO,
) -> PreTrainedModel:
    """A language model on the meta device: every layer is there, no number is.

    Args:
        name: a line of ``MODELS`` (which wins over a folder of that name), a local folder with a config.json, or a Hub
            id, of which only the config is fetched.
        dtype: of the weights; None takes the config's, float32 where it has none.
        cache_dir, revision: as in :func:`~lorafa.models.load.resolve_model`.
        kind: a line of ``KINDS``, or "auto" for the one its config speaks of.

    Raises:
        SourceError: there is no such model, its config cannot be read, or it is not one of such a model.
    """
    known = MODELS.get(name).shape if name in MODELS and revision is None else None
    try:
        place = name if known else resolve_model(name, cache_dir=cache_dir, revision=revision)
    except SourceError as error:
        raise SourceError(f"{error} Shapes known by name: {', '.join(MODELS.names())}.") from error
    import transformers

    step = f"give model=<local folder with config.json>, a Hub id, or one of: {', '.join(MODELS.names())}."
    words = "a model" if kind == AUTO else KINDS.get(kind).words
    with as_source_error(f"Could not make {words} from the config of {name!r}", step):
        found = transformers.AutoConfig
        config = found.for_model(**known) if known else found.from_pretrained(place, revision=revision)
    entry = kind_named(kind, config)
    with as_source_error(f"Could not make {entry.words} from the config of {name!r}", step):
        stored = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, entry.auto_class).from_config(config, dtype=dtype or stored)
    return model
