"""A config meets a model once: it is checked, the model walked and its layers looked for once a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafa
import lorafa.config
import lorafa.io.load
import lorafa.surgery.resolve
from lorafa import (
    LoraConfig,
    PeftModel,
    RankRule,
    choose_ranks,
    collect_statistics,
    get_peft_model,
    initialize,
    inject_adapter_in_model,
    start_from,
    with_ranks,
)
from lorafa.errors import AdapterError, CalibrationError, ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.surgery.resolve import met, resolve
from toys.language_models import mixtral

ROWS = list(torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))


def loss(adapted: nn.Module, batch: Tensor) -> Tensor:
    return (adapted(batch) - 1).pow(2).mean()


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0", "1", "2"]} | fields)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a config was checked, the model walked for a plan, and its layers looked for."""
    counted = {"check_config": 0, "planned_places": 0, "find_targets": 0}

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(lorafa.config, "check_config")
    count(lorafa.surgery.resolve, "planned_places")
    count(lorafa.io.load, "planned_places")
    count(lorafa.surgery.resolve, "find_targets")
    return counted


def trained_by_gradients() -> PeftModel:
    return initialize(model(), LORA_ONE, ROWS, loss=loss)


def with_ranks_and_gamma() -> PeftModel:
    rule, held = RankRule("budget"), ROWS[:2]
    return initialize(model(), AUTO, ROWS, loss=loss, ranks=rule, halves=True, heldout=held)


LORA_ONE = config(init_lora_weights="lora_one")
AUTO = config(init_lora_weights="lora_one", init_config={"stable_gamma": "auto"})
PLAIN = config()
WAYS: dict[str, Callable[[], Any]] = {
    "get_peft_model": lambda: get_peft_model(model(), PLAIN),
    "add_adapter": lambda: get_peft_model(model(), PLAIN).add_adapter("second", PLAIN),
    "initialize": trained_by_gradients,
    "initialize, ranks and gamma": with_ranks_and_gamma,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_a_config_meets_the_model_once(way: str, calls: dict[str, int]) -> None:
    WAYS[way]()
    times = 2 if way == "add_adapter" else 1  # once for each of the two adapters
    assert calls == {"check_config": times, "planned_places": times, "find_targets": times}


def test_a_file_meets_the_model_once(tmp_path: Path, calls: dict[str, int]) -> None:
    get_peft_model(model(), PLAIN).save_pretrained(tmp_path)
    calls.update(dict.fromkeys(calls, 0))
    PeftModel.from_pretrained(model(), tmp_path)
    assert calls == {"check_config": 1, "planned_places": 1, "find_targets": 1}


def test_a_config_that_has_met_the_model_is_taken_as_it_is_and_for_another_model_meets_that() -> None:
    base, other = model(), model()
    resolved = resolve(base, LORA_ONE)
    assert met(base, resolved) is resolved
    assert met(other, resolved).model is other
    stats = collect_statistics(base, resolved, ROWS, loss=loss)
    ranks = choose_ranks(base, resolved, stats, RankRule("stable_rank"))
    assert ranks == choose_ranks(base, LORA_ONE, stats, RankRule("stable_rank"))


def test_what_is_settled_for_a_model_is_in_no_object_of_the_caller() -> None:
    given = LoraConfig(r=2, target_modules="all-linear", rank_pattern={"0": 1})
    before = given.to_dict()
    resolved = resolve(model(), given)
    assert resolved.config.target_modules == {"0", "1", "2"}
    assert resolved.given.target_modules == "all-linear"
    resolved.config.rank_pattern = {}
    assert given.to_dict() == before == resolved.given.to_dict()
    assert [target.rank for target in resolved.targets] == [1, 2, 2]


def test_a_config_that_met_the_model_before_another_adapter_went_on_meets_it_again() -> None:
    """The layers found before are no longer those of the model."""
    base = model()
    resolved = resolve(base, LORA_ONE)
    stats = collect_statistics(base, resolved, ROWS, loss=loss)
    inject_adapter_in_model(config(), base, "before")
    assert not resolved.holds()
    adapted = start_from(base, resolved, stats)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    assert [sorted(layer.adapters) for layer in layers] == [["before", "default"]] * 3
    with pytest.raises(AdapterError, match="already has an adapter 'default'"):
        start_from(base, resolved, stats)


def test_ranks_of_stacked_experts_are_those_asked_for() -> None:
    """all-linear doubles the rank of gate_up_proj, which holds two layers, unless another is said."""
    base = mixtral()
    given = LoraConfig(r=4, target_modules="all-linear")
    names = [target.full_name for target in resolve(base, given).targets]
    chosen = with_ranks(base, given, dict.fromkeys(names, 4), keep_scaling=False)
    adapted = get_peft_model(base, chosen)
    assert {layer.r["default"] for _, layer in adapted.base_model.lora_layers()} == {4}


def test_a_tied_end_that_stays_out_of_statistics_and_ranks_is_said_with_its_cause() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(self.embed(x)))

    tying: dict[str, Any] = {"target_modules": ["fc", "head"], "ensure_weight_tying": True}
    text = r"embed: statistics are collected of linear layers.* shares a weight with one, set ensure_weight_tying=False"
    with pytest.raises(CalibrationError, match=text):
        collect_statistics(Tied(), config(init_lora_weights="lora_one", **tying), [torch.tensor([[1, 2]])], loss=loss)
    text = r"embed cannot be left out: it shares its weight with a layer that stays, and ensure_weight_tying"
    with pytest.raises(ConfigError, match=text):
        with_ranks(Tied(), config(**tying), {"embed": 0, "fc": 1, "head": 2})
