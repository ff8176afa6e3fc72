"""Ranks from spectra: planted ranks are found, budgets are kept, published rules give their numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.calibration import RANK_RULES
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
from lorafa.starts.ranks import RankRule, choose_ranks, with_ranks
from lorafa.surgery.targets import find_targets


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
    """r = clip(round(B I / sum I) / f(m + n)), B = average * sum f(m + n)."""
    shapes = {"a": (8, 8), "b": (18, 18), "c": (8, 8)}
    ranks = by_importance({"a": 3.0, "b": 1.0, "c": 0.0}, shapes, average=4, r_min=2, r_max=7)
    budget = 4 * (4 + 6 + 4)
    assert ranks == {"a": 7, "b": round(budget / 4 / 6), "c": 2}
    W, G = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    assert importance_of(W, G) == (3 + 8) / 2


def test_explained_variance_is_eva() -> None:
    ratios = {"a": torch.tensor([0.5, 0.3, 0.2, 0.1]), "b": torch.tensor([0.05, 0.04, 0.03, 0.02])}
    assert by_explained_variance(ratios, {"a": 2, "b": 2}, rho=2.0) == {"a": 4, "b": 0}
    assert by_explained_variance(ratios, {"a": 2, "b": 2}, rho=1.5) == {"a": 3, "b": 1}
    assert by_explained_variance(ratios, {"a": 2, "b": 2}, rho=1.0) == {"a": 2, "b": 2}


@pytest.mark.parametrize(("rho", "rank", "most"), [(1.2, 3, 4), (1.1, 3, 3), (1.7, 2, 3), (2.0, 5, 10), (1.0, 7, 7)])
def test_a_layer_gets_at_most_as_many_ranks_as_eva_follows_components(rho: float, rank: int, most: int) -> None:
    """k = round(rho r), for the principal components as for the ranks that are chosen among them."""
    measured = Measured("steep", 64, 64, rank, PCASettings(rho=rho))
    ratios = {"steep": torch.linspace(0.9, 0.5, 64), "flat": torch.linspace(0.1, 0.0, 64)}
    ranks = by_explained_variance(ratios, {"steep": rank, "flat": rank}, rho)
    assert ranks == {"steep": most, "flat": 2 * rank - most}
    assert IncrementalPCA(measured).k == most


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def stats(first: list[float], second: list[float]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, values in (("first", first), ("second", second)):
        S = torch.tensor(values, dtype=torch.float64)
        out, in_ = (10, 12) if name == "first" else (12, 10)
        U, Vh = torch.eye(out, len(S), dtype=torch.float64), torch.eye(len(S), in_, dtype=torch.float64)
        found[name] = {"gradient.S": S, "gradient.U": U, "gradient.Vh": Vh, "gradient.norm2": S.square().sum()}
    return found


CONFIG = LoraConfig(r=2, lora_alpha=8, target_modules=["first", "second"], init_seed=0)


def test_chosen_ranks_are_patterns_that_keep_the_scaling() -> None:
    model = Model()
    ranks = choose_ranks(model, CONFIG, stats([9.0, 8, 7, 6], [1.0, 0.5, 0.1, 0.1]))
    assert ranks == {"first": 3, "second": 1}
    for use_rslora in (False, True):
        config = LoraConfig(**(vars(CONFIG) | {"use_rslora": use_rslora}))
        adapted = get_peft_model(Model(), with_ranks(model, config, ranks)).get_base_model()
        plain = get_peft_model(Model(), config).get_base_model()
        for name, rank in ranks.items():
            layer = adapted.get_submodule(name)
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == pytest.approx(plain.get_submodule(name).scaling["default"])
    free = with_ranks(model, CONFIG, ranks, keep_scaling=False)
    assert free.alpha_pattern == {}
    assert free.rank_pattern == {"^first": 3, "^second": 1}


def test_a_rank_of_zero_leaves_the_layer_out() -> None:
    config = with_ranks(Model(), CONFIG, {"first": 4, "second": 0})
    adapted = get_peft_model(Model(), config)
    assert [path for path, _ in adapted.base_model.lora_layers()] == ["first"]
    nothing = {"principal.singular_values": torch.zeros(4), "principal.total_variance": torch.ones(())}
    with pytest.raises(ConfigError, match="Every layer would get rank 0"):
        choose_ranks(Model(), CONFIG, dict.fromkeys(("first", "second"), nothing), RankRule("explained_variance"))


class Nested(nn.Module):
    """``fc`` is also how the name of ``blk.fc`` ends; ``blk.fc`` has a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.blk = nn.ModuleDict({"fc": nn.Linear(12, 12), "out": nn.Linear(12, 12)})
        self.again = self.blk


