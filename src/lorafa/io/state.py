"""State dicts of single adapters in memory, by PEFT's functions and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import AdapterError, CheckpointError
from lorafa.io.layouts import as_peft
from lorafa.io.layouts.base import Raw
from lorafa.io.layouts.names import BaseNames
from lorafa.io.load import fitting, put_in
from lorafa.io.peft_format import (
    file_tensors,
    has_start,
    named_as_in_files,
    pristine_tensors,
)
from lorafa.io.strict import compare
from lorafa.io.tables import which_tables
from lorafa.layers.host import Host
from lorafa.surgery.activate import require_adapters, require_nothing_merged, require_unmerged, without_start
from lorafa.surgery.walk import PREFIX, hosts, uncompiled, uncompiled_name, user_model

_STATE_DICT = "The state dict"
"""What errors call tensors that come from no file."""


def parts_of(model: nn.Module) -> tuple[nn.Module, dict[str, Any], str]:
    """The user's model, its configs, and the prefix its keys have in a file."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(
            f"This {type(model).__name__} carries no adapter of lorafa. Call get_peft_model or inject_adapter_in_model."
        )
    inner = user_model(model)
    return inner, configs, "" if inner is model else PREFIX


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under the names they have in a file, the adapter's name taken out.

    Args:
        model: a PeftModel, or a model with injected adapters (then the keys have no prefix).
        state_dict: take the values from here, under the model's live names.
        unwrap_compiled: the model is a torch.compile wrapper: look inside it.

    Raises:
        AdapterError: no such adapter.
        CheckpointError: ``state_dict`` lacks a tensor of the adapter.
    """
    if unwrap_compiled:
        model = uncompiled(model)
    inner, configs, prefix = parts_of(model)
    require_adapters(inner, [adapter_name])
    config = configs[adapter_name]
    tables = which_tables(config, inner, save_embedding_layers)
    tensors = file_tensors(inner, adapter_name, config, state_dict=state_dict, tables=tables)
    return {prefix + key: value for key, value in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fill one adapter from tensors named as :func:`get_peft_model_state_dict` names them.

    Those of another version of the model are brought to the layers of this one, as when a file is loaded. Scalings are
    not in a state dict: they are taken for those of the adapter that is there.

    Args:
        ignore_mismatched_sizes: leave tensors of another shape as they are in the model; a warning lists them.
        low_cpu_mem_usage: PEFT's; an adapter made on the meta device gets its memory here in any case.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, both empty.

    Raises:
        AdapterError: no such adapter, or it is merged.
        CheckpointError: the tensors do not fit; nothing was changed.
    """
    inner, configs, _ = parts_of(model)
    require_adapters(inner, [adapter_name])
    require_unmerged(inner, adapter_name, "loading other values into it")
    config, with_start = configs[adapter_name], has_start(inner, adapter_name)
    tensors = named_as_in_files(inner, adapter_name, peft_model_state_dict)
    converted = as_peft(Raw(Path(_STATE_DICT), {}, config, tensors, {}), BaseNames(inner))
    fits = fitting(
        inner, adapter_name, config, tensors if converted is None else converted[1],
        with_start=with_start, path=_STATE_DICT, ignore_sizes=ignore_mismatched_sizes,
    )  # fmt: skip
    put_in(inner, adapter_name, config, fits, with_start=with_start)
    return torch.nn.modules.module._IncompatibleKeys([], [])


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base weights, without what was merged into them, under the names they had before any adapter was put on.

    Args:
        model: a PeftModel, or a model with injected adapters.
    """
    return {name: tensor.detach() for name, tensor in _base_tensors(user_model(model))}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Give the base other weights, named as :func:`get_base_model_state_dict` names them; adapters stay as they are.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, both empty if ``strict``.

    Raises:
        AdapterError: an adapter is merged into the base, or its start taken out of it.
        CheckpointError: a tensor has another shape or, if ``strict``, is missing or unknown; nothing was changed.
    """
    inner = user_model(model)
    require_nothing_merged(inner)
    if (changed := without_start(inner)) is not None:
        require_unmerged(inner, changed, "loading other base weights")
    own = dict(_base_tensors(inner))
    given = {uncompiled_name(key): tensor for key, tensor in state_dict.items()}
    found = compare(given, own)
    if not strict:
        found = replace(found, missing=[], unexpected=[])
    if found:
        raise CheckpointError(f"The state dict does not fit the base.\n{found.describe()}\nNothing was loaded.")
    with torch.no_grad():
        for name, tensor in given.items():
            if name in own:
                own[name].copy_(tensor)
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the user's model, by the names they had before any layer was wrapped."""
    pristine = pristine_tensors(hosts(model))
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, Host):
            stack.append((path, module.get_submodule(module.wrapped_path)))
            continue
        module = uncompiled(module)
        lasting = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **lasting}.items():
            if tensor is not None:
                yield f"{path}.{key}".removeprefix("."), pristine.get(id(tensor), tensor)
        children = [
            (f"{path}.{key}".removeprefix("."), child) for key, child in module._modules.items() if child is not None
        ]
        stack.extend(reversed(children))
