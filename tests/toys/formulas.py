"""A formula on one linear layer, in float64: what claims of papers are tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import train
from toys.layers import Single
from toys.watch import Kept

OUT, IN, R = 10, 24, 4


def on_linear(dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """An adapter that has left its start; scaling 1.5."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["layer"], r=R, lora_alpha=6, init_seed=1, **settings)
    model = get_peft_model(Single(nn.Linear(IN, OUT)).to(dtype), config, autocast_adapter_dtype=False)
    train(model)
    return model


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def kept_for_backward(model: PeftModel, x: Tensor) -> int:
    """Bytes."""
    with Kept(*model.parameters(), *model.buffers()) as kept:
        model(x)
    return kept.bytes


def gradients(model: PeftModel, x: Tensor, probe: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x) * probe).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) >= 2
    return found


def learns_the_same_again(model: PeftModel, reentrant: bool) -> None:
    """Under activation checkpointing the gradients are those without it, to the bit."""
    probe, x, found = torch.randn(8, OUT, dtype=torch.float64), inputs(8).requires_grad_(), []
    for again in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        (y * probe).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