@pytest.mark.parametrize("config", [{"target_modules": ["fc", "out"]}, {"target_modules": "all-linear"}])
@pytest.mark.parametrize("kept", [["fc"], ["blk.fc"], ["fc", "blk.out"], ["blk.fc", "blk.out"]])
def test_a_layer_is_left_out_whose_name_ends_as_that_of_another(config: dict[str, Any], kept: list[str]) -> None:
    """Ranks {fc: 3, blk.fc: 0} adapt fc alone, and so does the config that is saved."""
    ranks = {name: 3 if name in kept else 0 for name in ("fc", "blk.fc", "blk.out")}
    chosen = with_ranks(Nested(), LoraConfig(r=4, **config), ranks)
    for one in (chosen, LoraConfig.from_dict(json.loads(json.dumps(chosen.to_dict())))):
        adapted = get_peft_model(Nested(), one)
        assert {path: layer.r["default"] for path, layer in adapted.base_model.lora_layers()} == dict.fromkeys(kept, 3)
    assert isinstance(chosen.target_modules, str) == ("fc" in kept)  # a list would mean blk.fc too


def test_layers_that_were_picked_by_number_or_excluded_stay_out() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in "012"])

    config = LoraConfig(r=4, target_modules=["a", "b"], layers_to_transform=[1, 2], exclude_modules=["layers.2.b"])
    chosen = with_ranks(Blocks(), config, {"layers.1.a": 2, "layers.1.b": 0, "layers.2.a": 0})
    adapted = get_peft_model(Blocks(), chosen)
    assert [path for path, _ in adapted.base_model.lora_layers()] == ["layers.1.a"]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))


def test_a_parameter_is_left_out_where_its_name_is_not_the_end_of_one_that_stays() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"a": Stack(), "b": nn.ModuleDict({"a": Stack()}), "fc": nn.Linear(4, 4)})

    chosen = with_ranks(model(), LoraConfig(r=2, target_modules=["fc"], target_parameters=["b.a.w", "b.a.v"]),
                        {"b.a.w": 2, "b.a.v": 0, "fc": 0})  # fmt: skip
    assert [(t.full_name, t.rank) for t in find_targets(model(), chosen)] == [("b.a.w", 2)]
    with pytest.raises(
        ConfigError, match=r"b\.a\.w cannot be left out: target_parameters takes names and their dotted"
    ):
        with_ranks(model(), LoraConfig(r=2, target_modules=[], target_parameters=["a.w"]), {"a.w": 2, "b.a.w": 0})


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ({"first": 2}, r"ranks must have the full name of every target.*Missing: second\. Not targeted: none\."),
        ({"first": 2, "second": 2, "third": 1}, r"Missing: none\. Not targeted: third\."),
        ({"first": 0, "second": 0}, r"Every rank is 0, so no layer would have an adapter\. Give one layer a rank"),
        ({"first": 2, "second": -1}, r"ranks\['second'\] must be an integer >= 0, found -1"),
        ({"first": 2, "second": 1.5}, r"ranks\['second'\] must be an integer >= 0, found 1\.5"),
    ],
)
def test_ranks_that_do_not_fit_the_config_are_refused(ranks: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        with_ranks(Model(), CONFIG, ranks)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule("energy", share=0.9), {"first": 3, "second": 1}),
        (RankRule("stable_rank"), {"first": 3, "second": 2}),
        (RankRule("entropy"), {"first": 4, "second": 2}),  # exp(H) = 3.02 and 1.47
        (RankRule("entropy", r_max=2), {"first": 2, "second": 2}),
        (RankRule("budget", r_max=2), {"first": 2, "second": 2}),
    ],
)
def test_rules_are_chosen_by_name(rule: RankRule, expected: dict[str, int]) -> None:
    assert choose_ranks(Model(), CONFIG, stats([9.0, 8, 7, 1], [1.0, 0.3, 0.1, 0.1]), rule) == expected


def test_rules_say_what_they_lack() -> None:
    given = stats([1.0], [1.0])
    with pytest.raises(CalibrationError, match=r"no principal directions of the input of 'first'.*\['principal'\]"):
        choose_ranks(Model(), CONFIG, given, RankRule("explained_variance"))
    with pytest.raises(CalibrationError, match="do not keep two half samples apart"):
        choose_ranks(Model(), CONFIG, given, RankRule("cross_validation"))
    with pytest.raises(ConfigError, match=r"rule.*'budgte'.*Did you mean 'budget'|rule must be"):
        RankRule("budgte")
    with pytest.raises(ConfigError, match="r_max must be"):
        RankRule(r_min=3, r_max=2)
    with pytest.raises(
        ConfigError, match=r"rule for ranks is a RankRule, found 'budget' \(str\)\. Pass RankRule\('budg"
    ):
        choose_ranks(Model(), CONFIG, given, "budget")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RANK_RULES.names())
