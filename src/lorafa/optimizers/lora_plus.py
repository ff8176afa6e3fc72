"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from lorafa.optimizers.checked import check_idle_pairs, check_state, check_stock, name_of
from lorafa.optimizers.entry import AdamSettings, OptimizerEntry
from lorafa.optimizers.pairs import filled, other_groups, pairs_of
from lorafa.optimizers.state_bytes import two_moments
from lorafa.settings.checks import check_flag, check_number, check_rate


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float | None = None,
    fast_vectors: bool = False,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer whose learning rate is ``lr`` for A and ``loraplus_lr_ratio * lr`` for B.

    Everything else that is trained learns at ``lr``; vectors are not decayed.

    Args:
        model: a model with adapters.
        optimizer_cls: any class of torch optimizers.
        lr: learning rate of A.
        loraplus_lr_ratio: lambda, >= 1 in the paper, which advises 16.
        loraplus_lr_embedding: learning rate of both factors on embeddings.
        loraplus_weight_decay: decoupled weight decay of matrices; None takes ``weight_decay`` of ``kwargs``, or 0.
        fast_vectors: give biases and magnitudes B's rate, as PEFT does; the paper speaks of B only.
        **kwargs: passed to ``optimizer_cls``.

    Raises:
        ConfigError: a number is out of range, or not the optimizer's.
        AdapterError: there are no adapters, or one is merged or holds nan or inf; in a step, the adapters without a
            gradient are no longer the active ones.
        BackendError: a factor has no values (meta), is sharded or quantized.
    """
    check_rate("lr", lr)
    check_number("loraplus_lr_ratio", loraplus_lr_ratio, "a number > 0", 0)
    check_number("loraplus_lr_embedding", loraplus_lr_embedding, "a number >= 0", 0, closed="[")
    check_flag("fast_vectors", fast_vectors)
    decay = kwargs.pop("weight_decay", 0.0)
    if loraplus_weight_decay is not None:
        check_number("loraplus_weight_decay", loraplus_weight_decay, "a number >= 0", 0, closed="[")
        decay = loraplus_weight_decay
    check_stock(optimizer_cls, kwargs | {"weight_decay": decay})
    pairs = pairs_of(model, folding=True)
    fast = lr * loraplus_lr_ratio
    on_embeddings = [pair for pair in pairs if pair.layer.is_table]
    elsewhere = [pair for pair in pairs if not pair.layer.is_table]
    matrices, vectors = other_groups(model, pairs, decay)
    groups: list[dict[str, Any]] = [
        {"params": [pair.A for pair in elsewhere], "lr": lr, "weight_decay": decay},
        {"params": [f for p in on_embeddings for f in (p.A, p.B)], "lr": loraplus_lr_embedding, "weight_decay": decay},
        {"params": [pair.B for pair in elsewhere], "lr": fast, "weight_decay": decay},
        {**matrices, "lr": lr},
        {**vectors, "lr": fast if fast_vectors else lr},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    optimizer = optimizer_cls(filled(groups, algorithm=f"lora_plus {name_of(optimizer_cls)}"), lr=lr, **kwargs)
    trained = [pair for pair in pairs if pair.B.requires_grad]
    optimizer.register_step_pre_hook(lambda stepping, args, kwargs: check_idle_pairs(stepping, trained))
    optimizer.register_load_state_dict_pre_hook(check_state)
    return optimizer


@dataclass(frozen=True, kw_only=True)
class LoraPlusSettings(AdamSettings):
    """LoRA+ under AdamW."""

    lr_ratio: float = 16.0
    """Learning rate of B over that of A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lr_ratio", self.lr_ratio, "a number > 0", 0)


def _make(model: nn.Module, settings: LoraPlusSettings, **common: float) -> Optimizer:
    adam = {"betas": settings.betas, "eps": settings.eps, "fused": True}
    return create_loraplus_optimizer(model, AdamW, loraplus_lr_ratio=settings.lr_ratio, **common, **adam)  # type: ignore[arg-type]


LORA_PLUS = OptimizerEntry(lr=2e-4, state=two_moments, settings=LoraPlusSettings, make=_make)
