"""Conversion to plain LoRA beside PEFT's: the same products, configs and refusals, where PEFT's are right."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lorafa
from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import train
from toys.compare import close
from toys.models import Two

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


def both(folder: Path, **settings: Any) -> tuple[PeftModel, peft.PeftModel]:
    """One adapter in both libraries."""
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["first", "second"], **settings)
    ours = get_peft_model(Two(), config)
    train(ours)
    ours.save_pretrained(folder)
    return ours, peft.PeftModel.from_pretrained(Two(), folder)


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """s B A by layer, for s = 1."""
    ends = ".lora_A.weight"
    return {
        key.removesuffix(ends): tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        for key in tensors
        if key.endswith(ends)
    }


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter", "ignore:Adapter 'default' as plain LoRA")
@pytest.mark.parametrize("rank", [2, 0.7, 0.99])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_products_ranks_and_alphas_are_pefts(settings: dict[str, Any], rank: int | float, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, **settings)
    config, tensors = lorafa.convert_to_lora(ours, rank)
    their_config, their_tensors = peft.convert_to_lora(theirs, rank)
    assert tensors.keys() == their_tensors.keys()
    for name, product in products(their_tensors).items():
        close(products(tensors)[name], product.detach(), 1e-4)
        layer = name.removeprefix("base_model.model.")
        wanted = their_config.rank_pattern.get(layer, their_config.r)
        assert config.rank_pattern.get(layer, config.r) == tensors[f"{name}.lora_A.weight"].shape[0] == wanted
        assert config.alpha_pattern.get(layer, config.lora_alpha) == wanted
    assert {"first", "second"} <= set(config.target_modules or ()) <= set(their_config.target_modules)


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
def test_pefts_loader_reads_what_is_saved_without_a_word(tmp_path: Path) -> None:
    ours, _ = both(tmp_path / "own", use_dora=True)
    lorafa.save_as_lora(tmp_path / "plain", ours, 10)
    x = torch.randn(3, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(Two(), tmp_path / "plain").eval()
    close(theirs(x), ours.eval()(x), 1e-4)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, 100, -0.1])
def test_ranks_that_peft_refuses_are_refused(rank: int | float, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    if rank != -1:  # which PEFT takes for all but one
        with pytest.raises(ValueError):
            peft.convert_to_lora(theirs, rank)
    with pytest.raises(ValueError, match="rank"):
        lorafa.convert_to_lora(ours, rank)


def test_what_can_be_converted_is_said_on_model_and_layer_as_in_peft(tmp_path: Path) -> None:
    for model in both(tmp_path):
        assert model.supports_lora_conversion() is True
        assert model.base_model.supports_lora_conversion() is True
        assert model.base_model.model.first.supports_lora_conversion("default") is True


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_of_dora_peft_converts_the_low_rank_part_alone_and_we_the_update(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, use_dora=True)
    _, tensors = lorafa.convert_to_lora(ours, 10)
    _, their_tensors = peft.convert_to_lora(theirs, 10)
    x, base = torch.randn(3, 12), Two()
    change = products(tensors)["base_model.model.first"]
    adapted = ours.base_model.model.first.eval()
    close(base.first(x) + x @ change.T, adapted(x), 1e-4)
    assert not torch.allclose(
        base.first(x) + x @ products(their_tensors)["base_model.model.first"].T, adapted(x), atol=0.1
    )


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_two_ways_in_which_it_is_more_than_pefts(tmp_path: Path) -> None:
    """The bias of B goes along, and biases of the base are no reason to refuse; PEFT drops the one, refuses others."""
    ours, theirs = both(tmp_path / "a", lora_bias=True)
    _, tensors = lorafa.convert_to_lora(ours, 4)
    _, their_tensors = peft.convert_to_lora(theirs, 4)
    assert any(key.endswith("bias") for key in tensors)
    assert not any(key.endswith("bias") for key in their_tensors)
    ours, theirs = both(tmp_path / "b", bias="all")
    assert any(key.endswith("bias") for key in lorafa.convert_to_lora(ours, 4)[1])
    with pytest.raises(ValueError, match="bias"):
        peft.convert_to_lora(theirs, 4)
