"""LoRA-Pro: gradients of A and B whose step comes nearest to that of the whole weight (arXiv:2407.18242).

With G the gradient of the weight, s the scaling, and any r x r matrix X,

    h_A = (1/s^2) (B^T B)^-1 g_A + X A,        h_B = (1/s^2) (I - P_B) g_B (A A^T)^-1 - B X

move the weight by  s (B h_A + h_B A) = P_B G + (I - P_B) G P_A,  the projection of G onto what A and B can reach; X
only decides how much of it each of them takes:

* ``zero``: X = 0.
* ``sylvester``: the X that keeps h nearest to g:  B^T B X + X A A^T = -(1/s^2) (B^T B)^-1 g_A A^T.
* ``symmetric``: X = -(1/2s^2) (B^T B)^-1 B^T g_B (A A^T)^-1: what both can reach is shared evenly.

Where B has (nearly) lost its rank, at the start above all, h_A = g_A and h_B = (1/s^2) g_B (A A^T)^-1, LoRA-FA's step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.errors import ConfigError
from lorafa.numerics.linalg import damped_gram, exceeds, spd_inverse, sylvester, wide
from lorafa.optimizers.adamw import AdamWSteps, adamw_, add_moments_
from lorafa.optimizers.batches import PairBatch, live_batches
from lorafa.optimizers.checked import PairOptimizer, check_adam_numbers
from lorafa.optimizers.entry import AdamSettings, OptimizerEntry
from lorafa.optimizers.pairs import Pair, factors_of, groups_of, pairs_of, trained_together
from lorafa.optimizers.preconditioned import precondition
from lorafa.optimizers.state_bytes import Sizes, moments_of_weights, nothing, one_buffer, two_moments
from lorafa.settings.checks import check_choice, check_number

FORMS = ("adamw", "sgd", "full")
CHOICES = ("zero", "sylvester", "symmetric")
LOST_RANK = 1e-6
"""B counts as rank-deficient where its smallest singular value is below this times max(1, its size), or where the
square of it is lost in the rounding of B^T B. Its size, sqrt(|| B^T B ||_F), is that of its largest singular value."""


def adjusted_gradients(
    A: Tensor, B: Tensor, gradient_A: Tensor, gradient_B: Tensor, s: Tensor, X: str, damping: float = 0.0
) -> tuple[Tensor, Tensor]:
    """h_A (N, r, n) and h_B (N, m, r) for A (N, r, n), B (N, m, r), their gradients and s (N, 1, 1).

    Args:
        gradient_A: s B^T G for some G (N, m, n).
        gradient_B: s G A^T for the same G.
        X: ``"zero"``, ``"sylvester"`` or ``"symmetric"``.
        damping: added to both Gram matrices, as a share of their mean eigenvalue.
    """
    grams = torch.cat([B.mT @ B, A @ A.mT])
    core = wide(B.mT @ gradient_B)  # = g_A A^T: both are s B^T G A^T
    lost, dependent = _singular(grams, max(torch.finfo(A.dtype).eps, torch.finfo(B.dtype).eps))
    M = wide(grams)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    S, T = (M + damping * M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * identity).chunk(2)
    S = torch.where(lost, identity, S)
    T = torch.where(dependent, damped_gram(grams.chunk(2)[1], damping, relative=True), T)
    wide_s = s.to(S.dtype) ** 2
    inverse_B, inverse_A = spd_inverse(torch.linalg.cholesky(torch.cat([S, T]))).chunk(2)
    inverse_B = inverse_B / wide_s
    shared = inverse_B @ core @ inverse_A  # (1/s^2) (B^T B)^-1 B^T g_B (A A^T)^-1
    if X == "sylvester":
        between = sylvester(S, T, -inverse_B @ core)
    else:
        between = -0.5 * shared if X == "symmetric" else torch.zeros_like(shared)

    # Everything small is put together first: each product with a factor or a gradient is a pass over memory.
    left = torch.where(lost, identity, inverse_B).to(A.dtype)
    right = (inverse_A / wide_s).to(B.dtype)
    taken = torch.where(lost, 0.0, shared + between).to(B.dtype)
    given = torch.where(lost, 0.0, between).to(A.dtype)
    for_A, for_B = left @ gradient_A, gradient_B @ right
    if X != "zero":
        for_A.baddbmm_(given, A)
    return for_A, for_B.baddbmm_(B, taken, alpha=-1.0)


def _singular(grams: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Which B have lost their rank, and of which A an eigenvalue is lost in rounding, (N, 1, 1) each.

    Neither are factors that are not finite: decomposing them is an error.

    Args:
        grams: N times B^T B, then N times A A^T, (2 N, r, r).
        eps: what they are rounded to.
    """
    M = wide(grams)
    size = torch.linalg.matrix_norm(M)
    of_B, of_A = (eps * size).chunk(2)
    of_B = (M.shape[-1] * of_B).maximum(LOST_RANK**2 * size.chunk(2)[0].clamp(min=1.0))
    singular = ~exceeds(M, torch.cat([of_B, of_A])) & size.isfinite()
    lost, dependent = singular[..., None, None].chunk(2)
    return lost, dependent


