"""Exchange an adapter for another one in place: what has to agree, the numbers of the new one, and room for its ranks.

The tensors on the layers stay the same objects at the same addresses, and the scaling is a tensor, so that code which
torch.compile has made of the model goes on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, Variant
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, ConfigError, TargetError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import slots_of
from lorafa.spec import LayerSpec
from lorafa.surgery.build import initial_extras, trained_factors
from lorafa.surgery.given import lora_config
from lorafa.surgery.resolve import Resolved, resolve
from lorafa.surgery.walk import lora_layers, places
from lorafa.variants import formula_of, switches, variant_types

_SAME = (
    "lora_bias",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "layer_replication",
    "attention_out_proj_twice",
)
"""Fields that say which tensors there are beside A and B, and how they count; those of the formulas are added."""


def check_hotswap_configs_compatible(config0: LoraConfig, config1: LoraConfig) -> None:
    """Raise unless an adapter of ``config1`` can take the place of one of ``config0``.

    They must agree on the formula and its settings, and on what there is beside A and B. Ranks, alphas, patterns,
    ``use_rslora``, ``lora_dropout`` and the start may differ, as the numbers of the adapter follow; whether the ranks
    have room, and the layers are the same ones or fewer, is seen when the adapter is exchanged.

    Args:
        config0, config1: of the adapter that is there, and of the new one; PEFT's own are read too.

    Raises:
        ConfigError: a field differs that must not, or one of the two is no config of LoRA.
    """
    there, new = lora_config(config0), lora_config(config1)
    formulas = [" under ".join(one.name for one in variant_types(config)) for config in (there, new)]
    if formulas[0] != formulas[1]:
        raise ConfigError(
            f"The configs are not compatible for hot-swapping: the adapter that is there computes {formulas[0]}, the "
            f"new one {formulas[1]}. Load it with load_adapter under a name of its own."
        )
    for field in (*_SAME, *switches()):
        one, other = (getattr(config, field) for config in (there, new))
        if _plain(one) != _plain(other):
            raise ConfigError(
                f"The configs are not compatible for hot-swapping: {field} is {one!r} in the adapter that is there and "
                f"{other!r} in the new one. Load it with load_adapter under a name of its own."
            )


def _plain(value: Any) -> Any:
    """A value by which two configs are compared: the order of names does not count, and none is none."""
    if isinstance(value, (list, tuple, set)) and all(isinstance(one, (str, int)) for one in value):
        value = sorted(value, key=str)
    return value or None


@dataclass(frozen=True)
class _Number:
    """An adapter on one layer, with the numbers it is to have."""

    adapter: Adapter
    rank: int
    alpha: float
    is_empty: bool = False


@dataclass(frozen=True)
class Swap:
    """How the numbers of an adapter change when it is exchanged. Nothing is changed until :meth:`trying`."""

    name: str
    config: LoraConfig
    """The new one, with what depends on the model settled."""
    layers: list[LoraLayer]
    """All that carry the adapter."""
    numbers: list[_Number]
    emptied: list[tuple[LoraLayer, dict[str, Tensor]]]
    """Layers the new adapter is not on, with start values of what the formula has beside A and B there."""

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Let ranks be those of the new adapter, by which its tensors are read; as they were if the block fails."""
        before = [(one.adapter, one.adapter.rank, one.adapter.is_empty) for one in self.numbers]
        try:
            for one in self.numbers:
                one.adapter.rank, one.adapter.is_empty = one.rank, one.is_empty
            yield
        except BaseException:
            for adapter, rank, is_empty in before:
                adapter.rank, adapter.is_empty = rank, is_empty
            raise

    @torch.no_grad()
    def finish(self) -> None:
        """Once the tensors are exchanged: set all other numbers, and leave no update where the new adapter has none."""
        for layer, extras in self.emptied:
            for parameter in layer.stored_parameters(self.name).values():
                parameter.zero_()
            for kind, value in extras.items():
                layer.adapters[self.name].extra(kind).copy_(layer.store_extra(value))
        trains = trained_factors(self.config)
        for one in self.numbers:
            adapter = one.adapter
            adapter.alpha, adapter.use_rslora, adapter.trains = one.alpha, self.config.use_rslora, trains
            adapter.fallback = None
            adapter.scaling = adapter.initial_scaling
            _set_dropout(adapter, self.config.lora_dropout)
        for layer in self.layers:
            layer.adapters_changed()


def plan_swap(model: nn.Module, name: str, current: LoraConfig, config: LoraConfig) -> Swap:
    """Find out how adapter ``name`` becomes one of ``config``; the model is untouched.

    Args:
        model: the user's model.
        current: the config the adapter has now.

    Raises:
        ConfigError: the two configs are not compatible.
        TargetError: the new adapter is on layers that carry none now.
        AdapterError: its ranks have no room, or it leaves a layer out whose formula zeros do not switch off.
    """
    resolved = resolve(model, config, lenient=True, everything=list(places(model)))
    check_hotswap_configs_compatible(current, resolved.config)
    carriers = [(path, layer) for path, layer in lora_layers(model) if name in layer.adapters]
    wanted = _wanted(resolved, name)
    for path, layer in carriers:
        if layer in wanted:
            _check_rank(path, layer.adapters[name], wanted[layer][0])
    numbers, emptied = [], []
    for path, layer in carriers:
        adapter = layer.adapters[name]
        if layer in wanted:
            numbers.append(_Number(adapter, *wanted[layer]))
        else:
            numbers.append(_Number(adapter, adapter.rank, adapter.alpha, is_empty=True))
            if adapter.tied_to is None:
                emptied.append((layer, _extras_of_nothing(path, adapter)))
    return Swap(name, resolved.config, [layer for _, layer in carriers], numbers, emptied)


