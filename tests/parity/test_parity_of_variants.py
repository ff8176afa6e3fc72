"""Formulas beside PEFT: the same config on the same tensors computes the same, and files are read both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import train
from toys.parity import stored, stored_config

peft = pytest.importorskip("peft")
IN, OUT = 24, 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.o_proj = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(self.q_proj(x).tanh())
        return y


COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


def ours(**settings: Any) -> PeftModel:
    model = get_peft_model(Net(), LoraConfig(**COMMON | settings)).eval()
    train(model)
    return model


def theirs(**settings: Any) -> Any:
    model = peft.get_peft_model(Net(), peft.LoraConfig(**COMMON | settings)).eval()
    train(model)
    return model


def same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one(X), other(X), rtol=1e-4, atol=1e-5)


def read_here(folder: Path, **settings: Any) -> PeftModel:
    return PeftModel.from_pretrained(Net(), folder, **settings)


def read_there(folder: Path, **settings: Any) -> Any:
    return peft.PeftModel.from_pretrained(Net(), folder, **settings)


# ---- QA-LoRA, which PEFT has on GPTQ's layers alone


def qalora_of_peft(**settings: Any) -> Any:
    """PEFT's own formula, put on its dense layers as it puts it on those of GPTQ."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    model = theirs(use_qalora=True, **settings)
    for layer in (model.base_model.model.q_proj, model.base_model.model.o_proj):
        layer.lora_variant["default"] = QALoraLinearVariant()
        QALoraLinearVariant.init(layer, "default", model.peft_config["default"])
    train(model)
    return model


@pytest.mark.parametrize("size", [2, 4, 12])
def test_a_qalora_file_of_peft_computes_here_what_it_computes_there(size: int, tmp_path: Path) -> None:
    model = qalora_of_peft(qalora_group_size=size)
    model.save_pretrained(tmp_path)
    loaded = read_here(tmp_path)
    same(loaded, model)
    assert loaded.base_model.model.q_proj.lora_A["default"].weight.shape == (4, IN // size)
    loaded.merge_adapter()
    same(loaded, model)  # PEFT does not merge it


def test_a_qalora_file_of_ours_is_plain_lora_there_and_comes_back_grouped(tmp_path: Path) -> None:
    model = ours(use_qalora=True, qalora_group_size=4)
    model.save_pretrained(tmp_path)
    assert stored_config(tmp_path)["use_qalora"] is False
    keys = {f"base_model.model.q_proj.{key}" for key in ("lora_A.weight", "lora_unfolded.A")}
    assert keys <= stored(tmp_path).keys()
    same(read_there(tmp_path), model)
    back = read_here(tmp_path, is_trainable=True)
    assert torch.equal(back.eval()(X), model(X))
    assert back.peft_config["default"].use_qalora
    assert back.base_model.model.q_proj.lora_A["default"].weight.shape == (4, IN // 4)


def test_dora_over_qalora_is_dora_there(tmp_path: Path) -> None:
    model = ours(use_qalora=True, qalora_group_size=4, use_dora=True)
    model.save_pretrained(tmp_path)
    same(read_there(tmp_path), model)
    assert torch.equal(read_here(tmp_path)(X), model(X))


# ---- BD-LoRA

BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}


def blocks(library: Any) -> Any:
    return lorafa.BdLoraConfig(**BLOCKS) if library is lorafa else peft.tuners.lora.BdLoraConfig(**BLOCKS)


def test_bdlora_files_go_both_ways_in_the_compact_form_of_peft(tmp_path: Path) -> None:
    here, there = ours(use_bdlora=blocks(lorafa)), theirs(use_bdlora=blocks(peft))
    here.save_pretrained(tmp_path / "ours")
    there.save_pretrained(tmp_path / "theirs")
    shapes = [{key: value.shape for key, value in stored(tmp_path / name).items()} for name in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    assert stored_config(tmp_path / "ours")["use_bdlora"] == stored_config(tmp_path / "theirs")["use_bdlora"]
    same(read_there(tmp_path / "ours"), here)
    same(read_here(tmp_path / "theirs"), there)
    assert torch.equal(read_here(tmp_path / "ours")(X), here(X))


def test_bdlora_learns_the_same_as_in_peft_and_merges_to_the_same(tmp_path: Path) -> None:
    there = theirs(use_bdlora=blocks(peft))
    there.save_pretrained(tmp_path)
    same_gradients(read_here(tmp_path, is_trainable=True), there)
    torch.testing.assert_close(
        read_here(tmp_path).merge_and_unload().o_proj.weight, there.merge_and_unload().o_proj.weight
    )


def same_gradients(here: nn.Module, there: nn.Module) -> None:
    found = {}
    for model in (here, there):
        model.train()
        model(X).square().sum().backward()
        found[model] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[here].keys() == found[there].keys()
    for name, grad in found[there].items():
        torch.testing.assert_close(found[here][name], grad, rtol=1e-4, atol=1e-5)


def test_dora_over_bdlora_is_dora_there(tmp_path: Path) -> None:
    model = ours(use_bdlora=blocks(lorafa), use_dora=True)
    model.save_pretrained(tmp_path)
    same(read_there(tmp_path), model)
    assert torch.equal(read_here(tmp_path)(X), model(X))
