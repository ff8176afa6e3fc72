"""Make room on a model for the ranks of adapters to come: PEFT's ``prepare_model_for_compiled_hotswap``."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, ConfigError, warn
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import slots_of, widened
from lorafa.settings.checks import check_choice, check_int
from lorafa.storage.tensors import is_part
from lorafa.surgery.activate import require_nothing_merged, without_start
from lorafa.surgery.doubled import alpha_factor, doubled, stacked_start
from lorafa.surgery.given import lora_config
from lorafa.surgery.walk import lora_layers, require_module, uncompiled, user_model

_SIZES = ("out_features", "out_channels"), ("in_features", "in_channels")
"""What modules of A, and of B, call their number of ranks."""


@dataclass(frozen=True)
class _Room:
    """An adapter on one layer, and the slots it is to have."""

    layer: LoraLayer
    name: str
    slots: int
    stacks: bool
    """Whether its frozen start is stacked onto its factors, which doubles its rank."""


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Let the adapters of a model be exchanged by :func:`lorafa.hotswap_adapter` without compiling it again.

    Call it once, after the first adapter is loaded and before ``torch.compile``. Factors get room for ``target_rank``
    ranks, of which those that no adapter uses are zeros, and scalings become tensors. Outputs stay as they are, and so
    do the adapters' own ranks, their configs and files. An adapter with a frozen start (PiSSA and its like) becomes the
    plain LoRA of rank 2 r it is, wherever that has room, because adapters to come bring no start.

    Parameters stay the same objects with other sizes: make optimizers after it, gradients are dropped.

    Args:
        model: a PeftModel, or a model with injected adapters; every adapter on it is prepared.
        target_rank: the slots of every layer, the highest rank of all adapters to come; None: as many as now, or as
            ``config`` needs.
        config: of adapters to come, one or several by name: refused if a rank needs more slots. PEFT sets their ranks;
            here they stay as they are.
        check_compiled: what to do if a part of the model is compiled already, which is then compiled again.

    Raises:
        AdapterError: the model has no adapters, is compiled, an adapter is merged, or has a higher rank, or a formula
            in which an empty rank would count.
        ConfigError: an argument is none of the allowed values, or a config's rank is above ``target_rank``.

    After any of them nothing was changed.
    """
    check_choice("check_compiled", check_compiled, ("error", "warn", "ignore"))
    if target_rank is not None:
        check_int("target_rank", target_rank, at_least=1)
    if config is not None:
        target_rank = _with_room_for(config, target_rank)
    configs = getattr(uncompiled(require_module(model)), "peft_config", None)
    layers = _unchanged_layers(model, check_compiled)
    adapters = [(path, layer, adapter) for path, layer in layers for adapter in layer.adapters.values()]
    rooms = [room for path, _, adapter in adapters if (room := _room(path, adapter, target_rank)) is not None]
    if stacked := {room.name for room in rooms if room.stacks}:
        _require_all_stacked(rooms, stacked)
        if not isinstance(configs, MutableMapping):
            raise AdapterError(
                f"Adapter {min(stacked)!r} has a frozen start, so its config changes with it, and this "
                f"{type(model).__name__} holds none. Pass the PeftModel."
            )
        for name in stacked:
            configs[name] = doubled(configs[name])
    for room in rooms:
        _make(room)
    for _, layer, adapter in adapters:
        _make_exchangeable(layer, adapter)


def _with_room_for(config: Any, target_rank: int | None) -> int:
    configs = list(config.values()) if isinstance(config, Mapping) else [config]
    if not configs:
        raise ConfigError("config is empty. Pass the LoraConfig of an adapter, a dict of them, or None.")
    found = [lora_config(one) for one in configs]
    needed = max(rank for one in found for rank in (one.r, *one.rank_pattern.values()))
    if target_rank is not None and needed > target_rank:
        raise ConfigError(
            f"config asks for rank {needed}, which target_rank={target_rank} has no room for. Set target_rank={needed}."
        )
    return needed if target_rank is None else target_rank


def _unchanged_layers(model: nn.Module, check_compiled: str) -> list[tuple[str, LoraLayer]]:
    """The layers with adapters, on a model that is not compiled and whose base weights are as they were loaded.

    Raises:
        AdapterError: there are none, or something was changed.
    """
    inner = user_model(uncompiled(model))
    layers = list(lora_layers(inner))
    if not layers:
        raise AdapterError(
            f"The {type(model).__name__} has no adapters. Call prepare_model_for_compiled_hotswap once the first "
            "adapter is loaded, and before the model is compiled."
        )
    _check_compiled(model, check_compiled)
    require_nothing_merged(inner)
    if (changed := without_start(inner)) is not None:
        raise AdapterError(
            f"The start of adapter {changed!r} is taken out of the base weights. Call restore_base(model) first."
        )
    return layers


def _check_compiled(model: nn.Module, check: str) -> None:
    compiled = any(uncompiled(one) is not one or one._compiled_call_impl is not None for one in model.modules())
    if compiled and check == "error":
        raise AdapterError(
            "The model, or a part of it, is compiled already, and other sizes compile it again. Call "
            "prepare_model_for_compiled_hotswap *before* compiling the model, or pass check_compiled='ignore'."
        )
    if compiled and check == "warn":
        warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled, which will compile "
            "it again. Call it before compiling the model."
        )


