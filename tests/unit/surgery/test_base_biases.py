"""Biases of the base (``bias="all"``) are told apart from what other adapters hold, whatever it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model, get_peft_model_state_dict
from lorafa.errors import AdapterError
from toys.adapters import train
from toys.compare import close, refused


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
        "base_model.model.lora_head.bias",
    }


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


BIASES = {"base_model.model.q_proj.base_layer.bias", "base_model.model.lora_head.bias"}


def test_adapter_that_trains_the_biases_of_the_base_leaves_a_frozen_adapter_frozen() -> None:
    model = get_peft_model(Named(), config(lora_bias=True), "first")
    model.base_model.set_requires_grad("first", False)
    model.add_adapter("second", config(bias="all"))
    assert trained(model) == set()
    model.set_adapter("second")
    assert {name for name in trained(model) if "lora_" not in name or name in BIASES} == BIASES
    assert not any(".first." in name for name in trained(model))


def test_biases_train_while_their_adapter_does_and_never_for_another() -> None:
    model = get_peft_model(Named(), config(bias="all"), "first")
    assert trained(model) >= BIASES
    model.add_adapter("second", config())
    model.set_adapter("second")
    assert not trained(model) & BIASES
    model.set_adapter("first")
    assert trained(model) >= BIASES
    model.set_adapter("first", inference_mode=True)
    assert trained(model) == set()
    model.set_requires_grad("first")
    assert trained(model) >= BIASES


def test_an_adapter_of_lora_only_trains_the_biases_its_file_holds() -> None:
    model = get_peft_model(Named(), LoraConfig(target_modules=["lora_head"], r=2), "first")
    model.add_adapter("second", config(bias="lora_only"))
    model.set_adapter("second")
    biases = {name for name in trained(model) if name.endswith("bias")}
    assert biases == {key for key in get_peft_model_state_dict(model, adapter_name="second") if key.endswith("bias")}
    assert biases == {"base_model.model.q_proj.base_layer.bias"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("gone", ["deleted", "unloaded", "another merged"])
def test_biases_go_back_to_the_base_when_their_adapter_goes(gone: str, bias: str) -> None:
    base = Named()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, config(bias=bias), "first")
    model.add_adapter("second", config())
    train(model)
    assert not torch.equal(base.q_proj.base_layer.bias, before["q_proj.bias"])  # type: ignore[arg-type]
    if gone == "deleted":
        model = copy.deepcopy(model)
        model.delete_adapter("first")
        assert trained(model) == {f"base_model.model.q_proj.lora_{factor}.second.weight" for factor in "AB"}
    after = model.merge_and_unload(adapter_names=["second"]) if gone == "another merged" else model.unload()
    close(after.q_proj.bias, before["q_proj.bias"], 0.0)  # type: ignore[arg-type]
    close(after.lora_head.bias, before["lora_head.bias"], 0.0)  # type: ignore[arg-type]


def test_biases_of_a_merged_adapter_stay() -> None:
    model = get_peft_model(Named(), config(bias="all"))
    train(model)
    x = torch.randn(3, 4)
    expected = model(x)
    close(model.merge_and_unload()(x), expected, torch.float32)


def test_biases_are_not_taken_from_or_given_back_to_a_base_with_an_update_in_it() -> None:
    model = get_peft_model(Named(), config(), "first")
    model.merge_adapter()
    with refused(model, AdapterError, "is merged into the base weights"):
        model.add_adapter("second", config(bias="all"))
    model.unmerge_adapter()
    model.add_adapter("second", config(bias="all"))
    model.merge_adapter(["first"])
    with refused(model, AdapterError, "is merged into the base weights"):
        model.delete_adapter("second")


def test_biases_without_values_here_stay_with_a_warning() -> None:
    model = get_peft_model(Named(), config(bias="all"), "first")
    head = model.get_base_model().lora_head
    head.bias = nn.Parameter(torch.empty(3, device="meta"))
    model.add_adapter("second", config())
    with pytest.warns(UserWarning, match="biases of lora_head stay as adapter 'first' has trained them"):
        model.delete_adapter("first")
