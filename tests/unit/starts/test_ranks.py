"""Ranks of a model from its statistics: patterns that keep the scaling, layers left out, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.calibration import RANK_RULES
from lorafa.errors import CalibrationError, ConfigError
from lorafa.starts.ranks import RankRule, choose_ranks, with_ranks
from lorafa.surgery.resolve import resolve
from toys.models import Two


def two() -> Two:
    return Two(12, 10, 12)


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
    model = two()
    ranks = choose_ranks(model, CONFIG, stats([9.0, 8, 7, 6], [1.0, 0.5, 0.1, 0.1]))
    assert ranks == {"first": 3, "second": 1}
    for use_rslora in (False, True):
        config = LoraConfig(**(vars(CONFIG) | {"use_rslora": use_rslora}))
        adapted = get_peft_model(two(), with_ranks(model, config, ranks)).get_base_model()
        plain = get_peft_model(two(), config).get_base_model()
        for name, rank in ranks.items():
            layer = adapted.get_submodule(name)
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == pytest.approx(plain.get_submodule(name).scaling["default"])
    free = with_ranks(model, CONFIG, ranks, keep_scaling=False)
    assert free.alpha_pattern == {}
    assert free.rank_pattern == {"^first": 3, "^second": 1}


def test_a_rank_of_zero_leaves_the_layer_out() -> None:
    config = with_ranks(two(), CONFIG, {"first": 4, "second": 0})
    adapted = get_peft_model(two(), config)
    assert [path for path, _ in adapted.base_model.lora_layers()] == ["first"]
    nothing = {"principal.singular_values": torch.zeros(4), "principal.total_variance": torch.ones(())}
    with pytest.raises(ConfigError, match="Every layer would get rank 0"):
        choose_ranks(two(), CONFIG, dict.fromkeys(("first", "second"), nothing), RankRule("explained_variance"))


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
    def two() -> nn.Module:
        return nn.ModuleDict({"a": Stack(), "b": nn.ModuleDict({"a": Stack()}), "fc": nn.Linear(4, 4)})

    chosen = with_ranks(two(), LoraConfig(r=2, target_modules=["fc"], target_parameters=["b.a.w", "b.a.v"]),
                        {"b.a.w": 2, "b.a.v": 0, "fc": 0})  # fmt: skip
    assert [(t.full_name, t.rank) for t in resolve(two(), chosen).targets] == [("b.a.w", 2)]
    with pytest.raises(
        ConfigError, match=r"b\.a\.w cannot be left out: target_parameters takes names and their dotted"
    ):
        with_ranks(two(), LoraConfig(r=2, target_modules=[], target_parameters=["a.w"]), {"a.w": 2, "b.a.w": 0})


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
        with_ranks(two(), CONFIG, ranks)


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
    assert choose_ranks(two(), CONFIG, stats([9.0, 8, 7, 1], [1.0, 0.3, 0.1, 0.1]), rule) == expected


def test_rules_say_what_they_lack() -> None:
    given = stats([1.0], [1.0])
    with pytest.raises(CalibrationError, match=r"no principal directions of the input of 'first'.*\['principal'\]"):
        choose_ranks(two(), CONFIG, given, RankRule("explained_variance"))
    with pytest.raises(CalibrationError, match="do not keep two half samples apart"):
        choose_ranks(two(), CONFIG, given, RankRule("cross_validation"))
    with pytest.raises(ConfigError, match=r"rule.*'budgte'.*Did you mean 'budget'|rule must be"):
        RankRule("budgte")
    with pytest.raises(ConfigError, match="r_max must be"):
        RankRule(r_min=3, r_max=2)
    with pytest.raises(
        ConfigError, match=r"rule for ranks is a RankRule, found 'budget' \(str\)\. Pass RankRule\('budg"
    ):
        choose_ranks(two(), CONFIG, given, "budget")  # type: ignore[arg-type]


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
    ranks = choose_ranks(two(), config, given, RankRule("budget", r_max=10))
    assert ranks == {"first": 2 * r - least, "second": least}
    assert choose_ranks(two(), config, given, RankRule("budget", r_min=1, r_max=10))["second"] == 1
    assert choose_ranks(two(), config, given, RankRule("budget", r_max=1)) == {"first": 1, "second": 1}
    assert min(choose_ranks(two(), config, given, RankRule("stable_rank")).values()) >= 1


def directions(*S: float, total: float) -> dict[str, Tensor]:
    """Of the four that are followed at r = 2, those that vary."""
    values = torch.tensor([*S, *[0.0] * (4 - len(S))])
    return {"principal.singular_values": values, "principal.total_variance": torch.tensor(total)}


def test_a_layer_whose_input_does_not_vary_gets_no_rank() -> None:
    stats = {"first": directions(3.0, 1.0, total=10.0), "second": directions(0.0, 0.0, total=0.0)}
    assert choose_ranks(two(), CONFIG, stats, RankRule("explained_variance")) == {"first": 2, "second": 0}


def test_inputs_that_are_not_finite_choose_no_ranks() -> None:
    bad = directions(torch.nan, 1.0, total=torch.nan)
    stats = {"first": directions(3.0, 1.0, 0.1, 0.1, total=10.0), "second": bad}
    rule = RankRule("explained_variance")
    before = CONFIG.r
    with pytest.warns(UserWarning, match="The input of 1 of 2 layers is not finite, and their ranks stay .*: second"):
        assert choose_ranks(two(), CONFIG, stats, rule) == {"first": before, "second": before}
    with pytest.raises(CalibrationError, match="No layer has a finite input, so there is nothing to choose ranks by"):
        choose_ranks(two(), CONFIG, {"first": bad, "second": bad}, rule)


def broken(values: list[float]) -> dict[str, Tensor]:
    """What is collected of a gradient that is not finite: no halves, and nothing whole."""
    S = torch.tensor(values, dtype=torch.float64)
    return {"gradient.S": S, "gradient.U": S, "gradient.Vh": S, "gradient.norm2": S.square().sum()}


GRADIENT_RULES = [rule for rule in RANK_RULES.names() if "gradient" in RankRule(rule).reads()["also"]]  # type: ignore[operator]


@pytest.mark.parametrize("bad", [[torch.nan] * 4, [torch.inf, 3.0, 2.0, 1.0]])
@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_a_layer_whose_gradient_is_not_finite_keeps_its_rank_and_spoils_no_other(rule: str, bad: list[float]) -> None:
    class Three(Two):
        def __init__(self) -> None:
            super().__init__(12, 10, 12)
            self.bad = nn.Linear(50, 70)

    values = torch.tensor([9.0, 8, 7, 1], dtype=torch.float64)
    given = stats([9.0, 8, 7, 1], [1.0, 0.3, 0.1, 0.1])
    for name, shape in (("first", (10, 12)), ("second", (12, 10))):
        given[name] |= {"gradient.cross": values, "gradient.S_half": values, "gradient.dense": torch.ones(shape)}
    config = LoraConfig(**(vars(CONFIG) | {"target_modules": ["first", "second", "bad"], "rank_pattern": {"bad": 5}}))
    alone = choose_ranks(two(), CONFIG, given, RankRule(rule))
    with pytest.warns(UserWarning, match="gradient of 1 of 3 layers is not finite, and their ranks stay .*: bad"):
        ranks = choose_ranks(Three(), config, given | {"bad": broken(bad)}, RankRule(rule))
    assert ranks == alone | {"bad": 5}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_no_ranks_are_chosen_where_no_gradient_is_finite(rule: str) -> None:
    given = dict.fromkeys(("first", "second"), broken([torch.nan] * 4))
    with pytest.raises(CalibrationError, match="No layer has a finite gradient, so there is nothing to choose ranks"):
        choose_ranks(two(), CONFIG, given, RankRule(rule))
