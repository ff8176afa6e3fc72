"""What is trained beside the factors on a base whose weights rest elsewhere, and adapted models that are offloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lorafa.errors import AdapterError, CheckpointError
from toys.compare import close
from toys.layers import backend_for, input_for
from toys.offload import (
    BESIDE,
    CALLED_KINDS,
    WHERE,
    WITH_STARTS,
    Net,
    Offload,
    X,
    accelerate,
    in_memory,
    nets,
    offloading,
    pair,
    ran,
    settings_for,
)


@pytest.fixture(params=WHERE)
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    return offloading(request.param, tmp_path)


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_copies_and_rows_train_merge_and_are_saved_as_in_memory(
    settings: dict[str, Any], offload: Offload, tmp_path: Path
) -> None:
    here, away = nets(offload, **settings)
    (y, grads), (other, others) = ran(here, X), ran(away, X)
    close(other, y, torch.float32)
    assert grads.keys() == others.keys()
    assert not any(p.is_meta for p in away.parameters() if p.requires_grad)
    for name in grads:
        close(others[name], grads[name], torch.float32)
    away.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(offload(Net()), tmp_path)(X), away.eval()(X))
    close(PeftModel.from_pretrained(Net(), tmp_path)(X), y, torch.float32)
    close(away.merge_and_unload()(X), y, torch.float32)


def test_a_copy_of_a_module_with_children_is_in_memory_whole(offload: Offload) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))

    x, config = torch.randn(5, 4), LoraConfig(target_modules=["0"], r=2, modules_to_save=["1"])
    here, away = get_peft_model(model(), config), get_peft_model(offload(model()), config)
    close(away(x), here(x), torch.float32)
    assert not any(p.is_meta for p in away.get_base_model()[1].modules_to_save.parameters())
    assert get_peft_model_state_dict(away).keys() == get_peft_model_state_dict(here).keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [3, 7]},
        {"target_modules": ["embed", "head"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed", "head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_what_shares_a_weight_is_found_though_each_has_it_brought_in_for_itself(
    settings: dict[str, Any], called: bool
) -> None:
    def away(model: nn.Module) -> nn.Module:
        in_memory(model)
        if called:
            model(X)
        return model

    here, other = nets(away, tied=True, **settings)
    y, grads = ran(here, X)
    found, others = ran(other, X)
    close(found, y, torch.float32)
    assert grads.keys() == others.keys()
    for name in grads:
        close(others[name], grads[name], torch.float32)
    close(other.merge_and_unload()(X), y, torch.float32)


def test_head_and_embedding_that_differ_when_merged_are_not_called_tied(offload: Offload) -> None:
    model = get_peft_model(offload(Net(tied=True)), LoraConfig(target_modules=["embed"], r=2, init_lora_weights=False))
    y = model(X)
    with pytest.warns(UserWarning, match="the output head and the input embedding hold different weights"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    close(merged(X), y, torch.float32)


def test_embeddings_saved_with_an_adapter_are_those_that_are_brought_in(offload: Offload, tmp_path: Path) -> None:
    here, away = nets(offload)
    tensors = [get_peft_model_state_dict(model, save_embedding_layers=True) for model in (here, away)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0] if "lora" not in key)
    here.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=r"cannot be filled: embed.weight, head.weight, head.bias rest"):
        PeftModel.from_pretrained(offload(Net()), tmp_path)


# ---- an adapted model that is offloaded


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind", "start"), WITH_STARTS, ids=str)
def test_an_adapted_model_can_be_offloaded(variant: str, kind: str, start: bool | str, offload: Offload) -> None:
    (model, _), x = pair(kind, in_memory, **settings_for(variant, start)), input_for(kind)
    model.eval()
    y, tensors = model(x), get_peft_model_state_dict(model)
    tensors = {key: value.clone() for key, value in tensors.items()}
    offload(model)
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        close(model(x), y, torch.float32)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, tensors[key])
    model.merge_adapter()
    if not backend_for(kind).quantized:
        close(model(x), y, torch.float32)
    model.unmerge_adapter()
    close(model(x), y, torch.float32)


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_copies_and_rows_of_an_adapted_model_can_be_offloaded(settings: dict[str, Any], offload: Offload) -> None:
    model = nets(in_memory, **settings)[0].eval()
    y = model(X)
    offload(model)
    close(model(X), y, torch.float32)
    close(model.merge_and_unload()(X), y, torch.float32)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, *BESIDE.values()], ids=["lora", "dora", *BESIDE])
def test_an_adapter_that_is_offloaded_itself_is_not_trained(settings: dict[str, Any], offload: Offload) -> None:
    model = nets(in_memory, **settings)[0]
    offload(model)
    with pytest.raises(AdapterError, match="Adapter 'default' cannot be trained: its parameters rest elsewhere"):
        model.train()(X)
    with torch.no_grad():
        model(X)


def test_an_adapter_that_is_offloaded_itself_is_not_filled(offload: Offload, tmp_path: Path) -> None:
    model = nets(in_memory)[0]
    model.save_pretrained(tmp_path)
    offload(model)
    with pytest.raises(CheckpointError, match=r"body.lora_A.weight, body.lora_B.weight rest elsewhere \(device"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("kind", CALLED_KINDS)
def test_an_adapted_model_can_be_dispatched(kind: str, tmp_path: Path) -> None:
    (model, _), x = pair(kind, in_memory), input_for(kind)
    model.eval()
    y = model(x)
    twin = copy.deepcopy(model)
    accelerate.disk_offload(twin, str(tmp_path), torch.device("cpu"))  # dispatch_model of all is refused before 1.15
    assert all(parameter.is_meta for parameter in twin.parameters())
    close(twin(x), y, torch.float32)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    close(ran(model.train(), x)[0], y, torch.float32)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
