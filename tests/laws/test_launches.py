"""How many operations a training step launches a layer, beyond those of the frozen base: on an accelerator each costs
some microseconds, whatever its size. They can be counted on a CPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorafa
from toys.watch import Launches

PLACES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = 4
LAYERS = BLOCKS * len(PLACES)


def llama(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=BLOCKS, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config).to(dtype)


def step(model: nn.Module) -> None:
    ids = torch.arange(26).view(2, 13)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def launched(model: nn.Module) -> Launches:
    """Those of the third step: the first tells which factors the second makes together."""
    model.train()
    step(model)
    step(model)
    with Launches() as launches:
        step(model)
    return launches


def frozen(dtype: torch.dtype) -> int:
    """Of the base alone, with gradients through it as an adapter on its first layers needs them."""
    model = llama(dtype).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())  # type: ignore[operator]
    return launched(model).count


def a_layer(dtype: torch.dtype, library: ModuleType = lorafa, **settings: Any) -> float:
    model = library.get_peft_model(llama(dtype), library.LoraConfig(r=4, target_modules=PLACES, **settings))
    return (launched(model).count - frozen(dtype)) / LAYERS


@pytest.mark.parametrize(
    ("dtype", "plain", "dropped"), [(torch.bfloat16, 8, 12), (torch.float32, 6.5, 10.5)], ids=["bfloat16", "float32"]
)
def test_a_layer_launches_few_operations(dtype: torch.dtype, plain: float, dropped: float) -> None:
    assert a_layer(dtype) <= plain
    with lorafa.dropout_source("generator"):
        assert a_layer(dtype, lora_dropout=0.1) <= dropped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dora_launches_seven_tenths_of_what_it_does_in_peft(dtype: torch.dtype) -> None:
    assert a_layer(dtype, use_dora=True) <= 0.7 * a_layer(dtype, peft, use_dora=True)


def test_with_a_frozen_a_there_are_six() -> None:
    model = lorafa.get_peft_model(llama(torch.bfloat16), lorafa.LoraConfig(r=4, target_modules=PLACES))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert (launched(model).count - frozen(torch.bfloat16)) / LAYERS <= 6
