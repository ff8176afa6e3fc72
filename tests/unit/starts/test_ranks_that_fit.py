"""Ranks from data are those that the data have, that the budget pays for, and that a start can be made with."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import EvaConfig, LoraConfig, RankRule, choose_ranks, collect_statistics, initialize, with_ranks
from lorafa.calibration.base import CalibrationOptions, Measured
from lorafa.calibration.gradient import GradientSketch
from lorafa.calibration.projections import Projections
from lorafa.calibration.rank_rules import Spectrum, by_budget, by_energy, by_stable_rank
from lorafa.errors import CalibrationError, ConfigError
from toys import calibration
from toys.calibration import LAYERS, Toy, gradients, inputs, loss


def config(start: str = "lora_one", **settings: Any) -> LoraConfig:
    return calibration.config(start, **({"r": 4, "lora_alpha": 8} | settings))


def sketched(G: Tensor, rank: int, passes: int, seed: int) -> Spectrum:
    options = CalibrationOptions(seed=seed, passes=passes, dense=False)
    statistic, number = GradientSketch(Measured("layer", *G.shape, rank, None, options, Projections(seed))), 0
    while statistic.wants_pass(number):
        statistic.start_pass(number, {})
        statistic.update(torch.eye(G.shape[1], dtype=G.dtype), G.mT.contiguous())
        statistic.end_pass(number, (1.0, 0.0))
        number += 1
    return Spectrum.of("layer", {f"gradient.{name}": one for name, one in statistic.result().items()}, tuple(G.shape))


def with_spectrum(S: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(2 * [len(S)], generator=generator, dtype=S.dtype)).Q for _ in "UV")
    return U * S @ V.mT


DECAY = torch.arange(256, dtype=torch.float64)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("S", [1 / (DECAY + 1), 0.7**DECAY], ids=["1 / i", "0.7^i"])
def test_energy_and_stable_rank_of_sketches_are_those_of_the_spectrum(S: Tensor, passes: int) -> None:
    """The estimate of ||G||^2 by ten rows alone would be off by a third."""
    G, energy = with_spectrum(S), S.square().cumsum(0) / S.square().sum()
    for seed in range(8):
        found = {"layer": sketched(G, 8, passes, seed)}
        assert found["layer"].norm2 == pytest.approx(float(S.square().sum()), rel=0.1)
        assert abs(by_energy(found, 32)["layer"] - int((energy < 0.9).sum()) - 1) <= 2  # 6 and 4
        assert by_stable_rank(found, 32) == {"layer": 2}  # 1.64 and 1.96


def test_four_passes_find_the_energy_rank_of_a_slowly_decaying_spectrum() -> None:
    """Of i^-0.75: one pass takes the first directions for more than they hold, two for less."""
    S = (DECAY + 1) ** -0.75
    G, energy = with_spectrum(S), S.square().cumsum(0) / S.square().sum()
    true = int((energy < 0.8).sum()) + 1
    one, two, four = (by_energy({"layer": sketched(G, 16, n, 1)}, 64, share=0.8)["layer"] for n in (1, 2, 4))
    assert one < true < two
    assert abs(four - true) <= 1


def test_energy_asks_for_no_more_directions_than_the_statistics_hold() -> None:
    held = Spectrum(20, 20, torch.tensor([3.0, 2.0, 1.0]), 100.0)
    assert by_energy({"layer": held}, 16) == {"layer": 3}


class Equal(nn.Module):
    """Layers of one shape."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(count))


