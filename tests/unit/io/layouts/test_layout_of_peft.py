"""PEFT's layout as programs and wrappers vary it: prefixes, adapter names, copies of modules, old and new configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lorafa import LoraConfig, PeftModel
from lorafa.errors import CheckpointError, ConfigError, SourceError
from lorafa.io.key_names import plain_names
from toys.compare import close, refused
from toys.layouts import IDS, LAYERS, WIDTH, Model, assert_loads, by_hand, pairs, peft_config, peft_file, updates, write

TARGETS = tuple(name.rpartition(".")[2] for name in LAYERS)


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("base_model.model.", ""),
        ("", ""),
        ("base_model.model.", ".default"),
        ("base_model.model.", ".mine"),
        ("module.base_model.model.", ".default"),
        ("module.", ""),
        ("_orig_mod.base_model.model.", ".default"),
        ("base_model.model._orig_mod.", ""),
        ("_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.", ".default"),
        ("base_model.model._checkpoint_wrapped_module.", ""),
    ],
)
def test_names_that_wrappers_have_changed_are_read(tmp_path: Path, before: str, inside: str) -> None:
    factors = pairs()
    folder = write(tmp_path, peft_file(factors, before, inside), peft_config(*TARGETS))
    assert_loads(Model(), folder, by_hand(Model(), updates(factors, 3.0)))


def test_wrappers_inside_the_model_are_left_out_of_names(tmp_path: Path) -> None:
    factors = pairs()
    tensors = {
        key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.").replace(".mlp.", "._orig_mod.mlp."): tensor
        for key, tensor in peft_file(factors).items()
    }
    assert_loads(Model(), write(tmp_path, tensors, peft_config(*TARGETS)), by_hand(Model(), updates(factors, 3.0)))


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
def test_norms_of_dora_are_read_with_and_without_weight(tmp_path: Path, ending: str) -> None:
    factors = pairs({"self_attn.q_proj": (8, WIDTH)})
    base = Model()
    inside = ".default" if "default" in ending else ""
    tensors, expected = peft_file(factors, inside=inside), {}
    for i, (name, (A, B)) in enumerate(factors.items()):
        norms = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) + 1
        tensors[f"base_model.model.{name}.lora_magnitude_vector{ending}"] = norms
        weight = base.get_parameter(f"{name}.weight").detach()
        moved = weight + 3.0 * B @ A
        expected[name] = norms[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    folder = write(tmp_path, tensors, peft_config("q_proj", use_dora=True))
    assert_loads(Model(), folder, by_hand(base, expected))


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_whole_modules_are_read_with_and_without_what_wraps_them(tmp_path: Path, infix: str) -> None:
    """As Unsloth writes embedding and head that were trained in full."""
    factors, base = pairs(), Model()
    inside = ".default" if infix.endswith("default") else ""
    table = torch.randn(base.model.embed_tokens.weight.shape, dtype=torch.float64)
    head = torch.randn(base.lm_head.weight.shape, dtype=torch.float64)
    tensors = peft_file(factors, inside=inside) | {
        f"base_model.model.model.embed_tokens{infix}.weight": table,
        f"base_model.model.lm_head{infix}.weight": head,
    }
    config = peft_config(
        *TARGETS,
        modules_to_save=["embed_tokens", "lm_head"],
        base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True},
    )
    expected = by_hand(base, updates(factors, 3.0))
    expected.model.embed_tokens.weight.data, expected.lm_head.weight.data = table, head
    assert_loads(Model(), write(tmp_path, tensors, config), expected)


@pytest.mark.parametrize("inside", ["", ".default"])
def test_embeddings_are_read_with_and_without_the_adapters_name(tmp_path: Path, inside: str) -> None:
    A, B = torch.randn(2, 11, dtype=torch.float64), torch.randn(WIDTH, 2, dtype=torch.float64)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    folder = write(tmp_path, {f"{name}A{inside}": A, f"{name}B{inside}": B}, peft_config("embed_tokens"))
    assert_loads(Model(), folder, by_hand(Model(), {"model.embed_tokens": 3.0 * (B @ A).T}))


def test_names_of_several_adapters_are_refused(tmp_path: Path) -> None:
    factors = pairs()
    both = peft_file(factors, inside=".a") | peft_file(factors, inside=".b")
    folder = write(tmp_path, both, peft_config(*TARGETS))
    base = Model()
    with refused(base, CheckpointError, "carry those of 2 adapters: a, b. A file holds one"):
        PeftModel.from_pretrained(base, folder)


def test_two_tensors_of_one_name_are_refused() -> None:
    one = torch.zeros(2, 3)
    with pytest.raises(CheckpointError, match=r"would both be 'q.lora_A.weight'"):
        plain_names({"q.lora_A.weight": one, "base_model.model.q.lora_A.weight": one})


@pytest.mark.parametrize("written_by", ["0.2", "0.7", "0.12", "0.21"])
def test_configs_of_old_and_new_versions_of_peft_are_read(tmp_path: Path, written_by: str) -> None:
    """What each version wrote beside what all have; LLaMA-Factory's and axolotl's files are of these."""
    extra: dict[str, dict[str, Any]] = {
        "0.2": {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False},
        "0.7": {"layers_pattern": None, "megatron_core": "megatron.core", "loftq_config": {}, "rank_pattern": {}},
        "0.12": {"use_dora": False, "use_rslora": False, "layer_replication": None, "revision": None},
        "0.21": peft.LoraConfig(r=2).to_dict(),
    }
    config = extra[written_by] | peft_config(*TARGETS)
    config = {key: value for key, value in config.items() if not isinstance(value, set)}
    factors = pairs()
    folder = write(tmp_path, peft_file(factors), config)
    assert_loads(Model(), folder, by_hand(Model(), updates(factors, 3.0)))
    theirs = peft.PeftModel.from_pretrained(Model(), str(folder))
    with torch.no_grad():
        close(theirs(IDS), by_hand(Model(), updates(factors, 3.0))(IDS))


def test_a_setting_of_a_newer_version_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, peft_file(pairs()), peft_config(*TARGETS, use_newlora=True))
    base = Model()
    with refused(base, ConfigError, r"The config sets use_newlora=True, which lorafa .* does not know"):
        PeftModel.from_pretrained(base, folder)


def test_a_pickle_is_read_on_request_only(tmp_path: Path) -> None:
    """As older versions of PEFT and LLaMA-Factory wrote them."""
    factors = pairs()
    folder = write(tmp_path, peft_file(factors), peft_config(*TARGETS))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    base = Model()
    with refused(base, CheckpointError, "opening a pickle can run any code"):
        PeftModel.from_pretrained(base, folder)
    expected = by_hand(Model(), updates(factors, 3.0))
    assert_loads(Model(), folder, expected, use_safetensors=False, allow_pickle=True)


def test_a_folder_of_checkpoints_names_them(tmp_path: Path) -> None:
    """As axolotl and LLaMA-Factory leave them where a training was ended early."""
    for step in (100, 200):
        write(tmp_path / f"checkpoint-{step}", peft_file(pairs()), peft_config(*TARGETS))
    base = Model()
    with refused(base, SourceError, "it holds checkpoints of a training that are: checkpoint-100, checkpoint-200"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_larger_vocabulary_is_refused_with_the_call_that_makes_room(tmp_path: Path) -> None:
    tensors = peft_file(pairs()) | {"base_model.model.lm_head.weight": torch.zeros(14, WIDTH, dtype=torch.float64)}
    folder = write(tmp_path, tensors, peft_config(*TARGETS, modules_to_save=["lm_head"]))
    base = Model()
    with refused(base, CheckpointError, r"vocabulary of 14, the model of 11. Call\s+model.resize_token_embeddings\(14"):
        PeftModel.from_pretrained(base, folder)


def test_a_single_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    factors = pairs()
    folder = write(tmp_path, peft_file(factors), peft_config(*TARGETS))
    assert_loads(Model(), folder / "adapter_model.safetensors", by_hand(Model(), updates(factors, 3.0)))
    (folder / "adapter_config.json").unlink()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS)
    file = folder / "adapter_model.safetensors"
    assert_loads(Model(), file, by_hand(Model(), updates(factors, 3.0)), config=config)
