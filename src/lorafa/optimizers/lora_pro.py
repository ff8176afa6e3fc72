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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.adapter import working_dtype
from lorafa.checks import check_choice, check_number
from lorafa.errors import CheckpointError
from lorafa.linalg import damped_inverse, spd_eigh, sylvester
from lorafa.optimizers.adamw import adamw_, moments
from lorafa.optimizers.pairs import Pair, check_both_trained, other_groups, pairs_of
from lorafa.optimizers.preconditioned import precondition, split, with_gradients

FORMS = ("adamw", "sgd", "full")
CHOICES = ("zero", "sylvester", "symmetric")
LOST_RANK = 1e-6
"""B counts as rank-deficient where its smallest singular value is below this times max(1, its largest)."""


def adjusted_gradients(
    A: Tensor, B: Tensor, gradient_A: Tensor, gradient_B: Tensor, s: Tensor, X: str, damping: float = 0.0
) -> tuple[Tensor, Tensor]:
    """h_A (N, r, n) and h_B (N, m, r) for A (N, r, n), B (N, m, r), their gradients and s (N, 1, 1).

    Args:
        X: ``"zero"``, ``"sylvester"`` or ``"symmetric"``.
        damping: added to both Gram matrices, as a share of their mean eigenvalue.
    """
    squared = s**2
    gram_B, gram_A = B.mT @ B, A @ A.mT
    p, P = spd_eigh(gram_B, damping)
    largest, smallest = p[..., -1].sqrt(), p[..., 0].sqrt()
    lost = (smallest < LOST_RANK * largest.clamp(min=1.0))[..., None, None]
    p = torch.where(lost[..., 0], torch.ones_like(p), p)
    inverse_B = ((P / p[..., None, :]) @ P.mT).to(B.dtype)
    if X == "sylvester":
        q, Q = spd_eigh(gram_A, damping)
        inverse_A = ((Q / q[..., None, :]) @ Q.mT).to(A.dtype)
    else:
        inverse_A = damped_inverse(gram_A, damping, relative=True)

    right = gradient_B @ inverse_A / squared
    for_A = inverse_B @ gradient_A / squared
    through_B = inverse_B @ (B.mT @ right)
    for_B = right - B @ through_B
    if X == "sylvester":
        core = sylvester(p, P, q, Q, -(for_A @ A.mT).to(p.dtype)).to(A.dtype)
    elif X == "symmetric":
        core = -0.5 * through_B
    if X != "zero":
        for_A, for_B = for_A + core @ A, for_B - B @ core
    return torch.where(lost, gradient_A, for_A), torch.where(lost, right, for_B)


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
        form: ``"adamw"`` keeps Adam's moments of h_A and h_B: 2 r (m + n) numbers a layer, an algorithm of its own that
            other libraries call LoRA-Pro; ``"sgd"`` steps on h_A and h_B; ``"full"`` is the paper's AdamW, which keeps
            the moments of the whole weight: 2 m n numbers a layer, 8 m n bytes, as training the weight itself would.
        X: ``"zero"``, ``"sylvester"`` or ``"symmetric"``; ``"full"`` uses it for its last projection.
        betas: decay of the two moments.
        eps: added to sqrt(v).
        weight_decay: decoupled weight decay of matrices.
        momentum: of ``"sgd"``.
        damping: added to B^T B and A A^T, as a share of their mean eigenvalue.

    Raises:
        ConfigError: an argument is out of range.
        AdapterError: there are no adapters, or a factor is frozen.
    """
    check_choice("form", form, FORMS)
    check_choice("X", X, CHOICES)
    check_number("lr", lr, "a number >= 0", 0, closed="[")
    check_number("weight_decay", weight_decay, "a number >= 0", 0, closed="[")
    check_number("damping", damping, "a number >= 0", 0, closed="[")
    pairs = pairs_of(model)
    check_both_trained(pairs, "LoRA-Pro")
    groups = [
        {"params": [f for pair in pairs for f in (pair.A, pair.B)], "weight_decay": weight_decay},
        *other_groups(model, pairs, weight_decay),
    ]
    groups = [group for group in groups if group["params"]]
    if form == "full":
        return LoraProAdamW(groups, lr, betas, eps, weight_decay, pairs=pairs, X=X, damping=damping)

    def transform(A: Tensor, B: Tensor, gradient_A: Tensor, gradient_B: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return adjusted_gradients(A, B, gradient_A, gradient_B, s, X, damping)

    stock: Optimizer
    if form == "sgd":
        stock = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    else:
        stock = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return precondition(stock, pairs, transform)


class LoraProAdamW(Optimizer):
    """LoRA-Pro's AdamW in full: Adam in weight space, projected back onto A and B in every step.

    State: two moments of the weight's shape (E, m, n) under B, float32 (float64 where B is): 8 m n bytes a layer.

    Args:
        params: parameter groups, the factors of ``pairs`` among them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to sqrt(v).
        weight_decay: decoupled decay, before the step.
        pairs: the pairs among ``params``.
        X: of the last projection.
        damping: as in `create_lorapro_optimizer`.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, *,
                 pairs: list[Pair], X: str, damping: float) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pairs, self.X, self.damping = pairs, X, damping
        self.register_load_state_dict_pre_hook(self._check_state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes the loss and its gradients again, and the loss is returned."""
        for pair in self.pairs:
            pair.check_active()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        moved = set()
        for pair in self.pairs:  # one at a time: each needs matrices of the weight's size
            moved |= {pair.A, pair.B}
            if pair.A.grad is not None and pair.B.grad is not None:
                self._move(pair, group_of[pair.B])
        for parameter, group in group_of.items():
            if parameter not in moved and parameter.grad is not None:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    moments(state, parameter)
                state["step"] += 1
                adamw_([parameter], [parameter.grad], [state], step=state["step"], lr=group["lr"],
                       betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])  # fmt: skip
        return loss

    def _move(self, pair: Pair, group: dict[str, Any]) -> None:
        A, B, gradient_A, gradient_B, s = with_gradients([pair])
        state = self.state[pair.B]
        if not state:
            state["step"] = 0
            shape = (B.shape[0], B.shape[1], A.shape[2])
            state["exp_avg"], state["exp_avg_sq"] = B.new_zeros(shape), B.new_zeros(shape)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        for_A, for_B = adjusted_gradients(A, B, gradient_A, gradient_B, s, "zero", self.damping)
        G = s * (B @ for_A + for_B @ A)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(G, 1 - beta1)
        v.mul_(beta2).addcmul_(G, G, value=1 - beta2)
        root = math.sqrt(1 - beta2 ** state["step"])
        direction = m / (1 - beta1 ** state["step"]) / (v.sqrt() / root + group["eps"])
        for_A, for_B = s * B.mT @ direction, s * direction @ A.mT
        for_A, for_B = adjusted_gradients(A, B, for_A, for_B, s, self.X, self.damping)
        lr, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
        for _, step_A, step_B in split([pair], for_A, for_B):
            pair.A.copy_(kept * pair.A.to(step_A.dtype) - lr * step_A)
            pair.B.copy_(kept * pair.B.to(step_B.dtype) - lr * step_B)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; moments keep the working dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key] = state[key].to(working_dtype(state[key].dtype))

    def _check_state(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        expected = {}
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for pair in self.pairs:
            A, B = pair.matrices_A(pair.A), pair.matrices_B(pair.B)
            expected[pair.B] = (B.shape[0], B.shape[1], A.shape[2])
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        if len(saved) != len(mine):
            raise CheckpointError(
                f"The saved optimizer has {len(saved)} parameters, this one {len(mine)}; nothing was loaded. Make the "
                "optimizer for the same model and adapters as the saved one."
            )
        for index, parameter in zip(saved, mine, strict=True):
            found = state_dict["state"].get(index, {}).get("exp_avg")
            shape = expected.get(parameter, tuple(parameter.shape))
            if isinstance(found, Tensor) and tuple(found.shape) != shape:
                raise CheckpointError(
                    f"Parameter {index} needs moments of shape {shape}, the saved ones have {tuple(found.shape)}; "
                    "nothing was loaded. The state is that of another model or another form of the optimizer."
                )
