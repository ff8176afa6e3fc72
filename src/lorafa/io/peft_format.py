"""An adapter as PEFT names it: the tensors of adapter_model.safetensors, out of a model and back into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lorafa.backends.offload import rests_elsewhere, value_of
from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, shorten
from lorafa.io.dense_factors import (
    Layers,
    as_stored,
    dense_factors,
    factor_keys,
    holds_dense,
    unfolded,
    with_other_factors,
)
from lorafa.io.key_names import bare, plain_names
from lorafa.io.strict import Misfit, compare
from lorafa.io.tables import Tables, base_entry, require_equal_tables, table_entries
from lorafa.io.ties import check_ties, tied_tensors
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.layers.parts import Stored
from lorafa.layers.slots import with_free, without_free
from lorafa.storage.tensors import can_be_gathered, is_part, whole
from lorafa.surgery.alone import Named, layers_alone, modules_alone
from lorafa.surgery.walk import PREFIX, hosts, joined, lora_layers, uncompiled_name

START_A, START_B = "lora_start.A", "lora_start.B"


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by their names in the user's model, whatever wrappers it had (:func:`plain_names`).

    Files of PEFT with ``bias="all"`` hold the biases of ``modules_to_save`` twice; one of the two is left out.

    Raises:
        CheckpointError: as :func:`plain_names`.
    """
    named = plain_names(tensors)
    copies = [key for key in named if ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in named]
    return {key: value for key, value in named.items() if key not in copies}


