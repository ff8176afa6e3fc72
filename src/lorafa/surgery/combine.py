"""Adapters of a model combined to a new one beside them (``add_weighted_adapter``). All of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import used_factors
from lorafa.layers.wrapper import Wrapper
from lorafa.storage.tensors import is_part
from lorafa.surgery.activate import require_adapters, require_uniform, set_requires_grad
from lorafa.surgery.build import Options
from lorafa.surgery.combination import Combination
from lorafa.surgery.combine_layer import Combined, Share, combine_layer
from lorafa.surgery.combined_config import combined_config
from lorafa.surgery.combining import Combining
from lorafa.surgery.plan import Plan, PlannedLayer, check_adapter_name, plan
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import full_name, layers_at, places, wrappers


@dataclass(frozen=True)
class _Site:
    """A layer of the model that carries some of the adapters."""

    name: str
    """Full name of the layer, or of the parameter it adapts."""
    layer: LoraLayer
    inner: bool
    """Whether it is inside another one, with which it gets its adapters."""


def add_combination(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    weights: Mapping[str, float],
    adapter_name: str,
    asked: Combining,
    put_on: Callable[[Plan], Callable[[], None]],
) -> Combination:
    """Combine adapters of ``model`` to a new one, which is frozen and does not count until it is activated.

    Args:
        model: the user's model, wrapped layers in it.
        configs: of all its adapters.
        weights: adapter -> weight.
        put_on: carries out a plan and returns how to take it back.

    Raises:
        AdapterError, BackendError, ConfigError: the adapters cannot be combined so; the model is as it was.
    """
    check_adapter_name(places(model), adapter_name)
    require_adapters(model, list(weights))
    require_uniform(model, list(weights), "Combining")
    asked.say_what_it_adds(len(weights))
    beside = _held_beside(model, weights)
    mine = {name: configs[name] for name in weights}
    sites = _sites(model, mine)
    found = _at_one_scaling((site, _combined(site, weights, asked, adapter_name)) for site in sites)
    take_back = put_on(_planned(model, mine, adapter_name, found))
    try:
        for wrapper, source in beside:
            wrapper.copy_values(source, adapter_name)
        set_requires_grad(model, adapter_name, False)
    except BaseException:
        take_back()
        raise
    made = Combination(adapter_name, asked.combination_type, {site.name: one.error for site, one in found})
    made.log()
    return made


# ---- what is there


def _sites(model: nn.Module, configs: Mapping[str, LoraConfig]) -> list[_Site]:
    """Every layer that one of the adapters changes, once.

    Where all adapters share those of modules that share a weight (``ensure_weight_tying``), so does the result, and the
    modules that follow are left out. Else each of them gets its own.
    """
    tied = all(config.ensure_weight_tying for config in configs.values())
    seen: set[int] = set()
    sites: list[_Site] = []
    for site in _every_site(model):
        here = [site.layer.adapters[name] for name in configs if site.layer.has_update(name)]
        follows = tied and any(adapter.tied_to is not None for adapter in here)
        if here and not follows and id(site.layer) not in seen:
            seen.add(id(site.layer))
            sites.append(site)
    return sites


def _every_site(model: nn.Module) -> Iterator[_Site]:
    for place in places(model):
        for layer in layers_at(place):
            name = full_name(place, layer)
            yield _Site(name, layer, inner=False)
            for child in layer.inner_layers:
                inside = layer.get_base_layer().get_submodule(child)
                if isinstance(inside, LoraLayer):
                    yield _Site(f"{name}.{child}", inside, inner=True)


def _held_beside(model: nn.Module, weights: Mapping[str, float]) -> list[tuple[Wrapper, str]]:
    """Wrappers of what is trained beside the factors, with the one adapter that has something there.

    Raises:
        AdapterError: two have, or its weight is not 1: copies and rows stand in for the base's, and are no update.
    """
    found: list[tuple[Wrapper, str]] = []
    for path, wrapper in wrappers(model):
        held = [name for name in weights if name in wrapper.held()]
        if len(held) > 1:
            raise AdapterError(
                f"Adapters {held[0]!r} and {held[1]!r} both have {path!r} trained in full (modules_to_save, "
                "trainable_token_indices), which is no update that could be added up. Combine adapters of which one at "
                "most has it. Nothing was changed."
            )
        if held and weights[held[0]] != 1:
            raise AdapterError(
                f"Adapter {held[0]!r} has {path!r} trained in full (modules_to_save, trainable_token_indices), which "
                f"is copied as it is and cannot be weighted by {weights[held[0]]:g}. Give the adapter the weight 1, or "
                "train it without. Nothing was changed."
            )
        found += [(wrapper, name) for name in held]
    return found


@torch.no_grad()
def _combined(site: _Site, weights: Mapping[str, float], asked: Combining, adapter_name: str) -> Combined:
    layer = site.layer
    shares = [_share(site, name, weight) for name, weight in weights.items() if layer.has_update(name)]
    groups = layer.rank_groups(layer.get_base_layer())
    return combine_layer(asked, site.name, shares, of=len(weights), groups=groups, key=adapter_name)


def _share(site: _Site, name: str, weight: float) -> Share:
    """What adapter ``name`` changes on a layer.

    Raises:
        AdapterError: only a part of a factor is in this process, other modules are in the place of the factors, or its
            start has quantized the layer.
        BackendError: hooks or other modules make something else of its factors.
    """
    layer, adapter = site.layer, site.layer.adapters[name]
    if layer.origin is not None:
        raise AdapterError(
            f"{site.name}: the start of adapter {name!r} has quantized this layer (LoftQ), and its update belongs to "
            "the codes: a combination, which is plain LoRA, would be loaded on the weights there were before. Merge it "
            "instead (merge_into_dense). Nothing was changed."
        )
    if not adapter.as_made:
        layer.require_readable(adapter)
    A, B = used_factors(layer, name)
    if is_part(A, 2) or is_part(B, 2):
        raise AdapterError(
            f"{site.name}: only parts of adapter {name!r} are in this process (FSDP, DeepSpeed ZeRO-3). Combine "
            "adapters before the model is sharded. Nothing was changed."
        )
    dense = None if adapter.variant.plain else adapter.delta_weight(layer.base_weight())
    bias = None if adapter.bias is None else adapter.bias.detach() / adapter.times
    return Share(name, weight, float(adapter.scaling), A.detach(), B.detach(), bias, dense)


# ---- what is made


def _at_one_scaling(found: Iterable[tuple[_Site, Combined]]) -> list[tuple[_Site, Combined]]:
    """The combinations with the scaling of a layer for the layers inside it too: a config says one for all of them."""
    scaling, made = 1.0, []
    for site, one in found:  # a layer comes before those inside it
        scaling = scaling if site.inner else one.scaling
        made.append((site, one.at_scaling(scaling)))
    return made


def _planned(
    model: nn.Module, configs: Mapping[str, LoraConfig], adapter_name: str, found: Sequence[tuple[_Site, Combined]]
) -> Plan:
    """A plan with the combined factors in it.

    Raises:
        AdapterError: the config that results does not mean just these layers.
    """
    outer = [(site, one) for site, one in found if not site.inner]
    numbers = {site.name: (one.error.rank, one.alpha) for site, one in outer}
    parameters = {site.name: numbers[site.name] for site, _ in outer if site.layer.parameter_name is not None}
    modules = {name: both for name, both in numbers.items() if name not in parameters}
    has_bias = any(one.bias is not None for _, one in found)
    config = combined_config(configs, modules, parameters, lora_bias=has_bias)
    resolved = resolve(model, config, lenient=True, checked=True).called_by_model()
    options = Options(low_cpu_mem_usage=True, from_file=True)  # the factors are there: no memory is taken for others
    planned = plan(resolved, adapter_name, options)
    by_layer = {id(site.layer): one for site, one in found}
    meant = {id(layer.target.wrapper): layer.target.full_name for layer in planned.layers}
    apart = [site.name for site, _ in found if id(site.layer) not in meant]
    apart += [name for key, name in meant.items() if key not in by_layer]
    if apart:
        raise AdapterError(
            f"The layers of the adapters cannot be put into one config: {shorten(apart, 3)} would be on one side only. "
            "One of the adapters may train in full (modules_to_save) what another adapts. Nothing was changed."
        )
    return replace(planned, layers=[_filled(one, by_layer[id(one.target.wrapper)], has_bias) for one in planned.layers])


def _filled(planned: PlannedLayer, combined: Combined, has_bias: bool) -> PlannedLayer:
    bias = combined.bias
    if bias is None and has_bias:
        bias = combined.B.new_zeros(combined.B.shape[-2])
    parts = replace(
        planned.parts,
        A=combined.A,
        B=combined.B,
        bias=bias,
        rank=combined.error.rank,
        alpha=combined.alpha,
        dtype=combined.A.dtype,
    )
    return replace(planned, parts=parts)
