"""Methods of PEFT's layers that scripts call: they give what PEFT's give, or say what to do instead."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafa
from lorafa.backends import own_weight
from lorafa.errors import AdapterError, BackendError, ConfigError, NotAvailableError
from toys.language_models import IDS, llama
from toys.layers import base_layer
from toys.models import Mlp

KINDS = {
    "linear": lambda: nn.Linear(6, 8),
    "Conv1D": lambda: Conv1D(8, 6),
    "embedding": lambda: nn.Embedding(6, 8),
    "conv": lambda: nn.Conv2d(6, 8, 3),
}


def adapted(base: nn.Module, library: Any = lorafa, **settings: Any) -> Any:
    given: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False, **settings}
    return library.get_peft_model(nn.Sequential(base).double(), library.LoraConfig(**given))


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def x_of(kind: str) -> Tensor:
    shapes = {"linear": (3, 6), "Conv1D": (3, 6), "conv": (2, 6, 5, 5)}
    return torch.arange(6) if kind == "embedding" else torch.randn(shapes[kind], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_weight_is_read_as_pefts_and_written_where_the_layer_reads_it(kind: str) -> None:
    torch.manual_seed(0)
    base = KINDS[kind]()
    model = adapted(base)
    layer = layer_of(model)
    theirs = layer_of(adapted(copy.deepcopy(base), peft, fan_in_fan_out=kind == "Conv1D"))
    torch.testing.assert_close(layer.get_base_weight(), theirs.get_base_weight(), rtol=0, atol=0)
    assert not layer.get_base_weight().requires_grad
    x, new = x_of(kind), torch.randn_like(layer.get_base_weight())
    before, held = model(x), layer.get_base_weight()
    kept = held.clone()
    expected = copy.deepcopy(layer.base_layer)
    old = expected(x)
    with torch.no_grad():
        expected.weight.copy_(new)
    layer.set_base_weight(new)
    assert layer.base_layer.weight is base.weight
    torch.testing.assert_close(held, kept, rtol=0, atol=0)
    torch.testing.assert_close(model(x), before - old + expected(x), rtol=1e-10, atol=1e-12)


def test_a_quantized_weight_is_read_as_numbers_and_not_written() -> None:
    base = base_layer("lorafa.backends.nf4.NF4Linear")
    model = lorafa.get_peft_model(nn.Sequential(base), lorafa.LoraConfig(r=2, target_modules=["0"]))
    layer = layer_of(model)
    torch.testing.assert_close(layer.get_base_weight(), own_weight(base), rtol=0, atol=0)
    with pytest.raises(BackendError, match=r"NF4Linear is quantized, rests elsewhere.*before the adapter is put on"):
        layer.set_base_weight(torch.zeros(1))


def test_a_weight_is_not_written_while_another_one_runs_or_in_another_shape() -> None:
    model = adapted(nn.Linear(6, 8))
    layer = layer_of(model)
    with pytest.raises(ConfigError, match="weight_data is 6x8, the weight 8x6"):
        layer.set_base_weight(torch.zeros(6, 8))
    model.merge_adapter()
    merged = layer.get_base_weight()
    with pytest.raises(AdapterError, match=r"merged into this layer.*Call unmerge_adapter\(\) before set_base_weight"):
        layer.set_base_weight(torch.zeros(8, 6))
    torch.testing.assert_close(layer.get_base_weight(), merged, rtol=0, atol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(merged - layer.get_base_weight(), layer.get_delta_weight("default"))


@pytest.mark.parametrize("start", [True, "gaussian", "GAUSSIAN"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_drawn_anew_compute_the_base_and_are_pefts_by_the_same_random_source(kind: str, start: Any) -> None:
    torch.manual_seed(0)
    base = KINDS[kind]()
    model = adapted(base, lora_bias=kind == "linear")
    theirs = layer_of(adapted(copy.deepcopy(base), peft, fan_in_fan_out=kind == "Conv1D"))
    layer, x = layer_of(model), x_of(kind)
    drawn = []
    for one in (layer, theirs, layer):
        torch.manual_seed(3 if len(drawn) < 2 else 4)
        one.reset_lora_parameters("default", start)
        pair = (one.lora_embedding_A, one.lora_embedding_B) if kind == "embedding" else (one.lora_A, one.lora_B)
        drawn.append([getattr(f["default"], "weight", f["default"]).detach().clone() for f in pair])
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    assert not all(torch.equal(*pair) for pair in zip(drawn[0], drawn[2], strict=True))
    torch.testing.assert_close(model(x), layer.base_layer(x), rtol=0, atol=0)
    held = [p.clone() for p in model.parameters()]
    layer.reset_lora_parameters("default", False)
    assert all(torch.equal(*pair) for pair in zip(held, model.parameters(), strict=True))


def test_what_cannot_be_drawn_anew_says_so() -> None:
    layer = layer_of(adapted(nn.Linear(6, 8)))
    with pytest.raises(ConfigError, match=r"'pissa': factors are drawn anew by True or 'gaussian'\. .*delete_adapter"):
        layer.reset_lora_parameters("default", "pissa")
    with pytest.raises(AdapterError, match=r"'other' has no factors of its own on this layer\. .* default"):
        layer.reset_lora_parameters("other")


def test_the_formula_of_an_adapter_is_shown_where_it_is_another_than_lora() -> None:
    model = adapted(nn.Linear(6, 8))
    model.add_adapter("sized", lorafa.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    shown = layer_of(model).lora_variant
    assert {name: variant.name for name, variant in shown.items()} == {"sized": "dora"}


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("update_layer", "rank_pattern and alpha_pattern set the numbers of single layers"),
        ("resolve_lora_variant", r"Read layer\.adapters\[name\]\.variant"),
        ("pissa_init", r"Name it in the config: LoraConfig\(init_lora_weights=\.\.\.\)"),
    ],
)
def test_what_layers_do_not_do_by_themselves_says_who_does(method: str, instead: str) -> None:
    layer = layer_of(adapted(nn.Linear(6, 8)))
    with pytest.raises(NotAvailableError, match=rf"LoraLinear\.{method}: .*{instead}"):
        getattr(layer, method)("default", 4, config=None)


def test_a_table_of_formulas_on_a_class_of_layers_says_where_they_are() -> None:
    with pytest.raises(NotAvailableError, match=r"lora_variants: formulas are lines of a registry.*CONTRIBUTING\.md"):
        layer_of(adapted(nn.Linear(6, 8))).lora_variants  # noqa: B018


def test_a_class_of_layers_to_register_is_told_of_back_ends() -> None:
    with pytest.raises(NotAvailableError, match=r"_register_custom_module\(LSTM\): .*lorafa\.backends\.BACKENDS\.add"):
        lorafa.LoraConfig()._register_custom_module({nn.LSTM: nn.Module})


def test_adapters_are_named_by_pefts_keywords() -> None:
    model = adapted(nn.Linear(6, 8), modules_to_save=None)
    model.add_adapter("other", lorafa.LoraConfig(r=2, target_modules=["0"]))
    layer = layer_of(model)
    layer.set_adapter(adapter_names=["other"], inference_mode=True)
    assert layer.active_adapters == ["other"]
    layer.set_requires_grad(adapter_names=["default", "other"], requires_grad=True)
    assert all(p.requires_grad for n, p in layer.named_parameters() if "lora_" in n)
    layer.set_requires_grad("default", False)
    assert {n.split(".")[1] for n, p in layer.named_parameters() if p.requires_grad} == {"other"}


def test_a_config_in_the_place_of_an_adapter_is_put_on() -> None:
    model = lorafa.get_peft_model(Mlp(), lorafa.LoraConfig(r=2, target_modules=["first"]))
    tuner = model.base_model
    tuner.peft_config["other"] = lorafa.LoraConfig(r=3, target_modules=["second"])
    tuner.inject_adapter(tuner.model, "other")
    assert tuner.model.second.r == {"other": 3}
    assert model.active_adapters == ["default"]
    tuner.peft_config["third"] = lorafa.LoraConfig(r=3, target_modules=["second"])
    keys = {"base_model.model.first.lora_A.weight": torch.zeros(3, 12)}
    tuner.inject_adapter(tuner.model, "third", state_dict=keys)
    assert "third" in tuner.model.first.r
    assert "third" not in tuner.model.second.r
    wrong = lorafa.LoraConfig(r=3, target_modules=["no_such_layer"])
    tuner.peft_config["wrong"] = wrong
    with pytest.raises(lorafa.errors.TargetError, match="no_such_layer"):
        tuner.inject_adapter(tuner.model, "wrong")
    assert tuner.peft_config["wrong"] is wrong
    with pytest.raises(ConfigError, match=r"no config by the name 'fifth'\. Write it there, or call add_adapter"):
        tuner.inject_adapter(tuner.model, "fifth")
    with pytest.raises(ConfigError, match=r"was given a Mlp that this LoraModel does not hold\. Pass its \.model"):
        tuner.inject_adapter(Mlp(), "wrong")


def test_an_adapter_that_a_lora_model_alone_is_given_counts() -> None:
    base = llama().eval()
    plain = base(IDS).logits
    tuner = lorafa.LoraModel(base)
    tuner.peft_config["a"] = lorafa.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuner.inject_adapter(base, "a")
    assert tuner.active_adapters == ["a"]
    assert not torch.allclose(tuner(IDS).logits, plain)
