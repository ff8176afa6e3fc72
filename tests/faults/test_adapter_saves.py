"""Each step of saving an adapter is killed, cut short, refused or interrupted: the old one is there, or the new one.

Old and new differ in alpha, of which no shape tells.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafa
from lorafa import LoraConfig, PeftModel
from lorafa.errors import CheckpointError
from lorafa.io.adapter_files import read_adapter
from toys.faults import FOR_GOOD, KILLS, REFUSALS, every_fault, files_in

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


def check_every_fault(
    old: Path, new: Callable[[Path], Any], tmp_path: Path, folders: tuple[str, ...] = (".",), good: str = WEIGHTS
) -> int:
    """At every step of ``new`` over ``old`` each adapter is the old one or the new one; how many faults that were."""
    place, after = tmp_path / "work" / "adapter", tmp_path / "after"
    place.parent.mkdir()
    if old.exists():
        shutil.copytree(old, after)
    new(after)
    before, wanted = files_in(old), files_in(after)
    pairs = {name: (of_lorafa(old / name), of_lorafa(after / name)) for name in folders}
    plain = {name: (of_peft(old / name), of_peft(after / name), None) for name in folders}
    count = 0
    for what, raised in every_fault(old, place, new):
        count += 1
        fault = what.partition(" at step")[0]
        states = {name: of_lorafa(place / name) for name in folders}
        for name in folders:
            assert states[name] in pairs[name], what
            assert of_peft(place / name) in plain[name], what
        found = files_in(place)
        if fault in REFUSALS:
            assert raised is None or type(raised) is CheckpointError, what
            assert found == (wanted if raised is None else before), what
            if raised is not None:
                assert files_in(place, leavings=True) == before, what
                assert os.strerror(REFUSALS[fault]) in str(raised), what
        elif fault == FOR_GOOD:
            assert raised is None or type(raised) is CheckpointError, what
        elif fault not in KILLS:
            assert raised is None or type(raised) is KeyboardInterrupt, what
            assert found in (before, wanted), what
        new(place)
        assert files_in(place, leavings=True) == wanted, what
        assert not list(place.rglob(".*")), what
    return count


@pytest.mark.parametrize("old", ["lorafa", "another program", "the same config", "nothing"])
def test_an_adapter_is_the_old_one_or_the_new_one(old: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    if old != "nothing":
        saved(folder, adapted(1))
        (folder / "notes.txt").write_text("of the user")
    if old == "another program":
        as_of_peft(folder)
    new = adapted(2, **({} if old == "the same config" else {"lora_alpha": 64}))
    assert check_every_fault(folder, new.save_pretrained, tmp_path) > 100
