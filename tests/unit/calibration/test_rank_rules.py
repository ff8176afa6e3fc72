"""Ranks from spectra: planted ranks are found, budgets are kept, published rules give their numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.calibration.base import Measured
from lorafa.calibration.explained_variance import by_explained_variance
from lorafa.calibration.gradient import cross_validated
from lorafa.calibration.principal import IncrementalPCA, PCASettings
from lorafa.calibration.rank_rules import (
    Spectrum,
    by_budget,
    by_cross_validation,
    by_energy,
    by_entropy,
    by_importance,
    by_stable_rank,
    entropy_rank,
    importance_of,
)
from lorafa.errors import CalibrationError, ConfigError
from lorafa.numerics.linalg import full_svd


def spectrum(values: list[float], out: int = 10, in_: int = 12, **more: Any) -> Spectrum:
    S = torch.tensor(values, dtype=torch.float64)
    return Spectrum(out, in_, S, float(S.square().sum()), **more)


def noisy(rank: int, seed: int, out: int = 60, in_: int = 70) -> Spectrum:
    """Two half samples of a gradient of that rank, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    signal = torch.linalg.qr(rand(out, max(rank, 1))).Q @ torch.linalg.qr(rand(in_, max(rank, 1))).Q.mT
    first, second = ((50 if rank else 0) * signal + rand(out, in_) for _ in range(2))
    whole, half = full_svd((first + second) / 2), full_svd(first)
    return Spectrum(out, in_, whole.S, float(whole.S.square().sum()), cross_validated(half, second), half.S)


def test_cross_validation_finds_planted_ranks() -> None:
    spectra = {str(rank): noisy(rank, seed=rank) for rank in (5, 0, 12)}
    assert by_cross_validation(spectra, r_max=32, r_min=0) == {"5": 5, "0": 0, "12": 12}
    assert by_cross_validation(spectra, r_max=8, r_min=2) == {"5": 5, "0": 2, "12": 8}


def test_cross_validation_and_budget_need_what_they_read() -> None:
    with pytest.raises(CalibrationError, match=r"'a' do not keep two half samples apart.*halves=True"):
        by_cross_validation({"a": spectrum([1.0])}, 4)
    with pytest.raises(CalibrationError, match=r"no gradient of 'a' to choose a rank by.*also=\['gradient'\]"):
        Spectrum.of("a", {}, (3, 4))


def test_energy_and_stable_and_entropy_rank() -> None:
    spectra = {"a": spectrum([3.0, 4.0**0.5, 1.0, 0.0]), "b": spectrum([2.0] * 4), "c": spectrum([5.0, 0, 0, 0])}
    assert by_energy(spectra, 4, share=0.9) == {"a": 2, "b": 4, "c": 1}
    assert by_energy(spectra, 4, share=1.0) == {"a": 3, "b": 4, "c": 1}
    assert by_stable_rank(spectra, 4) == {"a": 2, "b": 4, "c": 1}
    assert entropy_rank(spectra["b"].S) == pytest.approx(4)
    assert entropy_rank(spectra["c"].S) == pytest.approx(1)
    shares = (9 / 14, 4 / 14, 1 / 14)
    assert entropy_rank(spectra["a"].S) == pytest.approx(math.prod(p**-p for p in shares))  # 2.33
    assert by_entropy(spectra, 4) == {"a": 3, "b": 4, "c": 1}
    assert by_entropy(spectra, 2) == {"a": 2, "b": 2, "c": 1}
    zero = {"z": spectrum([0.0, 0.0])}
    assert by_energy(zero, 4, r_min=0) == by_stable_rank(zero, 4, r_min=0) == by_entropy(zero, 4, r_min=0) == {"z": 0}


