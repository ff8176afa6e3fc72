"""Config and tensors of one save belong together: another config is refused by what differs; names may be edited."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafa
from lorafa import LoraConfig, PeftModel
from lorafa.errors import CheckpointError, ConfigError
from lorafa.io.adapter_files import read_adapter
from lorafa.io.belonging import as_text, differences, tied
from lorafa.storage.leavings import hidden
from toys.blocks import Model, train_model
from toys.compare import assert_unchanged, everything

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(10))
    return found


def of_another_program(folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ---- which fields are tied


NUMBERS: dict[str, Any] = {
    "r": 3, "lora_alpha": 64, "use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2}, "fan_in_fan_out": True, "init_lora_weights": "pissa", "lora_bias": True,
    "layer_replication": [[0, 1]], "trainable_token_indices": [1], "alora_invocation_tokens": [1],
    "use_qalora": True, "qalora_group_size": 4, "velora_config": {"num_groups": 4}, "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 3}, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2},
    "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 3.0}, "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"scale": "gd"}, "ensure_weight_tying": True,
}  # fmt: skip
"""A value of each field that changes numbers, other than the default."""
NAMES: dict[str, Any] = {
    "base_model_name_or_path": "elsewhere/base", "revision": "abc", "task_type": "CAUSAL_LM", "inference_mode": False,
    "auto_mapping": {"base_model_class": "A", "parent_library": "b"}, "peft_version": "0.99", "lora_dropout": 0.5,
    "target_modules": ["v_proj", "q_proj"], "exclude_modules": ["x"], "modules_to_save": ["head"], "bias": "all",
    "layers_to_transform": [0], "layers_pattern": "layers", "target_parameters": ["x"], "peft_type": "LORA",
    "megatron_config": {"a": 1}, "megatron_core": "another",
}  # fmt: skip
"""Fields that name something, or that change a training alone."""


def test_each_field_of_a_file_either_changes_numbers_or_is_free() -> None:
    assert not NUMBERS.keys() & NAMES.keys()
    assert NUMBERS.keys() | NAMES.keys() == LoraConfig().to_dict().keys()


@pytest.mark.parametrize("field", NUMBERS)
def test_a_field_that_changes_numbers_is_tied(field: str) -> None:
    config = LoraConfig().to_dict()
    entry = json.loads(json.dumps(tied(config)))
    assert differences(config, entry) == {}
    assert list(differences(config | {field: NUMBERS[field]}, entry)) == [field]


@pytest.mark.parametrize("field", NAMES)
def test_names_are_free(field: str) -> None:
    config = LoraConfig().to_dict()
    assert differences(config | {field: NAMES[field]}, tied(config)) == {}


def test_equal_numbers_are_equal_however_they_are_written() -> None:
    assert as_text(16) == as_text(16.0) == "16"
    assert as_text(None) == as_text({}) == as_text([])
    assert as_text({"b": 1, "a": 2.5}) == as_text({"a": 2.5, "b": 1})
    assert as_text(0) != as_text(None)
    assert as_text(False) != as_text(None)
    long = {f"layers.{i}.q_proj": 8 for i in range(500)}
    assert len(as_text(long)) < 40
    assert as_text(long) != as_text(long | {"layers.7.q_proj": 9})


def test_a_field_that_a_file_lacks_has_its_default_and_one_of_a_later_version_is_not_compared() -> None:
    config = LoraConfig().to_dict()
    short = {field: value for field, value in config.items() if field != "use_rslora"}
    assert differences(short, tied(config)) == {}
    assert differences(config, {"numbers": {"field_of_later": "1"}}) == {}


# ---- loading


def test_a_config_of_another_save_is_refused_and_nothing_is_loaded(folder: Path, tmp_path: Path) -> None:
    train_model(lora_alpha=64, use_rslora=True).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / CONFIG, folder / CONFIG)
    model = Model()
    before = everything(model)
    text = (
        r"adapter_config\.json and adapter_model\.safetensors are not of one save: lora_alpha is 64 and was 8 when the "
        r"tensors were saved, use_rslora is true and was false when the tensors were saved\. Restore the file"
    )
    with pytest.raises(CheckpointError, match=text):
        PeftModel.from_pretrained(model, folder)
    with pytest.raises(CheckpointError, match="not of one save"):  # a config given instead does not make them of one
        PeftModel.from_pretrained(model, folder, config=LoraConfig.from_pretrained(folder))
    assert_unchanged(before, model)


def test_an_edit_that_is_meant_counts_once_it_is_accepted_and_saved(folder: Path, tmp_path: Path) -> None:
    edit(folder, lora_alpha=64)
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    of_another_program(plain)
    wanted = PeftModel.from_pretrained(Model(), plain)
    loaded = PeftModel.from_pretrained(Model(), folder, ignore_config_mismatch=True)
    assert torch.equal(outputs(loaded), outputs(wanted))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(PeftModel.from_pretrained(Model(), tmp_path / "again")), outputs(wanted))
    loaded.load_adapter(folder, "second", ignore_config_mismatch=True)
    assert loaded.peft_config["second"].lora_alpha == 64


def test_an_edit_of_what_the_file_has_otherwise_than_the_adapter_is_refused(tmp_path: Path) -> None:
    train_model(init_lora_weights="pissa").save_pretrained(tmp_path)  # in the file of twice the rank
    edit(tmp_path, lora_alpha=64)
    with pytest.raises(CheckpointError, match=r"lora_alpha is 64 and was 16 when"):
        PeftModel.from_pretrained(Model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"lora_alpha cannot be edited in the file\. The adapter itself has an"):
        PeftModel.from_pretrained(Model(), tmp_path, ignore_config_mismatch=True)


def test_names_and_paths_may_be_edited(folder: Path) -> None:
    wanted = outputs(PeftModel.from_pretrained(Model(), folder))
    edit(folder, base_model_name_or_path="my/base", task_type="CAUSAL_LM", target_modules=["v_proj", "q_proj"])
    assert torch.equal(outputs(PeftModel.from_pretrained(Model(), folder)), wanted)


def test_a_file_of_another_program_says_nothing_and_loads_with_any_config(folder: Path) -> None:
    of_another_program(folder)
    edit(folder, lora_alpha=64)
    assert PeftModel.from_pretrained(Model(), folder).peft_config["default"].lora_alpha == 64


def test_peft_reads_what_lorafa_has_tied(folder: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(Model(), folder)
    torch.testing.assert_close(outputs(theirs), outputs(PeftModel.from_pretrained(Model(), folder)))


def test_a_value_that_is_not_allowed_is_said_first(folder: Path) -> None:
    edit(folder, r=0)
    with pytest.raises(ConfigError, match="r must be an integer >= 1, found 0"):
        PeftModel.from_pretrained(Model(), folder)


# ---- after a save that was killed


def test_the_config_that_a_killed_save_took_away_is_found_and_said(folder: Path) -> None:
    wanted = outputs(PeftModel.from_pretrained(Model(), folder))
    left = hidden(folder)
    (left / "old").mkdir(parents=True)
    (folder / CONFIG).rename(left / "old" / CONFIG)
    (left / CONFIG).write_text(json.dumps(LoraConfig(r=7).to_dict()))
    text = r"A save to .*adapter was killed before its end, and its adapter_config\.json is read from .*old/adapter_con"
    with pytest.warns(UserWarning, match=text):
        loaded = PeftModel.from_pretrained(Model(), folder)
    assert torch.equal(outputs(loaded), wanted)
    with pytest.warns(UserWarning, match=text):
        read_adapter(folder / WEIGHTS)
    loaded.save_pretrained(folder)
    assert not left.exists()
    assert torch.equal(outputs(PeftModel.from_pretrained(Model(), folder)), wanted)


def test_a_config_that_no_save_of_these_tensors_took_away_is_not_used(folder: Path) -> None:
    left = hidden(folder)
    left.mkdir()
    (left / CONFIG).write_text(json.dumps(LoraConfig(r=7).to_dict()))
    (left / "damaged").mkdir()
    (folder / CONFIG).unlink()
    with pytest.raises(lorafa.errors.SourceError, match=f"has no {CONFIG}"):
        PeftModel.from_pretrained(Model(), folder)


def test_an_adapter_that_is_saved_over_and_over_is_read_whole_each_time(tmp_path: Path) -> None:
    models = [train_model(lora_alpha=alpha) for alpha in (8, 64)]
    for model, alpha in zip(models, (8, 64), strict=True):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(alpha)
    models[0].save_pretrained(tmp_path)
    ended, failed = threading.Event(), list[BaseException]()

    def save() -> None:
        try:
            for turn in range(60):
                models[turn % 2].save_pretrained(tmp_path)
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    writer = threading.Thread(target=save)
    writer.start()
    reads = 0
    try:
        while not ended.is_set():
            stored = read_adapter(tmp_path)
            values = {float(value) for tensor in stored.tensors.values() for value in tensor.unique()}
            assert values == {float(stored.config.lora_alpha)}
            reads += 1
    finally:
        writer.join()
    assert not failed
    assert reads > 5
    assert os.listdir(tmp_path).count(CONFIG) == 1


# ---- what is not written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_that_is_not_finite_is_not_written_over_a_good_one(folder: Path, value: float) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = train_model()
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = value
    text = r"adapter_model\.safetensors was not written: 1 of \d+ tensors hold values that are not finite .*lora_B"
    with pytest.raises(CheckpointError, match=text):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md"])
def test_a_folder_in_the_place_of_a_file_is_said_and_what_was_there_stays(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    before = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    model = train_model(lora_alpha=64)
    if name == "README.md":  # a card is not written where there is something
        model.save_pretrained(folder)
        return
    with pytest.raises(CheckpointError, match=rf"{name} could not be written: Is a directory\..*Nothing was changed"):
        model.save_pretrained(folder)
    assert {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before
