"""The numbers of an adapter that is filled anew: ranks say what fits, alphas and the rule for scalings are the file's.

Tensors alone do not say how an adapter counts. What the config of a file says of it and no tensor shows is taken over
here, or has to be as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lorafa.adapter import Adapter
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.auxiliary import other_rows
from lorafa.surgery.hotswap import numbers_here
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import places

_NUMBERS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Fields of a config from which scalings follow."""
_OTHER_NAME = "Load it under a name of its own. Nothing was loaded."


@dataclass(frozen=True)
class Numbers:
    """What an adapter counts by once it is filled. Nothing is changed until :meth:`set`."""

    name: str
    config: LoraConfig
    """The adapter's own, with the numbers of the other one; the same object where they are equal."""
    layers: list[tuple[LoraLayer, float]]
    """Each layer with the alpha it gets."""
    use_rslora: bool

    def set(self) -> None:
        """Count by these numbers, whatever scaling the adapter was given since it was made."""
        for layer, alpha in self.layers:
            adapter = layer.adapters[self.name]
            adapter.alpha, adapter.use_rslora = alpha, self.use_rslora
            adapter.scaling = adapter.initial_scaling
            layer.adapters_changed()


def plan_numbers(
    model: nn.Module, name: str, current: LoraConfig, config: LoraConfig, *, ignore_sizes: bool = False
) -> Numbers:
    """Find out how adapter ``name`` counts once it holds the tensors of one of ``config``; the model is untouched.

    What is trained of it and its dropout stay.

    Args:
        model: the user's model.
        current: the config the adapter has now.
        config: of the file its tensors come from, which fit.
        ignore_sizes: layers of other ranks keep what they have, with its numbers.

    Raises:
        ConfigError: the two differ in what a tensor does not show: the formula or its settings, ranks, which rows of a
            table are trained; or the config does not speak of a layer that carries the adapter.
    """
    resolved = resolve(model, config, lenient=True, everything=list(places(model)))
    found, _ = numbers_here(resolved, name)
    carriers = layers_alone(model, name)
    unknown = [path for path, layer in carriers if layer not in found]
    if unknown:
        raise ConfigError(
            f"The file's config does not mean {shorten(unknown, 3)}, which adapter {name!r} is on and the file has "
            f"tensors of, so their scalings are not known. {_OTHER_NAME}"
        )
    targets = [target.module for target in resolved.targets]
    if (rows := other_rows(model, resolved.config, resolved.named, targets, name)) is not None:
        new, own = (shorten(map(str, indices), 8) or "no token" for indices in rows)
        raise ConfigError(
            f"trainable_token_indices: the file has the rows of {new}, and adapter {name!r} those of {own}. "
            f"{_OTHER_NAME}"
        )
    other = [(path, layer.adapters[name].rank, found[layer][0]) for path, layer in carriers]
    other = [(path, here, there) for path, here, there in other if here != there]
    if other and not ignore_sizes:
        path, here, there = other[0]
        raise ConfigError(
            f"{path}: adapter {name!r} has rank {here}, and the file's config says {there}, though the tensors have "
            f"equal shapes. {_OTHER_NAME}"
        )
    left = {path for path, _, _ in other}
    layers = [(layer, found[layer][1]) for path, layer in carriers if path not in left]
    changes = [one for one, alpha in layers if _counts_by(one.adapters[name]) != (alpha, config.use_rslora)]
    if other and changes:
        raise ConfigError(
            f"The file has other ranks than adapter {name!r} on {len(other)} layers, which keep what they have "
            f"(ignore_mismatched_sizes=True), and other scalings on {len(changes)} of the rest. {_OTHER_NAME}"
        )
    numbers = _with_numbers(current, resolved.config) if changes else current
    return Numbers(name, numbers, layers, config.use_rslora)


def _counts_by(adapter: Adapter) -> tuple[float, bool]:
    return adapter.alpha, adapter.use_rslora


def _with_numbers(current: LoraConfig, new: LoraConfig) -> LoraConfig:
    return replace(current, **{field: getattr(new, field) for field in _NUMBERS})
