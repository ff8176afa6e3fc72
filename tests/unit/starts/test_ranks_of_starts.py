"""Starts that choose their own ranks: GoRA's by importance, of whole gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import LoraConfig, PeftModel, RankRule, choose_ranks, collect_statistics, initialize
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers.gora import GoraConfig
from lorafa.starts.initialize import start_from
from toys import calibration
from toys.calibration import LAYERS, Toy, gradients, inputs, loss


def config(start: str = "gora", **settings: Any) -> LoraConfig:
    return calibration.config(start, **({"r": 4, "lora_alpha": 8} | settings))


def ranks_of(model: PeftModel) -> dict[str, int]:
    return {path: layer.r["default"] for path, layer in model.base_model.lora_layers()}


def scalings_of(model: PeftModel) -> list[float]:
    return [layer.scaling["default"] for _, layer in model.base_model.lora_layers()]


def shares(model: Toy, data: list[Tensor], r: int) -> dict[str, int]:
    """clip(B I / sum I / (m + n)) to [r / 2, 4 r] with B = r sum (m + n), rounded down, by autograd's gradients."""
    weights = {name: model.get_submodule(name).weight.detach() for name in LAYERS}
    importance = {name: (weights[name] * G).abs().mean().item() for name, G in gradients(model, data).items()}  # type: ignore[operator]
    size = {name: sum(weight.shape) for name, weight in weights.items()}  # type: ignore[operator]
    budget = r * sum(size.values())
    found = {name: round(budget * importance[name] / sum(importance.values())) // size[name] for name in LAYERS}
    return {name: min(max(value, r // 2), 4 * r) for name, value in found.items()}


def test_gora_chooses_its_own_ranks() -> None:
    expected = shares(Toy(), inputs(), 4)
    assert len(set(expected.values())) > 1
    assert ranks_of(initialize(Toy(), config(), inputs(), loss=loss)) == expected


def test_gora_keeps_ranks_within_half_and_four_times_those_of_the_config() -> None:
    for r, expected in ((5, {"first": 2, "second": 2, "last": 20}), (1, {"first": 1, "second": 1, "last": 4})):
        model = Toy(in_=400, hidden=90)
        with torch.no_grad():
            model.first.weight *= 1e-6
            model.second.weight *= 1e-6
        assert ranks_of(initialize(model, config(r=r), inputs(in_=400), loss=loss)) == expected


def test_the_scaling_of_gora_is_that_of_the_ranks_it_chose() -> None:
    """s = alpha / sqrt(r) with the layer's own rank; without rsLoRA a change of rank changes no scaling, as ever."""
    ranks = shares(Toy(), inputs(), 4)
    stable = initialize(Toy(), config(use_rslora=True), inputs(), loss=loss)
    assert scalings_of(stable) == pytest.approx([8 / ranks[name] ** 0.5 for name in LAYERS])
    assert stable.peft_config["default"].alpha_pattern == {}
    assert scalings_of(initialize(Toy(), config(), inputs(), loss=loss)) == pytest.approx([2.0] * 3)


def test_gora_takes_another_rule_or_the_ranks_of_the_config() -> None:
    kept = initialize(Toy(), config(init_config=GoraConfig(share_ranks=False)), inputs(), loss=loss)
    assert ranks_of(kept) == dict.fromkeys(LAYERS, 4)
    rule = RankRule("stable_rank", r_min=3, r_max=3)
    other = initialize(Toy(), config(use_rslora=True), inputs(), loss=loss, ranks=rule)
    assert ranks_of(other) == dict.fromkeys(LAYERS, 3)
    assert scalings_of(other) == pytest.approx([8 / 4**0.5] * 3)
    with pytest.raises(ConfigError, match="share_ranks must be True or False, found 1"):
        GoraConfig(share_ranks=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["gora", "lora_one"])
def test_importance_is_that_of_whole_gradients(start: str) -> None:
    """Of layers so wide that a sketch is kept unless something asks for more."""
    wide = {"in_": 240, "hidden": 200}
    data, settings = inputs(in_=240), config(start, r=1)
    sketched = collect_statistics(Toy(**wide), config("lora_one", r=1), data, loss=loss)
    assert "gradient.dense" not in sketched["first"]
    rule = RankRule("importance", r_max=4)
    adapted = initialize(Toy(**wide), settings, data, loss=loss, ranks=None if start == "gora" else rule)
    assert ranks_of(adapted) == {name: max(rank, 1) for name, rank in shares(Toy(**wide), data, 1).items()}
    said = (
        r"Importance is the mean of \|W o G\|, and the statistics of first, second hold a sketch of the gradient, "
        r"whose entries are smaller\. Collect them with dense=True, or use another rule\."
    )
    with pytest.raises(CalibrationError, match=said):
        choose_ranks(Toy(**wide), settings, sketched, rule)


def test_gora_is_not_made_of_a_sketch() -> None:
    model, data = Toy(in_=240, hidden=200), inputs(in_=240)
    sketched = collect_statistics(model, config("lora_one"), data, loss=loss, dense=False)
    said = (
        r"first: GoRA fits B to all entries of the gradient, and the statistics hold a sketch, which does not have "
        r"them\. Collect them with dense=True, or with the config of this start\."
    )
    with pytest.raises(CalibrationError, match=said):
        start_from(model, config(init_config=GoraConfig(share_ranks=False)), sketched)
