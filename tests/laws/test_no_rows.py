"""The law of batches without rows: an adapted layer answers them as its base does, and gradients are finite.

An expert that no token was sent to gets one, and so does a process that has no rows left.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorafa
from toys.adapters import DEFINED, VARIANT, adapted, only_layer
from toys.layers import backend_for, input_for


def no_rows(kind: str) -> Tensor:
    x = input_for(kind)
    return x[:, :0] if backend_for(kind).host == "experts" and x.dim() == 3 else x[:0]


@pytest.mark.matrix(4)
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_no_rows_are_answered_by_none(variant: str, kind: str, settings: dict[str, Any]) -> None:
    if settings and backend_for(kind).host in ("experts", "attention"):
        pytest.skip("its update is added to the weight, and no input to drop elements of is seen")
    x = no_rows(kind)
    with torch.no_grad():
        expected = adapted(kind, **VARIANT[variant]).unload()(x)
    model = adapted(kind, **VARIANT[variant], **settings)
    assert model.eval()(x).shape == expected.shape
    y = model.train()(x)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    penalty = lorafa.penalty(model)
    if y.requires_grad:
        (y.sum() + penalty).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(tensor.isfinite().all() for tensor in only_layer(model).buffers() if tensor.is_floating_point())
