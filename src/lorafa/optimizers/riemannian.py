"""Riemannian preconditioning (Zhang and Pilanci 2024, arXiv:2402.02347), and LoRA-One's form of it (arXiv:2502.01235).

    g_A <- (B^T B + d I)^-1 g_A,        g_B <- g_B (A A^T + d I)^-1

With d -> 0 a step of gradient descent on them does not depend on the basis A and B are written in: to first order it
moves the weight by -lr s^2 (P_B G + G P_A).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lorafa.numerics.linalg import damped_inverse
from lorafa.optimizers.adamw import AdamWSteps
from lorafa.optimizers.batches import PairBatch, batches_of, live_batches
from lorafa.optimizers.checked import PairOptimizer, check_adam_numbers, check_stock, name_of
from lorafa.optimizers.entry import AdamSettings, OptimizerEntry
from lorafa.optimizers.pairs import Pair, factors_of, groups_of, pairs_of, trained_together
from lorafa.optimizers.preconditioned import precondition
from lorafa.optimizers.state_bytes import two_moments, two_wide_moments
from lorafa.settings.checks import check_choice, check_number, check_rate


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    damping: str = "relative",
    **kwargs: Any,
) -> Optimizer:
    """A stock optimizer that steps on preconditioned gradients of A and B; both from the factors before the step.

    Args:
        model: a model with adapters of which A and B are trained.
        optimizer_cls: any class of torch optimizers whose step takes no closure.
        lr: learning rate.
        reg: how much is added to the diagonals.
        damping: ``"relative"``: ``reg`` times the mean eigenvalue, the same for factors of any size;
            ``"absolute"``: ``reg`` itself, as PEFT and the authors do.
        **kwargs: passed to ``optimizer_cls``. ``weight_decay`` spares vectors, and is 0 if not given, whatever the
            class would take. AdamW's leaves A and B each with 1 - lr weight_decay of themselves, as the authors'
            classes do, and so B A with the square of that.

    Raises:
        ConfigError: an argument is out of range or not the optimizer's, or it needs a closure.
        AdapterError: there are no adapters, or one is merged, holds nan or inf, has a frozen factor or a matrix between
            its factors.
        BackendError: a factor has no values (meta), is sharded or quantized.
    """
    check_rate("lr", lr)
    check_number("reg", reg, "a number >= 0", 0, closed="[")
    check_choice("damping", damping, ("relative", "absolute"))
    check_stock(optimizer_cls, kwargs)
    pairs = trained_together(pairs_of(model), "Riemannian preconditioning")
    relative = damping == "relative"

    def transform(batch: PairBatch) -> tuple[Tensor, Tensor]:
        A, B = batch.A.values(), batch.B.values()
        grams = torch.cat([B.mT @ B, A @ A.mT])
        left, right = damped_inverse(grams, reg, relative=relative).chunk(2)
        return left.to(A.dtype) @ batch.A.gradients(), batch.B.gradients() @ right.to(B.dtype)

    decay = kwargs.get("weight_decay", 0.0)
    groups = groups_of(model, pairs, decay, algorithm=f"riemannian {name_of(optimizer_cls)}")
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    return precondition(optimizer, pairs, transform)


class PreconditionedAdamW(PairOptimizer):
    """LoRA-One's AdamW (``prec_reg``): A moves first, B is preconditioned with the new A, nothing corrects the bias.

    Args:
        params: parameter groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to sqrt(v).
        weight_decay: decoupled decay, after the step, as the authors have it; B is preconditioned with the decayed A.
        prec_reg: added to the diagonals of B^T B and A A^T.
        pairs: the pairs among ``params``.
    """

    copied = ("pairs", "prec_reg", "_batches")

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                 prec_reg: float, pairs: list[Pair]) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, pairs)
        self.prec_reg = prec_reg
        self._batches = batches_of(pairs)

    def update(self) -> None:
        """A of every pair, then its B with the new A, then what is trained besides."""
        adamw, live = AdamWSteps(self, correct_bias=False, decay_last=True), live_batches(self._batches)
        for_A = [self._for_A(batch) for batch in live]  # what fails, fails before the first of them is moved
        for batch, gradients in zip(live, for_A, strict=True):
            adamw.step(batch.A.parameters, batch.A.split(gradients))
            A = batch.A.values()
            inverse = damped_inverse(A @ A.mT, self.prec_reg, relative=False)
            adamw.step(batch.B.parameters, batch.B.split(batch.B.gradients() @ inverse.to(A.dtype)))
        adamw.step_others(than=factors_of(self.pairs))

    def _for_A(self, batch: PairBatch) -> Tensor:
        """(B^T B + d I)^-1 g_A, (N, r, n)."""
        B = batch.B.values()
        inverse = damped_inverse(B.mT @ B, self.prec_reg, relative=False)
        batch.check_finite_gradients()  # an A that is moved by nan cannot be decomposed for its B
        return inverse.to(B.dtype) @ batch.A.gradients()


def create_preconditioned_adamw(
    model: nn.Module,
    *,
    lr: float,
    prec_reg: float = 1e-6,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> PreconditionedAdamW:
    """The optimizer LoRA-One's experiments call ``prec_reg``; see `PreconditionedAdamW` for the arguments.

    Raises:
        ConfigError: a number is out of range.
        AdapterError, BackendError: as :func:`create_riemannian_optimizer`.
    """
    check_adam_numbers(lr, betas, eps, weight_decay)
    check_number("prec_reg", prec_reg, "a number > 0", 0)
    pairs = trained_together(pairs_of(model), "LoRA-One's preconditioned AdamW")
    groups = groups_of(model, pairs, weight_decay, algorithm="preconditioned")
    return PreconditionedAdamW(groups, lr, betas, eps, weight_decay, prec_reg, pairs)


@dataclass(frozen=True, kw_only=True)
class RiemannianSettings(AdamSettings):
    """Riemannian preconditioning under AdamW."""

    reg: float = 1e-2
    """What is added to the diagonals of the two Gram matrices."""
    damping: Literal["relative", "absolute"] = "relative"
    """reg in units of the mean eigenvalue, or as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("reg", self.reg, "a number >= 0", 0, closed="[")


@dataclass(frozen=True, kw_only=True)
class PreconditionedSettings(AdamSettings):
    """LoRA-One's AdamW."""

    prec_reg: float = 1e-6
    """What is added to the diagonals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("prec_reg", self.prec_reg, "a number > 0", 0)


def _riemannian(model: nn.Module, settings: RiemannianSettings, *, lr: float, weight_decay: float) -> Optimizer:
    adam = {"betas": settings.betas, "eps": settings.eps, "weight_decay": weight_decay, "fused": True}
    return create_riemannian_optimizer(model, AdamW, lr=lr, reg=settings.reg, damping=settings.damping, **adam)


def _preconditioned(model: nn.Module, settings: PreconditionedSettings, **common: float) -> Optimizer:
    adam = {"betas": settings.betas, "eps": settings.eps}
    return create_preconditioned_adamw(model, prec_reg=settings.prec_reg, **common, **adam)  # type: ignore[arg-type]


RIEMANNIAN = OptimizerEntry(lr=1e-3, state=two_moments, settings=RiemannianSettings, make=_riemannian)
PRECONDITIONED = OptimizerEntry(lr=1e-3, state=two_wide_moments, settings=PreconditionedSettings, make=_preconditioned)
