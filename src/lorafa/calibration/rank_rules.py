"""Ranks from spectra: how many directions each layer is given, by a threshold of its own or out of one budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafa.calibration.ranking import Asked, Layer, Rule
from lorafa.errors import CalibrationError, ConfigError, shorten
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class EnergySettings:
    """What rule "energy" is set by."""

    share: float = 0.9
    """Share of a gradient's energy that its ranks must hold."""

    def __post_init__(self) -> None:
        check_number("share", self.share, "a number in (0, 1]", 0, 1, closed="]")


@dataclass(frozen=True)
class CrossValidationSettings:
    """What rule "cross_validation" is set by."""

    threshold: float = 0.25
    """Share of its singular value that a direction must hold in the other half sample to count: noise scores near
    zero."""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, "a number in (0, 1]", 0, 1, closed="]")


SHARE, THRESHOLD = EnergySettings.share, CrossValidationSettings.threshold


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a layer's gradient."""

    out: int
    in_: int
    S: Tensor
    """(k,), falling."""
    norm2: float
    """||G||^2, of which S^2 may be a part."""
    cross: Tensor | None = None
    """(k,) what the directions of one half sample hold in the other; for two half samples."""
    S_half: Tensor | None = None
    """(k,) what they hold in their own."""

    @property
    def cost(self) -> int:
        """Parameters a rank costs."""
        return self.out + self.in_

    def first(self, count: int) -> Spectrum:
        """With this many of its directions, of which there are no others to choose."""
        return replace(self, S=self.S[:count])

    @property
    def finite(self) -> bool:
        """Whether the gradient was."""
        known = [one for one in (self.S, self.cross, self.S_half) if one is not None]
        return math.isfinite(self.norm2) and all(bool(torch.isfinite(one).all()) for one in known)

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Spectrum:
        """From the gradient statistics of a layer.

        Raises:
            CalibrationError: there are none.
        """
        if "gradient.S" not in tensors:
            raise CalibrationError(
                f"There is no gradient of {name!r} to choose a rank by. Collect statistics with also=['gradient']."
            )
        cross, S_half = tensors.get("gradient.cross"), tensors.get("gradient.S_half")
        return cls(*shape, tensors["gradient.S"], float(tensors["gradient.norm2"]), cross, S_half)


Spectra = Mapping[str, Spectrum]


def by_cross_validation(spectra: Spectra, r_max: int, r_min: int = 1, threshold: float = THRESHOLD) -> dict[str, int]:
    """As many ranks as there are directions u_i, v_i with u_i^T G' v_i >= threshold sigma_i, in the other half G'.

    Directions of noise hold next to nothing there, however large their sigma: planted ranks are found exactly where
    they stand out, with one pass also from the noise that the sketch adds. The count ends at the first direction that
    fails: further down sigma is small, and noise passes now and then.

    Raises:
        CalibrationError: the statistics do not keep two halves apart.
    """
    return {name: _clip(_signal(name, one, r_max, threshold), r_min, r_max) for name, one in spectra.items()}


def _signal(name: str, spectrum: Spectrum, r_max: int, threshold: float) -> int:
    cross, own = _halves(name, spectrum)
    confirmed = (cross[:r_max] >= threshold * own[:r_max]) & (own[:r_max] > 0)
    return int(confirmed.int().cumprod(0).sum())