def _shares_of_decay(lr: float, weight_decay: float) -> tuple[float, float]:
    """What is left of A and of B where B A is to keep 1 - lr weight_decay of itself, as a weight does under AdamW.

    The root of it is left of each. AdamW turns a weight round where lr weight_decay is above 1; B has the sign then.
    """
    kept = 1 - lr * weight_decay
    root = math.sqrt(abs(kept))
    return root, math.copysign(root, kept)


def create_lorapro_optimizer(
    model: nn.Module,
    *,
    lr: float,
    form: str = "adamw",
    X: str = "sylvester",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    damping: float = 1e-8,
) -> Optimizer:
    """The optimizer of LoRA-Pro in one of three forms.

    Args:
        model: a model with adapters of which A and B are trained.
        lr: learning rate.
        form: ``"adamw"`` keeps Adam's moments of h_A and h_B: 2 r (m + n) numbers a layer. It is the authors' default,
            by the name of "efficient", and another algorithm than ``"full"``, the paper's AdamW, which keeps the
            moments of the whole weight: 2 m n numbers a layer, 8 m n bytes, as training the weight itself would.
            ``"sgd"`` steps on h_A and h_B.
        X: ``"zero"``, ``"sylvester"`` or ``"symmetric"``; ``"full"`` uses it for its last projection.
        betas: decay of the two moments; not of ``"sgd"``.
        eps: added to sqrt(v); not of ``"sgd"``.
        weight_decay: of matrices. ``"full"`` leaves B A with 1 - lr weight_decay of itself, as AdamW would a weight;
            the authors decay the base as well, which is frozen here. ``"adamw"`` leaves that share of A and of B, and
            so the square of it of B A. Both are decoupled; ``"sgd"`` has torch add the decay to the gradient.
        momentum: of ``"sgd"``.
        damping: added to B^T B and A A^T, as a share of their mean eigenvalue.

    Raises:
        ConfigError: an argument is out of range, or belongs to another form.
        AdapterError: there are no adapters, or one is merged, holds nan or inf, has a frozen factor, a scaling of 0 or
            a matrix between its factors.
        BackendError: a factor has no values (meta), is sharded or quantized.
    """
    check_choice("form", form, FORMS)
    check_choice("X", X, CHOICES)
    check_adam_numbers(lr, betas, eps, weight_decay)
    check_number("momentum", momentum, "a number in [0, 1)", 0, 1, closed="[")
    check_number("damping", damping, "a number >= 0", 0, closed="[")
    _check_form(form, betas, eps, momentum)
    pairs = trained_together(pairs_of(model), "LoRA-Pro")
    for pair in pairs:
        pair.used_scaling()
    groups = groups_of(model, pairs, weight_decay, algorithm=f"lora_pro {form}")
    if form == "full":
        return LoraProAdamW(groups, lr, betas, eps, weight_decay, pairs=pairs, X=X, damping=damping)

    def transform(batch: PairBatch) -> tuple[Tensor, Tensor]:
        factors, gradients = (batch.A.values(), batch.B.values()), (batch.A.gradients(), batch.B.gradients())
        return adjusted_gradients(*factors, *gradients, batch.scalings(), X, damping)

    stock: Optimizer
    if form == "sgd":
        stock = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    else:
        stock = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return precondition(stock, pairs, transform)


def _check_form(form: str, betas: tuple[float, float], eps: float, momentum: float) -> None:
    """Raises ConfigError for a setting of another form."""
    if form == "sgd" and (tuple(betas), eps) != ((0.9, 0.999), 1e-8):
        raise ConfigError("betas and eps are Adam's, and form='sgd' has neither. Leave them out, or use form='adamw'.")
    if form != "sgd" and momentum:
        raise ConfigError(f"momentum belongs to form='sgd', and form={form!r} has betas instead. Leave it out.")


