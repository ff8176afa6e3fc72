"""Files that hold adapters of several models, as those of diffusion pipelines do: which is the one for this model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, shorten, warn
from lorafa.io.layouts.base import NORMS, Factors, Raw, most_common, tidy
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


def rank_of(raw: Raw, name: str, A: Tensor, B: Tensor) -> int:
    """The rank of a layer's A (r, in) and B (out, r), or kernels of these.

    Raises:
        CheckpointError: they have no such shapes.
    """
    if A.dim() < 2 or B.dim() != A.dim() or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise CheckpointError(
            f"{raw.path}: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, which are no (r, in) and (out, r). "
            "Nothing was loaded."
        )
    return int(A.shape[0])


def alpha_of(raw: Raw, name: str, alpha: Tensor | None, rank: int) -> float:
    """The alpha of a layer; without one, and with 0, it is the rank, so that the update is B A.

    Raises:
        CheckpointError: it is no number, or less than 0.
    """
    if alpha is None:
        return rank
    if alpha.numel() != 1 or alpha.double().item() < 0:
        raise CheckpointError(
            f"{raw.path}: the alpha of {name} has to be one number, 0 or more, found a tensor {tuple(alpha.shape)}"
            f"{f' of {alpha.item()}' if alpha.numel() == 1 else ''}. Nothing was loaded."
        )
    return tidy(alpha.double().item() or rank)


def require_all_or_none(raw: Raw, having: Collection[str], names: Collection[str]) -> None:
    """Raises CheckpointError where some layers have an alpha and others have none, so that some was lost."""
    if having and (lacking := [name for name in names if name not in having]):
        raise CheckpointError(
            f"{raw.path}: {len(lacking)} of {len(names)} layers have no alpha, and the others have one: "
            f"{shorten(lacking, 3)}. Fetch the file again. Nothing was loaded."
        )


def assumed_config(factors: Mapping[str, Factors]) -> LoraConfig:
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
