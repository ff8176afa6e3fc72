"""Planning an adapter: what it is built from, and what is only a matter of the file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.surgery.plan import plan
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import lora_layers
from toys.adapters import config_for, only_layer, train
from toys.layers import PARAMETERS, Single, base_layer

LINEAR = "torch.nn.modules.linear.Linear"


class Mixed(nn.Module):
    """One layer that stores (out, in) and one that stores (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.straight, self.turned = nn.Linear(4, 6), conv1d(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.turned(self.straight(x))
        return y


def test_fan_in_fan_out_is_set_to_false_with_a_warning_where_a_linear_layer_stores_out_in() -> None:
    config = config_for(LINEAR, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True means .* that of 'layer', a Linear, is \(out, in\)"):
        model = get_peft_model(Single(base_layer(LINEAR)), config)
    assert model.peft_config["default"].fan_in_fan_out is False
    assert config.fan_in_fan_out is True


def test_fan_in_fan_out_is_kept_where_some_layer_stores_in_out() -> None:
    config = LoraConfig(target_modules=["straight", "turned"], r=2, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="that of 'straight'"):
        model = get_peft_model(Mixed(), config)
    assert model.peft_config["default"].fan_in_fan_out is True


@pytest.mark.parametrize("target", ["turned", "embed"])
def test_fan_in_fan_out_is_nothing_to_warn_of_elsewhere(target: str) -> None:
    base = Mixed()
    base.embed = nn.Embedding(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, LoraConfig(target_modules=[target], r=2, fan_in_fan_out=True))
    assert model.peft_config["default"].fan_in_fan_out is True


def test_a_file_with_fan_in_fan_out_on_a_linear_layer_is_loaded_with_the_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = base_layer(LINEAR)
    model = get_peft_model(Single(layer), config_for(LINEAR))
    train(model)
    model.peft_config["default"].fan_in_fan_out = True
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out=True means"):
        loaded = PeftModel.from_pretrained(Single(layer), tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", [LINEAR, "torch.nn.modules.sparse.Embedding", *PARAMETERS])
def test_a_second_adapter_starts_from_the_pristine_weight_while_the_first_is_merged(kind: str) -> None:
    model = get_peft_model(Single(base_layer(kind)), config_for(kind))
    train(model)
    config = config_for(kind, init_lora_weights="pissa", r=2)
    (planned,) = plan(resolve(model.get_base_model(), config), "second").layers
    model.merge_adapter()
    (again,) = plan(resolve(model.get_base_model(), config), "second").layers
    torch.testing.assert_close(again.parts.A, planned.parts.A)
    torch.testing.assert_close(again.parts.B, planned.parts.B)
    assert len(list(lora_layers(model))) == 1
    assert only_layer(model).merged
