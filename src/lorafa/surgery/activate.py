"""Which adapters count, which train, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lorafa.errors import AdapterError, BackendError, did_you_mean
from lorafa.layers.host import Host
from lorafa.surgery.walk import hosts, layers_of, lora_layers


def require_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Raises AdapterError unless ``names`` is no text and every name is one of the model's adapters."""
    if isinstance(names, str):
        raise AdapterError(f"Names of adapters are given as a list, found {names!r}. Pass [{names!r}].")
    _require_known(hosts(model), names)


def _require_known(found: Iterable[tuple[str, Host]], names: Sequence[str]) -> None:
    layers = layers_of(found)
    for name in names:
        if not any(name in layer.adapters for _, layer in layers):
            known = list(dict.fromkeys(name for _, layer in layers for name in layer.adapters))
            raise AdapterError(
                f"The model has no adapter {name!r}.{did_you_mean(str(name), known)} "
                f"It has: {', '.join(known) or '(none)'}."
            )


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make exactly ``names`` count and (unless ``inference_mode``) train; every other adapter is frozen.

    Raises:
        AdapterError: an unknown name, adapters are merged, or two of ``names`` want one place; nothing was changed.
    """
    listed = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    found = list(hosts(model))
    _require_known(found, listed)
    _require_nothing_merged(found)
    for path, host in found:
        host.require_together(listed, repr(path), trains=not inference_mode)
    changed = _without_start(found)
    if changed is not None and listed != [changed]:
        raise AdapterError(
            f"The start of adapter {changed!r} is taken out of the base weights, so no other can count. Call "
            "restore_base(model) before activating other adapters."
        )
    for _, host in found:
        host.set_adapter(listed, inference_mode)


def without_start(model: nn.Module) -> str | None:
    """The adapter whose start is taken out of the base weights (:func:`lorafa.mutate_base`), or None."""
    return _without_start(hosts(model))


def _without_start(found: Iterable[tuple[str, Host]]) -> str | None:
    return next((layer.active_adapters[0] for _, layer in layers_of(found) if layer.without_start), None)


def require_nothing_merged(model: nn.Module) -> None:
    """Raises AdapterError if some base weight holds an update: which adapters count cannot be changed then."""
    _require_nothing_merged(hosts(model))


def _require_nothing_merged(found: Iterable[tuple[str, Host]]) -> None:
    merged = next((layer.merged_adapters for _, layer in layers_of(found) if layer.merged_adapters), None)
    if merged:
        raise AdapterError(
            f"{', '.join(map(repr, merged))} {'is' if len(merged) == 1 else 'are'} merged into the base weights. "
            "Call unmerge_adapter() before activating other adapters."
        )


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let the parameters of adapters train, or freeze them, whether they count or not."""
    listed = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    require_adapters(model, listed)
    for _, host in hosts(model):
        host.set_requires_grad(listed, requires_grad)


def require_unmerged(model: nn.Module, name: str, before: str) -> None:
    """Raises AdapterError if some base weight holds the update of adapter ``name``."""
    for path, layer in lora_layers(model):
        if name in layer.merged_adapters:
            raise AdapterError(f"Adapter {name!r} is merged into {path!r}. Call unmerge_adapter() before {before}.")
    if without_start(model) == name:
        raise AdapterError(
            f"The start of adapter {name!r} is taken out of the base weights. Call restore_base(model) before {before}."
        )


def require_uniform(model: nn.Module, names: Sequence[str], doing: str) -> None:
    """Raises BackendError if the update of an adapter changes with the input and is no matrix; ``doing``: "Merging"."""
    for path, layer in lora_layers(model):
        for name in names:
            if name in layer.adapters and not layer.adapters[name].variant.uniform:
                raise BackendError(
                    f"{doing} adapter {name!r}: its update of {path!r} ({layer.adapters[name].variant.name}) changes "
                    "with the input, so there is no matrix that could be added to the weight. Keep the adapter beside "
                    "the model. Nothing was changed."
                )


def delete_adapter(model: nn.Module, name: str, successor: str | None = None) -> None:
    """Remove an adapter and its parameters from every layer, and activate ``successor`` if there is one.

    Raises:
        AdapterError: an unknown name, the adapter is merged, or another one is and there is a successor; nothing was
            changed.
    """
    require_adapters(model, [name] if successor is None else [name, successor])
    require_unmerged(model, name, "deleting it")
    if successor is not None:
        require_nothing_merged(model)
    for _, host in hosts(model):
        host.detach_adapter(name)
    if successor is not None:
        set_adapter(model, successor)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Let the active adapters count, or run the base model alone."""
    for _, host in hosts(model):
        host.enable_adapters(enabled)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model alone for the length of a with-block, merged or not; what was enabled is so again after it."""
    was = [(host, host.disable_adapters) for _, host in hosts(model)]
    enable_adapters(model, False)
    try:
        yield model
    finally:
        for host, off in was:
            host.enable_adapters(not off)