def named_as_in_files(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of adapter ``name``, named as in a file or as on this very model, by their names in a file.

    On the model they have the adapter's name in them, and what other adapters have put around their modules.
    """
    own = {str(entry.live): entry.key for entry in _of_adapter(modules_alone(model, name), name)}
    live = {key: bare(key) for key in tensors}
    if own.keys() == {found for found in live.values() if name in found.split(".")}:
        tensors = {own.get(live[key], key): tensor for key, tensor in tensors.items()}
    return without_prefix(tensors)


def entries(model: nn.Module, name: str, config: LoraConfig, *, tables: Tables = "none") -> Iterator[Stored]:
    """Every tensor of adapter ``name`` as it is stored, by its names from the model, frozen starts apart.

    In a file these are the names it has in a model without other adapters (:mod:`lorafa.surgery.alone`).

    Args:
        model: the user's model, wrapped layers in it.
        config: the adapter's; its ``bias`` says which base biases belong to the adapter.
        tables: which of the base's tables belong with it (:func:`lorafa.io.tables.which_tables`).
    """
    named = list(modules_alone(model, name))
    yield from _of_adapter(named, name)
    if config.bias != "none" or tables != "none":
        pristine = pristine_tensors(hosts(model))
        yield from _biases(named, config, pristine)
        yield from table_entries(model, name, pristine, tables)


def _of_adapter(named: Iterable[Named], name: str) -> Iterator[Stored]:
    """What the hosts of a model hold of an adapter."""
    for key, path, host in named:
        if isinstance(host, Host):
            yield from (_uncompiled(entry.at(key, path)) for entry in host.stored(name))


def _uncompiled(entry: Stored) -> Stored:
    """The entry by the names it has where no part of a module that is saved as a whole is compiled."""
    key, live = uncompiled_name(entry.key), None if entry.live is None else uncompiled_name(entry.live)
    return entry if key is entry.key and live is entry.live else replace(entry, key=key, live=live)


def pristine_tensors(found: Iterable[tuple[str, Host]]) -> dict[int, Tensor]:
    """Identity of a merged weight or bias -> the one it stands in for, which is what belongs with an adapter.

    Args:
        found: the hosts of a model (:func:`lorafa.surgery.walk.hosts`).
    """
    return {id(merged): kept for _, host in found for merged, kept in host.merged_parameters()}


def _biases(named: Iterable[Named], config: LoraConfig, pristine: Mapping[int, Tensor]) -> Iterator[Stored]:
    adapted = {id(one.module.get_base_layer()) for one in named if isinstance(one.module, LoraLayer)}
    for key, path, module in named if config.bias != "none" else ():
        bias = None if isinstance(module, Host) else module._parameters.get("bias")
        if bias is not None and (config.bias == "all" or id(module) in adapted):
            yield base_entry(joined(key, "bias"), joined(path, "bias"), bias, pristine)


def has_start(model: nn.Module, name: str) -> bool:
    """Whether adapter ``name`` subtracts a frozen start from its update."""
    return any(name in layer.lora_start for _, layer in lora_layers(model))


def file_tensors(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    tables: Tables = "none",
    with_start: bool = True,
    dense: bool = True,
) -> dict[str, Tensor]:
    """The tensors of adapter ``name`` as a file holds them, without prefix.

    s B A - s B0 A0 is written as the ordinary LoRA of rank 2 r it is: A and A0 stacked, B and -B0 side by side. Where
    the variant is no plain LoRA (DoRA), A0 and B0 go into keys of their own, which PEFT passes over. Where its dense
    factors are not those it stores (LoRA-SB), the dense ones are written, and the stored ones in keys of their own.

    Sharded tensors are gathered, which all processes have to do together (:func:`lorafa.storage.tensors.whole`).

    Args:
        state_dict: take values from here by their live names (a gathered state dict) instead of from the model.
        with_start: False gives A and B alone.
        dense: False gives A and B as they are stored, as PEFT's files have them.

    Raises:
        CheckpointError: ``state_dict`` lacks a tensor of the adapter, or only a part of one is here.
    """
    values = _values(model, list(entries(model, name, config, tables=tables)), state_dict, name)
    layers = layers_alone(model, name)
    return _arranged(layers, name, config, values, with_start=with_start, dense=dense)


def _arranged(
    layers: Layers, name: str, config: LoraConfig, values: dict[str, Tensor], *, with_start: bool, dense: bool
) -> dict[str, Tensor]:
    """The tensors of a file out of those that are stored, by key; on the meta device it is their shapes alone."""
    values |= without_free(layers, name, values)
    for path, layer in with_other_factors(layers, name) if dense else ():
        stored = {key: values[key] for key in factor_keys(path, layer)}
        made = dense_factors(path, layer, name, stored, values)
        values |= made | {unfolded(path, key): stored[key] for key in made}
    for path, layer, start in _starts(layers, name) if with_start else ():
        values |= _stacked(path, layer, layer.adapters[name].variant.stacks_start, start, values)
    values |= {key: values[key] / 2 for key in _factors_applied_twice(layers, config)}
    return values | tied_tensors(layers, name, values)


def _value(model: nn.Module, entry: Stored) -> Tensor:
    """The values of an entry, wherever they rest."""
    tensor = entry.tensor
    if tensor.is_meta and entry.live is not None:
        tensor = cast(Tensor, value_of(model.get_submodule(entry.live.rpartition(".")[0]), tensor))
    return tensor.detach()


def _stacked(
    path: str, layer: LoraLayer, stacks: bool, start: tuple[Tensor, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a file holds of one layer's A, B and start (A0, B0), for A and B among ``values``."""
    A0, B0 = start
    if not stacks:
        return {f"{path}.{START_A}": layer.stored_A(A0), f"{path}.{START_B}": layer.stored_B(B0)}
    key_A, key_B = (f"{path}.{key}" for key in layer.factor_names)
    A, B = layer.matrix_A(values[key_A]), layer.matrix_B(values[key_B])
    return {
        key_A: layer.stored_A(torch.cat([A, A0.to(A)], dim=-2)),
        key_B: layer.stored_B(torch.cat([B, -B0.to(B)], dim=-1)),
    }


def _split(
    path: str, layer: LoraLayer, stacks: bool, rank: int, values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The inverse of :func:`_stacked`: A and B by their keys where they change, and (A0, B0)."""
    if not stacks:
        return {}, (layer.matrix_A(values[f"{path}.{START_A}"]), layer.matrix_B(values[f"{path}.{START_B}"]))
    key_A, key_B = (f"{path}.{key}" for key in layer.factor_names)
    A, B = layer.matrix_A(values[key_A]), layer.matrix_B(values[key_B])
    own = {key_A: layer.stored_A(A[..., :rank, :]), key_B: layer.stored_B(B[..., :, :rank])}
    return own, (A[..., rank:, :], -B[..., :, rank:])


def _values(
    model: nn.Module, found: list[Stored], state_dict: Mapping[str, Tensor] | None, name: str
) -> dict[str, Tensor]:
    """The values of the entries by their names in a file, from the model itself or from a gathered state dict."""
    values: dict[str, Tensor] = {}
    missing, parts = [], []
    if state_dict is not None:
        state_dict = {uncompiled_name(key): tensor for key, tensor in state_dict.items()}
    for entry in found:
        own = state_dict is None or entry.live is None
        source = _value(model, entry) if own else in_state(state_dict or {}, str(entry.live))
        if source is None:
            missing.append(str(entry.live))
            continue
        alone = own and state_dict is not None  # the other processes may not be here to gather with
        value = None if alone and can_be_gathered(source) else whole(source, _dims(entry))
        if value is None:
            parts.append(entry.key)
        else:
            values[entry.key] = value
    if missing:
        raise CheckpointError(
            f"state_dict lacks {len(missing)} of the {len(found)} tensors of adapter {name!r}: {shorten(missing)}. "
            "Gather the whole state dict of the model, frozen adapters included; with save_embedding_layers=False no "
            "tables of the base are asked for."
        )
    if parts:
        raise CheckpointError(
            f"Only parts of {len(parts)} of the {len(found)} tensors of adapter {name!r} are in this process (FSDP, "
            f"DeepSpeed ZeRO-3): {shorten(parts)}. Gather the state dict of the model in all processes, and pass it "
            "as state_dict=."
        )
    return values


def in_state(state_dict: Mapping[str, Tensor], live: str) -> Tensor | None:
    """A tensor of the user's model in a state dict of it, or of the PeftModel around it; None if it is not there."""
    return next((state_dict[key] for key in (PREFIX + live, live) if key in state_dict), None)


def _dims(entry: Stored) -> int:
    """The least number of dimensions of the whole tensor: factors are matrices, or kernels."""
    return 2 if re.search(r"lora_(embedding_)?[AB](\.weight)?$", entry.key) else 0


def _factors_applied_twice(layers: Layers, config: LoraConfig) -> list[str]:
    """Keys of the B that PEFT multiplies in twice: those of inner layers, nn.MultiheadAttention's out_proj.

    An adapter that counts once here is stored with half of that B (exact in binary) and read with twice the B of a
    file, so that a file means the same to both libraries.
    """
    if config.attention_out_proj_twice:
        return []
    return [
        f"{path}.base_layer.{child}.{LoraLayer.factor_names[1]}"
        for path, layer in layers
        for child in layer.inner_layers
    ]


def _starts(layers: Layers, name: str) -> Iterator[tuple[str, LoraLayer, tuple[Tensor, Tensor]]]:
    for path, layer in layers:
        start = layer.adapters[name].start if name in layer.lora_start else None  # a tied one's is another layer's
        if start is not None:
            yield path, layer, (start.A, start.B)


@torch.no_grad()
def load_tensors(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], *, with_start: bool
) -> None:
    """Fill adapter ``name`` from the tensors of a file that fits (see :func:`misfit`).

    Raises:
        CheckpointError: they differ for what is one parameter here, or one rests elsewhere; nothing was changed.
    """
    layers = layers_alone(model, name)
    check_ties(model, name, tensors)
    own, tables = _filled(model, name, config, tensors)
    filled = [entry for entry in (*own, *tables) if entry.key in tensors]
    if tables:
        require_equal_tables(model, name, tensors)
    _require_memory(layers, name, filled)
    tensors = dict(tensors)
    tensors |= {key: 2 * tensors[key] for key in _factors_applied_twice(layers, config) if key in tensors}
    starts: list[tuple[Tensor, Tensor]] = []
    for path, layer, start in _starts(layers, name) if with_start else ():
        factors, stored = _split(path, layer, layer.adapters[name].variant.stacks_start, start[0].shape[-2], tensors)
        tensors |= factors
        starts += zip(start, stored, strict=True)
    if holds_dense(layers, name, tensors, with_start):
        tensors = as_stored(layers, name, tensors)
    tensors |= with_free(layers, name, tensors)
    for live, value in starts:
        live.copy_(value)
    for entry in filled:
        entry.tensor.data.copy_(tensors[entry.key])
    for _, layer in layers:
        layer.adapters_changed()


def _require_memory(layers: Layers, name: str, filled: Iterable[Stored]) -> None:
    starts = (layer.lora_start[name] for _, layer in layers if name in layer.lora_start)
    resting = [e.key for e in filled if e.tensor.is_meta] + ["lora_start" for s in starts if rests_elsewhere(s)]
    if resting:
        raise CheckpointError(
            f"Adapter {name!r} cannot be filled: {shorten(resting, 3)} {'rests' if len(resting) == 1 else 'rest'} "
            "elsewhere (device 'meta'), and hooks of accelerate bring in a copy for each call. Load the adapter before "
            "the model is offloaded, or take the hooks off with accelerate.hooks.remove_hook_from_submodules. Nothing "
            "was loaded."
        )


def wanted_tensors(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    *,
    with_start: bool,
    values: bool = True,
) -> dict[str, Tensor]:
    """What a file of adapter ``name`` would hold; whole tables only if ``tensors`` has them: some files do.

    Args:
        values: False makes tensors of the same shapes on the meta device, which hold none.

    Raises:
        CheckpointError: the adapter, or what else the file holds, is sharded here, so that nothing can be filled in.
    """
    own, tables = _filled(model, name, config, tensors)
    filled = [*own, *tables]
    if parts := [entry.key for entry in filled if is_part(entry.tensor, _dims(entry))]:
        raise CheckpointError(
            f"Adapter {name!r} cannot be filled from a file: only parts of {shorten(parts, 3)} are in this process "
            "(FSDP, DeepSpeed ZeRO-3). Load the file before the model is sharded. Nothing was loaded."
        )
    read = _value if values else _shape
    found = {entry.key: read(model, entry) for entry in own}
    layers = layers_alone(model, name)
    dense = holds_dense(layers, name, tensors, with_start)
    want = _arranged(layers, name, config, found, with_start=with_start, dense=dense)
    return {entry.key: entry.tensor.detach() for entry in tables} | want


def _filled(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[list[Stored], list[Stored]]:
    """What a file fills of adapter ``name``, and of the base's tables those it holds."""
    own = list(entries(model, name, config))
    if not tensors.keys() - {entry.key for entry in own}:
        return own, []
    pristine = pristine_tensors(hosts(model))
    return own, [entry for entry in table_entries(model, name, pristine) if entry.key in tensors]


def _shape(model: nn.Module, entry: Stored) -> Tensor:
    return torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, device="meta")


def misfit(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], *, with_start: bool
) -> Misfit:
    """How the tensors of a file differ from those adapter ``name`` has; empty if they fit."""
    return compare(tensors, wanted_tensors(model, name, config, tensors, with_start=with_start, values=False))
