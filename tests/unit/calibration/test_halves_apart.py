"""Of two half samples neither has a part in what is found in the other, however gradients are collected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import LoraConfig, RankRule, initialize
from lorafa.calibration.base import CalibrationOptions, Measured
from lorafa.calibration.gradient import GradientSketch
from lorafa.calibration.projections import Projections
from lorafa.calibration.rank_rules import Spectrum, by_cross_validation
from toys.calibration import LAYERS, Toy, inputs, loss

COLLECTED: dict[str, dict[str, Any]] = {
    "dense": {"dense": True},
    "one pass": {"dense": False},
    "two passes": {"dense": False, "passes": 2},
    "four passes": {"dense": False, "passes": 4},
}
EACH = pytest.mark.parametrize("options", COLLECTED.values(), ids=COLLECTED)


def sketch(
    first: Tensor, second: Tensor | None = None, rank: int = 8, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Of the gradient ``first``; or of two half samples, each with its own. G = d^T x with x = I."""
    chosen = CalibrationOptions(seed=seed, halves=second is not None, **options)
    statistic = GradientSketch(Measured("layer", *first.shape, rank, None, chosen, Projections(seed)))
    batches, number = [first] if second is None else [first, second], 0
    while statistic.wants_pass(number):
        statistic.start_pass(number, {})
        for half, G in enumerate(batches):
            statistic.start_batch(half)
            statistic.update(torch.eye(first.shape[1], dtype=G.dtype), G.mT.contiguous())
        statistic.end_pass(number, (1.0, float(len(batches) - 1)))
        number += 1
    return statistic.result()


def spectrum(found: dict[str, Tensor]) -> dict[str, Spectrum]:
    shape = (len(found["U"]), found["Vh"].shape[1])
    return {"layer": Spectrum.of("layer", {f"gradient.{name}": value for name, value in found.items()}, shape)}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signal(rank: int, out: int, in_: int, seed: int = 9) -> Tensor:
    """Of that rank, with equal singular values of 1."""
    U, V = (torch.linalg.qr(noise(n, max(rank, 1), seed=seed + n)).Q for n in (out, in_))
    return U @ V.mT if rank else torch.zeros(out, in_, dtype=torch.float64)


@EACH
@pytest.mark.parametrize("shape", [(300, 100), (100, 300)])
def test_directions_of_noise_hold_next_to_nothing_in_the_other_half(
    shape: tuple[int, int], options: dict[str, Any]
) -> None:
    """u^T G2 v is of variance 1 for unit u and v that G2 has no part in, and sigma_1 is sqrt(300) + sqrt(100) = 27; a
    sketch of one pass makes both three times as large. The mean of 24 shares is within 0.06."""
    shares = []
    for seed in range(3):
        found = sketch(noise(*shape, seed=seed), noise(*shape, seed=seed + 100), seed=seed, **options)
        shares.append((found["cross"] / found["S_half"])[:8])
        assert by_cross_validation(spectrum(found), 32, r_min=0) == {"layer": 0}
    assert torch.stack(shares).mean().abs() < 0.06


@EACH
@pytest.mark.parametrize("rank", [5, 0, 12])
def test_a_planted_rank_is_found(rank: int, options: dict[str, Any]) -> None:
    G, shape = 400 * signal(rank, 150, 120), (150, 120)
    found = sketch(G + noise(*shape, seed=1), G + noise(*shape, seed=2), **options)
    assert by_cross_validation(spectrum(found), 32, r_min=0) == {"layer": rank}


@EACH
@pytest.mark.parametrize("rank", [8, 40])
def test_a_signal_of_more_directions_than_are_kept_is_confirmed_in_all_of_them(
    rank: int, options: dict[str, Any]
) -> None:
    """Eight triplets are kept of 40 equal directions: each half has its own eight, and they hold as much in both."""
    G, shape = 100 * signal(rank, 120, 110), (120, 110)
    found = sketch(G + 0.1 * noise(*shape, seed=1), G + 0.1 * noise(*shape, seed=2), rank=2, **options)
    kept = min(rank, len(found["S"]))
    torch.testing.assert_close(found["cross"][:kept], found["S_half"][:kept], rtol=0.05, atol=0)


@EACH
def test_the_first_half_is_sketched_as_it_would_be_alone(options: dict[str, Any]) -> None:
    first, second = (noise(60, 90, seed=seed) @ torch.diag(torch.arange(1, 91) ** -1.0).double() for seed in (1, 2))
    found, alone = sketch(first, second, rank=3, **options), sketch(first, rank=3, **options)
    torch.testing.assert_close(found["S_half"], alone["S"], rtol=1e-9, atol=1e-12)
    if options != COLLECTED["one pass"]:  # which knows the other half by a sketch
        held = (alone["U"].mT @ second @ alone["Vh"].mT).diagonal()
        torch.testing.assert_close(found["cross"], held, rtol=1e-9, atol=1e-10)


@EACH
def test_what_the_other_half_holds_is_linear_in_it(options: dict[str, Any]) -> None:
    """Hence unbiased: the mean over samples of the other half is that of their mean."""
    first, second, third = (noise(60, 70, seed=seed) for seed in (1, 2, 3))
    held = [sketch(first, G, rank=2, **options)["cross"] for G in (second, third, (second + third) / 2, first)]
    torch.testing.assert_close((held[0] + held[1]) / 2, held[2], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(held[3], sketch(first, rank=2, **options)["S"], rtol=1e-9, atol=1e-10)


@EACH
def test_keeping_halves_apart_changes_nothing_about_the_whole(options: dict[str, Any]) -> None:
    first, second = noise(60, 70, seed=1), noise(60, 70, seed=2)
    found, whole = sketch(first, second, rank=2, **options), sketch((first + second) / 2, rank=2, **options)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_ranks_by_cross_validation_of_sketches_are_those_the_data_confirm(passes: int) -> None:
    """The same batches in both halves confirm every direction; a gradient of three tokens has three."""
    few = [inputs(1)[0][:1, :3]] * 4
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(LAYERS), init_lora_weights="lora_one", init_seed=0)
    rule = RankRule("cross_validation", threshold=1e-6)
    adapted = initialize(Toy(), config, few, loss=loss, ranks=rule, dense=False, passes=passes)
    ranks = {path: layer.r["default"] for path, layer in adapted.base_model.lora_layers()}
    assert ranks == dict.fromkeys(LAYERS, 3)