def test_budget_is_kept_and_used_up_by_the_best_directions() -> None:
    spectra = {"strong": spectrum([9.0, 8, 7, 6, 5]), "weak": spectrum([4.0, 3, 2, 1, 0.5])}
    budget = 2 * (22 + 22)
    assert by_budget(spectra, budget, r_max=5) == {"strong": 3, "weak": 1}
    assert by_budget(spectra, budget, r_max=5, r_min=0) == {"strong": 4, "weak": 0}
    assert by_budget(spectra, budget, r_max=2) == {"strong": 2, "weak": 2}
    with pytest.raises(ConfigError, match=r"A budget of rank 2 does not pay for at least 3 in every layer"):
        by_budget(spectra, budget, r_max=5, r_min=3)


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_never_exceeded_and_nothing_that_fits_is_left(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for index in range(6):
        out, in_ = (int(torch.randint(6, 40, (), generator=generator)) for _ in range(2))
        values = torch.rand(6, generator=generator).sort(descending=True).values.tolist()
        spectra[str(index)] = spectrum(values, out, in_)
    budget = 5 * sum(one.cost for one in spectra.values()) // 2
    ranks = by_budget(spectra, budget, r_max=6)
    spent = sum(ranks[name] * one.cost for name, one in spectra.items())
    assert spent <= budget
    assert all(ranks[name] == 6 or spent + one.cost > budget for name, one in spectra.items())
    assert min(ranks.values()) >= 1


def test_budget_pays_for_what_the_other_half_confirms() -> None:
    """A large singular value of noise buys nothing while a confirmed direction is to be had."""
    noise = spectrum([9.0, 9, 9], cross=torch.tensor([0.0, -1, 0]), S_half=torch.tensor([9.0, 9, 9]))
    signal = spectrum([2.0, 2, 2], cross=torch.tensor([2.0, 2, 2]), S_half=torch.tensor([2.0, 2, 2]))
    assert by_budget({"noise": noise, "signal": signal}, 2 * (22 + 22), r_max=3) == {"noise": 1, "signal": 3}


def test_importance_is_gora() -> None:
    """r = clip(floor(round(B I / sum I) / (m + n))), B = sum r (m + n)."""
    shapes = {"a": (8, 8), "b": (18, 18), "c": (8, 8)}
    budget = 4 * (16 + 36 + 16)
    ranks = by_importance({"a": 3.0, "b": 1.0, "c": 0.0}, shapes, budget, r_min=2, r_max=7)
    assert ranks == {"a": 7, "b": 2, "c": 2}  # 204 / 16 = 12.75, 68 / 36 = 1.9
    assert by_importance({"a": 3.0, "b": 1.0, "c": 0.0}, shapes, budget, r_min=1, r_max=16) == {"a": 8, "b": 1, "c": 1}
    W, G = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    assert importance_of(W, G) == (3 + 8) / 2


def test_equal_importance_gives_equal_parameters() -> None:
    """And so the smaller layers the larger ranks."""
    shapes = {"square": (48, 48), "wide": (48, 144), "small": (24, 24)}
    budget = 6 * sum(map(sum, shapes.values()))
    ranks = by_importance(dict.fromkeys(shapes, 0.3), shapes, budget, r_min=1, r_max=99)
    assert ranks == {"square": 7, "wide": 3, "small": 14}  # 672 parameters each


@pytest.mark.parametrize("seed", range(8))
def test_importance_spends_its_budget_and_no_more_but_for_the_least_rank(seed: int) -> None:
    """Every layer has its share of the parameters, short of it by less than one rank costs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(40, 200, (6, 2), generator=generator).tolist()
    shapes = {str(index): (out, in_) for index, (out, in_) in enumerate(sizes)}
    importance = dict(zip(shapes, (0.5 + torch.rand(6, generator=generator)).tolist(), strict=True))
    budget = 16 * sum(map(sum, shapes.values()))
    ranks = by_importance(importance, shapes, budget, r_min=1, r_max=1000)
    for name, shape in shapes.items():
        share = budget * importance[name] / sum(importance.values())
        full = min(shape)  # no layer takes a larger rank
        assert ranks[name] == full or -0.5 <= share - ranks[name] * sum(shape) < sum(shape) + 0.5
    assert sum(ranks[name] * sum(shape) for name, shape in shapes.items()) <= budget + len(shapes) / 2


def test_explained_variance_is_eva() -> None:
    ratios = {"a": torch.tensor([0.5, 0.3, 0.2, 0.1]), "b": torch.tensor([0.05, 0.04, 0.03, 0.02])}
    assert by_explained_variance(ratios, {"a": 2, "b": 2}, rho=2.0) == {"a": 4, "b": 0}
    assert by_explained_variance(ratios, {"a": 2, "b": 2}, rho=1.5) == {"a": 3, "b": 1}
    assert by_explained_variance(ratios, {"a": 2, "b": 2}, rho=1.0) == {"a": 2, "b": 2}


@pytest.mark.parametrize("names", ["qkv", "vkq", "kqv"])
def test_a_tie_of_explained_variance_goes_to_the_earlier_layer(names: str) -> None:
    """Layers of one input explain exactly as much. The first of them gets the larger rank, whatever its name."""
    shares = dict.fromkeys(names, torch.tensor([0.4, 0.3, 0.2, 0.06, 0.03, 0.01], dtype=torch.float64))
    for budget, expected in ((9, [3, 3, 3]), (10, [4, 3, 3]), (11, [4, 4, 3]), (12, [4, 4, 4])):
        before = dict(zip(names, (3, 3, budget - 6), strict=True))
        assert list(by_explained_variance(shares, before, rho=2.0).values()) == expected


@pytest.mark.parametrize(("rho", "rank", "most"), [(1.2, 3, 4), (1.1, 3, 3), (1.7, 2, 3), (2.0, 5, 10), (1.0, 7, 7)])
def test_a_layer_gets_at_most_as_many_ranks_as_eva_follows_components(rho: float, rank: int, most: int) -> None:
    """k = round(rho r), for the principal components as for the ranks that are chosen among them."""
    measured = Measured("steep", 64, 64, rank, PCASettings(rho=rho))
    ratios = {"steep": torch.linspace(0.9, 0.5, 64), "flat": torch.linspace(0.1, 0.0, 64)}
    ranks = by_explained_variance(ratios, {"steep": rank, "flat": rank}, rho)
    assert ranks == {"steep": most, "flat": 2 * rank - most}
    assert IncrementalPCA(measured).k == most
