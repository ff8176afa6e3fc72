"""LoRA-FA: A is frozen, B follows the gradient of the whole weight (Zhang et al. 2023, arXiv:2308.03303).

Two algorithms, by name:

* ``exact`` keeps A as it is and turns B's gradient into the projected one, (1/s^2) g_B (A A^T)^-1, before AdamW. This
  is the documented algorithm, step for step. The decompositions are made once, because A never changes.
* ``fold`` makes the rows of A orthonormal once, with B changed so that the function stays: A = L Q, B <- B L, A <- Q.
  Then A A^T = I, the transform is the number 1/s^2, and any stock optimizer does the rest at its own speed.

For SGD, momentum and decoupled decay the two move the weight alike. For Adam they coincide where A A^T is diagonal
(most data-aware starts) and differ otherwise: Adam's scaling of single entries depends on the basis B is written in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.checks import check_choice
from lorafa.errors import AdapterError, ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.optimizers.adamw import AdamW
from lorafa.optimizers.checked import PairOptimizer, check_adam_numbers, check_state
from lorafa.optimizers.pairs import Pair, other_groups, pairs_of
from lorafa.optimizers.row_space import RowSpace, row_factors

ALGORITHMS = ("exact", "fold")
ORTHONORMAL = 1e-6
"""Rows of A this near to orthonormal are left as they are, so that folding twice is folding once; in half precision
as near as its rounding lets them come."""


class LoraFAOptimizer(PairOptimizer):
    """AdamW on every parameter it is given, with the projected gradient for the B of each pair.

    The step is  B <- B - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps), then B <- (1 - lr weight_decay) B.
    State: two moments of B's shape, in float32 or float64, and the number of steps. Nothing is kept for A.

    Args:
        params: parameters or parameter groups; those of A need not be among them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to sqrt(v) before the bias correction.
        weight_decay: decoupled decay.
        correct_bias: divide the moments by 1 - beta^t.
        pairs: the pairs whose B is among ``params`` (`lorafa.optimizers.pairs.pairs_of`).

    Raises:
        ConfigError: a number is out of range, or there are no pairs.
        AdapterError: the rows of some A are dependent.
    """

    own = ("pairs", "row_space")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        pairs: Sequence[Pair] = (),
    ) -> None:
        check_adam_numbers(lr, betas, eps, weight_decay)
        if not pairs:
            raise ConfigError(
                "LoraFAOptimizer needs to know which A belongs to which B, and was given no pairs. Call "
                "create_lorafa_optimizer(model, ...), or pass pairs=pairs_of(model)."
            )
        self.row_space = RowSpace(pairs)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults | {"algorithm": "exact"}, pairs)

    def update(self) -> None:
        """AdamW with the projected gradient of every B, then on what is trained besides."""
        adamw = AdamW(self, eps_corrected=False, decay_last=True)
        for Bs, gradients in self.row_space.projected():
            adamw.step(Bs, gradients)
        adamw.step_others(than=[pair.B for pair in self.pairs])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
    *,
    algorithm: str = "exact",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    correct_bias: bool = True,
) -> Optimizer:
    """Freeze A of the active adapters and make the LoRA-FA optimizer of the rest.

    The scaling is read from each layer, so `rank_pattern`, `alpha_pattern` and rsLoRA are right by themselves; ``r``,
    ``lora_alpha`` and ``use_rslora`` are there for callers that state them, and are checked against the model.
    What is trained besides (magnitudes, biases, `modules_to_save`, token rows) gets plain AdamW in the same optimizer;
    vectors are not decayed.

    Args:
        model: a model with adapters.
        r: rank of the adapters, None to read it from the model.
        lora_alpha: alpha of the adapters, None to read it.
        lr: learning rate.
        weight_decay: decoupled weight decay of matrices.
        use_rslora: whether s is alpha / sqrt(r), None to read it.
        algorithm: ``"exact"`` or ``"fold"``, see the module.
        betas: decay of the two moments.
        eps: for gradients in the units of the projected gradient; ``fold`` converts it.
        correct_bias: divide the moments by 1 - beta^t (``exact`` only; torch's AdamW always does).

    Returns:
        A `LoraFAOptimizer`, or with ``fold`` a `torch.optim.AdamW` on B alone.

    Raises:
        ConfigError: an argument is out of range or is not what the model has.
        AdapterError: there are no adapters; some A has dependent rows, is not finite, or is trained beside a frozen B.
        BackendError: a factor is sharded or quantized.

    Everything is checked before the model is changed.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_adam_numbers(lr, betas, eps, weight_decay)
    if algorithm == "fold" and not correct_bias:
        raise ConfigError(
            "correct_bias=False is not defined for algorithm='fold': torch's AdamW always corrects. Use 'exact'."
        )
    pairs = pairs_of(model)
    _require_trained_B(pairs)
    _check_arguments(pairs, r, lora_alpha, use_rslora)
    rest = other_groups(model, pairs, weight_decay)
    if algorithm == "exact":
        groups = [group for group in ({"params": [pair.B for pair in pairs]}, *rest) if group["params"]]
        exact = LoraFAOptimizer(groups, lr, betas, eps, weight_decay, correct_bias, pairs=pairs)
        _freeze(model, pairs)
        return exact
    factors = [row_factors(pair) for pair in pairs]
    _freeze(model, pairs)
    for pair, L in zip(pairs, factors, strict=True):
        fold_(pair, L)
    of_scaling: dict[float, list[nn.Parameter]] = {}
    for pair in pairs:
        of_scaling.setdefault(pair.scaling, []).append(pair.B)
    groups = [
        # Adam does not see the factor 1/s^2 of the gradient, its eps does
        *({"params": Bs, "weight_decay": weight_decay, "eps": eps * s**2} for s, Bs in of_scaling.items()),
        *rest,
    ]
    groups = [group | {"algorithm": "fold"} for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    optimizer.register_load_state_dict_pre_hook(check_state)
    return optimizer


def _freeze(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Make a frozen A part of the adapters: of their layers, and of the configs that are saved with them."""
    names = {pair.name for pair in pairs}
    tables = (module.__dict__.get("peft_config") for module in model.modules())
    frozen = [
        (table, {name: replace(config, freeze_A=True) for name, config in table.items() if name in names})
        for table in tables
        if isinstance(table, dict)
    ]
    for pair in pairs:
        pair.layer.trains[pair.name] = "B"
        pair.A.requires_grad_(False)
    for table, configs in frozen:
        table |= configs


@torch.no_grad()
def fold_(pair: Pair, L: Tensor | None = None) -> None:
    """A = L Q, B <- B L, A <- Q: the same function with orthonormal rows of A; twice is once.

    A frozen start is folded alike, so that B A - B0 A0 stays exactly zero where it is.

    Args:
        L: (E, r, r), what `row_factors` gives for the pair.
    """
    L = row_factors(pair) if L is None else L
    eye = torch.eye(L.shape[-1], dtype=L.dtype)
    if torch.allclose(L, eye.expand_as(L), rtol=0.0, atol=max(ORTHONORMAL, torch.finfo(pair.A.dtype).eps)):
        return
    _fold_into(pair, pair.A, pair.B, L)
    start = pair.adapter.start
    if start is not None:
        A0, B0 = pair.layer.stored_A(start.A), pair.layer.stored_B(start.B)
        _fold_into(pair, A0, B0, L)
        start.A.copy_(pair.layer.matrix_A(A0))
        start.B.copy_(pair.layer.matrix_B(B0))


def _fold_into(pair: Pair, A: Tensor, B: Tensor, L: Tensor) -> None:
    wide_A, wide_B = pair.matrices_A(A).cpu().double(), pair.matrices_B(B).cpu().double()
    A.copy_(pair.stored_A(torch.linalg.solve_triangular(L, wide_A, upper=False)))
    B.copy_(pair.stored_B(wide_B @ L))


def _require_trained_B(pairs: Iterable[Pair]) -> None:
    for pair in pairs:
        if "B" not in pair.layer.trains[pair.name] or (pair.A.requires_grad and not pair.B.requires_grad):
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r}: B is frozen and A is trained, and LoRA-FA trains B alone: "
                "nothing would be left. Use a stock optimizer such as torch.optim.AdamW, or a start that trains B. "
                "Nothing was changed."
            )


def _check_arguments(pairs: Sequence[Pair], r: int | None, alpha: float | None, use_rslora: bool | None) -> None:
    """What the caller says of the adapters must be true of at least one layer: patterns may change single ones."""

    def check(what: str, said: object, found: Callable[[LoraLayer, str], object]) -> None:
        values = sorted({found(pair.layer, pair.name) for pair in pairs}, key=str)
        if said is not None and said not in values:
            have = ", ".join(map(str, values))
            raise ConfigError(
                f"{what}={said} was given, but the adapters have {what}={have}. The optimizer reads it from each "
                f"layer: pass {what}={values[0]}, or leave it out. Nothing was changed."
            )

    check("r", r, lambda layer, name: layer.r[name])
    check("lora_alpha", alpha, lambda layer, name: layer.lora_alpha[name])
    check("use_rslora", use_rslora, lambda layer, name: layer.use_rslora[name])