def _room(path: str, adapter: Adapter, target_rank: int | None) -> _Room | None:
    """The slots an adapter is to have on a layer; None where it is another layer's, which has them.

    Raises:
        AdapterError: it cannot have them.
    """
    layer, name = adapter.layer, adapter.name
    assert isinstance(layer, LoraLayer)
    if adapter.tied_to is not None:
        return None
    now = slots_of(layer, name)
    slots = now if target_rank is None or not adapter.variant.has_own_update else target_rank
    if slots < adapter.rank:
        raise AdapterError(
            f"{path}: adapter {name!r} has rank {adapter.rank}, which target_rank={slots} has no room for. Set "
            f"target_rank={adapter.rank}, or higher if adapters to come need it. Nothing was changed."
        )
    slots = max(slots, now)
    groups = layer.rank_groups(layer.get_base_layer())
    if slots % groups:
        raise AdapterError(
            f"{path}: target_rank={slots} cannot be shared out over the convolution's groups={groups}. Set "
            f"target_rank={slots + groups - slots % groups}. Nothing was changed."
        )
    if slots == now:
        return _Room(layer, name, slots, stacks=False)
    if not adapter.variant.takes_empty_ranks:
        raise AdapterError(
            f"{path}: an empty rank would count in {adapter.variant.name}, so adapter {name!r} can only be exchanged "
            "for others of its own rank. Drop target_rank. Nothing was changed."
        )
    if adapter.start is not None:
        _check_start(path, adapter, slots)
    if any(parameter.is_meta for parameter in layer.stored_parameters(name).values()):
        raise AdapterError(
            f"{path}: adapter {name!r} rests elsewhere (device 'meta'). Make room before the model is offloaded, and "
            "after the adapter has its values. Nothing was changed."
        )
    if parts := [p for p in layer.stored_parameters(name).values() if p.dim() > 1 and is_part(p)]:
        raise AdapterError(
            f"{path}: only parts of {len(parts)} tensors of adapter {name!r} are in this process. Make room before the "
            "model is sharded. Nothing was changed."
        )
    return _Room(layer, name, slots, stacks=adapter.start is not None)


def _check_start(path: str, adapter: Adapter, slots: int) -> None:
    if not adapter.variant.stacks_start:
        raise AdapterError(
            f"{path}: adapter {adapter.name!r} subtracts a frozen start under {adapter.variant.name}, which adapters "
            "to come do not bring. Begin with one without a start, or drop target_rank. Nothing was changed."
        )
    if slots < 2 * adapter.rank:
        raise AdapterError(
            f"{path}: adapter {adapter.name!r} subtracts a frozen start, so its whole update has rank "
            f"{2 * adapter.rank}, which target_rank={slots} has no room for. Set target_rank={2 * adapter.rank}. "
            "Nothing was changed."
        )


def _require_all_stacked(rooms: list[_Room], stacked: set[str]) -> None:
    """Refuse an adapter whose start is stacked onto its factors on some layers and stays on others."""
    for room in rooms:
        adapter = room.layer.adapters[room.name]
        if room.name in stacked and not room.stacks and adapter.start is not None:
            raise AdapterError(
                f"Adapter {room.name!r} subtracts a frozen start, and its whole update has rank {2 * adapter.rank} on "
                f"some layers. Set target_rank={2 * adapter.rank}. Nothing was changed."
            )


@torch.no_grad()
def _make(room: _Room) -> None:
    layer, adapter = room.layer, room.layer.adapters[room.name]
    parameters = layer.stored_parameters(room.name)
    own = [parameters[key] for key in layer.factor_names]
    A, B = (parameter.data for parameter in own)
    if room.stacks:
        wide_A, wide_B = stacked_start(layer, room.name)
        A, B = layer.stored_A(wide_A), layer.stored_B(wide_B)
        del layer.lora_start[room.name]
        adapter.rank, adapter.alpha = 2 * adapter.rank, adapter.alpha * alpha_factor(adapter.use_rslora)
    for parameter, factor in zip(own, widened(layer, A, B, room.slots), strict=True):
        _resize(parameter, factor)
    adapter.slots = room.slots
    for module, sizes in zip(adapter.modules, _SIZES, strict=True):
        for size in sizes if module is not None else ():
            if size in module.__dict__:
                setattr(module, size, room.slots)


def _make_exchangeable(layer: LoraLayer, adapter: Adapter) -> None:
    """Keep what another adapter may set otherwise, scaling and dropout, where setting it compiles nothing again."""
    if adapter.tied_to is not None:
        own = adapter.tied_to[0].adapters[adapter.name]
        adapter.rank, adapter.alpha, adapter.slots = own.rank, own.alpha, own.slots
    adapter.hold_scaling()
    if type(layer.lora_dropout[adapter.name]) is nn.Identity:  # so that another probability can be set in it
        layer.lora_dropout[adapter.name] = nn.Dropout(0.0).train(layer.training)


def _resize(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.grad = None
    parameter.data = value.contiguous()