def _wanted(resolved: Resolved, name: str) -> dict[LoraLayer, tuple[int, float]]:
    """(rank, alpha) of every layer the new adapter is on.

    Raises:
        TargetError: some of them do not carry adapter ``name``.
        LoraError: as :func:`numbers_here`.
    """
    found, further = numbers_here(resolved, name)
    if further:
        raise TargetError(
            f"The new adapter is also on {len(further)} layers that adapter {name!r} is not on: "
            f"{shorten(further, 3)}. Hot-swapping exchanges values and wraps no layer: begin with the adapter that is "
            "on the most layers, or load this one with load_adapter under a name of its own. Nothing was changed."
        )
    return found


def numbers_here(resolved: Resolved, name: str) -> tuple[dict[LoraLayer, tuple[int, float]], list[str]]:
    """(rank, alpha) that a config gives the layers that carry adapter ``name``, and its layers that do not.

    Raises:
        ConfigError: a rank cannot be carried out on its layer, or the formula is another one there or has other
            settings.
    """
    found: dict[LoraLayer, tuple[int, float]] = {}
    further, types = [], variant_types(resolved.config)
    for target in resolved.targets:
        layer = target.wrapper
        if layer is None or name not in layer.adapters:
            further.append(target.full_name)
            continue
        config = resolved.config
        layer.check(target.full_name, target.base, target.rank, bias=config.lora_bias, dropout=config.lora_dropout)
        _check_formula(resolved.config, types, target.full_name, layer.adapters[name], target.rank)
        inner = (target.base.get_submodule(child) for child in layer.inner_layers)
        for one in (layer, *inner):
            assert isinstance(one, LoraLayer)
            found[one] = target.rank, target.alpha
    return found, further


def _check_rank(path: str, adapter: Adapter, rank: int) -> None:
    slots = slots_of(adapter.layer, adapter.name)  # type: ignore[arg-type]
    if rank == slots or (rank < slots and adapter.slots is not None and adapter.variant.takes_empty_ranks):
        return
    if not adapter.variant.takes_empty_ranks:
        raise AdapterError(
            f"{path}: adapter {adapter.name!r} has rank {slots} and the new one {rank}, and ranks that are left empty "
            f"would count in {adapter.variant.name}. Load it with load_adapter under a name of its own. Nothing was "
            "changed."
        )
    room = f"has rank {slots}" if adapter.slots is None else f"has slots for {slots} ranks"
    raise AdapterError(
        f"{path}: adapter {adapter.name!r} {room}, the new one has rank {rank}. Call "
        f"prepare_model_for_compiled_hotswap(model, target_rank={max(rank, slots)}) first, before the model is "
        "compiled. Nothing was changed."
    )


def _check_formula(config: LoraConfig, types: Sequence[type[Variant]], path: str, adapter: Adapter, rank: int) -> None:
    new = formula_of(types, config, _spec(adapter, path, rank, config.scaling(rank, adapter.alpha)))
    if _settings(new) != _settings(adapter.variant):
        same = new.name == adapter.variant.name
        raise ConfigError(
            f"{path}: {new.name} has other settings in the new adapter than in {adapter.name!r}. Load it with "
            "load_adapter under a name of its own. Nothing was changed."
            if same
            else f"{path}: the new adapter computes {new.name}, and {adapter.name!r} {adapter.variant.name}. Load it "
            "with load_adapter under a name of its own. Nothing was changed."
        )


def _settings(formula: Variant) -> list[tuple[type, dict[str, Any]]]:
    return [
        (type(one), {key: value for key, value in vars(one).items() if key != "inner" and not key.startswith("_")})
        for one in formula.chain()
    ]


def _spec(adapter: Adapter, path: str, rank: int, scaling: float) -> LayerSpec:
    layer = adapter.layer
    assert isinstance(layer, LoraLayer)
    return LayerSpec(
        name=path, kind=layer.kind, rank=rank, scaling=scaling, seed=0, is_table=layer.is_table,
        groups=layer.rank_groups(layer.get_base_layer()),
    )  # fmt: skip


def _extras_of_nothing(path: str, adapter: Adapter) -> dict[str, Tensor]:
    """Values of the formula's own tensors with which A = 0 and B = 0 change nothing.

    Raises:
        AdapterError: there are none, or the adapter has no memory here to be emptied.
    """
    variant, layer = adapter.variant, adapter.layer
    if not variant.takes_empty_ranks or adapter.start is not None:
        what = variant.name if adapter.start is None else "a frozen start"
        raise AdapterError(
            f"The new adapter leaves out {path}, and adapter {adapter.name!r} has {what} there, which zeros do not "
            "switch off. Load it with load_adapter under a name of its own. Nothing was changed."
        )
    if any(tensor.is_meta for tensor in layer.stored_parameters(adapter.name).values()):
        raise AdapterError(
            f"The new adapter leaves out {path}, and what adapter {adapter.name!r} has there rests elsewhere (device "
            "'meta'), where it cannot be emptied. Exchange adapters before the model is offloaded. Nothing was changed."
        )
    if not variant.extras:
        return {}
    A, B = torch.zeros_like(adapter.A), torch.zeros_like(adapter.B)
    spec = _spec(adapter, path, adapter.rank, adapter.initial_scaling)
    return initial_extras(variant, layer.base_weight(), A, B, None, spec, {})


def _set_dropout(adapter: Adapter, probability: float) -> None:
    held = adapter.layer.lora_dropout
    module = held[adapter.name]
    if type(module) is nn.Dropout:  # in place: compiled code goes on
        module.p = probability
    elif type(module) is nn.Identity and probability:
        held[adapter.name] = nn.Dropout(probability).train(module.training)
