"""Hot-swapping by PEFT's names: the same outputs where PEFT is right, and the right ones where it is not."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import hotswap as peft_hotswap
from torch import Tensor

import lorafa
from toys.adapters import train
from toys.compare import close
from toys.language_models import IDS, llama
from toys.parity import quiet

NAMES = (
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
    "check_hotswap_configs_compatible",
)


def saved(folder: Path, **settings: Any) -> str:
    """The folder of an adapter that PEFT has made."""
    torch.manual_seed(1)
    with quiet():
        config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings))
        model = peft.get_peft_model(llama(), config)
        train(model, 0.1)
        model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def swapped(first: str, second: str, **prepared: Any) -> tuple[Tensor, Tensor]:
    """Outputs of ours and of PEFT's once the second adapter is in the place of the first."""
    with quiet():
        ours, theirs = (library.PeftModel.from_pretrained(llama(), first) for library in (lorafa, peft))
        for library, model in ((lorafa, ours), (peft_hotswap, theirs)):
            if prepared:
                library.prepare_model_for_compiled_hotswap(model, **prepared)  # type: ignore[attr-defined]
            library.hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")  # type: ignore[attr-defined]
    return logits(ours), logits(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_functions_take_the_arguments_of_peft(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (lorafa, peft_hotswap))
    named = [key for key, parameter in theirs.items() if parameter.kind is not parameter.VAR_KEYWORD]
    assert [key for key in ours if key in named] == named
    assert [ours[key].default for key in named] == [theirs[key].default for key in named]


@pytest.mark.parametrize(
    ("settings", "prepared"),
    [
        ({}, {}),
        ({"lora_alpha": 20}, {}),
        ({"r": 2, "lora_alpha": 5}, {"target_rank": 8}),
        ({"r": 8}, {"target_rank": 8}),
        ({"target_modules": ["q_proj"]}, {}),
    ],
)
def test_outputs_are_those_of_peft(settings: dict[str, Any], prepared: dict[str, Any], tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second", **settings)
    close(*swapped(first, second, **prepared), torch.float32)


def test_patterns_of_ranks_are_followed_where_peft_leaves_them_out(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "r": 8}
    first, second = saved(tmp_path / "first", **patterns), saved(tmp_path / "second", **patterns)
    with quiet():
        fresh = logits(peft.PeftModel.from_pretrained(llama(), second))
        ours, theirs = swapped(first, second)
    close(ours, fresh, torch.float32)
    assert not torch.allclose(theirs, fresh, atol=1e-4)
