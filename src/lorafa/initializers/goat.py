"""GOAT: each expert starts at triplets of another part of the spectrum of W (Fan et al. 2025, arXiv:2502.16894)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, initializer
from lorafa.initializers.stages import halves, require_directions, require_finite
from lorafa.numerics.linalg import full_svd
from lorafa.settings.checks import check_flag, check_int, check_number
from lorafa.spec import LayerSpec


@dataclass
class GoatConfig:
    """How the spectrum is shared out."""

    experts: int = 8
    """E, the number of experts; each has rank d = r / E."""
    rho: float = 10.0
    """The factors are made smaller by sqrt(rho)."""
    last: bool = False
    """Take the last d triplets of a segment instead of the first ("goat_mini" in the authors' code)."""

    def __post_init__(self) -> None:
        check_int("experts", self.experts, at_least=1)
        check_number("rho", self.rho, "a number > 0", 0)
        check_flag("last", self.last)


@initializer(reads_weight=True, settings=GoatConfig, moves_base=True, keeps_function=False, variant="goat")
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
    A, B = halves(chosen, 1 / (spec.scaling * settings.rho))
    return InitResult(A, B, taken=(A, B / settings.experts))


def segments(values: int, settings: GoatConfig, spec: LayerSpec) -> Tensor:
    """Which of ``values`` triplets the experts take, (r,), d of each segment.

    Raises:
        ConfigError: see :func:`goat`.
    """
    experts, length = settings.experts, values // settings.experts
    each, rest = divmod(spec.rank, experts)
    if rest or each > length:
        raise ConfigError(
            f"{spec.name}: GOAT gives each of {experts} experts the rank r / {experts}, from segments of {length} "
            f"singular values, found r = {spec.rank}. Set r to a multiple of {experts} up to {length * experts}, or "
            "another number of experts."
        )
    first = length - each if settings.last else 0
    return (length * torch.arange(experts)[:, None] + first + torch.arange(each)).flatten()
