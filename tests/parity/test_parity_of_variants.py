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


# ---- VeLoRA and MonteCLoRA


def velora(library: Any, **settings: Any) -> dict[str, Any]:
    kind = lorafa.VeloraConfig if library is lorafa else peft.VeloraConfig
    return {"velora_config": kind(**{"num_groups": 4} | settings)}


def monteclora(library: Any, **settings: Any) -> dict[str, Any]:
    kind = lorafa.MontecloraConfig if library is lorafa else peft.MontecloraConfig
    return {"monteclora_config": kind(**{"num_samples": 3, "buffer_size": 2} | settings)}


@pytest.mark.parametrize("settings", [velora, monteclora])
def test_files_with_tensors_of_a_formula_go_both_ways(settings: Any, tmp_path: Path) -> None:
    here, there = ours(**settings(lorafa)), theirs(**settings(peft))
    for model, name in ((here, "ours"), (there, "theirs")):
        model.train()(X)  # which sets what follows from a batch
        model.eval().save_pretrained(tmp_path / name)
    shapes = [{key: value.shape for key, value in stored(tmp_path / name).items()} for name in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    same(read_there(tmp_path / "ours"), here)
    same(read_here(tmp_path / "theirs"), there)
    again = tmp_path / "again"
    read_here(tmp_path / "theirs").save_pretrained(again)
    assert all(torch.equal(stored(again)[key], value) for key, value in stored(tmp_path / "theirs").items())
    read_there(tmp_path / "ours").save_pretrained(tmp_path / "back")
    assert all(torch.equal(stored(tmp_path / "back")[key], value) for key, value in stored(tmp_path / "ours").items())


@pytest.mark.parametrize("groups", [4, 5])
@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
def test_velora_learns_the_same_as_in_peft(init_type: str, groups: int, tmp_path: Path) -> None:
    there = theirs(**velora(peft, init_type=init_type, num_groups=groups, scale=0.5))
    there.save_pretrained(tmp_path)
    here = read_here(tmp_path, is_trainable=True)
    same_gradients(here, there)
    vectors = [
        dict(model.named_buffers()).get(f"base_model.model.q_proj.lora_velora_embed.default{end}")
        for model, end in ((here, ".weight"), (there, ""))
    ]
    torch.testing.assert_close(vectors[0], vectors[1])


@pytest.mark.parametrize("use_entropy", [False, True])
def test_the_penalty_of_monteclora_is_that_of_peft_but_for_a_sign(use_entropy: bool, tmp_path: Path) -> None:
    """PEFT has log gamma(alpha) - log gamma(prior) of the Dirichlet divergence with the opposite sign."""
    there = theirs(**monteclora(peft, kl_loss_weight=0.1, use_entropy=use_entropy, dirichlet_prior=0.3))
    there.train()(X)
    there.save_pretrained(tmp_path)
    here = read_here(tmp_path, is_trainable=True)
    twice = torch.zeros(())
    for _, layer in here.base_model.lora_layers():
        alpha = layer.adapters["default"].extra("omega").exp()
        twice = twice + 2 * (torch.lgamma(alpha) - torch.lgamma(torch.tensor(0.3))).sum() / 2
    wanted = there.base_model._get_monteclora_loss() - 0.1 * twice
    torch.testing.assert_close(lorafa.penalty(here), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [velora, monteclora])
@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_peft_has_of_no_two_it_reads_without_the_formula_inside(
    settings: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    model = ours(**settings(lorafa), **more)
    model.save_pretrained(tmp_path)
    same(read_there(tmp_path), model)
    back = read_here(tmp_path)
    assert torch.equal(back(X), model(X))
    field = next(iter(settings(lorafa)))
    assert getattr(back.peft_config["default"], field) == getattr(model.peft_config["default"], field)
