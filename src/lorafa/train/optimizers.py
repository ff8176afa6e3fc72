"""From the settings of an optimizer to the optimizer."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer

from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.train.schema import OptimConfig

STOCK = {"adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
"""Optimizers that transformers makes -> its name for them."""


def pair_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer | None:
    """The optimizer that needs to know which A belongs to which B, or None where transformers makes it."""
    lr, betas, eps, decay = optim.lr, optim.betas, optim.eps, optim.weight_decay
    if optim.name == "lora_fa":
        return create_lorafa_optimizer(
            model, lr=lr, weight_decay=decay, algorithm=optim.algorithm, betas=betas, eps=eps
        )
    if optim.name == "lora_plus":
        return create_loraplus_optimizer(
            model, AdamW, lr=lr, loraplus_lr_ratio=optim.lr_ratio, betas=betas, eps=eps, weight_decay=decay, fused=True
        )
    if optim.name == "riemannian":
        return create_riemannian_optimizer(
            model, AdamW, lr=lr, reg=optim.reg, damping=optim.damping, betas=betas, eps=eps, weight_decay=decay,
            fused=True,
        )  # fmt: skip
    if optim.name == "preconditioned":
        return create_preconditioned_adamw(
            model, lr=lr, prec_reg=optim.prec_reg, betas=betas, eps=eps, weight_decay=decay
        )
    if optim.name == "lora_pro":
        return create_lorapro_optimizer(
            model, lr=lr, form=optim.form, X=optim.X, betas=betas, eps=eps, weight_decay=decay
        )
    return None
