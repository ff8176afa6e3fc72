"""GOAT: each expert starts at triplets of another part of the spectrum of W (Fan et al. 2025, arXiv:2502.16894)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import halves, require_directions, require_finite
from lorafa.numerics.linalg import full_svd
from lorafa.settings.checks import check_choice, check_flag, check_int, check_number
from lorafa.spec import LayerSpec

_RULES = ("classic", "rs", "goat")


@dataclass
class GoatConfig:
    """How the spectrum is shared out, and how tokens are."""

    experts: int = 8
    """E, the number of experts; each has rank d = r / E."""
    rho: float = 10.0
    """The factors are made smaller by sqrt(rho)."""
    last: bool = False
    """Take the last d triplets of a segment instead of the first ("goat_mini" in the authors' code)."""
    top_k: int = 2
    """Experts a token is routed to. With 1 its weight is 1 whatever the router says, which then learns from the balance
    alone."""
    scaling: str | float = "classic"
    """The factor s on B_i A_i: "classic" alpha / d, as in the authors' first code, "rs" alpha / sqrt(d), "goat" sqrt(3
    in / d), which the paper derives, which their later code takes and which does not read alpha, or a number, such as
    sqrt(3 eta in / d) for another eta than 1."""
    balance: float = 1e-3
    """Weight of the loss that keeps all experts in use, E sum f_i P_i. In the authors' code the shares f_i have the sum
    top_k, here 1: their 1e-3 is top_k times that here."""

    def __post_init__(self) -> None:
        check_int("experts", self.experts, at_least=1)
        check_int("top_k", self.top_k, at_least=1)
        if self.top_k > self.experts:
            raise ConfigError(
                f"top_k={self.top_k} is more than there are experts, {self.experts}. Lower top_k, or set more experts."
            )
        if isinstance(self.scaling, str):
            check_choice("scaling", self.scaling, _RULES)
        else:
            check_number("scaling", self.scaling, f"a number > 0 or one of {', '.join(map(repr, _RULES))}", 0)
        check_number("balance", self.balance, "a number >= 0", 0, closed="[")
        check_number("rho", self.rho, "a number > 0", 0)
        check_flag("last", self.last)


@initializer(
    reads_weight=True,
    settings=GoatConfig,
    moves_base=True,
    keeps_function=False,
    variant="goat",
    stages=Stages(
        objective="product", target="W", metric="identity", selection="r/E of each of E segments of the spectrum",
        split="sqrt, sqrt", scale="1/(s rho)", base="without the mean of the experts",
    ),
)  # fmt: skip
def goat(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B_i = U_i sqrt(S_i / (s rho)) and A_i = sqrt(S_i / (s rho)) V_i^T, stacked expert after expert.

    Expert i has d triplets of segment i of the spectrum, which is cut into E of floor(k / E), k = min(out, in). The
    base is left without (s / E) sum B_i A_i: the mean of what a router adds that sends tokens to experts at random.

    Raises:
        ConfigError: r is no multiple of E, or a segment has fewer than d triplets.
        DegenerateError: W is not finite, or some singular value taken is zero.
    """
    settings: GoatConfig = spec.settings or GoatConfig()
    index = segments(min(weight.shape), settings, spec)
    require_finite(weight, "its weight")
    everything = full_svd(weight)
    chosen = everything.at(index)
    require_directions(chosen.S, everything.S[0], max(weight.shape), "its weight")
    scaling = strength(settings, spec.scaling, spec.rank, weight.shape[1])
    A, B = halves(chosen, 1 / (scaling * settings.rho))
    return InitResult(A, B, taken=(A, B / settings.experts))


def strength(settings: GoatConfig, scaling: float, rank: int, in_features: int) -> float:
    """The factor s on B_i A_i for experts of rank d = ``rank`` / E.

    Args:
        scaling: alpha / ``rank``.
        rank: of all experts together.
    """
    each = rank / settings.experts
    if not isinstance(settings.scaling, str):
        return settings.scaling
    if settings.scaling == "goat":
        return math.sqrt(3 * in_features / each)
    alpha = scaling * rank
    return alpha / math.sqrt(each) if settings.scaling == "rs" else alpha / each


def rank_of_expert(settings: GoatConfig, spec: LayerSpec) -> int:
    """The rank d = r / E.

    Raises:
        ConfigError: r is no multiple of E.
    """
    each, rest = divmod(spec.rank, settings.experts)
    if rest:
        raise ConfigError(
            f"{spec.name}: GOAT gives each of {settings.experts} experts the rank r / {settings.experts}, found r = "
            f"{spec.rank}. Set r (rank_pattern for single layers) to a multiple of {settings.experts}, or another "
            "number of experts in init_config."
        )
    return each


def segments(values: int, settings: GoatConfig, spec: LayerSpec) -> Tensor:
    """Which of ``values`` triplets the experts take, (r,), d of each segment.

    Raises:
        ConfigError: see :func:`goat`.
    """
    experts, length = settings.experts, values // settings.experts
    each = rank_of_expert(settings, spec)
    if each > length:
        raise ConfigError(
            f"{spec.name}: GOAT takes r / {experts} = {each} singular values of each of {experts} segments of the "
            f"weight's, which have {length}. Set r (rank_pattern for single layers) to {length * experts} or less, or "
            "leave the layer out with exclude_modules."
        )
    first = length - each if settings.last else 0
    return (length * torch.arange(experts)[:, None] + first + torch.arange(each)).flatten()
