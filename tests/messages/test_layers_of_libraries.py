"""Layers of libraries that lorafa has no back end for are refused by name, also where "all-linear" meets them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import NotAvailableError, TargetError

PLACES = {
    ("transformer_engine.pytorch.module.linear", "Linear"): "a Linear of Transformer Engine",
    ("transformer_engine.pytorch.module.layernorm_linear", "LayerNormLinear"): "a LayerNormLinear of Transformer Eng",
    ("megatron.core.tensor_parallel.layers", "ColumnParallelLinear"): "a ColumnParallelLinear of Megatron",
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_they_are_refused_with_the_way_out(place: tuple[str, str], targets: list[str] | str) -> None:
    module, name = place
    layer = type(name, (Layer,), {"__module__": module})()
    model = nn.Sequential(layer, nn.Linear(6, 2))
    with pytest.raises(TargetError, match=f"'0' is {PLACES[place]}.*which cannot carry an adapter.*exclude_modules"):
        get_peft_model(model, LoraConfig(target_modules=targets))
    assert model[0] is layer
    made = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=["0"]))
    assert made.targeted_module_names == ["1"]


def test_megatrons_settings_are_refused_by_name() -> None:
    config = LoraConfig(target_modules=["0"], megatron_config={"sequence_parallel": True})
    with pytest.raises(NotAvailableError, match=r"LoRA on Megatron's parallel layers \(megatron_config="):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
