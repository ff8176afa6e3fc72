"""Each step of saving an adapter is killed, cut short, refused or interrupted: the old one is there, or the new one.

Old and new differ in alpha, of which no shape tells.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafa
from lorafa import LoraConfig, PeftModel, save_as_lora
from lorafa.io.adapter_files import read_adapter
from toys.faults import FAULTS, FEW, check_every_fault

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the harness looks descriptors up there")


def adapted(seed: int, *others: str, **settings: Any) -> PeftModel:
    """A model whose adapters have values that only this seed gives."""
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["0"]} | settings
    torch.manual_seed(0)
    model = lorafa.get_peft_model(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), LoraConfig(**config))
    for name in others:
        model.add_adapter(name, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


Pair = tuple[dict[str, Any], dict[str, list[Any]]]
"""Config and tensors of one adapter."""


def of_peft(folder: Path) -> Pair | None:
    """An adapter as PEFT reads it: the two files as they are; None where one is not there, and PEFT refuses."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return None
    config = json.loads((folder / CONFIG).read_text())
    return config, {name: tensor.tolist() for name, tensor in load_file(folder / WEIGHTS).items()}


def of_lorafa(folder: Path) -> Pair | None:
    """As lorafa reads it; None where nothing is there."""
    if not (folder / WEIGHTS).is_file():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a save was killed
        stored = read_adapter(folder)
    config = stored.config.to_dict() | {"inference_mode": True}
    return config, {name: tensor.tolist() for name, tensor in stored.tensors.items()}


def as_of_peft(folder: Path) -> Path:
    """Make the files of another program of those lorafa wrote: nothing in the header."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def saved(folder: Path, model: PeftModel) -> Path:
    model.save_pretrained(folder)
    return folder


def each_is_old_or_new(old: Path, new: Path, *folders: str) -> Callable[[Path], None]:
    """Looks whether each adapter is the old or the new one for lorafa, and for PEFT, or refused by that."""
    pairs = {name: (of_lorafa(old / name), of_lorafa(new / name)) for name in folders}
    plain = {name: (of_peft(old / name), of_peft(new / name), None) for name in folders}

    def look(place: Path) -> None:
        for name in folders:
            assert of_lorafa(place / name) in pairs[name], sorted(place.rglob("*"))
            assert of_peft(place / name) in plain[name], sorted(place.rglob("*"))

    return look


LONG = pytest.param(FAULTS, id="all faults", marks=pytest.mark.slow)
TWO = pytest.param(("killed before", "full"), id="two faults")
OLD = ("lorafa", "another program", "the same config", "nothing")


@pytest.mark.parametrize(
    ("old", "faults"),
    [
        *(pytest.param(old, FEW if old == "lorafa" else TWO.values[0], id=old) for old in OLD),
        *(pytest.param(old, FAULTS, id=f"{old}, all faults", marks=pytest.mark.slow) for old in OLD),
    ],
)
def test_an_adapter_is_the_old_one_or_the_new_one(old: str, faults: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    if old != "nothing":
        saved(folder, adapted(1))
        (folder / "notes.txt").write_text("of the user")
    if old == "another program":
        as_of_peft(folder)
    new = adapted(2, **({} if old == "the same config" else {"lora_alpha": 64}))
    look = each_is_old_or_new(folder, saved(tmp_path / "new", new), ".")
    assert check_every_fault(folder, new.save_pretrained, tmp_path, faults, look) > 40


@pytest.mark.parametrize("faults", [TWO, LONG])
def test_of_two_adapters_each_is_the_old_one_or_the_new_one_and_both_after_an_error(
    faults: tuple[str, ...], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "old", adapted(1, "other"))
    new = adapted(2, "other", lora_alpha=64)
    look = each_is_old_or_new(folder, saved(tmp_path / "new", new), ".", "other")
    assert check_every_fault(folder, new.save_pretrained, tmp_path, faults, look) > 60


@pytest.mark.parametrize("faults", [TWO, LONG])
def test_a_converted_adapter_is_the_old_one_or_the_new_one(faults: tuple[str, ...], tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "old", adapted(1)), adapted(2, r=3)
    save_as_lora(tmp_path / "new", model, 1)
    look = each_is_old_or_new(folder, tmp_path / "new", ".")
    save = partial(save_as_lora, model=model, rank=1)
    assert check_every_fault(folder, save, tmp_path, faults, look) > 30
