"""Merging and unloading models: which weights change, what comes back, and what tied weights do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError
from lorafa.storage.tensors import read_tensors
from toys.adapters import train
from toys.compare import assert_unchanged, everything
from toys.models import Tied

X = torch.arange(10).view(2, 5)


def adapted(*targets: str, **settings: Any) -> PeftModel:
    model = get_peft_model(Tied(), LoraConfig(target_modules=list(targets), r=2, **settings))
    train(model)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(X)


CASES: dict[str, dict[str, Any]] = {
    "linear": {"targets": ["proj"]},
    "embedding": {"targets": ["embed"]},
    "head": {"targets": ["head"]},
    "both ends": {"targets": ["embed", "head"]},
    "copy of the head": {"targets": ["proj"], "modules_to_save": ["head"]},
    "copies of both ends": {"targets": ["proj"], "modules_to_save": ["embed", "head"]},
    "token rows": {"targets": ["proj"], "trainable_token_indices": [1, 4]},
    "biases": {"targets": ["proj"], "bias": "all"},
    "bias of B": {"targets": ["proj"], "lora_bias": True},
    "dora": {"targets": ["embed", "proj"], "use_dora": True},
    "pissa": {"targets": ["proj"], "init_lora_weights": "pissa"},
}
UNTIED = {"embedding", "head", "both ends", "copy of the head", "dora"}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def make(case: str) -> PeftModel:
    settings = dict(CASES[case])
    return adapted(*settings.pop("targets"), **settings)


@pytest.mark.filterwarnings("ignore:After merging")
def test_a_merged_and_unloaded_model_computes_the_same_and_is_plain(case: str) -> None:
    model = make(case)
    expected, kinds = run(model), [type(module) for module in Tied().modules()]
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-10, atol=1e-10)
    assert [type(module) for module in merged.modules()] == kinds
    assert merged.state_dict().keys() == Tied().state_dict().keys()


def test_a_merge_and_unmerge_restores_every_bit(case: str) -> None:
    model = make(case)
    before, output = everything(model), run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), output, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(run(model), output)
    assert_unchanged(before, model)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if case != "biases"])  # those train the base's own
def test_unloading_gives_the_base_model_back_bit_for_bit(case: str, merged: bool) -> None:
    model = make(case)
    if merged:
        model.merge_adapter()
    plain, wanted = model.unload(), Tied()
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in plain.state_dict().items())
    assert plain.head.weight is plain.embed.weight
    assert plain.config.tie_word_embeddings is True


def test_tied_weights_are_untied_just_where_they_have_to_be(case: str) -> None:
    model = make(case)
    if case in UNTIED:
        with pytest.warns(UserWarning, match="output head and the input embedding hold different weights"):
            merged = model.merge_and_unload()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is (case not in UNTIED)
    assert (merged.head.weight is merged.embed.weight) is (case not in UNTIED)


def test_merging_one_of_several_adapters_leaves_the_others_to_be_merged_too() -> None:
    model = adapted("proj")
    model.add_adapter("b", LoraConfig(target_modules=["proj"], r=3))
    model.set_adapter("b")
    train(model)
    model.base_model.set_adapter(["default", "b"])
    both = run(model)
    model.merge_adapter(["default"])
    assert model.base_model.model.proj.merged_adapters == ["default"]
    model.merge_adapter(["b"])
    assert model.base_model.model.proj.merged_adapters == ["default", "b"]
    torch.testing.assert_close(run(model), both, rtol=1e-10, atol=1e-10)
    model.merge_adapter(["b"])  # merged already: nothing is added twice
    torch.testing.assert_close(run(model), both, rtol=1e-10, atol=1e-10)


def test_merging_a_half_precision_weight_ten_times_rounds_it_no_more_than_once() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    weight = base[0].weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=4))
    train(model)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(base[0].get_base_layer().weight, weight)
    layer = base[0]
    delta = layer.scaling["default"] * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    merged = model.merge_and_unload()
    assert torch.equal(merged[0].weight, (weight.float() + delta).bfloat16())


@pytest.mark.parametrize(("kind", "part"), [("layer", "weight"), ("layer", "bias"), ("parameter", "weight")])
def test_an_update_that_is_finite_only_until_it_is_rounded_to_float16_is_refused(kind: str, part: str) -> None:
    target: dict[str, Any] = {"target_modules": ["0"]}
    if kind == "parameter":
        target = {"target_modules": [], "target_parameters": ["0.weight"]}
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)).half(), LoraConfig(r=2, lora_alpha=2, lora_bias=part == "bias", **target)
    )
    layer = model.get_base_model()[0]
    with torch.no_grad():  # 9e4 is beyond the largest float16, 65504
        if part == "bias":
            layer.lora_B["default"].bias.fill_(9e4)
        else:
            layer.lora_A["default"].weight.fill_(300.0)
            layer.lora_B["default"].weight.fill_(150.0)
    before = everything(model)
    with pytest.raises(
        AdapterError, match=r"Merging 'default' gives inf or nan in a Linear once rounded to its dtype; nothing was"
    ):
        model.merge_adapter()
    assert_unchanged(before, model)


def test_saving_while_merged_saves_the_factors_as_they_are(tmp_path: Any) -> None:
    model = adapted("proj")
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == merged.keys()
    assert all(torch.equal(value, merged[key]) for key, value in before.items())
    configs = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("before", "merged")]
    assert configs[0] == configs[1]
    headers = [read_tensors(tmp_path / name / "adapter_model.safetensors")[1] for name in ("before", "merged")]
    assert headers[0] == headers[1]
    loaded = PeftModel.from_pretrained(Tied(), tmp_path / "merged")
    torch.testing.assert_close(run(loaded), run(model), rtol=1e-10, atol=1e-10)
