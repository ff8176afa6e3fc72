"""Fold adapters into weights, and take them off. All layers or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafa.errors import warn
from lorafa.surgery.adapters import require_adapters
from lorafa.surgery.ties import SharedRows, share_merged
from lorafa.surgery.walk import Parents, hosts, lora_layers


def merge_adapter(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Put the updates of ``adapter_names`` (default: the active ones) into the base weights until unmerged.

    Every sum is taken in float32 from the pristine weight and rounded once; the pristine weights are kept, so that
    :func:`unmerge_adapter` restores them bit for bit. Costs a second copy of the adapted weights.

    Raises:
        AdapterError: an unknown adapter, or a merged weight would not be finite; nothing was merged.
        BackendError: a layer cannot hold the update; nothing was merged.
    """
    if adapter_names is not None:
        require_adapters(model, adapter_names)
    layers = [(layer, layer.mergeable(adapter_names)) for _, layer in lora_layers(model)]
    merged = [(layer, layer.merged_base(names), names) for layer, names in layers if names != layer.merged_adapters]
    share_merged(merged)
    for layer, base, names in merged:
        layer.put_merged(base, names)


def unmerge_adapter(model: nn.Module) -> None:
    """Bring the pristine base weights back, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def unload(model: nn.Module, *, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Take every wrapper of lorafa off the model, with the updates folded in if ``merge``, and return it.

    Without ``merge`` every weight is the pristine one, bit for bit. ``adapter_names`` (default: the active ones) are
    the adapters to fold in; the same names choose among copies of ``modules_to_save`` and trained rows.

    Raises:
        AdapterError, BackendError: as :func:`merge_adapter`; the model is as it was.
    """
    if merge:
        merge_adapter(model, adapter_names)
    ties = _says_tied(model)
    if not merge:
        unmerge_adapter(model)
    parents, tables = Parents(model), SharedRows()
    for _, host in reversed(list(hosts(model))):  # inner wrappers first
        chosen = host.active_adapters if adapter_names is None else list(adapter_names)
        plain = host.plain(chosen if merge else [])
        tables.share(host, plain, chosen)
        parents.replace(host, plain)
    if merge:
        _loosen(model, ties)
    return model


def _says_tied(model: nn.Module) -> bool:
    """Whether the model says that its head shares the weight of its embedding."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def _loosen(model: nn.Module, tied: bool) -> None:
    """Correct ``config.tie_word_embeddings`` where merging gave head and embedding different weights."""
    if not tied or not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is embedding.weight or head.weight.shape != embedding.weight.shape:
        return
    if (head.weight == embedding.weight).all():
        head.weight = embedding.weight
        return
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    warn(
        "After merging, the output head and the input embedding hold different weights, so config.tie_word_embeddings "
        "was set to False: saved with it set to True, one of the two would be lost."
    )
