"""``cast_mixed_precision_params``: what is frozen in half, what is trained in float32, and what is neither."""

from __future__ import annotations

from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn

from lorafa import LoraConfig, cast_mixed_precision_params, get_peft_model
from lorafa.backends.nf4 import NF4Linear
from lorafa.errors import AdapterError, BackendError, ConfigError
from toys.compare import refused
from toys.language_models import IDS, llama
from toys.models import Linears

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_frozen_weights_are_cast_and_trained_ones_are_float32_as_in_peft(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    ours = get_peft_model(llama(), LoraConfig(**settings))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    cast_mixed_precision_params(ours, dtype)
    peft.cast_mixed_precision_params(theirs, dtype)
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert found.keys() == expected.keys()
    assert {name: p.dtype for name, p in found.items()} == {name: p.dtype for name, p in expected.items()}
    assert {p.dtype for p in found.values()} == {dtype, torch.float32}
    assert all(torch.equal(found[name], expected[name]) for name in found if "lora_" not in name)


def test_a_half_model_has_its_adapter_in_float32() -> None:
    model = get_peft_model(llama().bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    cast_mixed_precision_params(model, torch.float16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.float16)


def test_the_model_trains_on_under_autocast() -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2]
    )
    model = get_peft_model(llama(), config)
    cast_mixed_precision_params(model, torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_an_adapter_is_cast_as_a_whole() -> None:
    """A frozen A, or the start that is subtracted, is a part of what the trained factor is learned for."""
    model = get_peft_model(Linears(), LoraConfig(r=2, target_modules=["first"], freeze_A=True))
    model.add_adapter("pissa", LoraConfig(r=2, target_modules=["second"], init_lora_weights="pissa"))
    model.base_model.set_adapter(["default", "pissa"])
    with torch.no_grad():
        x = torch.randn(3, 12)
        before = model(x)
    cast_mixed_precision_params(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {d for name, d in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {d for name, d in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(model(x.bfloat16()).float(), before, rtol=0.05, atol=0.05)


def test_an_adapter_that_is_not_trained_is_frozen_like_the_base() -> None:
    model = get_peft_model(Linears(), LoraConfig(r=2, target_modules=["first"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    cast_mixed_precision_params(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if "lora_A" in name}
    assert {name.split(".")[-2]: dtype for name, dtype in dtypes.items()} == {
        "default": torch.float32, "other": torch.bfloat16,
    }  # fmt: skip


def test_codes_stay_as_they_are() -> None:
    """PEFT casts them to numbers, which no layer reads."""
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 64)), nn.Linear(64, 4))
    model[0].register_parameter("codes8", nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    before = {name: t.dtype for name, t in adapted.state_dict().items() if "base_layer" in name}
    cast_mixed_precision_params(adapted, torch.bfloat16)
    after = {name: t.dtype for name, t in adapted.state_dict().items() if "base_layer" in name}
    changed = {name for name in before if before[name] != after[name]}
    assert all(before[name] == torch.float32 and name.endswith("bias") for name in changed)
    assert adapted.base_model.model[1].weight.dtype == torch.bfloat16


def test_gradients_follow_their_parameters() -> None:
    model = get_peft_model(Linears(), LoraConfig(r=2, target_modules=["first"]), autocast_adapter_dtype=False)
    model.bfloat16()
    model(torch.randn(3, 12).bfloat16()).float().pow(2).sum().backward()
    name, B = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    expected = B.grad.clone()  # type: ignore[union-attr]
    cast_mixed_precision_params(model, torch.float16)
    found = dict(model.named_parameters())[name].grad
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.complex64, "bfloat16", None])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    model = Linears()
    with refused(model, ConfigError, "dtype is that of frozen weights in mixed precision"):
        cast_mixed_precision_params(model, dtype)


def test_a_merged_model_is_refused() -> None:
    model = get_peft_model(Linears(), LoraConfig(r=2, target_modules=["first"]))
    model.base_model.merge_adapter()
    with refused(model, AdapterError, "merged"):
        cast_mixed_precision_params(model, torch.bfloat16)


def test_weights_that_rest_elsewhere_are_refused() -> None:
    model = accelerate.cpu_offload(Linears(), execution_device=torch.device("cpu"))
    with pytest.raises(BackendError, match="rest elsewhere and hooks of accelerate bring in a copy"):
        cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_sharded_model_is_refused() -> None:
    model = nn.Sequential(Linears())
    model[0].add_module("_fsdp_wrapped_module", nn.Linear(2, 2))
    with refused(model, BackendError, "Cast the model before it is sharded. Nothing was cast"):
        cast_mixed_precision_params(model, torch.bfloat16)