class LoraProAdamW(PairOptimizer):
    """LoRA-Pro's AdamW in full: Adam in weight space, projected back onto A and B in every step.

    State: two moments of the weight's shape (E, m, n) under B, float32 (float64 where B is): 8 m n bytes a layer.

    Args:
        params: parameter groups, the factors of ``pairs`` among them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to sqrt(v).
        weight_decay: decoupled decay, before the step: A and B are each left with the root of 1 - lr weight_decay, and
            other parameters with all of it.
        pairs: the pairs among ``params``.
        X: of the last projection.
        damping: as in `create_lorapro_optimizer`.
    """

    copied = ("pairs", "X", "damping")

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, *,
                 pairs: list[Pair], X: str, damping: float) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, pairs)
        self.X, self.damping = X, damping

    def update(self) -> None:
        """Every pair, then what is trained besides."""
        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        live = live_batches(PairBatch([pair]) for pair in self.pairs)
        found = [self._adjusted(batch) for batch in live]  # what fails, fails before the first of them is moved
        for batch, gradients in zip(live, found, strict=True):  # one pair at a time: matrices of the weight's size
            self._move(batch, group_of[batch.pairs[0].B], *gradients)
        AdamWSteps(self).step_others(than=factors_of(self.pairs))

    def _adjusted(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """h_A and h_B of X = 0: s (B h_A + h_B A) is what A and B can reach of the weight's gradient."""
        factors, gradients = (batch.A.values(), batch.B.values()), (batch.A.gradients(), batch.B.gradients())
        adjusted = adjusted_gradients(*factors, *gradients, batch.scalings(), "zero", self.damping)
        batch.check_finite_gradients()  # a nan would stay in the moments of the whole weight
        return adjusted

    def _move(self, batch: PairBatch, group: dict[str, Any], for_A: Tensor, for_B: Tensor) -> None:
        A, B, s, (pair,) = batch.A.values(), batch.B.values(), batch.scalings(), batch.pairs
        state = self.state[pair.B]
        add_moments_(state, pair.B, self._weight_shape(pair))
        state["step"] += 1
        G = s * (B @ for_A + for_B @ A)
        moved = torch.zeros_like(G)
        numbers = {"betas": group["betas"], "eps": group["eps"], "weight_decay": 0.0}
        adamw_([moved], [G], [state], step=state["step"], lr=1.0, **numbers)
        for_A, for_B = -s * B.mT @ moved, -s * moved @ A.mT
        for_A, for_B = adjusted_gradients(A, B, for_A, for_B, s, self.X, self.damping)
        lr, (kept_A, kept_B) = group["lr"], _shares_of_decay(group["lr"], group["weight_decay"])
        steps = (pair.A, batch.A.split(for_A)[0], kept_A), (pair.B, batch.B.split(for_B)[0], kept_B)
        for factor, step, kept in steps:
            factor.copy_(kept * factor.to(step.dtype) - lr * step)

    def moment_shapes(self) -> Mapping[Tensor, tuple[int, ...]]:
        return {pair.B: self._weight_shape(pair) for pair in self.pairs}

    @staticmethod
    def _weight_shape(pair: Pair) -> tuple[int, int, int]:
        A, B = pair.matrices_A(pair.A), pair.matrices_B(pair.B)
        return B.shape[0], B.shape[1], A.shape[2]


@dataclass(frozen=True, kw_only=True)
class LoraProSettings(AdamSettings):
    """LoRA-Pro; betas and eps are not of form sgd."""

    form: Literal["adamw", "sgd", "full"] = "adamw"
    """Moments of A and B, none, or of the whole weight (8 bytes a weight)."""
    X: Literal["zero", "sylvester", "symmetric"] = "sylvester"
    """How A and B share what both can reach."""
    gram_damping: float = 1e-8
    """Added to the two Gram matrices, in units of their mean eigenvalue."""
    momentum: float = 0.0
    """Form sgd: share of the step before that is added to the next, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gram_damping", self.gram_damping, "a number >= 0", 0, closed="[")
        check_number("momentum", self.momentum, "a number in [0, 1)", 0, 1, closed="[")
        _check_form(self.form, self.betas, self.eps, self.momentum)


def _make(model: nn.Module, settings: LoraProSettings, **common: float) -> Optimizer:
    own = {"form": settings.form, "X": settings.X, "damping": settings.gram_damping, "momentum": settings.momentum}
    adam = {"betas": settings.betas, "eps": settings.eps}
    return create_lorapro_optimizer(model, **own, **adam, **common)  # type: ignore[arg-type]


def _state(sizes: Sizes, settings: LoraProSettings) -> int:
    if settings.form == "sgd":
        return one_buffer(sizes) if settings.momentum else nothing(sizes)
    return moments_of_weights(sizes) if settings.form == "full" else two_moments(sizes)


LORA_PRO = OptimizerEntry(lr=1e-3, state=_state, settings=LoraProSettings, make=_make, form="form")
