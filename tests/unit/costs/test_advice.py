"""Recommendations follow their formula and their table, and the runner's defaults follow them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorafa.conf.compose import compose
from lorafa.costs.advice import Advice, Facts, advise, band, facts_of, rank_of
from lorafa.costs.memory import shape_of

SMALL = Facts(134_515_008, 576, "llama", 0.79, 80)


def advice(facts: Facts = SMALL, *settings: str) -> dict[str, Advice]:
    return {each.setting: each for each in advise(facts, compose(settings))}


def test_the_centre_of_the_rate_is_5e_4_times_a_power_of_the_width() -> None:
    low, middle, high = band(SMALL) or (0, 0, 0)
    assert middle == pytest.approx(5e-4 * (2000 / 576) ** 0.78) == pytest.approx(1.32e-3, rel=0.01)
    assert (low, high) == (pytest.approx(middle / 4), pytest.approx(middle * 4))
    qwen = band(replace(SMALL, family="qwen2", hidden=1536)) or (0, 0, 0)
    assert qwen[1] == pytest.approx(5e-4 * (2000 / 1536) ** 0.08)


def test_a_family_nobody_has_swept_gets_the_wider_band_and_is_told_so() -> None:
    found = advice(replace(SMALL, family="opt"))["optim.lr"]
    llama, qwen = band(SMALL), band(replace(SMALL, family="qwen3"))
    assert llama is not None
    assert qwen is not None
    assert (found.low, found.high) == (pytest.approx(qwen[0]), pytest.approx(llama[2]))
    assert "P is not known for this family" in found.reason


def test_the_defaults_of_the_runner_are_what_is_recommended_for_its_model() -> None:
    config = compose([])
    shape = shape_of(config.model)
    facts = facts_of(shape.model, shape.parameters, steps=config.train.steps)
    assert facts.family == "llama"
    assert facts.hidden == 576
    found = {each.setting: each.value for each in advise(facts, config)}
    assert config.peft.r == found["peft.r"] == rank_of(shape.parameters)
    assert config.peft.lora_alpha == found["peft.lora_alpha"]
    assert config.optim.lr == found["optim.lr"]
    assert config.peft.target_modules == found["peft.target_modules"]
    assert (config.init.mode, config.optim.name) == (found["init"], found["optim"])


def test_what_was_measured_best_lies_in_the_band() -> None:
    for settings, best in {
        (): 4e-3,
        ("optim=lora_fa",): 4e-3,
        ("optim=lora_plus",): 5e-4,
        ("optim=riemannian",): 2e-3,
        ("optim=lora_pro",): 2e-3,
        ("init=pissa",): 5e-4,
        ("init=corda",): 2.5e-4,
        ("init=lora_ga",): 2.5e-4,
    }.items():
        found = advice(SMALL, *settings)["optim.lr"]
        assert found.low is not None
        assert found.high is not None
        assert found.low <= best <= found.high, settings


@pytest.mark.parametrize(
    ("parameters", "rank", "dropout"), [(125e6, 16, 0.05), (3e9, 16, 0.05), (8e9, 32, 0.1), (70e9, 32, 0.1)]
)
def test_rank_alpha_and_dropout_go_by_the_size(parameters: float, rank: int, dropout: float) -> None:
    found = advice(replace(SMALL, parameters=int(parameters)))
    assert found["peft.r"].value == rank
    assert found["peft.lora_alpha"].value == 2 * rank
    alpha = found["peft.lora_alpha"]
    assert alpha.low is not None
    assert alpha.high is not None
    assert alpha.low <= 2 * rank <= alpha.high
    assert found["peft.lora_dropout"].value == dropout


def test_what_published_guides_say_otherwise_is_said() -> None:
    found = advice()
    assert found["peft.r"].against == "published guides say 4 to 8 for a model of this size, without a measurement"
    assert "0.0001 to 0.0005 for every model, in part outside this band; 4e-3 was" in str(found["optim.lr"].against)
    large = advice(replace(SMALL, parameters=8_000_000_000, hidden=4096, steps=5000))
    assert large["peft.r"].against is None
    assert large["optim.lr"].against is None


def test_a_start_that_moves_the_base_wants_a_smaller_rate_and_no_dropout() -> None:
    found = advice(SMALL, "init=pissa")
    assert found["peft.lora_dropout"].value == 0.0
    assert "8 to 16 times less" in found["optim.lr"].reason
    assert isinstance(found["optim.lr"].value, float)
    assert found["optim.lr"].value <= 2e-3 / 8


def test_where_there_is_no_rule_the_optimizers_own_rate_is_recommended_and_that_is_said() -> None:
    found = advice(SMALL, "optim=sgd")["optim.lr"]
    assert (found.value, found.low) == (0.1, None)
    assert "there is no rule" in found.reason
    assert "its config says no width" in advice(replace(SMALL, hidden=None))["optim.lr"].reason


def test_training_all_weights_has_a_rate_alone() -> None:
    found = advice(SMALL, "peft=full_ft")
    assert list(found) == ["optim.lr"]
    assert found["optim.lr"].value == compose(["peft=full_ft"]).optim.lr
    assert found["optim.lr"].words == "optim.lr=2e-05"


def test_long_trainings_want_the_middle_and_short_ones_twice_that() -> None:
    lengths = (SMALL.steps, 5000, None)
    rates = [advice(replace(SMALL, steps=steps))["optim.lr"].value for steps in lengths]
    assert rates == [2e-3, 1e-3, 1e-3]


def test_of_the_batch_it_says_that_nobody_has_swept_it_here() -> None:
    found = advice(SMALL, "train.batch_size=24")["train.batch_size"]
    assert (found.value, found.low, found.high) == (24, None, None)
    assert "the batch was not swept here" in found.reason
    assert "Sweep it together with the rate" in found.reason
