"""AdamW in one call for many tensors: torch's kernels, also for the forms papers use that torch.optim does not have.

torch's step is  p <- (1 - lr wd) p - lr (m / c1) / (sqrt(v / c2) + eps)  with c_i = 1 - beta_i^t. Two other forms are
the same kernel with other numbers: eps outside the bias correction (transformers' former AdamW) is eps / sqrt(c2), and
no correction at all is the limit of large t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lorafa.adapter import working_dtype

_LATE = 1e9
"""A step at which beta^t is 0 and no bias is left to correct."""
_FUSED_ON = ("cpu", "cuda", "mps", "xpu")


def moments(state: dict[str, Any], like: Tensor) -> None:
    """Give a parameter's state zero moments of its shape, in float32 (float64 where the parameter is)."""
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros(like.shape, dtype=working_dtype(like.dtype), device=like.device)


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
        states: what :func:`moments` filled.
        step: number of this step, from 1.
        correct_bias: divide the moments by 1 - beta^t.
        eps_corrected: eps is added to the corrected sqrt(v), as in torch; False adds it before the correction.
        decay_last: the decay shrinks the parameter after the step instead of before it.
    """
    if not params:
        return
    if correct_bias and not eps_corrected:
        eps = eps / math.sqrt(1 - betas[1] ** step)
    if decay_last and weight_decay:
        # (1 - lr wd) (p - lr u) = (1 - lr wd) p - lr' u with lr' = lr (1 - lr wd); torch decays by lr' wd'
        shrunk = lr * (1 - lr * weight_decay)
        weight_decay = weight_decay * lr / shrunk if shrunk else weight_decay
        lr = shrunk
    first = states[0]["exp_avg"]
    # the fused kernels walk all of them by address: one layout
    wide = [p.to(first.dtype).contiguous() for p in params]
    grads = [g.to(first.dtype).contiguous() for g in grads]
    averages, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    count = torch.tensor(float(step) if correct_bias else _LATE, device=first.device)
    common: dict[str, Any] = {"amsgrad": False, "beta1": betas[0], "beta2": betas[1], "lr": lr, "eps": eps}
    common |= {"weight_decay": weight_decay, "maximize": False}
    if first.device.type in _FUSED_ON:
        # torch.optim counts in a tensor a parameter; one for all of them saves a third of the time
        torch._fused_adamw_(wide, grads, averages, squares, [], [count] * len(wide), **common)
    else:
        adamw(wide, grads, averages, squares, [], [count - 1 for _ in wide], foreach=True, **common)
    for parameter, value in zip(params, wide, strict=True):
        if parameter is not value:
            parameter.copy_(value)


def adamw_group_(
    group: dict[str, Any],
    gradients: Mapping[Tensor, Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    **form: Any,
) -> None:
    """One step on the parameters of an optimizer's group that have an entry in ``gradients``, counted in their state.

    Args:
        group: lr, betas, eps and weight_decay, and the parameters.
        gradients: of the parameters' shapes.
        state: of the optimizer; moments are made where there are none.
        **form: switches of :func:`adamw_`.
    """
    batches: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in group["params"]:
        if parameter not in gradients:
            continue
        own = state[parameter]
        if not own:
            own["step"] = 0
            moments(own, parameter)
        own["step"] += 1
        batches.setdefault((own["step"], parameter.device, parameter.dtype), []).append(parameter)
    settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    for (step, *_), batch in batches.items():
        adamw_(batch, [gradients[p] for p in batch], [state[p] for p in batch], step=step, **settings, **form)
