"""Mixtures of experts of transformers 5, whose layers are stacked in parameters: "all-linear" takes them in."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from lorafa import LoraConfig, PeftModel, check_gradients, get_peft_model
from lorafa.errors import ConfigError, TargetError
from toys.adapters import train

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=3, **SIZES)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(num_experts=3, **SIZES)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(num_experts=3, moe_intermediate_size=12, shared_expert_intermediate_size=20, **SIZES)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=3, head_dim=8, **SIZES)),
}
IDS = torch.arange(24).view(2, 12)
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
PARAMETERS = {"gate_up_proj", "down_proj"}


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]()


def adapted(kind: str, **settings: Any) -> PeftModel:
    return get_peft_model(base(kind), LoraConfig(**({"r": 2, "target_modules": "all-linear"} | settings)))


def factors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_all_linear_is_what_it_is_in_peft(kind: str) -> None:
    """Attention, experts, router; the fused projections of an expert with the rank of two."""
    theirs = peft.get_peft_model(base(kind), peft.LoraConfig(r=2, target_modules="all-linear"))
    ours = adapted(kind)
    assert factors(ours) == factors(theirs)
    config, wanted = ours.peft_config["default"], theirs.peft_config["default"]
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        assert getattr(config, name) == getattr(wanted, name), name
    assert set(config.target_parameters) == set(wanted.target_parameters)


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_leaves_no_linear_map_but_the_head(kind: str) -> None:
    model = adapted(kind)
    train(model)
    whole = [n for n, p in model.named_parameters() if p.dim() > 1 and "lora_" not in n and "base_layer" not in n]
    assert {name.rpartition("model.")[2] for name in whole} <= {
        *("embed_tokens.weight", "lm_head.weight"),
        *("layers.0.mlp.experts.gate_up_proj_bias", "layers.0.mlp.experts.down_proj_bias"),
    }
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    check_gradients(model)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_config_spells_it_out_and_both_libraries_load_the_file(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    train(model)
    model.save_pretrained(tmp_path)
    saved = LoraConfig.from_pretrained(tmp_path)
    assert PARAMETERS.issubset(saved.target_parameters or ())
    assert ATTENTION.issubset(saved.target_modules or ())
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        for loaded in (PeftModel, peft.PeftModel):
            found = loaded.from_pretrained(base(kind), str(tmp_path)).eval()(IDS).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_experts_are_left_out_by_exclude_modules(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router = "router" if kind == "gpt_oss" else "gate"
        model = adapted(kind, exclude_modules=["experts", router], lora_dropout=0.1)
    assert model.peft_config["default"].target_parameters is None
    one = adapted(kind, exclude_modules=r".*(gate_up_proj|\.gate|router)")
    assert one.peft_config["default"].target_parameters == ["down_proj"]
    assert one.peft_config["default"].rank_pattern == {}


def test_dropout_that_cannot_act_on_experts_says_how_to_leave_them_out() -> None:
    """As in PEFT, which could not load a file of both either."""
    model = base("mixtral")
    with pytest.raises(
        ConfigError, match=r"gate\.weight: lora_dropout=0.1 cannot act on a bare par.*'all-linear'.*exclude_modules"
    ):
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(base("mixtral"), peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))


def test_ranks_of_the_user_win_and_the_scaling_is_that_of_the_other_layers() -> None:
    def experts(**settings: Any) -> Any:
        return adapted("mixtral", **settings).get_base_model().model.layers[0].mlp.experts

    def outer_and_inner(host: Any) -> dict[str, Any]:
        return {layer.parameter_name: layer for layer in (host, host.base_layer)}

    found = outer_and_inner(experts())["gate_up_proj"]
    assert (found.r["default"], found.scaling["default"]) == (4, 4.0)
    found = outer_and_inner(experts(use_rslora=True))["gate_up_proj"]
    assert found.r["default"] == 4
    assert math.isclose(found.scaling["default"], 8 / math.sqrt(2))
    found = outer_and_inner(experts(rank_pattern={"gate_up_proj": 3}))["gate_up_proj"]
    assert (found.r["default"], found.scaling["default"]) == (3, 8 / 3)


def test_parameters_the_user_names_are_kept() -> None:
    config = adapted("mixtral", target_parameters=["mlp.experts.down_proj"]).peft_config["default"]
    assert set(config.target_parameters) == {"mlp.experts.down_proj", "gate_up_proj", "gate.weight"}


def test_second_adapter_finds_the_experts_too() -> None:
    model = adapted("mixtral")
    model.add_adapter("second", LoraConfig(r=1, target_modules="all-linear"))
    layers = [layer for _, layer in model.base_model.lora_layers()]
    assert len(layers) == 7
    assert all(layer.held() and "second" in layer.adapters for layer in layers)


@pytest.mark.parametrize(
    ("kind", "names", "parameters"),
    [
        ("mixtral", ["gate_up_proj", "down_proj"], r"\['gate_up_proj', 'down_proj'\]"),
        ("mixtral", ["q_proj", "w1", "w3"], r"\['gate_up_proj'\]"),
        ("olmoe", ["q_proj", "gate_proj", "up_proj"], r"\['gate_up_proj'\]"),
        ("mixtral", r".*\.experts\.\d\.w2", r"\['down_proj'\]"),
    ],
)
def test_names_that_only_experts_have_are_refused_with_their_parameters(kind: str, names: Any, parameters: str) -> None:
    model = base(kind)
    with pytest.raises(TargetError, match=rf"nothing in the model\. Layers .* target_parameters={parameters}"):
        get_peft_model(model, LoraConfig(r=2, target_modules=names))
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("names", [["q_proj", "down_proj"], r".*\.(q_proj|down_proj)"], ids=["list", "expression"])
def test_names_of_experts_that_other_layers_have_too_leave_them_out_with_a_word(names: Any) -> None:
    with pytest.warns(UserWarning, match=r"also names layers of experts, .* target_parameters=\['down_proj'\]"):
        adapted("qwen2_moe", target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted("qwen2_moe", target_modules=names, exclude_modules=["experts"])
        adapted("qwen2_moe", target_modules=names, target_parameters=["experts.down_proj"])
        adapted("qwen2_moe", target_modules=["q_proj", "v_proj"])


class Positions(nn.Module):
    """A parameter of three dimensions that is no stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.zeros(1, 5, 4)), nn.Linear(4, 4)


def test_other_parameters_of_three_dimensions_are_none_of_its_business() -> None:
    model = get_peft_model(Positions(), LoraConfig(r=2, target_modules="all-linear"))
    assert model.peft_config["default"].target_parameters is None
    assert [path for path, _ in model.base_model.lora_layers()] == ["linear"]
