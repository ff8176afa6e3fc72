"""A file of an adapter is that of a model with this adapter alone, whatever else the model carries or has carried."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    set_peft_model_state_dict,
)
from lorafa.errors import TargetError
from lorafa.io.hotswap import hotswap_adapter_from_state_dict
from lorafa.storage.tensors import read_tensors
from toys.adapters import train
from toys.compare import assert_same_tensors, close, refused
from toys.models import AlikeMixture, Tied

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
UP, MID, DOWN = "experts.up", "experts.mid", "experts.down"
ORDERS = [(DOWN,), (DOWN, MID), (MID, UP), (DOWN, UP)]
"""What the adapter before is on; of two parameters one after the other, each added as an adapter of its own."""
OWN = [(UP, DOWN), (UP, MID, DOWN), (MID, DOWN), (UP,)]


def base() -> nn.Module:
    torch.manual_seed(0)
    return AlikeMixture().double().eval()


def on(*parameters: str, **settings: Any) -> LoraConfig:
    fields = {"target_modules": [], "target_parameters": list(parameters), "r": 2, "lora_alpha": 3} | settings
    return LoraConfig(**fields)


def alone(config: LoraConfig, model: nn.Module | None = None) -> PeftModel:
    made = get_peft_model(base() if model is None else model, copy.deepcopy(config), adapter_name="b").eval()
    train(made)
    return made


def after(before: tuple[str, ...]) -> PeftModel:
    """A model to which an adapter was added for each of the parameters, one after the other."""
    model = get_peft_model(base(), on(before[0]), adapter_name="a0")
    for number, parameter in enumerate(before[1:], 1):
        model.add_adapter(f"a{number}", on(parameter))
    return model.eval()


def saved(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder, selected_adapters=["b"])
    return read_tensors(folder / "b" / "adapter_model.safetensors")[0]


def output(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def loaded(folder: Path, model: nn.Module | None = None) -> PeftModel:
    found = PeftModel.from_pretrained(base() if model is None else model, folder / "b", adapter_name="b")
    return found.eval()


@pytest.mark.parametrize("own", OWN, ids="+".join)
@pytest.mark.parametrize("before", ORDERS, ids="+".join)
def test_what_a_nested_adapter_is_saved_as_does_not_depend_on_those_added_before(
    own: tuple[str, ...], before: tuple[str, ...], tmp_path: Path
) -> None:
    model = after(before)
    model.add_adapter("b", on(*own))
    model.set_adapter("b")
    train(model)
    expected = output(model)
    found = saved(model, tmp_path)
    assert found.keys() == saved(alone(on(*own)), tmp_path / "alone").keys()
    close(output(loaded(tmp_path)), expected)
    if set(own) == set(before):
        return
    other = after(before[::-1])
    other.load_adapter(tmp_path / "b", "b")
    other.set_adapter("b")
    close(output(other), expected)


@pytest.mark.parametrize("own", OWN, ids="+".join)
@pytest.mark.parametrize("before", ORDERS, ids="+".join)
def test_a_file_is_read_for_the_nesting_the_model_has(
    own: tuple[str, ...], before: tuple[str, ...], tmp_path: Path
) -> None:
    source = alone(on(*own))
    expected, tensors = output(source), saved(source, tmp_path)
    model = after(before)
    model.load_adapter(tmp_path / "b", "b")
    model.set_adapter("b")
    close(output(model), expected)
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)


@pytest.mark.parametrize("before", ORDERS, ids="+".join)
def test_state_dicts_go_to_and_fro_between_nestings(before: tuple[str, ...]) -> None:
    source, model = alone(on(UP, MID, DOWN)), after(before)
    model.add_adapter("b", on(UP, MID, DOWN))
    model.set_adapter("b")
    set_peft_model_state_dict(model, get_peft_model_state_dict(source, adapter_name="b"), "b")
    close(output(model), output(source))
    train(model)
    back = get_peft_model_state_dict(model, adapter_name="b", state_dict=model.state_dict())
    set_peft_model_state_dict(source, back, "b")
    close(output(source), output(model))


@pytest.mark.parametrize("of_model", [True, False])
def test_names_of_the_live_model_are_read_as_such(of_model: bool) -> None:
    model, source = after((DOWN,)), alone(on(UP, MID))
    model.add_adapter("b", on(UP, MID))
    model.set_adapter("b")
    train(model)
    giver = model if of_model else source
    expected = output(giver)
    own = {key: value.clone() for key, value in giver.state_dict().items() if ".b." in key}
    for fill in (
        lambda: set_peft_model_state_dict(model, own, "b"),
        lambda: hotswap_adapter_from_state_dict(model, own, "b", on(UP, MID)),
    ):
        for key, value in model.state_dict().items():
            value.mul_(0.5 if ".b." in key else 1)
        fill()
        close(output(model), expected)


def test_layers_inside_a_module_with_nested_adapters_are_saved_as_without_them(tmp_path: Path) -> None:
    inside = LoraConfig(target_modules=["gate"], r=2)
    source = alone(inside)
    expected, tensors = output(source), saved(source, tmp_path)
    model = after((UP, DOWN))
    model.load_adapter(tmp_path / "b", "b")
    model.set_adapter("b")
    close(output(model), expected)
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)


def test_the_first_adapter_deleted_or_merged_and_unmerged_leaves_the_names(tmp_path: Path) -> None:
    model = after((DOWN, UP))
    model.add_adapter("b", on(UP, DOWN))
    model.set_adapter("b")
    train(model)
    expected, tensors = output(model), saved(model, tmp_path)
    model.delete_adapter("a0")
    assert_same_tensors(saved(model, tmp_path / "deleted"), tensors)
    model.merge_adapter(["b"])
    assert_same_tensors(saved(model, tmp_path / "merged"), tensors)
    model.unmerge_adapter()
    assert_same_tensors(saved(model, tmp_path / "unmerged"), tensors)
    close(output(loaded(tmp_path / "deleted")), expected)


def test_swaps_read_files_for_the_nesting_the_model_has(tmp_path: Path) -> None:
    source = alone(on(UP, DOWN))
    expected, tensors = output(source), saved(source, tmp_path)
    model = after((DOWN,))
    model.add_adapter("b", on(UP, DOWN))
    model.set_adapter("b")
    hotswap_adapter(model, tmp_path / "b", "b")
    close(output(model), expected)
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)


def test_a_swap_that_leaves_a_parameter_out_leaves_its_level_out(tmp_path: Path) -> None:
    source = alone(on(DOWN))
    expected, tensors = output(source), saved(source, tmp_path)
    model = after((MID,))
    model.add_adapter("b", on(UP, DOWN))
    model.set_adapter("b")
    hotswap_adapter(model, tmp_path / "b", "b")
    close(output(model), expected)
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)


def test_conversions_have_the_names_of_the_adapter_alone() -> None:
    model = after((DOWN,))
    model.add_adapter("b", on(UP, DOWN))
    model.set_adapter("b")
    train(model)
    config, tensors = convert_to_lora(model, 2, "b")
    fresh = get_peft_model(base(), config, adapter_name="b").eval()
    set_peft_model_state_dict(fresh, tensors, "b")
    close(output(fresh), output(model), 1e-6)


def test_combinations_of_nested_adapters_are_saved_as_if_alone(tmp_path: Path) -> None:
    model = after((DOWN,))
    model.add_adapter("c", on(UP, DOWN))
    train(model)
    model.set_adapter("c")
    train(model)
    model.add_weighted_adapter(["c"], [1.0], "b", combination_type="cat")
    model.set_adapter("b")
    saved(model, tmp_path)
    close(output(loaded(tmp_path)), output(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_have_their_own_names_whatever_other_adapters_are_on(bias: str, tmp_path: Path) -> None:
    model = alone(LoraConfig(target_modules=["gate"], r=2, bias=bias))
    expected, tensors = output(model), saved(model, tmp_path)
    model.add_adapter("a", on(UP, DOWN))
    model.add_adapter("c", LoraConfig(target_modules=["head"], r=2))
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)
    close(output(loaded(tmp_path / "again")), expected)
    other = get_peft_model(base(), LoraConfig(target_modules=["head"], r=2), adapter_name="a").eval()
    other.load_adapter(tmp_path / "b", "b")
    other.set_adapter("b")
    close(output(other), expected)


def test_biases_of_a_module_that_another_adapter_trains_in_full_have_their_own_names(tmp_path: Path) -> None:
    model = alone(LoraConfig(target_modules=["gate"], r=2, bias="all"))
    expected, tensors = output(model), saved(model, tmp_path)
    model.add_adapter("a", LoraConfig(target_modules=["gate"], r=2, modules_to_save=["head"]))
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)
    close(output(loaded(tmp_path / "again")), expected)


IDS = torch.tensor([[1, 4, 7], [2, 2, 0]])


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().eval()


TABLE_HISTORIES = {
    "rows": {"target_modules": ["proj"], "trainable_token_indices": [1, 4]},
    "table": {"target_modules": ["embed"]},
    "head": {"target_modules": ["head"]},
    "copied": {"target_modules": ["proj"], "modules_to_save": ["head"]},
    "tied": {"target_modules": ["embed"], "ensure_weight_tying": True},
}
EXCLUDED = [{"rows", other} for other in ("table", "head", "copied", "tied")] + [
    {"copied", other} for other in ("head", "tied")
]
"""Pairs that want one module in two ways."""


@pytest.mark.parametrize("own", TABLE_HISTORIES)
@pytest.mark.parametrize("before", TABLE_HISTORIES)
def test_tables_are_saved_as_if_the_adapter_were_alone(own: str, before: str, tmp_path: Path) -> None:
    source = alone(LoraConfig(r=2, **TABLE_HISTORIES[own]), tied())
    expected, tensors = output(source, IDS), saved(source, tmp_path)
    model = get_peft_model(tied(), LoraConfig(r=2, **TABLE_HISTORIES[before]), adapter_name="a").eval()
    if {own, before} in EXCLUDED:
        with refused(model, TargetError, "cannot|follows|trained too"):
            model.load_adapter(tmp_path / "b", "b")
        return
    model.load_adapter(tmp_path / "b", "b")
    model.set_adapter("b")
    close(output(model, IDS), expected)
    assert_same_tensors(saved(model, tmp_path / "again"), tensors)
    again = PeftModel.from_pretrained(tied(), tmp_path / "again" / "b", adapter_name="b").eval()
    close(output(again, IDS), expected)
