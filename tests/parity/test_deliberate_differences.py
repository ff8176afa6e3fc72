"""What docs/peft.md lists as different from PEFT, where no other test is about it: both sides are run."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa.errors import AdapterError, BackendError
from toys.language_models import llama
from toys.models import Attention, Mlp
from toys.parity import quiet

LIBRARIES = pytest.mark.parametrize("library", [lorafa, peft], ids=["lorafa", "peft"])


def adapted(library: Any, model: nn.Module | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = Mlp(4, 5, 3) if model is None else model
    settings = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False} | settings
    with quiet():
        return library.get_peft_model(model, library.LoraConfig(**settings)).eval()


def layer(model: Any, name: str) -> Any:
    return model.get_base_model().get_submodule(name)


def inputs() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> set[str]:
    """Names of the modules that train something."""
    named = (name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad)
    return {name.split(".lora_")[0] for name in named}


def test_get_peft_model_a_second_time_is_refused_where_peft_warns() -> None:
    theirs, ours = adapted(peft), adapted(lorafa)
    for model in (theirs, theirs.get_base_model()):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["first"]))
        assert any("second time" in str(one.message) for one in said)
    again = lorafa.LoraConfig(r=2, target_modules=["first"])
    with pytest.raises(AdapterError, match=r"is a PeftModel already\. Call its add_adapter\(\)"):
        lorafa.get_peft_model(ours, again)
    with pytest.raises(AdapterError, match=r"already has an adapter 'default'\. Choose another name"):
        lorafa.get_peft_model(ours.get_base_model(), again)
    other = lorafa.get_peft_model(ours.get_base_model(), again, adapter_name="other")
    assert other.active_adapters == ["other"]


def test_a_bias_of_the_input_projection_of_attention_counts_where_peft_leaves_it_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Attention(), torch.randn(2, 5, 12)
    config = {"r": 2, "target_modules": ["attention"], "lora_bias": True, "init_lora_weights": False}
    model = lorafa.get_peft_model(copy.deepcopy(base), lorafa.LoraConfig(**config)).eval()
    host = model.get_base_model().attention
    bias = host.lora_B["default"].bias
    with torch.no_grad():
        for one in (bias, host.base_layer.out_proj.lora_B["default"].bias):
            one.normal_()
    model.save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        found, with_bias = theirs(x), model(x)
        bias.zero_()
        torch.testing.assert_close(model(x), found, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(with_bias, found, atol=1e-3)


def test_dora_on_a_grouped_convolution_is_refused_and_plain_lora_is_not() -> None:
    def grouped() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))

    adapted(peft, grouped(), target_modules=["0"], use_dora=True)
    with pytest.raises(BackendError, match=r"Conv2d with groups=2 has no weight that could hold this update"):
        adapted(lorafa, grouped(), target_modules=["0"], use_dora=True)
    plain = adapted(lorafa, grouped(), target_modules=["0"])
    with pytest.raises(BackendError, match=r"Merging, DoRA and starts from the weight need groups=1"):
        plain.merge_adapter()


@LIBRARIES
def test_disable_adapter_gives_every_layer_its_own_state_back(library: Any) -> None:
    """PEFT's leaves all layers unmerged and on."""
    model, ours = adapted(library), library is lorafa
    layer(model, "first").merge()
    layer(model, "second").enable_adapters(False)
    before = model(inputs())
    with quiet(), model.disable_adapter():
        torch.testing.assert_close(model(inputs()), base_of(model)(inputs()))
    assert layer(model, "first").merged is ours
    assert layer(model, "second").disable_adapters is ours
    assert torch.allclose(model(inputs()), before, atol=1e-5) is ours


def base_of(model: Any) -> nn.Module:
    """The base on its own."""
    torch.manual_seed(0)
    return Mlp(4, 5, 3).eval()


@LIBRARIES
def test_modules_are_tied_that_hold_one_parameter_whatever_the_config_says(library: Any) -> None:
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # cut loose, as fine-tuning both does
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "init_lora_weights": True}
    loose = trained(adapted(library, model, **settings))
    assert ("lm_head" in loose) is (library is peft)
    assert "model.embed_tokens" in loose
