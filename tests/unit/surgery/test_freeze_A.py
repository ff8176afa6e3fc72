"""A frozen A belongs to the adapter: it survives switching, saving, loading, and other libraries read the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError
from lorafa.optimizers import create_lorafa_optimizer
from lorafa.optimizers.pairs import pairs_of
from toys.adapters import adapted as adapted_kind
from toys.layers import KINDS, input_for
from toys.models import Mlp
from toys.optimizers import IN, adapted, batch, loss

LAYERS = ["first", "second"]


def trains(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name}


def only_B_trains(model: nn.Module, adapter: str = "default") -> bool:
    found = {name: value for name, value in trains(model).items() if f".{adapter}" in name}
    return bool(found) and all(value != ("_A." in name) for name, value in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_A_is_frozen_on_every_kind_of_layer_and_starts_with_independent_rows(kind: str) -> None:
    model = adapted_kind(kind, trained=False, freeze_A=True)
    x = input_for(kind)
    before = model(x)
    create_lorafa_optimizer(model, lr=1e-2)  # refuses dependent rows
    assert only_B_trains(model)
    model(x).square().sum().backward()
    torch.optim.SGD([pair.B for pair in pairs_of(model)], lr=0.1).step()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("freeze_A", [True, False])
def test_the_advice_for_a_start_without_full_rank_does_not_name_what_would_not_help(freeze_A: bool) -> None:
    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights="orthogonal", freeze_A=freeze_A)
    with pytest.raises(AdapterError, match="A has dependent rows") as refused:
        create_lorafa_optimizer(get_peft_model(Mlp(), config), lr=1e-3)
    assert "freeze_A" not in str(refused.value)


def test_switching_adapters_keeps_it() -> None:
    model = adapted(freeze_A=True)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=LAYERS))
    model.set_adapter("plain")
    assert not any(value for name, value in trains(model).items() if ".default" in name)
    assert all(value for name, value in trains(model).items() if ".plain" in name)
    model.set_adapter("default")
    assert only_B_trains(model)
    model.delete_adapter("plain")
    model.merge_adapter()
    model.unmerge_adapter()
    assert only_B_trains(copy.deepcopy(model))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("by", ["config", "optimizer"])
def test_it_is_saved_with_the_adapter(settings: dict[str, Any], by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mlp()
    fresh = copy.deepcopy(base)
    config = LoraConfig(r=3, target_modules=LAYERS, freeze_A=by == "config", **settings)
    model = get_peft_model(base, config)
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    for _ in range(3):
        loss(model, batch(torch.float32)).backward()
        optimizer.step()
    assert config.freeze_A == (by == "config")  # the caller's config is the caller's
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].freeze_A
    found = trains(loaded)
    assert not any(value for name, value in found.items() if "lora_A" in name)
    assert all(value for name, value in found.items() if "lora_A" not in name)
    x = torch.randn(4, IN)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Unexpected keyword")
def test_peft_reads_the_file_with_equal_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mlp()
    fresh = copy.deepcopy(base)
    model = adapted(torch.float32, base, freeze_A=True)
    model.save_pretrained(tmp_path)
    x = torch.randn(4, IN)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(theirs(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_layer_with_a_frozen_A_keeps_no_input_from_the_start() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=3, target_modules=LAYERS, freeze_A=True, lora_dropout=0.1))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(5, 11, IN)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model.model.first(x)
    assert tuple(x.shape) not in kept
    assert (5 * 11, IN) not in kept


def test_plain_files_say_nothing_of_it() -> None:
    assert "freeze_A" not in LoraConfig().to_dict()
    assert LoraConfig(freeze_A=True).to_dict()["freeze_A"] is True
