"""Names of tensors, and expressions that rename them, keep nobody busy; what cannot be renamed is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafa import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from lorafa.errors import CheckpointError, ConfigError, LoraError
from toys.models import Mlp

LONG = {
    "norms": ".lora_magnitude_vector", "embeddings": "embed", "words": "x", "experts": "experts.1.",
    "factors": ".lora_A.lora_B", "numbers": ".1", "wrappers": ".base_layer",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path)
    return tmp_path


def add(folder: Path, *names: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(2, 2) for name in names}, file)


def test_a_name_that_is_longer_than_any_is_refused(folder: Path) -> None:
    add(folder, "embed" * 150_000)
    with pytest.raises(CheckpointError, match=r"names a tensor in 750000 characters, 'embedembed.*'\.\.\.; names of"):
        PeftModel.from_pretrained(Mlp(), folder)


@pytest.mark.parametrize("piece", LONG)
def test_many_long_names_are_refused_in_time(folder: Path, piece: str) -> None:
    add(folder, *(f"{(LONG[piece] * 1000)[:990]}.{number}." for number in range(700)))
    start = time.process_time()
    with pytest.raises(LoraError) as error:
        PeftModel.from_pretrained(Mlp(), folder)
    assert time.process_time() - start < 4
    assert len(str(error.value)) <= 4000


@pytest.mark.parametrize("expression", [r"(a|aa)+b", r"(?P<a>.*)(?P<b>.*)(?P<c>.*)(.*)(?P=a)(?P=b)(?P=c)[XY]"])
def test_an_expression_that_takes_for_ever_is_refused(folder: Path, expression: str) -> None:
    add(folder, "a" * 900)
    start = time.process_time()
    with pytest.raises(ConfigError, match="key_mapping has regular expressions that take too long on the names"):
        load_peft_weights(folder, key_mapping={expression: "x"})
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    ("mapping", "kind", "text"),
    [
        ({"(": "x"}, ConfigError, r"key_mapping has '\(', which is no regular expression"),
        ({"(first)": r"\2"}, ConfigError, r"key_mapping has '\\\\2', which is no replacement for '\(first\)'"),
        ({"first": 1}, ConfigError, r"key_mapping has regular expressions and what replaces them, both texts, found {"),
        (["first"], ConfigError, r"key_mapping has regular expressions and what replaces them, both texts, found \["),
        ({"lora_[AB]": "x"}, CheckpointError, r"key_mapping gives '.*lora_A.*' and '.*lora_B.*' one name\. Tell them"),
    ],
)
def test_what_renames_nothing_well_is_refused(folder: Path, mapping: Any, kind: type[LoraError], text: str) -> None:
    with pytest.raises(kind, match=text):
        PeftModel.from_pretrained(Mlp(), folder, key_mapping=mapping)
