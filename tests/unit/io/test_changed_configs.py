"""An adapter's config changed after it was made, as scripts do before they convert a file: it saves, and loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lorafa import LoraConfig, LoraGAConfig, PeftModel
from lorafa.errors import ConfigError
from lorafa.variants import variant_types
from toys.adapters import STARTS, initializer_of, settings_of, train, with_adapter
from toys.layers import Single, base_layer, input_for

KIND = "torch.nn.modules.linear.Linear"
PLAIN = [start for start in STARTS if [v.name for v in variant_types(LoraConfig(**settings_of(start)))] == ["lora"]]


CHANGED = [(start, True) for start in PLAIN] + [(s, "pissa") for s in PLAIN if initializer_of(s).moves_base]


def adapted(start: bool | str, **settings: Any) -> tuple[PeftModel, nn.Module]:
    """A trained adapter, and its base."""
    torch.manual_seed(0)
    base = Single(base_layer(KIND))
    torch.manual_seed(0)
    model = with_adapter(Single(base_layer(KIND)), KIND, init_lora_weights=start, **settings)
    train(model)
    return model, base


@pytest.mark.parametrize(("start", "now"), CHANGED)
def test_a_trained_adapter_may_be_said_to_have_started_otherwise(
    start: bool | str, now: bool | str, tmp_path: Path
) -> None:
    """Its settings, which the config keeps, are those of another start then. PEFT converts PiSSA and LoRA-GA so."""
    model, base = adapted(start)
    x = input_for(KIND)
    expected = model(x)
    model.peft_config["default"].init_lora_weights = now
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    if initializer_of(start).quantizer is None:  # the base of the others is quantized when such a config is read
        assert torch.equal(loaded(x), expected)
    assert loaded.peft_config["default"].init_lora_weights == now
    loaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("start", ["lora_sb"])
def test_another_formula_than_that_of_the_layers_is_refused_when_it_is_saved(start: str, tmp_path: Path) -> None:
    model, _ = adapted(start)
    model.peft_config["default"].init_lora_weights = True
    with pytest.raises(
        ConfigError, match=rf"changed to init_lora_weights=True .* ask for lora, .* compute {start}, .*Set"
    ):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "new")


@pytest.mark.parametrize("start", [True, "gaussian", "lora_one"])
def test_a_start_that_would_be_made_again_from_the_base_is_refused_when_it_is_saved(
    start: bool | str, tmp_path: Path
) -> None:
    """Such a file would be read as the rest of a base that lacks its start."""
    model, _ = adapted(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(ConfigError, match=r"changed to init_lora_weights='pissa' .* the layers have taken nothing"):
        model.save_pretrained(tmp_path)


def test_dora_switched_off_afterwards_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    model, _ = adapted(True, use_dora=True)
    model.peft_config["default"].use_dora = False
    with pytest.raises(ConfigError, match=r"ask for lora, and the layers compute lora under dora"):
        model.save_pretrained(tmp_path)


def test_a_file_that_names_settings_of_another_start_loads(tmp_path: Path) -> None:
    """As versions before this one wrote it."""
    model, base = adapted("lora_ga")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        side = json.loads(opened.metadata()["lorafa"])
    side["start"] |= {"init_lora_weights": True}
    assert side["start"]["lora_ga_config"]
    save_file(load_file(file), file, {"format": "pt", "lorafa": json.dumps(side)})
    x = input_for(KIND)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_a_new_adapter_still_has_no_settings_that_would_be_ignored() -> None:
    with pytest.raises(ConfigError, match="lora_ga_config is set but would be ignored"):
        LoraConfig(target_modules=["layer"], lora_ga_config=LoraGAConfig(scale="unit"))
