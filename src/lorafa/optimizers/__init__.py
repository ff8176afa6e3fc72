"""Optimizers that know which A belongs to which B, and the table of all that the runner can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.optimizers.entry import OptimizerEntry
    from lorafa.optimizers.lora_fa import LoraFAOptimizer, create_lorafa_optimizer
    from lorafa.optimizers.lora_plus import create_loraplus_optimizer
    from lorafa.optimizers.lora_pro import create_lorapro_optimizer
    from lorafa.optimizers.riemannian import create_preconditioned_adamw, create_riemannian_optimizer

OPTIMIZERS: Registry[OptimizerEntry] = Registry(
    "optimizer",
    {
        "adamw": "lorafa.optimizers.stock:ADAMW",
        "adafactor": "lorafa.optimizers.stock:ADAFACTOR",
        "sgd": "lorafa.optimizers.stock:SGD",
        "lora_fa": "lorafa.optimizers.lora_fa:LORA_FA",
        "lora_plus": "lorafa.optimizers.lora_plus:LORA_PLUS",
        "riemannian": "lorafa.optimizers.riemannian:RIEMANNIAN",
        "preconditioned": "lorafa.optimizers.riemannian:PRECONDITIONED",
        "lora_pro": "lorafa.optimizers.lora_pro:LORA_PRO",
    },
)

_PUBLIC: Registry[Any] = Registry(
    "name of lorafa.optimizers",
    {
        "LoraFAOptimizer": "lorafa.optimizers.lora_fa:LoraFAOptimizer",
        "create_lorafa_optimizer": "lorafa.optimizers.lora_fa:create_lorafa_optimizer",
        "create_loraplus_optimizer": "lorafa.optimizers.lora_plus:create_loraplus_optimizer",
        "create_lorapro_optimizer": "lorafa.optimizers.lora_pro:create_lorapro_optimizer",
        "create_preconditioned_adamw": "lorafa.optimizers.riemannian:create_preconditioned_adamw",
        "create_riemannian_optimizer": "lorafa.optimizers.riemannian:create_riemannian_optimizer",
    },
)
"""Loaded when they are first asked for, so that the names of optimizers can be listed without torch."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _PUBLIC.get(name)


__all__ = [
    "OPTIMIZERS",
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_lorapro_optimizer",
    "create_preconditioned_adamw",
    "create_riemannian_optimizer",
]