def test_a_rule_refuses_the_settings_of_the_others(rule: str) -> None:
    for name, owner, value in (
        ("share", "energy", 0.5),
        ("threshold", "cross_validation", 0.5),
        ("rho", "explained_variance", 3),
    ):
        if rule == owner:
            assert getattr(RankRule(rule, **{name: value}).settings, name) == value
            with pytest.raises(ConfigError, match=f"{name} must be a number"):
                RankRule(rule, **{name: 0})
            continue
        said = rf"{name} is a setting of the rule '{owner}', and '{rule}' does not read it\. Drop {name}, or set rule="
        with pytest.raises(ConfigError, match=said):
            RankRule(rule, **{name: value})
    if rule == "explained_variance":
        for bound in ("r_min", "r_max"):
            with pytest.raises(
                ConfigError, match=rf"does not read {bound}: it gives a layer 0 to round\(rho r\) ranks.*Drop {bound}\."
            ):
                RankRule(rule, **{bound: 2})


@pytest.mark.parametrize(("r", "least"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_a_budget_gives_every_layer_two_ranks_where_it_is_larger_than_that(r: int, least: int) -> None:
    """At an average of 2 all of it would be spent on the smallest ranks."""
    config = LoraConfig(**(vars(CONFIG) | {"r": r}))
    given = stats([9.0] * 10, [1e-3] * 10)
    ranks = choose_ranks(Model(), config, given, RankRule("budget", r_max=10))
    assert ranks == {"first": 2 * r - least, "second": least}
    assert choose_ranks(Model(), config, given, RankRule("budget", r_min=1, r_max=10))["second"] == 1
    assert choose_ranks(Model(), config, given, RankRule("budget", r_max=1)) == {"first": 1, "second": 1}
    assert min(choose_ranks(Model(), config, given, RankRule("stable_rank")).values()) >= 1


def directions(*S: float, total: float) -> dict[str, Tensor]:
    """Of the four that are followed at r = 2, those that vary."""
    values = torch.tensor([*S, *[0.0] * (4 - len(S))])
    return {"principal.singular_values": values, "principal.total_variance": torch.tensor(total)}


def test_a_layer_whose_input_does_not_vary_gets_no_rank() -> None:
    stats = {"first": directions(3.0, 1.0, total=10.0), "second": directions(0.0, 0.0, total=0.0)}
    assert choose_ranks(Model(), CONFIG, stats, RankRule("explained_variance")) == {"first": 2, "second": 0}


def test_inputs_that_are_not_finite_choose_no_ranks() -> None:
    bad = directions(torch.nan, 1.0, total=torch.nan)
    stats = {"first": directions(3.0, 1.0, 0.1, 0.1, total=10.0), "second": bad}
    rule = RankRule("explained_variance")
    before = CONFIG.r
    with pytest.warns(UserWarning, match="The input of 1 of 2 layers is not finite, and their ranks stay .*: second"):
        assert choose_ranks(Model(), CONFIG, stats, rule) == {"first": before, "second": before}
    with pytest.raises(CalibrationError, match="No layer has a finite input, so there is nothing to choose ranks by"):
        choose_ranks(Model(), CONFIG, {"first": bad, "second": bad}, rule)


def broken(values: list[float]) -> dict[str, Tensor]:
    """What is collected of a gradient that is not finite: no halves, and nothing whole."""
    S = torch.tensor(values, dtype=torch.float64)
    return {"gradient.S": S, "gradient.U": S, "gradient.Vh": S, "gradient.norm2": S.square().sum()}


GRADIENT_RULES = [rule for rule in RANK_RULES.names() if "gradient" in RankRule(rule).reads()["also"]]  # type: ignore[operator]


@pytest.mark.parametrize("bad", [[torch.nan] * 4, [torch.inf, 3.0, 2.0, 1.0]])
@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_a_layer_whose_gradient_is_not_finite_keeps_its_rank_and_spoils_no_other(rule: str, bad: list[float]) -> None:
    class Three(Model):
        def __init__(self) -> None:
            super().__init__()
            self.bad = nn.Linear(50, 70)

    values = torch.tensor([9.0, 8, 7, 1], dtype=torch.float64)
    given = stats([9.0, 8, 7, 1], [1.0, 0.3, 0.1, 0.1])
    for name, shape in (("first", (10, 12)), ("second", (12, 10))):
        given[name] |= {"gradient.cross": values, "gradient.S_half": values, "gradient.dense": torch.ones(shape)}
    config = LoraConfig(**(vars(CONFIG) | {"target_modules": ["first", "second", "bad"], "rank_pattern": {"bad": 5}}))
    alone = choose_ranks(Model(), CONFIG, given, RankRule(rule))
    with pytest.warns(UserWarning, match="gradient of 1 of 3 layers is not finite, and their ranks stay .*: bad"):
        ranks = choose_ranks(Three(), config, given | {"bad": broken(bad)}, RankRule(rule))
    assert ranks == alone | {"bad": 5}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_no_ranks_are_chosen_where_no_gradient_is_finite(rule: str) -> None:
    given = dict.fromkeys(("first", "second"), broken([torch.nan] * 4))
    with pytest.raises(CalibrationError, match="No layer has a finite gradient, so there is nothing to choose ranks"):
        choose_ranks(Model(), CONFIG, given, RankRule(rule))
