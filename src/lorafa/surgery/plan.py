"""Plan an adapter: build all of it for the layers that were found. What can fail fails here; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, shorten, warn
from lorafa.layers import LAYERS
from lorafa.layers.parts import AdapterParts
from lorafa.settings.checks import shown
from lorafa.surgery.auxiliary import AuxiliaryPlan, plan_auxiliary
from lorafa.surgery.build import Builder, Options
from lorafa.surgery.bypassed import Bypassed
from lorafa.surgery.mixed import BASE
from lorafa.surgery.offloaded import require_reachable
from lorafa.surgery.quantize import require_unshared
from lorafa.surgery.replicate import Replication
from lorafa.surgery.resolve import Resolved
from lorafa.surgery.stats import Stats
from lorafa.surgery.targets import Target
from lorafa.surgery.ties import Tie, find_ties
from lorafa.surgery.walk import Place, layers_at


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
    replication: Replication | None = None
    """The stack of layers that is put into the model first."""


def plan(resolved: Resolved, name: str, options: Options | None = None, stats: Stats | None = None) -> Plan:
    """Build adapter ``name`` without touching the model; raise if any part of it cannot be built.

    Raises:
        AdapterError: the name is taken or unusable.
        TargetError: something that is trained beside the factors cannot be, or a name of it matches nothing.
        ConfigError, BackendError: rank, variant, start or another setting do not go with a layer.
        CalibrationError: the start needs statistics that were not given.
    """
    options = options or Options()
    model, config, targets, named = resolved.model, resolved.config, resolved.targets, resolved.named
    check_adapter_name(resolved.everything, name)
    auxiliary = plan_auxiliary(model, config, named, [target.module for target in targets], lenient=resolved.lenient)
    beside = [*auxiliary.saved, *(module for module, _, _ in auxiliary.tokens)]
    require_reachable(resolved.everything, config, targets, beside)
    ties = find_ties(named, config, targets)
    tied = {tie.target for tie in ties}
    builder = Builder(resolved, name, options, stats or {})
    require_unshared(named, list(filter(builder.quantizes, targets)), str(config.init_lora_weights))
    layers = [layer for target in targets if target not in tied for layer in _layers(target, builder)]
    _say_fallbacks(config, layers)
    if config.lora_dropout and not options.from_file:
        _say_what_dropout_does(config, layers)
        _say_where_dropout_is_not(resolved)
    return Plan(name, config, targets, layers, ties, auxiliary, resolved.replication)


def _say_fallbacks(config: LoraConfig, layers: list[PlannedLayer]) -> None:
    reasons = [f"{layer.target.full_name} ({layer.parts.fallback})" for layer in layers if layer.parts.fallback]
    if reasons:
        warn(
            f"init_lora_weights={config.init_lora_weights!r} has nothing to start from on {len(reasons)} of "
            f"{len(layers)} layers, which start at random and compute what the base does: {shorten(reasons, 3)}. The "
            "adapter's file says so."
        )


def _say_what_dropout_does(config: LoraConfig, layers: list[PlannedLayer]) -> None:
    """Warn of starts that take something out of the base: A and B put it back, but for the columns dropped."""
    moved = (layer.parts.B for layer in layers if layer.parts.start is not None and not layer.parts.B.is_meta)
    if any(bool(B.any()) for B in moved):
        warn(
            f"lora_dropout={config.lora_dropout} with init_lora_weights={config.init_lora_weights!r}: A and B hold a "
            "part of the base, of which dropout takes away too, so in training the first outputs are not those of the "
            "base but worse. Set lora_dropout=0."
        )


def _say_where_dropout_is_not(resolved: Resolved) -> None:
    bypassed = Bypassed(resolved.model, resolved.named)
    names = [t.name for t in resolved.targets if t.parameter is None and bypassed.reads(t.name)]
    if names:
        warn(
            f"lora_dropout={resolved.config.lora_dropout} does not act where the model multiplies by a layer's weight "
            f"instead of calling it, as it does, always or in some kernels, with {shorten(names, 3)}: there the update "
            "is in the weight, and has no input to drop."
        )


LONGEST_NAME = 200
"""Bytes of an adapter's name: file systems take 255, and writing needs a few."""


def check_adapter_name(everything: Iterable[Place], name: str) -> None:
    """Raises AdapterError for a name that is taken or that could not be a part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"An adapter name is a non-empty string without a dot, found {shown(name)}.")
    if not name.isprintable() or any(mark in name for mark in "/\\") or len(name.encode()) > LONGEST_NAME:
        raise AdapterError(
            f"{shown(name)} cannot be an adapter name: the adapter is saved in a folder of that name. Call it by "
            f"letters, digits, blanks and - _, without slashes, in at most {LONGEST_NAME} bytes."
        )
    if name == BASE:
        raise AdapterError(f"{BASE!r} cannot be an adapter name: in adapter_names it stands for the base alone.")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise AdapterError(
            f"{name!r} cannot be an adapter name: torch's containers of modules have an attribute of that name. "
            f"Call it {name + '_1'!r}, for example."
        )
    if any(name in layer.adapters for place in everything for layer in layers_at(place)):
        raise taken(name)


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


def taken(name: str) -> AdapterError:
    """What to say of an adapter's name that the model has."""
    return AdapterError(
        f"The model already has an adapter {name!r}. Choose another name, or delete_adapter({name!r}) first."
    )
