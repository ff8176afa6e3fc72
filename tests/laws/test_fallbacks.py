"""The law of fallbacks: a layer with nothing to start from starts as by default, and everybody is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.models import Two


def base() -> Two:
    """The weight of its second layer is zero."""
    return Two(8, 6, 4, bias=False, poor=True)


CONFIG = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights="pissa", init_seed=0)
WARNING = r"'pissa' has nothing to start from on 1 of 2 layers.*second \(its weight has 0 singular values"


def adapted() -> PeftModel:
    with pytest.warns(UserWarning, match=WARNING):
        return get_peft_model(base(), CONFIG)


def test_the_layer_starts_as_by_default_and_the_others_as_asked() -> None:
    model, plain = adapted(), get_peft_model(base(), LoraConfig(r=2, target_modules=["second"], init_seed=0))
    second, first = model.get_base_model().second, model.get_base_model().first
    assert torch.equal(second.factor_A("default"), plain.get_base_model().second.factor_A("default"))
    assert not second.factor_B("default").any()
    assert first.factor_B("default").any()
    x = torch.randn(3, 8)
    assert torch.equal(model(x), base()(x))


def test_the_file_says_so_and_has_the_same_outputs(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(3, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    fallbacks = {path: layer.fallbacks for path, layer in loaded.base_model.lora_layers()}
    assert fallbacks["first"] == {}
    assert fallbacks["second"]["default"].startswith("its weight has 0 singular values")


def test_peft_reads_the_file_with_equal_outputs(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = adapted(), torch.randn(3, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path)(x), model(x))
