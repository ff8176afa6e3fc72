"""Outputs compared before and after a merge, against what rounding explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, MergeCheck, check_merge, get_peft_model
from lorafa.errors import AdapterError, BackendError, ConfigError
from lorafa.layers.base import LoraLayer
from toys.adapters import adapted, train
from toys.compare import assert_unchanged, everything
from toys.language_models import IDS, bert, gpt2, llama, t5
from toys.layers import input_for
from toys.models import Mlp

MAKES = [llama, gpt2, bert, t5]


def language_model(make: Any, dtype: torch.dtype, size: float = 0.1) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(make().to(dtype), LoraConfig(r=4, target_modules="all-linear", init_seed=1))
    torch.manual_seed(1)
    train(model, size)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_rounding_explains_the_error_of_a_merge(make: Any, dtype: torch.dtype) -> None:
    """By a margin of more than two: the bound is no matter of luck."""
    model = language_model(make, dtype)
    before = everything(model)
    check = check_merge(model)
    assert_unchanged(before, model)
    assert check.explained
    assert check.max_error < check.allowed_max / 2
    assert check.mean_error < check.allowed_mean / 2
    assert check.scale > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_wrong_update_is_not_explained(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, merged = language_model(llama, dtype), LoraLayer.merged_base

    def wrong(self: LoraLayer, names: Any) -> nn.Module:
        if self is model.base_model.lora_layers()[3][1]:
            self.scale_layer(1.1)
            try:
                return merged(self, names)
            finally:
                self.scale_layer(1 / 1.1)
        return merged(self, names)

    monkeypatch.setattr(LoraLayer, "merged_base", wrong)
    before = everything(model)
    assert not check_merge(model).explained
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="does not compute what the adapted one does: largest error"):
            merge(verify=True)
        assert_unchanged(before, model)


def test_verifying_merges_report_and_merge() -> None:
    model = language_model(llama, torch.bfloat16)
    check = model.merge_adapter(verify=True)
    assert isinstance(check, MergeCheck)
    assert all(layer.merged for _, layer in model.base_model.lora_layers())
    model.unmerge_adapter()
    assert model.merge_adapter() is None
    model.unmerge_adapter()
    assert not any(isinstance(m, LoraLayer) for m in model.merge_and_unload(verify={"input_ids": IDS}).modules())


def test_only_the_named_adapters_are_compared() -> None:
    """Also where another one counts at the moment, which counts again afterwards."""
    model = language_model(llama, torch.float32)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = everything(model)
    assert check_merge(model, adapter_names=["other"]).max_error < 1e-5
    assert model.active_adapters == ["default"]
    assert_unchanged(before, model)


def test_a_model_is_asked_in_evaluation_and_left_in_its_mode() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    train(model)
    model.train()
    assert check_merge(model).explained
    assert model.training


def test_models_that_read_no_tokens_need_inputs() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["first"]))
    train(model)
    with pytest.raises(ConfigError, match=r"which takes no token ids. Give some to compare outputs on"):
        check_merge(model)
    assert check_merge(model, {"x": torch.randn(3, 12)}).explained


def test_a_quantized_base_is_reported_without_a_bound() -> None:
    kind = "lorafa.backends.nf4.NF4Linear"
    model = adapted(kind, dtype=torch.float32).eval()
    x: Tensor = input_for(kind, torch.float32)
    check = check_merge(model, {"x": x})
    assert check.allowed_max == float("inf")
    assert check.explained
    assert "rounding explains" not in str(check)


def test_what_cannot_be_merged_or_is_merged_is_refused() -> None:
    model = language_model(llama, torch.float32)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the base weights"):
        check_merge(model)
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match="verify= is True, False, or the arguments"):
        model.merge_adapter(verify="yes")
    with pytest.raises(AdapterError, match="has no adapter 'x'"):
        check_merge(model, adapter_names=["x"])
    routed = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3]))
    with pytest.raises(BackendError, match="changes with the input"):
        check_merge(routed)
