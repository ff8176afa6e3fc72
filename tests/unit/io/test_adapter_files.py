"""Folders of adapters: what is written, where, and how it is read back, filled in and continued."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafa
from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError, CheckpointError, ConfigError
from lorafa.io.adapter_files import read_adapter
from toys.adapters import train
from toys.compare import assert_unchanged, everything

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Model(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 10, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed_tokens(x)).tanh())


X = torch.arange(10).view(2, 5)


def adapted(*targets: str, name: str = "default", **settings: Any) -> PeftModel:
    config = LoraConfig(target_modules=list(targets or ("body",)), **({"r": 2} | settings))
    model = get_peft_model(Model(), config, name)
    train(model)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(X)


# ---- what is written


def test_a_folder_holds_the_two_files_of_peft_and_a_card(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_adapters_of_other_names_are_in_folders_of_their_names(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("b", LoraConfig(target_modules=["lm_head"], r=3))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [CONFIG, WEIGHTS]
    assert all("body" in key for key in load_file(tmp_path / WEIGHTS))
    assert all("lm_head" in key for key in load_file(tmp_path / "b" / WEIGHTS))


def test_single_adapters_can_be_selected(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("b", LoraConfig(target_modules=["lm_head"]))
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "b"]


def test_all_processes_but_one_write_nothing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_saved_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state_dict lacks 2 of the 2 tensors of adapter 'default'"):
        adapted().save_pretrained(tmp_path / "new", state_dict={})
    empty = get_peft_model(Model(), LoraConfig(target_modules=["body"], r=2), low_cpu_mem_usage=True)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors was not written: .* have no values"):
        empty.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_readme_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_saved_config_is_for_inference_and_the_one_in_memory_is_not(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert saved["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False
    assert saved["auto_mapping"] == {"base_model_class": "Model", "parent_library": Model.__module__}


def test_with_a_task_type_no_class_is_written(tmp_path: Path) -> None:
    adapted(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert (saved["task_type"], saved["auto_mapping"]) == ("CAUSAL_LM", None)


def test_the_name_and_revision_of_the_base_are_written(tmp_path: Path) -> None:
    base = Model()
    base.name_or_path = "someone/model"
    get_peft_model(base, LoraConfig(target_modules=["body"]), revision="v2").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("someone/model", "v2")


def test_a_gathered_state_dict_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved, own = load_file(tmp_path / WEIGHTS), lorafa.get_peft_model_state_dict(model)
    assert saved.keys() == own.keys()
    assert all(torch.equal(value, own[key] + 1) for key, value in saved.items())


def test_a_gathered_state_dict_that_lacks_a_tensor_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = adapted()
    gathered = {key: value for key, value in model.state_dict().items() if "lora_B" not in key}
    with pytest.raises(CheckpointError, match=r"state_dict lacks 1 of the 2 .*lora_B.*Gather the whole state dict"):
        model.save_pretrained(tmp_path, state_dict=gathered)
    assert list(tmp_path.iterdir()) == []


MERGED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"], "init_lora_weights": False},
    "table as a parameter": {
        "target_modules": [],
        "target_parameters": ["embed_tokens.weight"],
        "init_lora_weights": False,
    },
    "biases of adapted layers": {"target_modules": ["body"], "bias": "lora_only", "lora_bias": True},
    "all biases": {"target_modules": ["body"], "bias": "all", "lora_bias": True},
}


@pytest.mark.parametrize("way", ["from the model", "gathered", "gathered while disabled"])
@pytest.mark.parametrize("case", MERGED)
def test_what_is_saved_while_merged_is_the_adapter_of_the_pristine_base(tmp_path: Path, case: str, way: str) -> None:
    model = get_peft_model(Model(), LoraConfig(r=2, **MERGED[case]))
    train(model)
    expected = run(model.eval())
    model.merge_adapter()
    with model.disable_adapter() if "disabled" in way else nullcontext():
        state = None if way == "from the model" else model.state_dict()
        model.save_pretrained(tmp_path, state_dict=state, save_embedding_layers=True)
    assert torch.equal(run(PeftModel.from_pretrained(Model(), tmp_path)), expected)


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("targets", "wanted", "keys"),
    [
        (["body"], "auto", set()),
        (["body"], True, {"embed_tokens.weight", "lm_head.weight"}),
        (["embed_tokens"], "auto", {"embed_tokens.base_layer.weight"}),
        (["embed_tokens"], False, set()),
        (["lm_head", "embed_tokens"], "auto", {"embed_tokens.base_layer.weight", "lm_head.base_layer.weight"}),
    ],
)
def test_base_embeddings_are_in_the_file_when_they_are_targets_or_asked_for(
    tmp_path: Path, targets: list[str], wanted: str | bool, keys: set[str]
) -> None:
    model = adapted(*targets)
    model.save_pretrained(tmp_path, save_embedding_layers=wanted)
    found = {key.removeprefix(PREFIX) for key in load_file(tmp_path / WEIGHTS) if "lora_" not in key}
    assert found == keys
    assert torch.equal(run(PeftModel.from_pretrained(Model(), tmp_path)), run(model))


def test_embeddings_in_a_file_replace_those_of_the_model_and_are_not_checked_against_them(tmp_path: Path) -> None:
    model = adapted("embed_tokens", "body")
    model.save_pretrained(tmp_path)
    other = Model()
    with torch.no_grad():
        other.embed_tokens.weight.add_(1)
    assert torch.equal(run(PeftModel.from_pretrained(other, tmp_path)), run(model))
    other = Model()
    with torch.no_grad():
        other.body.weight.add_(1)
    with pytest.raises(CheckpointError, match="1 of 1 adapted layers have other weights here: body"):
        PeftModel.from_pretrained(other, tmp_path)


def test_saving_takes_no_setting_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_pretrained has no argument 'max_shard_sise'"):
        adapted().save_pretrained(tmp_path / "new", max_shard_sise=3)
    assert not (tmp_path / "new").exists()
    adapted().save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion="not read")


# ---- reading


def test_a_loaded_adapter_is_frozen_and_in_eval_mode_unless_it_is_to_be_trained(tmp_path: Path) -> None:
    adapted(modules_to_save=["lm_head"], bias="all", lora_dropout=0.5).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(Model(), tmp_path)
    assert not frozen.training
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if "lora_" in name or "modules_to" in name)
    trained = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    assert trained.training
    assert all(p.requires_grad for name, p in trained.named_parameters() if "lora_" in name or "modules_to" in name)


def test_a_loaded_adapter_waits_until_it_is_set(tmp_path: Path) -> None:
    adapted("lm_head").save_pretrained(tmp_path)
    model = adapted()
    before, flags = run(model), everything(model)["trains"]
    model.load_adapter(tmp_path, "b")
    assert torch.equal(run(model), before)
    assert {name: model.get_parameter(name).requires_grad for name in flags if "lm_head" not in name} == {
        name: flag for name, flag in flags.items() if "lm_head" not in name
    }
    model.set_adapter("b")
    assert torch.equal(run(model), run(PeftModel.from_pretrained(Model(), tmp_path)))


def test_an_adapter_can_be_loaded_to_be_trained_beside_the_active_one(tmp_path: Path) -> None:
    adapted("lm_head").save_pretrained(tmp_path)
    model = adapted()
    result = model.load_adapter(tmp_path, "b", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert model.active_adapters == ["default"]
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_loading_into_an_adapter_that_is_there_fills_it(tmp_path: Path) -> None:
    """A run that is resumed does this."""
    saved = adapted(modules_to_save=["lm_head"])
    saved.save_pretrained(tmp_path)
    model = adapted(modules_to_save=["lm_head"])
    before = everything(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(run(model), run(saved))
    after = everything(model)
    for aspect in ("objects", "modules", "trains", "modes"):
        assert before[aspect] == after[aspect]


def test_filling_a_merged_adapter_does_not_leave_the_old_update_in_the_weights(tmp_path: Path) -> None:
    saved = adapted()
    saved.save_pretrained(tmp_path)
    model = adapted()
    model.merge_adapter()
    before = everything(model)
    text = r"Adapter 'default' is merged into 'body'. Call unmerge_adapter\(\) before loading other values into it."
    with pytest.raises(AdapterError, match=text):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(AdapterError, match=text):
        lorafa.set_peft_model_state_dict(model, lorafa.get_peft_model_state_dict(saved))
    assert_unchanged(before, model)


def test_an_adapter_goes_to_the_device_of_its_layer_whatever_device_is_named(tmp_path: Path) -> None:
    saved = adapted()
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Model(), tmp_path, torch_device="meta", ephemeral_gpu_offload=True)
    model.load_adapter(tmp_path, "b", torch_device="meta", ephemeral_gpu_offload=True)
    for name in ("default", "b"):
        model.set_adapter(name)
        assert torch.equal(run(model), run(saved))


def test_low_memory_loading_gives_the_same_bits(tmp_path: Path) -> None:
    saved = adapted("body", "lm_head", "embed_tokens", use_dora=True)
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Model(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(run(model), run(saved))


def test_another_config_can_be_given_than_the_stored_one(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    config = LoraConfig(target_modules=["body"], r=2, lora_alpha=16)
    model = PeftModel.from_pretrained(Model(), tmp_path, config=config)
    assert model.get_base_model().body.scaling == {"default": 8.0}


def test_keys_can_be_renamed_on_the_way(tmp_path: Path) -> None:
    saved = adapted()
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key.replace("body", "old_body"): value for key, value in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="old_body"):
        PeftModel.from_pretrained(Model(), tmp_path)
    model = PeftModel.from_pretrained(Model(), tmp_path, key_mapping={r"old_(\w+)": r"\1"})
    assert torch.equal(run(model), run(saved))


def test_an_adapter_in_a_subfolder_is_read(tmp_path: Path) -> None:
    saved = adapted(name="mine")
    saved.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(Model(), tmp_path, subfolder="mine")), run(saved))


def test_reading_needs_no_model(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    assert stored.path == tmp_path / WEIGHTS
    assert stored.config.r == 2
    assert sorted(stored.tensors) == ["body.lora_A.weight", "body.lora_B.weight"]
    assert list(stored.base) == ["body"]


def test_saving_twice_over_itself_changes_nothing_but_is_whole(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(Model(), tmp_path)), run(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


# ---- state dicts


def test_a_state_dict_has_the_keys_of_a_file(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    assert lorafa.get_peft_model_state_dict(model).keys() == load_file(tmp_path / WEIGHTS).keys()


def test_misshapen_tensors_can_be_left_as_they_are() -> None:
    model = adapted("body", "lm_head")
    state = {key: value.clone() for key, value in lorafa.get_peft_model_state_dict(model).items()}
    key = PREFIX + "lm_head.lora_B.weight"
    kept = state[key].clone()
    other = {name: value * 2 for name, value in state.items()} | {key: torch.zeros(99, 2)}
    with pytest.warns(UserWarning, match=r"The state dict: 1 of 5 tensors have .*lm_head\.lora_B\.weight \(99x2"):
        result = lorafa.set_peft_model_state_dict(model, other, ignore_mismatched_sizes=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    now = lorafa.get_peft_model_state_dict(model)
    assert torch.equal(now[key], kept)
    name = PREFIX + "body.lora_A.weight"
    assert torch.equal(now[name], 2 * state[name])


def test_a_compiled_model_is_looked_into() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    inside = lorafa.get_peft_model_state_dict(compiled, unwrap_compiled=True)
    assert inside.keys() == lorafa.get_peft_model_state_dict(model).keys()
