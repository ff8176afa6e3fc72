"""Biases of the base (``bias="all"``) are told apart from what other adapters hold, whatever it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model, get_peft_model_state_dict


class Named(nn.Module):
    """A base layer has a name that looks like an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.lora_head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora_head(torch.tanh(self.q_proj(x)))
        return y


def config(**settings: object) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], r=2, **settings)  # type: ignore[arg-type]


def test_file_of_an_adapter_holds_all_biases_of_the_base_and_none_of_another_adapter() -> None:
    model = get_peft_model(Named(), config(bias="all"), "first")
    model.add_adapter("second", config(modules_to_save=["lora_head"], lora_bias=True))
    biases = {key for key in get_peft_model_state_dict(model, adapter_name="first") if key.endswith("bias")}
    assert biases == {
        "base_model.model.q_proj.base_layer.bias",
        "base_model.model.lora_head.original_module.bias",
    }


def test_adapter_that_trains_the_biases_of_the_base_leaves_a_frozen_adapter_frozen() -> None:
    model = get_peft_model(Named(), config(lora_bias=True), "first")
    model.base_model.set_requires_grad("first", False)
    model.add_adapter("second", config(bias="all"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"base_model.model.q_proj.base_layer.bias", "base_model.model.lora_head.bias"}
