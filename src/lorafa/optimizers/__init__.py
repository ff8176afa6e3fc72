"""Optimizers that know which A belongs to which B."""

from lorafa.optimizers.lora_fa import LoraFAOptimizer, create_lorafa_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer"]
