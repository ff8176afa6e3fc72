"""What is given as auto becomes the number that is recommended for the model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorafa.conf.automatic import AUTOMATIC
from lorafa.conf.compose import compose
from lorafa.costs.advice import advise, facts_of
from lorafa.costs.memory import shape_of
from lorafa.errors import ConfigError, SourceError
from toys.workplace import make_workplace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model={make_workplace(tmp_path_factory.mktemp('work')) / 'model'}"


def test_auto_is_what_the_plan_recommends(model: str) -> None:
    found = compose([model, *(f"{key}=auto" for key in AUTOMATIC), "optim=lora_plus", "train.steps=5000"])
    shape = shape_of(found.model)
    expected = {each.setting: each.value for each in advise(facts_of(shape.model, shape.parameters, steps=5000), found)}
    assert (found.peft.r, found.peft.lora_alpha) == (expected["peft.r"], expected["peft.lora_alpha"]) == (16, 32)
    assert found.optim.lr == expected["optim.lr"]
    assert found.optim.lr != compose([model, "optim=lora_plus"]).optim.lr


def test_a_larger_model_gets_a_larger_rank_from_its_config_alone() -> None:
    found = compose(["model=llama-3-8b", "peft.r=auto", "peft.lora_alpha=auto", "optim.lr=auto"])
    assert (found.peft.r, found.peft.lora_alpha) == (32, 64)
    assert found.optim.lr == 5e-4


@pytest.mark.parametrize("rank", [4, 64])
def test_alpha_is_twice_the_rank_that_is_given(model: str, rank: int) -> None:
    found = compose([model, f"peft.r={rank}", "peft.lora_alpha=auto"])
    assert (found.peft.r, found.peft.lora_alpha) == (rank, 2 * rank)


def test_other_settings_are_as_they_were(model: str) -> None:
    assert compose([model, "peft.r=auto", "optim=sgd"]) == compose([model, "peft.r=16", "optim=sgd"])


def test_a_setting_that_has_no_auto_refuses_it(model: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        compose([model, "train.batch_size=auto"])


def test_a_model_that_is_not_there_is_said() -> None:
    with pytest.raises(SourceError, match="No model 'nowhere'"):
        compose(["model=nowhere", "peft.r=auto"])


def test_settings_without_auto_read_no_model() -> None:
    code = "import sys; from lorafa.conf.compose import compose; compose([]); sys.exit('lorafa.costs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
