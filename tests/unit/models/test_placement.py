"""A model is put on the accelerator there is, unless something has placed it."""

from __future__ import annotations

import pytest
import torch

from lorafa.models.load import on_accelerator


def test_a_model_goes_to_the_accelerator_and_stays_where_it_was_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert on_accelerator(torch.nn.Linear(2, 2)).weight.device.type == "meta"
    placed = torch.nn.Linear(2, 2)
    placed.hf_device_map = {"": "cpu"}
    assert on_accelerator(placed).weight.device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert on_accelerator(torch.nn.Linear(2, 2)).weight.device.type == "cpu"
