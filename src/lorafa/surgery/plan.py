"""Plan an adapter: find its layers and build all of it. Everything that can fail fails here; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from lorafa.config import LoraConfig, require_available
from lorafa.errors import AdapterError, shorten, warn
from lorafa.layers import LAYERS
from lorafa.layers.parts import AdapterParts
from lorafa.surgery.auxiliary import AuxiliaryPlan, plan_auxiliary, with_heads, with_tied_ends
from lorafa.surgery.build import Builder, Options, Stats
from lorafa.surgery.offloaded import require_reachable
from lorafa.surgery.quantize import require_unshared
from lorafa.surgery.targets import Target, find_targets, resolved_targets
from lorafa.surgery.ties import Tie, find_ties
from lorafa.surgery.walk import lora_layers, places


@dataclass(frozen=True)
class PlannedLayer:
    target: Target
    parts: AdapterParts


@dataclass(frozen=True)
class Plan:
    """Everything an adapter needs, built; the model is untouched."""

    name: str
    config: LoraConfig
    """A copy, in which defaults that depend on the model are spelled out."""
    targets: list[Target]
    layers: list[PlannedLayer]
    """One a target, followed by those of its inner layers: the output projection of nn.MultiheadAttention."""
    ties: list[Tie]
    """Targets that have no layer of their own here: they count another target's adapter."""
    auxiliary: AuxiliaryPlan


def plan(
    model: nn.Module, config: LoraConfig, name: str, options: Options | None = None, stats: Stats | None = None
) -> Plan:
    """Build adapter ``name`` without touching the model; raise if any part of it cannot be built.

    Raises:
        NotAvailableError: the config asks for a feature this version does not have.
        AdapterError: the name is taken or unusable.
        TargetError: a pattern matches nothing, or something that cannot carry an adapter.
        ConfigError, BackendError: rank, variant, start or another setting do not go with a layer.
        CalibrationError: the start needs statistics that were not given.
    """
    options = options or Options()
    config.check()
    require_available(config)
    check_adapter_name(model, name)
    config = with_tied_ends(model, with_heads(config), lenient=options.from_file)
    targets = find_targets(model, config, lenient=options.from_file)
    config = replace(_with_layout(config, targets), target_modules=resolved_targets(model, config, targets))
    auxiliary = plan_auxiliary(model, config, [target.module for target in targets], lenient=options.from_file)
    require_reachable(model, config, targets, [*auxiliary.saved, *(module for module, _, _ in auxiliary.tokens)])
    ties = find_ties(list(places(model)), config, targets)
    tied = {tie.target for tie in ties}
    builder = Builder(config, name, options, stats or {})
    require_unshared(places(model), list(filter(builder.quantizes, targets)), str(config.init_lora_weights))
    layers = [layer for target in targets if target not in tied for layer in _layers(target, builder)]
    _say_fallbacks(config, layers)
    if config.lora_dropout and not options.from_file:
        _say_what_dropout_does(config, layers)
    return Plan(name, config, targets, layers, ties, auxiliary)


def _say_fallbacks(config: LoraConfig, layers: list[PlannedLayer]) -> None:
    reasons = [f"{layer.target.full_name} ({layer.parts.fallback})" for layer in layers if layer.parts.fallback]
    if reasons:
        warn(
            f"init_lora_weights={config.init_lora_weights!r} has nothing to start from on {len(reasons)} of "
            f"{len(layers)} layers, which start at random and compute what the base does: {shorten(reasons, 3)}. The "
            "adapter's file says so."
        )


def _say_what_dropout_does(config: LoraConfig, layers: list[PlannedLayer]) -> None:
    """Of a start that takes something out of the base: A and B put it back, but for the columns that are dropped."""
    moved = (layer.parts.B for layer in layers if layer.parts.start is not None and not layer.parts.B.is_meta)
    if any(bool(B.any()) for B in moved):
        warn(
            f"lora_dropout={config.lora_dropout} with init_lora_weights={config.init_lora_weights!r}: A and B hold a "
            "part of the base, of which dropout takes away too, so in training the first outputs are not those of the "
            "base but worse. Set lora_dropout=0, as the methods' authors do."
        )


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raises AdapterError for a name that is taken or that could not be a part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"An adapter name is a non-empty string without a dot, found {name!r}.")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise AdapterError(
            f"{name!r} cannot be an adapter name: torch's containers of modules have an attribute of that name. "
            f"Call it {name + '_1'!r}, for example."
        )
    if any(name in host.adapters for _, host in lora_layers(model)):
        raise AdapterError(
            f"The model already has an adapter {name!r}. Choose another name, or delete_adapter({name!r}) first."
        )


def _with_layout(config: LoraConfig, targets: list[Target]) -> LoraConfig:
    """The config with ``fan_in_fan_out`` as the layers are; here it changes nothing, in files PEFT reads it."""
    stored = {target.backend.fan_in_fan_out: target for target in targets}
    if not config.fan_in_fan_out or False not in stored:
        return config
    layer = stored[False]
    warn(
        f"fan_in_fan_out=True means weights stored as (in, out), but that of {layer.full_name!r}, a "
        f"{type(layer.base).__name__}, is (out, in): it is False there. Drop it; a layer's type says how it stores."
    )
    return config if True in stored else replace(config, fan_in_fan_out=False)


def _layers(target: Target, builder: Builder) -> Iterator[PlannedLayer]:
    yield PlannedLayer(target, builder.build(target))
    for child in LAYERS.get(target.backend.host).inner_layers:
        inner = replace(
            target,
            name=f"{target.name}.{child}",
            path=f"{target.path}.base_layer.{child}",
            module=target.base.get_submodule(child),
        )
        times = 2 if builder.config.attention_out_proj_twice else 1
        yield PlannedLayer(inner, replace(builder.build(inner), times=times))
