"""Small transformers, plain and adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapter_toys import train
from lorafa import LoraConfig, PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 7, 2, 9, 3], [4, 1, 0, 8, 6, 2]])
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64} | options
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def adapted(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    model = get_peft_model(base or llama(), LoraConfig(**({"r": 4, "target_modules": "all-linear"} | settings)))
    train(model, 0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients
