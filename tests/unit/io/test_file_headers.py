"""What lorafa alone reads of an adapter's files is in the header of the tensors, where no other reader minds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import CheckpointError
from lorafa.io.loose import needs_base
from toys.adapters import train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def adapted(**settings: Any) -> PeftModel:
    model = get_peft_model(Model(), LoraConfig(target_modules=["body"], r=2, **settings))
    train(model)
    return model.eval()


def header(folder: Path) -> dict[str, Any]:
    """What the header of the tensors says to lorafa."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    return json.loads(metadata["lorafa"])


def test_what_lorafa_alone_reads_is_in_the_header_of_the_tensors(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    assert list(header(tmp_path)["base"]) == ["body"]
    assert header(tmp_path)["base"]["body"]["shape"] == [6, 6]
    assert "own" not in header(tmp_path)


OWN: list[dict[str, Any]] = [
    {"init_seed": 5},
    {"freeze_A": True},
    {"attention_out_proj_twice": True},
    {"init_lora_weights": "olora", "init_config": {"pivoted": True}},
]


@pytest.mark.parametrize("settings", OWN, ids=lambda settings: next(iter(settings)))
def test_fields_that_peft_does_not_have_are_in_the_header_alone_and_come_back(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert saved.keys().isdisjoint({"init_seed", "freeze_A", "attention_out_proj_twice", "init_config"})
    config = PeftModel.from_pretrained(Model(), tmp_path).peft_config["default"]
    assert {name: getattr(config, name) for name in settings} == {
        name: getattr(model.peft_config["default"], name) for name in settings
    }


def test_files_that_hold_such_fields_in_their_config_still_load(tmp_path: Path) -> None:
    """As versions before this one wrote them."""
    model = adapted(init_seed=5, freeze_A=True)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text()) | {"init_seed": 5, "freeze_A": True}
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    side = {key: value for key, value in header(tmp_path).items() if key != "own"}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt", "lorafa": json.dumps(side)})
    loaded = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    assert (loaded.peft_config["default"].init_seed, loaded.peft_config["default"].freeze_A) == (5, True)
    assert not loaded.base_model.model.body.lora_A["default"].weight.requires_grad
    assert torch.equal(loaded.eval()(X), model(X))


def test_a_config_saved_alone_keeps_all_its_fields(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["body"], freeze_A=True, init_seed=5)
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def with_entry(folder: Path, **changed: Any) -> Path:
    entry = header(folder) | changed
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", "lorafa": json.dumps(entry)})
    return folder


DAMAGED: list[tuple[str, Any, str]] = [
    ("start", ["r"], "a mapping"),
    ("config", 3, "a mapping"),
    ("own", None, "a mapping"),
    ("fallbacks", "none", "a mapping"),
    ("fallbacks", {"body": 3}, "a reason for each layer"),
    ("base", [], "a mapping"),
    ("base", {"body": []}, "a fingerprint of each layer"),
    ("base", {"body": {"shape": [6, 6]}}, "a fingerprint of each layer"),
    ("quantized", True, "a mapping"),
    ("quantized", {"body": 1}, "a fingerprint of each layer"),
]


@pytest.mark.parametrize(("name", "value", "what"), DAMAGED, ids=[f"{name}-{value}" for name, value, _ in DAMAGED])
def test_an_entry_that_is_not_what_was_written_is_refused(name: str, value: Any, what: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with_entry(tmp_path, **{name: value})
    text = rf"{WEIGHTS}: '{name}' of the entry 'lorafa' in its header is not {what}\. The file is damaged"
    with pytest.raises(CheckpointError, match=text):
        PeftModel.from_pretrained(Model(), tmp_path)
    with pytest.raises(CheckpointError, match=text):
        needs_base(tmp_path)