def _halves(name: str, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    if spectrum.cross is None or spectrum.S_half is None:
        raise CalibrationError(
            f"The statistics of {name!r} do not keep two half samples apart, which cross-validation compares. Collect "
            "them with halves=True."
        )
    return spectrum.cross, spectrum.S_half


def by_energy(spectra: Spectra, r_max: int, r_min: int = 1, share: float = SHARE) -> dict[str, int]:
    """The smallest rank whose triplets hold ``share`` of ||G||^2; all that the statistics hold where that is less.

    Where the spectrum decays slowly, as i^-0.75, a sketch of one pass spreads what its range misses over the directions
    it holds, and the rank comes out too small; with two passes they hold too little, and it comes out too large. Four
    passes mend it.
    """
    return {name: _clip(_energy_rank(one, share), r_min, r_max) for name, one in spectra.items()}


def _energy_rank(spectrum: Spectrum, share: float) -> int:
    held = spectrum.S.double().square().cumsum(0)
    below = int((held < share * spectrum.norm2 * (1 - 1e-12)).sum())
    return min(below + 1, len(held)) if spectrum.norm2 > 0 else 0


def by_stable_rank(spectra: Spectra, r_max: int, r_min: int = 1) -> dict[str, int]:
    """||G||^2 / sigma_1^2, rounded up."""
    return {
        name: _clip(math.ceil(one.norm2 / float(one.S[0]) ** 2 - 1e-9) if one.S[0] > 0 else 0, r_min, r_max)
        for name, one in spectra.items()
    }


def by_entropy(spectra: Spectra, r_max: int, r_min: int = 1) -> dict[str, int]:
    """:func:`entropy_rank` of the directions the statistics hold, rounded up."""
    return {name: _clip(math.ceil(entropy_rank(one.S) - 1e-9), r_min, r_max) for name, one in spectra.items()}


def entropy_rank(S: Tensor) -> float:
    """exp of the entropy of sigma_i^2 / sum: the number of equal directions that would be spread as widely (k,).

    The effective rank of Roy and Vetterli 2007, of energies. 0 where there is nothing.
    """
    energy = S.double().square()
    shares = energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    return float(torch.exp(-torch.xlogy(shares, shares).sum())) if shares.any() else 0.0


def by_budget(spectra: Spectra, budget: int, r_max: int, r_min: int = 1) -> dict[str, int]:
    """The directions worth most for their parameters, over all layers, as many as ``budget`` parameters pay for.

    A direction is worth max(e_i, 0)^2 / (out + in), with e_i what it holds in the other half sample, or its singular
    value where there are no halves. Ranks are prefixes of a spectrum, so a layer offers direction i once i - 1 is
    bought, however little that is worth. Every layer keeps at least ``r_min`` and at most ``r_max``; what is left over
    once the best direction no longer fits goes to the next best that does.

    Raises:
        ConfigError: the budget does not pay for ``r_min`` in every layer.
    """
    ranks = {name: min(r_min, _largest(one)) for name, one in spectra.items()}
    spent = sum(ranks[name] * one.cost for name, one in spectra.items())
    if spent > budget:
        average = budget / sum(one.cost for one in spectra.values())
        raise ConfigError(
            f"A budget of rank {average:g} does not pay for at least {r_min} in every layer. Lower r_min, or raise r."
        )
    heap = [_next(name, one, ranks[name]) for name, one in spectra.items()]
    heapq.heapify(heap)
    while heap:
        *_, name = heapq.heappop(heap)
        one = spectra[name]
        if ranks[name] >= min(r_max, _largest(one)) or spent + one.cost > budget:
            continue
        ranks[name] += 1
        spent += one.cost
        heapq.heappush(heap, _next(name, one, ranks[name]))
    return ranks


def _next(name: str, spectrum: Spectrum, rank: int) -> tuple[float, float, str]:
    """What the next direction of a layer is worth, negative for a heap; where halves say nothing, sigma decides."""
    if rank >= len(spectrum.S):
        return 0.0, 0.0, name
    sigma = float(spectrum.S[rank])
    held = sigma if spectrum.cross is None else max(float(spectrum.cross[rank]), 0.0)
    return -(held**2) / spectrum.cost, -(sigma**2) / spectrum.cost, name


def by_importance(
    importance: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    r_min: int,
    r_max: int,
) -> dict[str, int]:
    """GoRA's ranks (He et al. 2025, arXiv:2502.12171, equations 5-7): each layer's share of the parameters.

    r = floor(round(budget I / sum I) / (m + n)), between ``r_min`` and ``r_max``. The authors' code can put the root or
    the logarithm of m + n for it, here and in the budget; the scripts it is released with leave it as it is.

    Args:
        importance: of each layer, :func:`importance_of`.
        budget: parameters, those of the ranks of the config.
    """
    total = sum(importance.values())
    sizes = {name: out + in_ for name, (out, in_) in shapes.items()}
    average = budget // sum(sizes.values())
    ranks = {}
    for name, value in importance.items():
        rank = round(budget * value / total) // sizes[name] if total > 0 else average
        ranks[name] = _clip(rank, r_min, min(r_max, *shapes[name]))
    return ranks


def importance_of(weight: Tensor, gradient: Tensor) -> float:
    """mean |W o G| of a layer."""
    return float((weight.double() * gradient.double()).abs().mean())


def _largest(spectrum: Spectrum) -> int:
    """Rank that there are directions for."""
    return min(spectrum.out, spectrum.in_, len(spectrum.S))


def _clip(rank: int, r_min: int, r_max: int) -> int:
    return max(r_min, min(rank, r_max))


def _spectrum(layer: Layer, settings: Any) -> Spectrum:
    return Spectrum.of(layer.name, layer.tensors, layer.shape)


def _finite_spectrum(spectrum: Spectrum) -> bool:
    return spectrum.finite


def _budget(asked: Asked) -> dict[str, int]:
    least = asked.r_min or (2 if asked.average > 2 and asked.r_max >= 2 else 1)
    spectra = {name: one.first(asked.layers[name].most) for name, one in asked.measured.items()}
    return by_budget(spectra, asked.budget, asked.r_max, least)


def _cross_validation(asked: Asked) -> dict[str, int]:
    return by_cross_validation(asked.measured, asked.r_max, asked.least, asked.settings.threshold)


def _require_halves(settings: Any, collecting: Mapping[str, Any], of_start: Any) -> None:
    if not collecting.get("halves", True):
        raise ConfigError(
            "RankRule('cross_validation') compares two half samples of the gradients, and halves=False keeps none. "
            "Drop halves=False, or choose another rule."
        )


def _energy(asked: Asked) -> dict[str, int]:
    return by_energy(asked.measured, asked.r_max, asked.least, asked.settings.share)


def _stable_rank(asked: Asked) -> dict[str, int]:
    return by_stable_rank(asked.measured, asked.r_max, asked.least)


def _entropy(asked: Asked) -> dict[str, int]:
    return by_entropy(asked.measured, asked.r_max, asked.least)


def _importance(asked: Asked) -> dict[str, int]:
    sketched = [name for name, layer in asked.layers.items() if "gradient.dense" not in layer.tensors]
    if sketched:
        raise CalibrationError(
            f"Importance is the mean of |W o G|, and the statistics of {shorten(sketched, 3)} hold a sketch of the "
            "gradient, whose entries are smaller. Collect them with dense=True, or use another rule."
        )
    found = {
        name: importance_of(layer.weight().detach(), layer.tensors["gradient.dense"])
        for name, layer in asked.layers.items()
    }
    shapes = {name: layer.shape for name, layer in asked.layers.items()}
    return by_importance(found, shapes, asked.budget, asked.least, asked.r_max)


def _require_entries(settings: Any, collecting: Mapping[str, Any], of_start: Any) -> None:
    if collecting.get("dense") is False:
        raise ConfigError(
            "RankRule('importance') reads single entries of the gradients, and dense=False keeps sketches of them "
            "only. Drop dense=False, or choose another rule."
        )


BUDGET = Rule(choose=_budget, measure=_spectrum, is_finite=_finite_spectrum, halves=True)
CROSS_VALIDATION = Rule(
    choose=_cross_validation,
    measure=_spectrum,
    is_finite=_finite_spectrum,
    needs_halves=True,
    settings=CrossValidationSettings,
    check=_require_halves,
)
ENERGY = Rule(choose=_energy, measure=_spectrum, is_finite=_finite_spectrum, settings=EnergySettings)
STABLE_RANK = Rule(choose=_stable_rank, measure=_spectrum, is_finite=_finite_spectrum)
ENTROPY = Rule(choose=_entropy, measure=_spectrum, is_finite=_finite_spectrum)
IMPORTANCE = Rule(choose=_importance, measure=_spectrum, is_finite=_finite_spectrum, dense=True, check=_require_entries)
