"""AdamW in one call for many tensors: torch's kernels, also for the forms papers use that torch.optim does not have.

torch's step is  p <- (1 - lr wd) p - lr (m / c1) / (sqrt(v / c2) + eps)  with c_i = 1 - beta_i^t. Two other forms are
the same kernel with other numbers: eps outside the bias correction (transformers' former AdamW) is eps / sqrt(c2), and
no correction at all is the limit of large t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lorafa.numerics.linalg import working_dtype

_LATE = 1e9
"""A step at which beta^t is 0 and no bias is left to correct."""
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "correct_bias")
_FUSED_ON = ("cpu", "cuda", "mps", "xpu")


def add_moments_(state: dict[str, Any], like: Tensor, shape: Sequence[int] | None = None) -> None:
    """Give a parameter's state a count of 0 and zero moments, in float32 (float64 where the parameter is).

    Moments that are there follow the parameter to another dtype or device.
    """
    wanted: dict[str, Any] = {"dtype": working_dtype(like.dtype), "device": like.device}
    state.setdefault("step", 0)
    for key in ("exp_avg", "exp_avg_sq"):
        if key not in state:
            state[key] = torch.zeros(like.shape if shape is None else tuple(shape), **wanted)
        elif state[key].dtype is not wanted["dtype"] or state[key].device != wanted["device"]:
            state[key] = state[key].to(**wanted)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    correct_bias: bool = True,
    eps_corrected: bool = True,
    decay_last: bool = False,
) -> None:
    """One step on parameters of one device and dtype that are at the same step.

    Args:
        params: any floating dtype and layout; half precision is updated in float32 and rounded once.
        grads: of the shapes of ``params``.
        states: what :func:`add_moments_` filled.
        step: number of this step, from 1.
        correct_bias: divide the moments by 1 - beta^t.
        eps_corrected: eps is added to the corrected sqrt(v), as in torch; False adds it before the correction.
        decay_last: the decay shrinks the parameter after the step instead of before it.
    """
    if not params:
        return
    if correct_bias and not eps_corrected:
        eps = eps / math.sqrt(1 - betas[1] ** step)
    kept = 1 - lr * weight_decay
    if decay_last:
        weight_decay = 0.0
    first = states[0]["exp_avg"]
    wide, grads = _packed(params, first.dtype), _packed(grads, first.dtype)
    averages, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    count = torch.tensor(float(step) if correct_bias else _LATE, device=first.device)
    common: dict[str, Any] = {"amsgrad": False, "beta1": betas[0], "beta2": betas[1], "lr": lr, "eps": eps}
    common |= {"weight_decay": weight_decay, "maximize": False}
    if first.device.type in _FUSED_ON:
        # torch.optim counts in a tensor a parameter; one for all of them saves a third of the time
        torch._fused_adamw_(wide, grads, averages, squares, [], [count] * len(wide), **common)
    else:
        adamw(wide, grads, averages, squares, [], [count - 1 for _ in wide], foreach=True, **common)
    if decay_last and kept != 1:
        torch._foreach_mul_(wide, kept)
    for parameter, value in zip(params, wide, strict=True):
        if parameter is not value:
            parameter.copy_(value)


def _packed(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The fused kernels walk all tensors by address: one dtype, one layout."""
    return [t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous() for t in tensors]


class AdamWSteps:
    """One step of AdamW on parameters of an optimizer, a few after the others, counted in their states.

    Args:
        optimizer: its groups hold lr, betas, eps and weight_decay, and maybe correct_bias.
        **form: switches of :func:`adamw_` that are the same in all groups.
    """

    def __init__(self, optimizer: Optimizer, **form: Any) -> None:
        self._state, self._form = optimizer.state, form
        self._group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}

    def step(self, params: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
        """Move ``params``, each by the one of ``grads``, of its shape."""
        batches: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for parameter, gradient in zip(params, grads, strict=True):
            group, own = self._group_of[parameter], self._state[parameter]
            add_moments_(own, parameter)
            own["step"] += 1
            key = (id(group), own["step"], parameter.device, parameter.dtype)
            batches.setdefault(key, []).append((parameter, gradient, own))
        for (_, step, *_), batch in batches.items():
            group = self._group_of[batch[0][0]]
            settings = {name: group[name] for name in _SETTINGS if name in group}
            moved, by, states = ([entry[i] for entry in batch] for i in range(3))
            adamw_(moved, by, states, step=step, **settings, **self._form)

    def step_others(self, than: Iterable[Tensor]) -> None:
        """Move every other parameter that has a gradient."""
        known = set(than)
        others = [p for p in self._group_of if p.grad is not None and p not in known]
        self.step(others, [p.grad for p in others if p.grad is not None])
