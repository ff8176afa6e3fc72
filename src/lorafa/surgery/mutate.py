"""The start of an adapter taken out of the base weights themselves, as the papers' own code does it."""

from __future__ import annotations

from torch import nn

from lorafa.errors import AdapterError, BackendError
from lorafa.layers.base import LoraLayer
from lorafa.settings.checks import found
from lorafa.surgery.activate import require_adapters, require_nothing_merged, require_uniform
from lorafa.surgery.ties import share_merged
from lorafa.surgery.walk import lora_layers


def mutate_base(model: nn.Module, adapter_name: str = "default") -> None:
    """Use W - s B0 A0 as the layer's weight, instead of subtracting s B0 A0 x from its output on every call.

    A training step then computes with rank r instead of 2 r. What it costs: W - s B0 A0 is rounded to the dtype of the
    weights, about 1.6e-3 of a bfloat16 base. The model then no longer starts exactly where the base is, and the file,
    which says s (B A - B0 A0) on W, differs from what was trained by as much. The pristine weights are kept: adapters
    can be disabled, merged and saved as before, and :func:`restore_base` takes this back. Merging, and a change of the
    scaling, do so too. Save with ``save_pretrained``: a ``state_dict`` of the whole model holds the changed weights,
    and can be loaded only into a model that was changed in the same way.

    Raises:
        AdapterError: no model, or an unknown adapter; it is not the only active one; others are on its layers; one is
            merged; it has no start to take out, or that was done.
        BackendError: a layer adds its update to the weight, or cannot hold another one (a quantized base).
            Nothing was changed in either case.
    """
    _require_model(model, "mutate_base")
    require_adapters(model, [adapter_name])
    require_nothing_merged(model)
    require_uniform(model, [adapter_name], "Taking the start out of the base of")
    carriers = [(path, layer) for path, layer in lora_layers(model) if adapter_name in layer.adapters]
    started = [(path, layer) for path, layer in carriers if layer.adapters[adapter_name].start is not None]
    if not started:
        raise AdapterError(
            f"Adapter {adapter_name!r} has no start that belongs to the base weights: there is nothing to take out of "
            "them. Only starts such as pissa or lora_ga have one."
        )
    for path, layer in started:
        _require_alone(path, layer, adapter_name)
        if layer.without_start:
            raise AdapterError(f"The start of adapter {adapter_name!r} is taken out of the base weights already.")
        if layer.backend.quantized:
            raise BackendError(
                f"{path}: a {type(layer.get_base_layer()).__name__} is quantized: its weight without the start would "
                "be rounded to codes again, which loses more than the start holds. Leave the base unchanged; the start "
                "is subtracted beside it. Nothing was changed."
            )
        if layer.changes_weight:
            raise BackendError(
                f"{path}: a {type(layer).__name__} adds its update to the weight in every forward pass; taking the "
                "start out of it would save nothing. Nothing was changed."
            )
    names = [adapter_name]
    changed = [(layer, _without_start(path, layer, adapter_name), names) for path, layer in started]
    share_merged(changed)
    for layer, base, _ in changed:
        layer.put_merged(base, [])


def _require_alone(path: str, layer: LoraLayer, name: str) -> None:
    """Raises AdapterError where other adapters are on the layer, or another choice than this one is active."""
    others = [other for other in layer.adapters if other != name]
    if others:
        raise AdapterError(
            f"{path}: every adapter of a layer reads its base weights, so {name!r} must be the only one there before "
            f"its start is taken out of them. Here are {', '.join(map(repr, layer.adapters))}. Call "
            f"delete_adapter({others[0]!r}) first. Nothing was changed."
        )
    if layer.active_adapters != [name]:
        raise AdapterError(
            f"{path}: {name!r} alone must be active before its start is taken out of the base weights. Active are: "
            f"{', '.join(map(repr, layer.active_adapters)) or 'none'}. Call set_adapter({name!r}) first. Nothing was "
            "changed."
        )


def _without_start(path: str, layer: LoraLayer, adapter_name: str) -> nn.Module:
    try:
        return layer.with_changes([-layer.adapters[adapter_name].start_product()], [adapter_name])
    except BackendError as error:
        raise BackendError(f"{path}: {error}") from error


def restore_base(model: nn.Module) -> None:
    """Bring the pristine weights back, bit for bit; the start is subtracted beside them again.

    Nothing is done to a model whose weights are pristine.

    Raises:
        AdapterError: ``model`` is no model.
    """
    _require_model(model, "restore_base")
    for _, layer in lora_layers(model):
        if layer.without_start:
            layer.unmerge()


def _require_model(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"{function} takes a model with adapters, found {found(model)}. Pass the PeftModel.")
