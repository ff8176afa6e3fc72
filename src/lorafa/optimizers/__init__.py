"""Optimizers that know which A belongs to which B."""

from lorafa.optimizers.lora_fa import LoraFAOptimizer, create_lorafa_optimizer
from lorafa.optimizers.lora_plus import create_loraplus_optimizer
from lorafa.optimizers.lora_pro import create_lorapro_optimizer
from lorafa.optimizers.riemannian import create_preconditioned_adamw, create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_lorapro_optimizer",
    "create_preconditioned_adamw",
    "create_riemannian_optimizer",
]
