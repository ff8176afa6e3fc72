"""A student with an adapter, another model for its teacher, and a batch of which some positions count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toys.adapters import train
from toys.compare import close
from toys.language_models import adapted, llama

IDS = torch.tensor([[4, 7, 1, 9, 3, 2], [2, 8, 8, 5, 1, 6], [9, 1, 4, 4, 6, 6]])
LABELS = torch.tensor([[-100, -100, 1, 9, 3, 2], [-100, 8, 8, 5, -100, -100], [-100, -100, -100, 4, 6, 6]])
BATCH = {"input_ids": IDS, "labels": LABELS}
COUNTED = LABELS[:, 1:] != -100


def student(seed: int = 1, **settings: Any) -> Any:
    model = adapted(llama().double(), **settings).eval()
    torch.manual_seed(seed)
    train(model, 0.2)
    return model


def other_model() -> nn.Module:
    torch.manual_seed(7)
    model = llama().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def counted_logits(model: Any) -> Tensor:
    """(positions that count, vocabulary)."""
    found: Tensor = model(input_ids=IDS).logits[:, :-1][COUNTED]
    return found


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        close(found[name], wanted[name], tolerance)