def test_a_budget_of_any_ranks_is_spent_to_the_last_direction() -> None:
    """All ranks cost the same, so that nothing can be left; average * cost rounds below it now and then."""
    draw = random.Random(0)
    patterns = [draw.choices([1, 2, 3, 4, 8], k=7) for _ in range(60)] + [[2, 1, 4, 4, 3, 1, 2], [3, 1, 2, 2, 3, 3, 3]]
    S = torch.linspace(2, 1, 12)
    tensors = {"gradient.S": S, "gradient.norm2": S.square().sum()}
    for ranks in patterns:
        config = LoraConfig(r=8, target_modules=["layers.0"] + [f"layers.{i}" for i in range(1, 7)],
                            rank_pattern={f"layers.{i}": rank for i, rank in enumerate(ranks)})  # fmt: skip
        given = {f"layers.{i}": tensors for i in range(7)}
        assert sum(choose_ranks(Equal(7), config, given, RankRule("budget")).values()) == sum(ranks)


def test_directions_are_bought_in_their_order() -> None:
    """A layer offers its second direction, which the other half confirms, only once its first is bought."""
    late = Spectrum(10, 10, torch.tensor([3.0, 2.0]), 13.0, torch.tensor([0.0, 2.0]), torch.tensor([3.0, 2.0]))
    steady = Spectrum(10, 10, torch.tensor([1.0, 1.0]), 2.0, torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    spectra = {"late": late, "steady": steady}
    assert by_budget(spectra, 2 * 20, r_max=2, r_min=0) == {"late": 0, "steady": 2}
    assert by_budget(spectra, 3 * 20, r_max=2, r_min=1) == {"late": 2, "steady": 1}


def flat(held: int) -> dict[str, dict[str, Tensor]]:
    """Layers of the toy, whose statistics hold that many equal directions of far more."""
    S = torch.ones(held, dtype=torch.float64)
    return {name: {"gradient.S": S, "gradient.norm2": torch.tensor(1e3)} for name in LAYERS}


@pytest.mark.parametrize("rule", ["energy", "stable_rank", "budget"])
def test_a_start_gets_as_many_ranks_as_its_statistics_have_directions_for(rule: str) -> None:
    """LoRA-GA takes two for each rank. GoRA takes none, and a start without data none: only rules end there."""
    chosen = RankRule(rule, r_max=100)
    for start, most in (("lora_one", 12), ("lora_ga", 6), ("lora_ga_peft", 6)):
        found = choose_ranks(Toy(), config(start, r=16), flat(12), chosen)
        assert found == dict.fromkeys(LAYERS, most)
    for start in ("gora", "kaiming"):
        found = choose_ranks(Toy(), config(start, r=16), flat(12), chosen)
        assert found == (
            {"first": 30, "second": 30, "last": 20} if rule == "stable_rank" else dict.fromkeys(LAYERS, 12)
        )


def test_a_layer_gets_no_more_ranks_than_its_gradient_has() -> None:
    """Three tokens: with more the layer would have nothing to start from, and start as by default."""
    few = [inputs(1)[0][:1, :3]]
    assert all(torch.linalg.matrix_rank(G) == 3 for G in gradients(Toy(), few).values())
    for start, rank in (("lora_one", 3), ("lora_ga", 1)):
        adapted = initialize(Toy(), config(start, r=6), few, loss=loss, ranks=RankRule("budget"), halves=False)
        assert {layer.r["default"] for _, layer in adapted.base_model.lora_layers()} == {rank}


class Fed(nn.Module):
    """Three layers: the inputs of one have six equal directions, those of the others 48 each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.few, self.many, self.more = (nn.Linear(48, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        narrow = torch.cat([x[..., :6], torch.zeros_like(x[..., 6:])], dim=-1)
        y: Tensor = self.few(narrow) + self.many(x) + self.more(2 * x)
        return y


def white() -> list[Tensor]:
    """Batches in which every feature varies as much, and without the others."""
    both = torch.cat([torch.eye(48), -torch.eye(48)])
    return [both[None] * size for size in (1.0, 1.1)]


def fed(start: str = "eva", r: int = 2, **settings: Any) -> LoraConfig:
    return LoraConfig(r=r, target_modules=["few", "many", "more"], init_lora_weights=start, init_seed=0, **settings)


@pytest.mark.parametrize(("rho", "rank"), [(1.0, 2), (1.5, 3), (2.0, 4), (3.0, 6), (4.0, 6)])
def test_explained_variance_gives_a_layer_up_to_rho_times_its_rank(rho: float, rank: int) -> None:
    """The budget is 6, and each of the six directions explains eight times as much as any of the others'."""
    stats = collect_statistics(Fed(), fed(eva_config=EvaConfig(rho=rho)), white())
    ranks = choose_ranks(Fed(), fed(eva_config=EvaConfig(rho=rho)), stats, RankRule("explained_variance", rho=rho))
    assert ranks["few"] == rank
    assert sum(ranks.values()) == 6


class OneInput(nn.Module):
    """Three layers of one input, which come in another order than their names, and one of a narrow input."""

    def __init__(self, narrow: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = narrow
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(48, 48) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        narrow = torch.cat([x[..., : self.narrow], torch.zeros_like(x[..., self.narrow :])], dim=-1)
        y: Tensor = self.q_proj(x) + self.k_proj(x) + self.v_proj(x) + self.o_proj(narrow)
        return y


@pytest.mark.parametrize(("narrow", "expected"), [(1, [3, 2, 2, 1]), (2, [2, 2, 2, 2])])
def test_of_layers_with_one_input_the_first_gets_the_larger_rank(narrow: int, expected: list[int]) -> None:
    """The narrow input leaves them 7 or 6 of 8 ranks to share, and each direction explains as much in all three."""
    steep = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 0.8 ** torch.arange(48)
    model = OneInput(narrow)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = initialize(model, LoraConfig(r=2, target_modules=names, init_lora_weights="eva"), [steep[None]])
    assert [layer.r["default"] for _, layer in adapted.base_model.lora_layers()] == expected


def test_explained_variance_is_refused_statistics_of_fewer_directions_than_rho_asks_for() -> None:
    small, both = fed(eva_config=EvaConfig(rho=1.0)), {"loss": lambda model, x: model(x).square().mean()}
    text = (
        r"'explained_variance' with rho=2 chooses among the first 4 principal directions of the input of 'few', and "
        r"its statistics hold 2: round\(rho r\), with the rho of EvaConfig .* and 2 otherwise\. Set the same rho"
    )
    with pytest.raises(CalibrationError, match=text):
        choose_ranks(Fed(), small, collect_statistics(Fed(), small, white()), RankRule("explained_variance"))
    rule = RankRule("explained_variance", rho=3.0)
    given = collect_statistics(Fed(), fed("lora_one"), white(), also=["principal"], **both)
    with pytest.raises(CalibrationError, match=r"rho=3 chooses among the first 6 .* hold 4: .* collect with a larger"):
        choose_ranks(Fed(), fed("lora_one"), given, rule)
    with pytest.raises(ConfigError, match=r"rho=3 chooses among more directions than are collected, those of rho=2"):
        initialize(Fed(), fed("lora_one"), white(), ranks=rule, **both)
    stats = collect_statistics(Fed(), fed("lora_one", r=3), white(), also=["principal"], **both)
    assert choose_ranks(Fed(), fed("lora_one"), stats, rule)["few"] == 6


@pytest.mark.parametrize("alpha", [1, 8, 16, 7.5])
def test_alpha_patterns_are_exact(alpha: float) -> None:
    """alpha r' / r where it is a number of the format: no 16.000000000000004."""
    for r in (1, 2, 3, 5, 7, 49):
        ranks = {"first": 3 * r, "second": r, "last": 2 * r}
        kept = with_ranks(Toy(), config(r=r, lora_alpha=alpha), ranks)
        assert kept.alpha_pattern == {"^first": 3 * alpha, "^last": 2 * alpha}
        back = with_ranks(Toy(), config(r=3 * r, lora_alpha=3 * alpha), dict.fromkeys(LAYERS, r))
        assert set(back.alpha_pattern.values()) == {3 * alpha * (r / (3 * r))}
