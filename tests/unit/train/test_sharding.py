"""What FSDP2 is asked for, what is left whole, and gradients that are averaged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import ConfigError
from lorafa.train import sharding
from lorafa.train.sharding import ASKED, Sharding, asked_for, average_gradients, hidden_from_accelerate, kept_whole
from toys.language_models import llama
from toys.processes import enter_group, leave_group, run_group

VARIABLES = (ASKED, "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING", "FSDP_AUTO_WRAP_POLICY")


@pytest.fixture(autouse=True)
def _of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    monkeypatch.setattr(sharding, "world_size", lambda: 2)


def arguments(tmp_path: Path, **more: Any) -> hf.TrainingArguments:
    return hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **more)


def ask(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in ({ASKED: "true", "FSDP_VERSION": "2"} | variables).items():
        monkeypatch.setenv(name, value)


def test_the_environment_of_accelerate_asks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert asked_for(arguments(tmp_path)) is None
    ask(monkeypatch)
    assert asked_for(arguments(tmp_path)) == Sharding(None, True, False)
    ask(monkeypatch, FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="false")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer,Other")
    assert asked_for(arguments(tmp_path)) == Sharding(frozenset({"LlamaDecoderLayer", "Other"}), False, False)
    monkeypatch.setattr(sharding, "world_size", lambda: 1)
    assert asked_for(arguments(tmp_path)) is None


@pytest.mark.parametrize(
    ("variables", "more", "text"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, r"activation_checkpointing \(train\.gradient_checkpoi"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, r"auto_wrap_policy=SIZE_BASED_WRAP \(TRANSFORMER_BASED_WRA"),
        ({}, {"torch_compile": True}, "torch_compile"),
    ],
)
def test_parts_of_it_that_are_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], more: dict[str, Any], text: str
) -> None:
    ask(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=rf"With FSDP2 a model with adapters is not trained with {text}"):
        asked_for(arguments(tmp_path, **more))


def test_a_torch_that_cannot_leave_parameters_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask(monkeypatch)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, *, mesh=None: module)
    with pytest.raises(ConfigError, match=r"adapters stay whole, which takes torch 2\.7 or newer, found"):
        asked_for(arguments(tmp_path))


def test_accelerate_does_not_see_what_is_asked_of_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask(monkeypatch)
    args = arguments(tmp_path)
    args.fsdp_plugin_args = {"fsdp_version": 2}
    with hidden_from_accelerate(args):
        assert ASKED not in sharding.os.environ
        assert args.fsdp_plugin_args is None
    assert sharding.os.environ[ASKED] == "true"
    assert args.fsdp_plugin_args == {"fsdp_version": 2}


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ({}, {"lora_A", "lora_B"}),
        ({"freeze_A": True}, {"lora_A", "lora_B"}),
        ({"use_dora": True}, {"lora_A", "lora_B", "lora_magnitude_vector"}),
        ({"modules_to_save": ["lm_head"]}, {"lora_A", "lora_B", "modules_to_save"}),
        ({"bias": "all"}, {"lora_A", "lora_B", "bias"}),
    ],
)
def test_adapters_and_all_that_is_trained_are_left_whole(settings: dict[str, Any], inside: set[str]) -> None:
    targets = {"target_modules": ["q_proj", "v_proj"]}
    model: PeftModel = get_peft_model(llama(attention_bias=True), LoraConfig(r=2, **targets, **settings))
    whole = {id(parameter) for parameter in kept_whole(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in whole}
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= names
    assert {part for part in inside if any(part in name for name in names)} == inside
    assert not any(name.endswith(("base_layer.weight", "embed_tokens.weight", "mlp.up_proj.weight")) for name in names)


def averaged(rank: int, folder: str) -> None:
    enter_group(rank, Path(folder))
    wide, narrow, here_only, idle, frozen = (nn.Parameter(torch.zeros(2)) for _ in range(5))
    narrow.data = narrow.data.bfloat16()
    frozen.requires_grad_(False)
    wide.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    narrow.grad = torch.tensor([4.0, 8.0], dtype=torch.bfloat16) * rank
    if rank == 0:
        here_only.grad = torch.ones(2)
    members = [wide, narrow, here_only, idle, frozen]
    average_gradients(members)
    found = [None if p.grad is None else p.grad.float().tolist() for p in members]
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
    leave_group()


def test_gradients_are_means_over_processes_whoever_has_them(tmp_path: Path) -> None:
    run_group(averaged, str(tmp_path))
    wanted = [[1.5, 3.0], [2.0, 4.0], [0.5, 0.5], None, None]
    assert [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)] == [wanted, wanted]
