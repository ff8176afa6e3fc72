"""Fold adapters into weights, and take them off. All layers or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafa.errors import BackendError
from lorafa.layers.base import LoraLayer
from lorafa.surgery.activate import require_adapters, require_uniform
from lorafa.surgery.replicate import put_back, require_not_replicated
from lorafa.surgery.ties import SharedRows, share_merged
from lorafa.surgery.untied import loosen, says_tied
from lorafa.surgery.walk import Parents, hosts, lora_layers, wrappers


def merge_adapter(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Put the updates of ``adapter_names`` (default: the active ones) into the base weights until unmerged.

    Every sum is taken in float32 from the pristine weight and rounded once; the pristine weights are kept, so that
    :func:`unmerge_adapter` restores them bit for bit. Costs a second copy of the adapted weights.

    Raises:
        AdapterError: an unknown adapter, two that want one place, or a merged weight would not be finite; nothing was
            merged.
        BackendError: a layer cannot hold the update; nothing was merged.
    """
    if adapter_names is not None:
        require_adapters(model, adapter_names)
    require_not_replicated(model)
    for path, wrapper in wrappers(model):
        wrapper.require_together(_folded_in(model, wrapper.active_adapters, adapter_names), repr(path), trains=False)
    layers = [(path, layer, layer.mergeable(adapter_names)) for path, layer in lora_layers(model)]
    require_uniform(model, [*dict.fromkeys(name for _, _, names in layers for name in names)], "Merging")
    with_names = [(path, layer, names) for path, layer, names in layers if names != layer.merged_adapters]
    merged = [(layer, _merged_base(path, layer, names), names) for path, layer, names in with_names]
    share_merged(merged)
    for layer, base, names in merged:
        layer.put_merged(base, names)


def require_mergeable(model: nn.Module) -> None:
    """Raises BackendError for active adapters that no weight could take in, before they are trained for it."""
    require_not_replicated(model)
    active = dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.active_adapters)
    require_uniform(model, list(active), "Merging")


def _merged_base(path: str, layer: LoraLayer, names: Sequence[str]) -> nn.Module:
    try:
        return layer.merged_base(names)
    except BackendError as error:
        raise BackendError(f"{path}: {error}") from error


def unmerge_adapter(model: nn.Module) -> None:
    """Bring the pristine base weights back, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def unload(model: nn.Module, *, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Take every wrapper of lorafa off the model, with the updates folded in if ``merge``, and return it.

    Without ``merge`` every weight is the pristine one, bit for bit, and layers that ``layer_replication`` has put there
    are gone. ``adapter_names`` (default: the active ones) are
    the adapters to fold in; the same names choose among copies of ``modules_to_save`` and trained rows.

    Raises:
        AdapterError, BackendError: as :func:`merge_adapter`; the model is as it was.
    """
    if merge:
        merge_adapter(model, adapter_names)
    tied = says_tied(model)
    if not merge:
        unmerge_adapter(model)
    chosen = {id(host): _folded_in(model, host.active_adapters, adapter_names) for _, host in hosts(model)}
    parents, tables = Parents(model), SharedRows()
    for _, host in reversed(list(hosts(model))):  # inner wrappers first
        names = chosen[id(host)] if merge else []
        plain = host.unwrapped(names)
        tables.share(host, plain, names)
        parents.replace(host, plain)
    if merge and tied:
        loosen(model)
    put_back(model)
    return model


def _folded_in(model: nn.Module, active: Sequence[str], adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters a merge folds in: those that are merged already, and the named ones (default: the active ones)."""
    merged = [name for _, layer in lora_layers(model) for name in layer.merged_adapters]
    return list(dict.fromkeys([*merged, *(active if adapter_names is None else adapter_names)]))
