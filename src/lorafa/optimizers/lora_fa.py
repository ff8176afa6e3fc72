"""LoRA-FA: A is frozen, B follows the gradient of the whole weight (Zhang et al. 2023, arXiv:2308.03303).

Two algorithms, by name:

* ``exact`` keeps A as it is and turns B's gradient into the projected one, (1/s^2) g_B (A A^T)^-1, before AdamW. This
  is the documented algorithm, step for step. The decompositions are made once, because A never changes.
* ``fold`` makes the rows of A orthonormal once, with B changed so that the function stays: A = L Q, B <- B L, A <- Q.
  Then A A^T = I, the transform is the number 1/s^2, and any stock optimizer does the rest at its own speed.

For SGD, momentum and decoupled decay the two move the weight alike. For Adam they coincide where the rows of A are
orthonormal and eps is negligible. Where A A^T is diagonal (most data-aware starts) ``exact`` is AdamW on B, and the
weight's step of ``fold`` is longer by what the rows of A were shorter than 1; for other A Adam's scaling of single
entries depends on the basis B is written in, too. ``exact`` adds eps before the bias correction and decays after the
step, as documented; torch's AdamW the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.errors import AdapterError, ConfigError, refuse, warn
from lorafa.layers.base import LoraLayer
from lorafa.optimizers.adamw import AdamWSteps
from lorafa.optimizers.checked import PairOptimizer, check_adam_numbers, check_idle_pairs, check_state
from lorafa.optimizers.entry import AdamSettings, OptimizerEntry
from lorafa.optimizers.pairs import Pair, filled, other_groups, pairs_of
from lorafa.optimizers.row_space import RowSpace, row_factors
from lorafa.optimizers.state_bytes import Sizes, two_moments, two_wide_moments
from lorafa.settings.checks import check_choice, check_flag

ALGORITHMS = ("exact", "fold")
ORTHONORMAL = 1e-6
"""Rows of A this near to orthonormal are left as they are, so that folding twice is folding once; in half precision
as near as its rounding lets them come."""


class LoraFAOptimizer(PairOptimizer):
    """AdamW on every parameter it is given, with the projected gradient for the B of each pair.

    The step is  B <- B - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps), then B <- (1 - lr weight_decay) B.
    State: two moments of B's shape, in float32 or float64, and the number of steps. Nothing is kept for A.

    Args:
        params: parameters or parameter groups, without those of any A.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to sqrt(v) before the bias correction.
        weight_decay: decoupled decay.
        correct_bias: divide the moments by 1 - beta^t.
        pairs: the pairs whose B is among ``params`` (`lorafa.optimizers.pairs.pairs_of`).

    Raises:
        ConfigError: a number is out of range, there are no pairs, or some A is among the parameters.
        AdapterError: the rows of some A are dependent or not finite.
    """

    copied = ("pairs", "row_space")

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
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        if any(id(pair.A) in held for pair in pairs):
            raise ConfigError(
                "LoraFAOptimizer moves B and keeps A, but was given parameters that are an A. Call "
                "create_lorafa_optimizer(model, ...), which freezes A, or leave every A out."
            )

    def update(self) -> None:
        """AdamW with the projected gradient of every B, then on what is trained besides."""
        adamw = AdamWSteps(self, eps_corrected=False, decay_last=True)
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
        model: a model with adapters, the PeftModel itself; adapters of which nothing is trained are left as they are.
        r: rank of the adapters' configs, None to read it from the model.
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
        AdapterError: there are no adapters; some A has dependent rows, is not finite, or is trained beside a frozen B;
            a formula is about the gradient of A; a scaling is 0; DistributedDataParallel is around the model and A was
            trained.
        BackendError: a factor is sharded or quantized.

    Everything is checked before the model is changed.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_adam_numbers(lr, betas, eps, weight_decay)
    if algorithm == "fold" and not correct_bias:
        raise ConfigError(
            "correct_bias=False is not defined for algorithm='fold': torch's AdamW always corrects. Use 'exact'."
        )
    check_flag("correct_bias", correct_bias)
    pairs = _with_trained_B(pairs_of(model))
    _check_arguments(model, pairs, r, lora_alpha, use_rslora)
    _require_unwrapped(model, pairs)
    rest = other_groups(model, pairs, weight_decay)
    if algorithm == "exact":
        groups = filled([{"params": [pair.B for pair in pairs]}, *rest])
        exact = LoraFAOptimizer(groups, lr, betas, eps, weight_decay, correct_bias, pairs=pairs)
        _freeze(model, pairs)
        return exact
    of_scaling: dict[float, list[nn.Parameter]] = {}
    for pair in pairs:
        of_scaling.setdefault(pair.used_scaling(), []).append(pair.B)
    # Adam does not see the factor 1/s^2 of the gradient, its eps does
    own = ({"params": Bs, "weight_decay": weight_decay, "eps": eps * s**2} for s, Bs in of_scaling.items())
    optimizer = torch.optim.AdamW(filled([*own, *rest], algorithm="fold"), lr=lr, betas=betas, eps=eps, fused=True)
    optimizer.register_step_pre_hook(lambda stepping, args, kwargs: check_idle_pairs(stepping, pairs))
    optimizer.register_load_state_dict_pre_hook(check_state)
    folded = [written for pair in pairs for written in _folded(pair)]
    _freeze(model, pairs)
    with torch.no_grad():
        for tensor, value in folded:
            tensor.copy_(value)
    return optimizer


def _freeze(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Make a frozen A part of the adapters: of their layers, and of the configs that are saved with them."""
    frozen = [
        (table, {name: replace(config, freeze_A=True) for name, config in configs.items()})
        for table, configs in _configs(model, pairs)
    ]
    if not frozen:
        warn(
            f"{type(model).__name__} holds no config of its adapters, so a file of theirs will not say that A is "
            "frozen. Pass the PeftModel itself."
        )
    for pair in pairs:
        pair.adapter.trains = "B"
        pair.A.requires_grad_(False)
    for table, configs in frozen:
        table |= configs


