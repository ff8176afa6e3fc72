"""Files of PEFT under a name that is there: what PEFT gets right stays, what it gets wrong in silence does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import CheckpointError
from toys.adapters import train
from toys.compare import close, refused
from toys.models import Linears
from toys.parity import quiet

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def base() -> nn.Module:
    torch.manual_seed(0)
    return Linears().eval()


def saved(folder: Path, **settings: Any) -> nn.Module:
    """A model of PEFT with an adapter that was saved."""
    with quiet():
        model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["first"], r=2, **settings)).eval()
        train(model)
        model.save_pretrained(folder)
    return model


def ours(**settings: Any) -> PeftModel:
    return get_peft_model(base(), LoraConfig(target_modules=["first"], r=2, **settings)).eval()


@torch.no_grad()
def test_scalings_are_those_of_the_file_where_peft_keeps_the_old_ones(tmp_path: Path) -> None:
    source = saved(tmp_path, lora_alpha=8)
    model = ours(lora_alpha=1)
    model.load_adapter(tmp_path, "default")
    close(model(X), source(X), torch.float32)
    with quiet():
        theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["first"], r=2, lora_alpha=1)).eval()
        theirs.load_adapter(tmp_path, "default")
    assert (theirs(X) - source(X)).abs().max() > 0.01


@torch.no_grad()
def test_files_whose_start_changed_the_base_go_into_an_adapter_that_subtracts_the_same_alone(tmp_path: Path) -> None:
    source = saved(tmp_path, init_lora_weights="pissa")
    same = ours(init_lora_weights="pissa")
    same.load_adapter(tmp_path, "default")
    close(same(X), source(X), torch.float32)
    for start, text in (
        (True, "not what init_lora_weights='pissa' took from the base"),
        ("olora", "subtracts the same is not known"),
    ):
        model = ours(init_lora_weights=start)
        with refused(model, CheckpointError, text):
            model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("alpha", [2, 5])
def test_trained_checkpoints_of_peft_resume(alpha: int, tmp_path: Path) -> None:
    source = saved(tmp_path, lora_alpha=alpha)
    model = ours(lora_alpha=alpha)
    config = model.peft_config["default"]
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.peft_config["default"] is config
    with torch.no_grad():
        close(model(X), source(X), torch.float32)
