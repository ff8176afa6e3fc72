"""What methods add to the loss, summed over a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafa.surgery.activate import require_adapters
from lorafa.surgery.walk import lora_layers, require_module


def penalty(model: nn.Module, adapter_names: str | list[str] | None = None) -> Tensor:
    """What the methods of the adapters add to the loss, for a training loop of your own: ``loss + penalty(model)``.

    The plain sum over layers with the weights of the adapter's config (KaSA's ``kasa_config``), or for MonteCLoRA the
    mean over them; 0 where no method has a penalty. :class:`lorafa.train.trainer.LoraTrainer` adds it by itself. What
    depends on tokens (the balance of GOAT's experts) is that of the last call of the PeftModel with gradients: call it,
    then this, then ``backward``.

    Args:
        model: a PeftModel, or any model with adapters.
        adapter_names: of which adapters; by default of those that are active.

    Returns:
        A scalar with gradients for the trained tensors, in float32 or float64.

    Raises:
        AdapterError: an unknown adapter, or one that has seen no tokens yet.
        BackendError: layers ran without gradients in the last call with them (reentrant gradient checkpointing).
    """
    found = penalty_of(require_module(model), adapter_names)
    return torch.zeros(()) if found is None else found


def penalty_of(
    model: nn.Module, adapter_names: str | list[str] | None = None, method: str | None = None
) -> Tensor | None:
    """As :func:`penalty`; None where no method has one.

    Args:
        method: the name of a formula: of adapters with it alone.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if names is not None:
        require_adapters(model, names)
    sums: dict[bool, Tensor] = {}
    averaged = 0
    for _, layer in lora_layers(model):
        for name in layer.active_adapters if names is None else names:
            if name in layer.adapters and layer.stored_parameters(name):  # what is tied counts where it is owned
                adapter = layer.adapters[name]
                if method is not None and all(one.name != method for one in adapter.variant.chain()):
                    continue
                own = adapter.variant.penalty(adapter)
                if own is not None:
                    mean = any(one.averages_penalty for one in adapter.variant.chain())
                    averaged += mean
                    sums[mean] = own if mean not in sums else sums[mean] + own.to(sums[mean].device)
    if True not in sums:
        return sums.get(False)
    mean_of_layers = sums[True] / averaged
    return sums[False].to(mean_of_layers.device) + mean_of_layers if False in sums else mean_of_layers