def _configs(model: nn.Module, pairs: Iterable[Pair]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every table of configs in the model, and what it has of the adapters of ``pairs``."""
    names = {pair.name for pair in pairs}
    tables = [t for module in model.modules() if isinstance(t := module.__dict__.get("peft_config"), dict)]
    found = [(table, {name: config for name, config in table.items() if name in names}) for table in tables]
    return [(table, configs) for table, configs in found if configs]


@torch.no_grad()
def fold_(pair: Pair) -> None:
    """A = L Q, B <- B L, A <- Q: the same function with orthonormal rows of A; twice is once.

    A frozen start is folded alike, so that B A - B0 A0 stays exactly zero where it is.
    """
    for tensor, value in _folded(pair):
        tensor.copy_(value)


@torch.no_grad()
def _folded(pair: Pair) -> list[tuple[Tensor, Tensor]]:
    """What :func:`fold_` writes to, and what; nothing if the rows of A are orthonormal."""
    L = row_factors(pair)
    eye = torch.eye(L.shape[-1], dtype=L.dtype)
    if torch.allclose(L, eye.expand_as(L), rtol=0.0, atol=max(ORTHONORMAL, torch.finfo(pair.A.dtype).eps)):
        return []
    A, B = _fold(pair, pair.A, pair.B, L)
    written: list[tuple[Tensor, Tensor]] = [(pair.A, A), (pair.B, B)]
    start = pair.adapter.start
    if start is not None:
        A, B = _fold(pair, pair.layer.stored_A(start.A), pair.layer.stored_B(start.B), L)
        written += [(start.A, pair.layer.matrix_A(A)), (start.B, pair.layer.matrix_B(B))]
    return written


def _fold(pair: Pair, A: Tensor, B: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 A and B L, in the stored layout."""
    wide_A, wide_B = pair.matrices_A(A).cpu().double(), pair.matrices_B(B).cpu().double()
    return pair.stored_A(torch.linalg.solve_triangular(L, wide_A, upper=False)), pair.stored_B(wide_B @ L)


def _with_trained_B(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs of which something is trained.

    Raises:
        AdapterError: of one it is A alone, or its formula is about the gradient of A.
    """
    trained = [pair for pair in pairs if pair.A.requires_grad or pair.B.requires_grad]
    for pair in trained:
        if any(variant.learns_from_A for variant in pair.adapter.variant.chain()):
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r} is {pair.adapter.variant.name}, which is about the gradient of A, "
                "and LoRA-FA freezes A. Use a stock optimizer such as torch.optim.AdamW, or a plain adapter. Nothing "
                "was changed."
            )
        if "B" not in pair.adapter.trains or not pair.B.requires_grad:
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r}: B is frozen and A is trained, and LoRA-FA trains B alone: "
                "nothing would be left. Use a stock optimizer such as torch.optim.AdamW, or a start that trains B. "
                "Nothing was changed."
            )
    return trained


def _require_unwrapped(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Raises AdapterError if DistributedDataParallel already waits for gradients of some A, which would never come."""
    if not any(pair.A.requires_grad for pair in pairs):
        return
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise AdapterError(
            "DistributedDataParallel was put around the model while A was trained, and would wait for its gradients. "
            "Make the optimizer before that, or the adapter with LoraConfig(freeze_A=True). Nothing was changed."
        )


def _check_arguments(
    model: nn.Module, pairs: Sequence[Pair], r: int | None, alpha: float | None, use_rslora: bool | None
) -> None:
    """What the caller says must be what the adapters' configs all say; where there are none, what some layer has."""
    configs = [config for _, table in _configs(model, pairs) for config in table.values()]

    def check(what: str, said: object, of_layer: Callable[[LoraLayer, str], object]) -> None:
        found = {getattr(config, what) for config in configs} or {of_layer(pair.layer, pair.name) for pair in pairs}
        values = sorted(found, key=str)
        if said is not None and (said not in values or (configs and len(values) > 1)):
            have, instead = ", ".join(map(str, values)), f"pass {what}={values[0]}, or " if len(values) == 1 else ""
            error = ConfigError(
                f"{what}={said!r} was given, but the adapters have {what}={have}. The optimizer reads it from each "
                f"layer: {instead}leave it out. Nothing was changed."
            )
            refuse(error, f"The optimizer goes by {what}={have}, as the layers do.")

    check("r", r, lambda layer, name: layer.r[name])
    check("lora_alpha", alpha, lambda layer, name: layer.lora_alpha[name])
    check("use_rslora", use_rslora, lambda layer, name: layer.use_rslora[name])


@dataclass(frozen=True, kw_only=True)
class LoraFASettings(AdamSettings):
    """LoRA-FA under AdamW."""

    eps: float = 1e-6
    """Added to the denominator, in the units of the projected gradient."""
    algorithm: Literal["exact", "fold"] = "exact"
    """Project B's gradient (exact), or make the rows of A orthonormal once (fold)."""


def _make(model: nn.Module, settings: LoraFASettings, **common: float) -> Optimizer:
    adam = {"betas": settings.betas, "eps": settings.eps}
    return create_lorafa_optimizer(model, algorithm=settings.algorithm, **common, **adam)  # type: ignore[arg-type]


def _state(sizes: Sizes, settings: LoraFASettings) -> int:
    return two_moments(sizes) if settings.algorithm == "fold" else two_wide_moments(sizes)


LORA_FA = OptimizerEntry(lr=2e-3, state=_state, settings=LoraFASettings, make=_make, freezes="A", form="algorithm")
