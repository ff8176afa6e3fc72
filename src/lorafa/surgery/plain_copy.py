"""A second adapter on the layers of a first one, with other factors: plain LoRA, or what is over it (DoRA)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lorafa.adapter import Adapter, Variant
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.parts import AdapterParts
from lorafa.numerics.low_rank import padded
from lorafa.surgery.build import Options
from lorafa.surgery.doubled import doubled
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.patterns import exactly
from lorafa.surgery.plain_config import NO_START, defaults_of
from lorafa.surgery.plan import PlannedLayer
from lorafa.surgery.resolve import Resolved, resolve
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import wrappers

_SAME = 1e-12
"""How far two scalings may be apart by rounding."""


@dataclass(frozen=True)
class NewFactors:
    """Dense factors for one layer, which its scaling multiplies as it did the old ones."""

    A: Tensor
    """(r, in) or (E, r, in), in the dtype that the new adapter keeps them in."""
    B: Tensor
    """(out, r) or (E, out, r)."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Extra tensors of the formula over B A; others are not read."""

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def put_on(tuner: LoraModel, old: str, new: str, factors: Mapping[LoraLayer, NewFactors]) -> None:
    """Put adapter ``new`` beside ``old`` and let it alone count; it trains as the config of the old one says.

    Its config is that of the old one, with plain B A in the place of the formula inside, no start, and the ranks and
    alphas of the factors; copied modules and trained rows have the old one's values.

    Args:
        factors: of every layer that holds factors of the old adapter; tied ones follow theirs.

    Raises:
        AdapterError: the config of the old adapter means other layers than those that carry it.
        LoraError: as :meth:`LoraModel.plan_adapter` and :meth:`LoraModel.set_adapter`; the model is as it was.
    """
    olds = {layer: layer.adapters[old] for layer in factors}
    config = _plain(tuner.peft_config[old], olds.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the config means was said when it met the model
        resolved = resolve(tuner.model, config, lenient=True)
        _require_same_layers(resolved.targets, old, factors)
        resolved = _with_ranks(resolved, old, factors)
        planned = tuner.plan_adapter(resolved, new, Options(from_file=True, low_cpu_mem_usage=True))
    layers = [_filled(one, olds, factors, resolved.config) for one in planned.layers]
    take_back = tuner.apply_plan(replace(planned, layers=layers))
    try:
        for _, wrapper in wrappers(tuner.model):
            wrapper.copy_values(old, new)
        tuner.set_adapter(new, planned.config.inference_mode)
    except BaseException:
        take_back()
        raise


def _plain(config: LoraConfig, adapters: Iterable[Adapter]) -> LoraConfig:
    """The config with plain B A in the place of the innermost formula, without a start, and with its rank where that is
    twice the old one, because a start was subtracted."""
    adapters = list(adapters)
    off = defaults_of(_innermost(adapter.variant).switch for adapter in adapters)
    config = replace(config, **{**off, **NO_START})
    return config if all(adapter.start is None for adapter in adapters) else doubled(config)


def _require_same_layers(targets: Sequence[Target], old: str, factors: Mapping[LoraLayer, NewFactors]) -> None:
    """Raises AdapterError unless each target carries the old adapter, and all that carry it are targets."""
    without = [target.full_name for target in targets if target.wrapper is None or old not in target.wrapper.adapters]
    meant = [target.wrapper for target in targets if target.wrapper is not None]
    inner = [layer.get_base_layer().get_submodule(child) for layer in meant for child in layer.inner_layers]
    extra = sum(layer not in meant and layer not in inner for layer in factors)
    if without or extra:
        which = shorten(without, 3) if without else f"{extra} that it does not name"
        raise AdapterError(
            f"The config of adapter {old!r} and the layers that carry it do not agree: {which}. Another module has "
            "taken the place of a layer, or the config was changed since. Load the adapter again. Nothing was changed."
        )


def _innermost(variant: Variant) -> Variant:
    return variant.chain()[-1]


def _with_ranks(resolved: Resolved, old: str, factors: Mapping[LoraLayer, NewFactors]) -> Resolved:
    """The same with the ranks of the factors, and alphas that keep each layer's scaling; patterns name what differs."""
    config, targets = resolved.config, []
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    for target in resolved.targets:
        rank, alpha = _numbers(target, old, factors, config)
        key = exactly(target.full_name)
        if rank != target.rank:
            ranks[key] = rank
        if alpha != target.alpha:
            alphas[key] = alpha
        targets.append(replace(target, rank=rank, alpha=alpha))
    return resolved.changed(
        targets, rank_pattern=ranks | config.rank_pattern, alpha_pattern=alphas | config.alpha_pattern
    )


def _numbers(
    target: Target, old: str, factors: Mapping[LoraLayer, NewFactors], config: LoraConfig
) -> tuple[int, float]:
    """Rank and alpha of a target; its inner layers have the same."""
    layer = _layer_of(target)
    adapter = layer.adapters[old]
    owner = layer if adapter.tied_to is None else adapter.tied_to[0]
    inner = [layer.get_base_layer().get_submodule(child) for child in layer.inner_layers]
    rank = max(factors[one].rank for one in (owner, *inner))  # type: ignore[index]
    scaling = float(adapter.scaling) / adapter.times
    for alpha, of in ((adapter.alpha, adapter.rank), (target.alpha, target.rank)):
        if of == rank and config.scaling(rank, alpha) == scaling:
            return rank, alpha
    return rank, scaling / config.scaling(rank, 1.0)


def _layer_of(target: Target) -> LoraLayer:
    layer = target.wrapper
    assert layer is not None  # it carries the old adapter: _require_same_layers has asked
    return layer


def _filled(
    planned: PlannedLayer,
    olds: Mapping[LoraLayer, Adapter],
    factors: Mapping[LoraLayer, NewFactors],
    config: LoraConfig,
) -> PlannedLayer:
    """A planned layer with its factors, of zeros beyond their rank, and the scaling of the old ones."""
    layer, parts = _layer_of(planned.target), planned.parts
    adapter, own = olds[layer], factors[layer]
    ratio = float(adapter.scaling) / (parts.times * config.scaling(parts.rank, parts.alpha))
    B = own.B if abs(ratio - 1) < _SAME else own.B * ratio
    A, B = padded(own.A, B, parts.rank)
    bias = None if adapter.bias is None else adapter.bias.detach().clone()
    if bias is not None and abs(ratio - 1) >= _SAME:
        bias = bias * ratio
    made: AdapterParts = replace(
        parts, A=A.detach(), B=B.detach(), dtype=own.A.dtype, bias=bias,
        extras={kind: own.extras[kind].detach() for kind in parts.variant.extras},
    )  # fmt: skip
    return replace(planned, parts=made)
