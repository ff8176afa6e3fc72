"""Conversion to plain LoRA: what is refused and said, and that nothing is changed by it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafa import LoraConfig, PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model, save_as_lora
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError
from lorafa.surgery.lora_model import LoraModel
from toys.adapters import train
from toys.compare import close, refused
from toys.models import Convolution, Two


def two(**settings: Any) -> PeftModel:
    model = get_peft_model(Two(), LoraConfig(**({"r": 4, "target_modules": ["first", "second"]} | settings)))
    train(model)
    return model.eval()


@pytest.mark.parametrize("rank", [0, -3, True, "4", None, 0.0, 1.01, float("nan")])
def test_a_rank_is_a_number_or_a_share(rank: Any) -> None:
    model = two()
    with refused(model, ConfigError, "rank is a whole number of 1 or more, or a share of the energy .* found"):
        convert_to_lora(model, rank)


def test_a_rank_no_layer_can_have_names_the_layer() -> None:
    model = two()
    with refused(model, ConfigError, "rank 11 is larger than 10, the smaller side of the weight of 'first'"):
        convert_to_lora(model, 11)


def test_an_update_that_changes_with_the_input_is_refused() -> None:
    model = two(alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    assert not model.supports_lora_conversion()
    with refused(model, BackendError, r"'first' \(alora\) changes with the input, and so do 2 of 2"):
        convert_to_lora(model, 2)


def test_unknown_and_merged_adapters_are_refused() -> None:
    model = two()
    with refused(model, AdapterError, "no adapter 'other'"):
        convert_to_lora(model, 2, "other")
    model.base_model.merge_adapter()
    with pytest.raises(AdapterError, match=r"merged into 'first'\. Call unmerge_adapter"):
        convert_to_lora(model, 2)
    with pytest.raises(AdapterError, match="carries no adapter"):
        convert_to_lora(Two(), 2)


def test_convolutions_of_several_groups_are_refused() -> None:
    model = get_peft_model(Convolution(2, groups=2), LoraConfig(r=2, target_modules=["conv"]))
    with refused(model, BackendError, "'conv': that is a convolution of several groups"):
        convert_to_lora(model, 2)


def test_an_adapter_that_is_spread_over_processes_is_refused() -> None:
    model = two()
    model.base_model.model.first.lora_B["default"].weight.ds_numel = 10**6  # as DeepSpeed marks what it shards
    with refused(model, CheckpointError, "only parts of it are in this process .*: first"):
        convert_to_lora(model, 2)


def test_what_a_rank_loses_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"as plain LoRA of rank 1: \d+\.\d+% of the energy of 2 updates is lost"):
        convert_to_lora(two(), 1)


def test_a_rank_that_is_enough_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    convert_to_lora(two(), 4)
    convert_to_lora(two(), 0.5)
    assert [str(warning.message) for warning in recwarn] == []


def test_names_are_those_of_the_model_it_was_injected_into() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), Two())
    config, tensors = convert_to_lora(model, 2)
    assert set(tensors) == {"first.lora_A.weight", "first.lora_B.weight"}
    assert config.target_modules == {"first"}


def test_of_a_lora_model_alone_names_begin_with_its_model_as_in_peft() -> None:
    model = LoraModel(Two(), LoraConfig(r=2, target_modules=["first"]))
    assert model.supports_lora_conversion()
    assert set(convert_to_lora(model, 2)[1]) == {f"model.first.lora_{f}.weight" for f in "AB"}


def test_one_of_several_adapters_is_converted() -> None:
    model = two()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["second"]))
    config, tensors = convert_to_lora(model, 2, "other")
    assert (config.r, {key.split(".")[2] for key in tensors}) == (2, {"second"})


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
def test_compiled_and_with_a_bar_it_is_the_same() -> None:
    model = two()
    config, tensors = convert_to_lora(model, 3, progressbar=True, compile_kwargs={"backend": "eager"})
    plain_config, plain = convert_to_lora(model, 3)
    assert config == plain_config
    for key in plain:
        close(tensors[key], plain[key], 1e-5)


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
def test_a_folder_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    save_as_lora(tmp_path, two(), 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        save_as_lora(tmp_path / "file", two(), 2)
    (tmp_path / "file").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_half_precision_adapters_are_decomposed_in_float32_and_rounded_once() -> None:
    half = get_peft_model(
        Two().to(torch.bfloat16), LoraConfig(r=3, target_modules=["first"]), autocast_adapter_dtype=False
    )
    train(half)
    _, tensors = convert_to_lora(half, 3)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    layer = half.base_model.model.first
    exact = layer.adapters["default"].delta_weight(layer.base_weight()).detach()
    B, A = (tensors[f"base_model.model.first.lora_{f}.weight"].float() for f in "BA")
    assert float((B @ A - exact).norm() / exact.norm()) < 0.01
