"""The modules an adapter is kept in, ``lora_A``, ``lora_B`` and ``lora_dropout``: are they as lorafa made them?

The fast path reads their weights and calls none of them. Other people's tools put hooks on them or others in their
place, and then they are called as PEFT calls them: ``lora_B(lora_A(lora_dropout(x))) * scaling``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lorafa.adapter import AdaptedLayer, Adapter
from lorafa.backends.base import is_hooked
from lorafa.backends.offload import is_only_moved, rests_elsewhere
from lorafa.errors import AdapterError

_FACTORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = tuple(kind.forward for kind in _FACTORS)
_DROPOUTS = (nn.Identity, nn.Dropout)


def as_made(layer: AdaptedLayer, adapter: Adapter) -> bool:
    """Whether nothing is lost where the adapter's modules are read and not called.

    It is not so if there are hooks on them, or on all modules of the process, or others in their place. On the way of
    every call, so it tests flags only.
    """
    if layer.takes_dropout:
        dropout: nn.Module = layer._modules["lora_dropout"]._modules[adapter.name]  # type: ignore[union-attr, assignment]
        if type(dropout) not in _DROPOUTS or is_hooked(dropout):
            return False
    A, B = adapter.modules
    if A is not None and B is not None and not (_as_made(layer, adapter, A, B) and layer.fits(A, B)):
        return False
    if adapter.variant.extras and any(map(is_hooked, adapter.extra_holders())):
        return False
    return not (
        torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def _as_made(layer: AdaptedLayer, adapter: Adapter, A: nn.Module, B: nn.Module) -> bool:
    known = type(A) in _FACTORS and type(B) in _FACTORS and not is_hooked(A) and not is_hooked(B)
    return known and _biases_fit(layer, adapter, A, B)


def _biases_fit(layer: AdaptedLayer, adapter: Adapter, A: nn.Module, B: nn.Module) -> bool:
    has_bias = B._parameters.get("bias") is not None
    return A._parameters.get("bias") is None and (not has_bias or adapter.has_bias)


def fits(layer: AdaptedLayer, A: nn.Module, B: nn.Module) -> bool:
    """Whether ``lora_A`` and ``lora_B`` have the settings they were made with; linear ones have none."""
    return True


def require_readable(layer: AdaptedLayer, adapter: Adapter) -> None:
    """Raise AdapterError unless the weights of ``lora_A`` and ``lora_B`` say all that calling them would do.

    Hooks are not asked: what they do to an output is in no weight.
    """
    A, B = adapter.modules
    for name, held in (("lora_A", A), ("lora_B", B)):
        if held is not None and not (type(held).forward in _FORWARDS and _keeps_its_forward(held)):
            raise AdapterError(
                f"{name} of adapter {adapter.name!r} was replaced by a {type(held).__name__} or given another forward, "
                "so the update is no matrix that could be merged or measured. Put the module that was there back, or "
                "call the model as it is, unmerged."
            )
    if A is not None and B is not None and not (_biases_fit(layer, adapter, A, B) and layer.fits(A, B)):
        raise AdapterError(
            f"lora_A or lora_B of adapter {adapter.name!r} was replaced by one with a bias or with other settings, so "
            "its weights do not say all of the update. Put the module that was there back, or call the model as it "
            "is, unmerged."
        )


def _keeps_its_forward(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ or is_only_moved(module)


def require_uncalled(layer: AdaptedLayer, adapter: Adapter, why: str) -> None:
    """Raise AdapterError if somebody waits for calls of the adapter's modules where none of them is called.

    Args:
        why: they are not, for the error.
    """
    require_readable(layer, adapter)
    A, B = adapter.modules
    _require_unwatched(adapter, {"lora_A": A, "lora_B": B} | _extra_holders(adapter), why)
    _require_kept(layer, adapter)


def _extra_holders(adapter: Adapter) -> dict[str, nn.Module]:
    names = [extra.holder for extra in adapter.variant.extras.values()]
    return dict(zip(names, adapter.extra_holders(), strict=True))


def by_modules(layer: AdaptedLayer, adapter: Adapter, x: Tensor, *, drops: bool = True) -> Tensor:
    """s B A drop(x) - s B0 A0 x with the adapter's modules called, in the layout of the layer's output.

    Args:
        drops: False for an x that dropout has been applied to.

    Raises:
        AdapterError: somebody waits for a call of what is never called, or the factors would learn nothing.
    """
    _require_unwatched(adapter, _extra_holders(adapter), "its values are read")
    _require_kept(layer, adapter)
    A, B = adapter.modules
    called = adapter.variant.is_called(adapter)
    if not called:
        require_readable(layer, adapter)
        why = f"{adapter.variant.name} is computed from its weight"
        _require_unwatched(adapter, {"lora_A": A, "lora_B": B}, why)
    weight = None if A is None else next(A.parameters(), None)
    x = x if weight is None else x.to(weight.dtype)
    dropped = layer.lora_dropout[adapter.name](x) if drops and layer.takes_dropout else x
    if not called:
        start = None if dropped is x else adapter.start_of(dropped - x)
        change = adapter.low_rank(dropped)  # without the start, of which x sees all
        return change if start is None else change + start
    if A is None or B is None:
        change = layer.low_rank(dropped, adapter.A, adapter.B, adapter.scaling)
    else:
        z = adapter.variant.between(adapter, A(adapter.variant.before(adapter, dropped)))
        change = B(z) * adapter.scaling
    start = adapter.start_of(x)
    return change if start is None else change - start


def _require_unwatched(adapter: Adapter, modules: Mapping[str, nn.Module | None], why: str) -> None:
    for name, module in modules.items():
        if module is not None and is_hooked(module) and not (is_only_moved(module) and not _is_watched(module)):
            raise AdapterError(
                f"A hook is on {name} of adapter {adapter.name!r}, which is never called: {why}. The hook would never "
                "run. Remove it."
            )


def _is_watched(module: nn.Module) -> bool:
    """Whether torch's own hooks are on it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _require_kept(layer: AdaptedLayer, adapter: Adapter) -> None:
    if layer.training and torch.is_grad_enabled():
        for holder in layer.holders():
            if adapter.name in holder:
                held = holder[adapter.name]
                require_kept(adapter.name, held if isinstance(held, nn.Module) else holder)


def require_kept(name: str, holder: nn.Module) -> None:
    """Raise AdapterError if gradients of what an adapter trains would go to copies that hooks bring in for one call.

    Args:
        name: the adapter's.
        holder: the module that holds what it trains.
    """
    resting = (module for module in holder.modules() if rests_elsewhere(module))
    if any(parameter.requires_grad for module in resting for parameter in module.parameters(recurse=False)):
        raise AdapterError(
            f"Adapter {name!r} cannot be trained: its parameters rest elsewhere, and hooks of accelerate bring in a "
            "copy for each call, so gradients would be lost. Offload the base before the adapter is put on it, and "
            "what it trains stays in memory; or call eval() to run the model without training it."
        )
