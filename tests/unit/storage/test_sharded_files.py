"""What only a part of is in this process is never taken for the whole: not in a file, and not in a fingerprint.

DeepSpeed ZeRO-3 leaves a parameter of no values that knows its size, FSDP1 a flat piece. The DTensors of FSDP2 are
tested with two processes, in tests/integration.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from lorafa.errors import CheckpointError
from lorafa.storage.tensors import is_part, whole
from toys.adapters import train
from toys.compare import assert_unchanged, everything


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def by_zero3(parameter: nn.Parameter) -> None:
    parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
    parameter.data = torch.empty(0)


def by_fsdp1(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.flatten()[: parameter.numel() // 2].clone()


SHARDERS = [by_zero3, by_fsdp1]


def adapted(**settings: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False} | settings)
    model = get_peft_model(Model(), config)
    train(model)
    return model.eval()


def sharded(model: PeftModel, shard: Callable[[nn.Parameter], None]) -> dict[str, Tensor]:
    """Shard every matrix; the state dict as it was, which is what gathering gives."""
    gathered = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            shard(parameter)
    return gathered


def fingerprints(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lorafa"])["base"]
    return found


@pytest.mark.parametrize("shard", SHARDERS)
def test_the_file_of_a_gathered_state_is_that_of_the_whole_model(
    tmp_path: Path, shard: Callable[[nn.Parameter], None]
) -> None:
    model = adapted()
    expected = model(X)
    model.save_pretrained(tmp_path / "whole")
    gathered = sharded(model, shard)
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    assert fingerprints(tmp_path / "gathered") == fingerprints(tmp_path / "whole")
    assert fingerprints(tmp_path / "gathered")["first"]["shape"] == [5, 6]
    assert torch.equal(PeftModel.from_pretrained(Model(), tmp_path / "gathered")(X), expected)
    with torch.no_grad():
        other = Model()
        other.first.weight.mul_(2)
    with pytest.raises(CheckpointError, match="made for another base model"):
        PeftModel.from_pretrained(other, tmp_path / "gathered")


@pytest.mark.parametrize("shard", SHARDERS)
def test_without_the_frozen_weights_no_fingerprint_is_written_and_saving_says_so(
    tmp_path: Path, shard: Callable[[nn.Parameter], None]
) -> None:
    """As trainers gather that leave frozen weights out."""
    model = adapted()
    expected = model(X)
    gathered = {key: value for key, value in sharded(model, shard).items() if "lora_" in key}
    with pytest.warns(UserWarning, match=r"does not say which base weights 2 of its layers belong to.*first, second"):
        model.save_pretrained(tmp_path, state_dict=gathered)
    assert fingerprints(tmp_path) == {"first": None, "second": None}
    assert torch.equal(PeftModel.from_pretrained(Model(), tmp_path)(X), expected)


@pytest.mark.parametrize("shard", SHARDERS)
def test_parts_of_an_adapter_are_not_written(tmp_path: Path, shard: Callable[[nn.Parameter], None]) -> None:
    model = adapted()
    sharded(model, shard)
    with pytest.raises(CheckpointError, match=r"Only parts of 4 of the 4 tensors of adapter 'default' .*state_dict="):
        model.save_pretrained(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"Only parts of 4 of the 4"):
        get_peft_model_state_dict(model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shard", SHARDERS)
def test_parts_of_an_adapter_are_not_filled(tmp_path: Path, shard: Callable[[nn.Parameter], None]) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    sharded(model, shard)
    before = everything(model)
    with pytest.raises(CheckpointError, match=r"'default' cannot be filled from a file: only parts of first\.lora_A"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(CheckpointError, match=r"Load the file before the model is sharded"):
        set_peft_model_state_dict(model, state)
    assert_unchanged(before, model)


def test_a_fingerprint_of_empty_shards_refuses_no_good_file(tmp_path: Path) -> None:
    """As versions before this one wrote it under ZeRO-3."""
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        side = json.loads(opened.metadata()["lorafa"])
    for described in side["base"].values():
        described |= {"shape": [0], "hash": "0" * 16, "sample": []}
    save_file(load_file(file), file, {"format": "pt", "lorafa": json.dumps(side)})
    assert torch.equal(PeftModel.from_pretrained(Model(), tmp_path)(X), model(X))


def test_a_process_that_is_not_the_main_one_has_nothing_to_do_for_what_it_holds_whole(tmp_path: Path) -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "new", is_main_process=False, state_dict={})
    assert not (tmp_path / "new").exists()


def test_a_whole_tensor_is_itself_and_a_part_is_none() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    found = whole(weight, 2)
    assert found is not None
    assert torch.equal(found, weight)
    assert not found.requires_grad
    assert not is_part(torch.empty(0))  # an empty tensor, of which there is no more
    by_zero3(weight)
    assert whole(weight) is None
    assert whole(torch.zeros(6), 2) is None
    assert whole(torch.zeros(6)) is not None
