"""Files that hold adapters of several models, as those of diffusion pipelines do: which is the one for this model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, shorten, warn
from lorafa.io.layouts.base import NORMS, Factors, Raw, most_common
from lorafa.io.layouts.names import BaseNames

Part = dict[str, dict[str, Tensor]]
"""Layer -> its tensors by the file's own names."""


def choose(raw: Raw, parts: Mapping[str, Part], base: BaseNames, first: str) -> Part:
    """The part of the file that is for this model; a warning names the others.

    Args:
        parts: by the name that the file has for the model of each.
        first: what A (r, in) is called, whose width tells apart models with the same names.

    Raises:
        CheckpointError: none is, or more than one may be.
    """
    fits = [name for name, part in parts.items() if _fits(part, base, first)]
    if len(fits) > 1:
        raise CheckpointError(
            f"{raw.path} holds adapters for {' and '.join(fits)}, and all of them fit this model. Leave the others out "
            "of the file. Nothing was loaded."
        )
    if not fits:
        lacking = {name: [layer for layer in part if base.home(layer) is None] for name, part in parts.items()}
        nearest = min(parts, key=lambda name: len(lacking[name]) / max(1, len(parts[name])))
        said = (
            f"the model lacks {len(lacking[nearest])} of its {len(parts[nearest])} layers: "
            f"{shorten(lacking[nearest], 3)}"
            if lacking[nearest]
            else "its layers have other widths here"
        )
        raise CheckpointError(
            f"{raw.path} holds adapters for {', '.join(name or 'one model' for name in parts)}, and none of them fits "
            f"this model; of {nearest or 'it'}, which is nearest, {said}. Load it on the model inside the pipeline it "
            "was made for (pipeline.unet, pipeline.transformer, pipeline.text_encoder). Nothing was loaded."
        )
    others = {name: len(part) for name, part in parts.items() if name != fits[0]}
    if others:
        listed = ", ".join(f"{name} ({count} layers)" for name, count in others.items())
        warn(
            f"{raw.path} also holds adapters for other models of the pipeline, which were not loaded: {listed}. Load "
            "the file on those as well."
        )
    return parts[fits[0]]


def _fits(part: Part, base: BaseNames, first: str) -> bool:
    for name, tensors in part.items():
        home = base.home(name)
        if home is None or home not in base.layers:
            return False
        A = tensors.get(first)
        if A is not None and A.dim() > 1 and A.shape[1] != base.layers[home][1]:
            return False
    return True


def plain_config(factors: Mapping[str, Factors]) -> LoraConfig:
    """A config for what comes without one: the usual rank and alpha of the layers, whose names are the targets."""
    rank = most_common([one.rank for one in factors.values()])
    alpha = most_common([one.alpha for one in factors.values() if one.rank == rank])
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(factors),
        use_dora=any(NORMS in one.tensors for one in factors.values()),
        inference_mode=True,
    )
