"""A router over many adapters on one model: names, layers, what is refused, and that nothing is left half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from lorafa.errors import AdapterError, ConfigError, LoraError, SourceError, TargetError
from toys.adapters import train
from toys.compare import refused
from toys.language_models import IDS, bert, llama

TARGETS = ["q_proj", "down_proj"]


def saved(folder: Path, seed: int, model: nn.Module | None = None, **settings: Any) -> Path:
    config = LoraConfig(**({"r": 2, "target_modules": TARGETS, "init_seed": seed} | settings))
    adapted = get_peft_model(llama() if model is None else model, config)
    torch.manual_seed(seed)
    train(adapted)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    return [str(saved(tmp_path / f"task{i}", i, r=2 + i)) for i in range(3)]


def test_it_loads_all_and_lets_the_router_alone_count(tasks: list[str]) -> None:
    given = ArrowConfig(top_k=2)
    model = create_arrow_model(llama(), tasks, given, autocast_adapter_dtype=False)
    assert list(model.peft_config) == ["task_0", "task_1", "task_2", "arrow_router"]
    assert model.active_adapters == ["arrow_router"]
    assert not model.training
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    config = model.peft_config["arrow_router"]
    assert config.arrow_config is not None
    assert config.arrow_config.task_adapter_names == ["task_0", "task_1", "task_2"]
    assert (config.arrow_config.gks_adapter_names, config.r, config.target_modules) == ([], 4, set(TARGETS))
    assert given.task_adapter_names is None, "the caller's own is as it was"
    out = model(IDS).logits
    model.set_adapter("task_0")
    assert not torch.allclose(model(IDS).logits, out)
    tokens = create_arrow_model(llama(), tasks, given).generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 9)


def test_one_adapter_behind_a_router_is_that_adapter(tasks: list[str]) -> None:
    model = create_arrow_model(llama(), tasks[:1], ArrowConfig(top_k=1))
    alone = PeftModel.from_pretrained(llama(), tasks[0])
    torch.testing.assert_close(model(IDS).logits, alone(IDS).logits)


def test_only_some_of_the_layers_of_a_name_may_carry_the_adapters(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(i), i, layers_to_transform=[1]) for i in range(2)]
    model = create_arrow_model(llama(), paths, ArrowConfig(top_k=1))
    layers = [path for path, layer in model.base_model.lora_layers() if "arrow_router" in layer.adapters]
    assert layers == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def test_saved_and_loaded_again_piece_by_piece_it_computes_the_same(tmp_path: Path, tasks: list[str]) -> None:
    general = [str(saved(tmp_path / "general", 7, r=3))]
    model = create_arrow_model(llama(), tasks, ArrowConfig(use_gks=True, exact_gks=True), general)
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(llama(), tmp_path / "all" / "arrow_router", adapter_name="arrow_router")
    with pytest.raises(AdapterError, match="The router 'arrow_router' has no experts"):
        again(IDS)
    for name in ("task_2", "gks_0", "task_0", "task_1"):
        again.load_adapter(tmp_path / "all" / name, name, low_cpu_mem_usage=name == "task_0")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_what_experts_have_trained_besides_is_said(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(i), i, modules_to_save=["norm"]) for i in range(2)]
    with pytest.warns(UserWarning, match=r"Adapter 'task_0' .* has trained \['norm'\] besides, in modules_to_save or"):
        create_arrow_model(llama(), paths, ArrowConfig(top_k=1))


def test_peft_has_its_own_class_of_settings_and_it_is_read(tasks: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = create_arrow_model(llama(), tasks, peft.ArrowConfig(top_k=2, router_temperature=0.5))
    settings = model.peft_config["arrow_router"].arrow_config
    assert settings is not None
    assert (settings.top_k, settings.router_temperature) == (2, 0.5)


REFUSED: list[tuple[dict[str, Any], type[LoraError], str]] = [
    ({"task_specific_adapter_paths": []}, ConfigError, r"task_specific_adapter_paths is a list .* found \[\]"),
    ({"task_specific_adapter_paths": "x"}, ConfigError, r"task_specific_adapter_paths is a list of .* 'x' \(str\)"),
    ({"arrow_config": ArrowConfig(top_k=4)}, ConfigError, r"top_k=4 is more than the 3 adapters of task_spec"),
    ({"arrow_config": None}, ConfigError, r"arrow_config is None\. Pass arrow_config=ArrowConfig\(\)"),
    ({"arrow_config": 3}, ConfigError, r"arrow_config must be ArrowConfig"),
    ({"arrow_config": ArrowConfig(use_gks=True)}, ConfigError, r"general_adapter_paths, which use_gks=True .* None"),
    ({"general_adapter_paths": ["x"]}, ConfigError, r"general_adapter_paths=\['x'\] would be ignored: use_gks of"),
]


@pytest.mark.parametrize(("changed", "kind", "text"), REFUSED)
def test_arguments_that_contradict_each_other_are_refused(
    tasks: list[str], changed: dict[str, Any], kind: type[LoraError], text: str
) -> None:
    model = llama()
    with refused(model, kind, text):
        create_arrow_model(model, **({"task_specific_adapter_paths": tasks, "arrow_config": ArrowConfig()} | changed))


def test_adapters_on_other_layers_or_of_another_kind_are_refused_and_the_model_is_as_it_was(
    tmp_path: Path, tasks: list[str]
) -> None:
    model = llama()
    other = saved(tmp_path / "other", 5, target_modules=["q_proj"])
    text = r"down_proj.*: adapter 'task_0' .*task0\) is there and 'task_3' \(.*other\) is not.* the same target_modules"
    with refused(model, AdapterError, text):
        create_arrow_model(model, [*tasks, other], ArrowConfig())
    tables = [saved(tmp_path / f"t{i}", i, target_modules=["embed_tokens"]) for i in range(2)]
    with refused(model, ConfigError, r"embed_tokens: arrow is not defined on embedding layers"):
        create_arrow_model(model, tables, ArrowConfig(top_k=1))
    with refused(model, SourceError, "missing"):
        create_arrow_model(model, [*tasks, str(tmp_path / "missing")], ArrowConfig())
    alien = saved(tmp_path / "alien", 6, bert(), target_modules=["query"])
    with refused(model, TargetError, "target_modules: 'query' matches nothing in the model"):
        create_arrow_model(model, [*tasks, alien], ArrowConfig())


def test_factors_of_other_ranks_are_refused_by_genknowsub_with_layer_and_way_out(
    tmp_path: Path, tasks: list[str]
) -> None:
    model, general = llama(), [saved(tmp_path / "general", 7)]
    text = r"q_proj: The router 'arrow_router' has use_gks=True .* they differ in shape: 'task_0' has r = 2, .*Set ex"
    with refused(model, AdapterError, text):
        create_arrow_model(model, tasks, ArrowConfig(use_gks=True), general)
    routed = create_arrow_model(model, tasks, ArrowConfig(use_gks=True, exact_gks=True), general)
    assert bool(routed(IDS).logits.isfinite().all())
