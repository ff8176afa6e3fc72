"""DoRA's norms taken on the accelerator for weights that lie elsewhere (``runtime_config.ephemeral_gpu_offload``)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, LoraRuntimeConfig, get_peft_model


def magnitudes(**settings: object) -> Tensor:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_seed=0, **settings)  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    layer = model.get_base_model()[0]  # type: ignore[index]
    found: Tensor = layer.lora_magnitude_vector["default"].weight.detach() if settings.get("use_dora") else layer.weight
    return found


def test_they_are_taken_where_the_accelerator_is_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    there = torch.device("cpu")

    def current() -> torch.device:
        asked.append("asked")
        return there

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    offload = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    usual = magnitudes(use_dora=True)
    assert not asked
    assert torch.equal(magnitudes(use_dora=True, runtime_config=offload), usual)
    assert len(asked) == 1
    magnitudes(runtime_config=offload)  # plain LoRA reads no weight
    assert len(asked) == 1


def test_without_an_accelerator_nothing_is_other() -> None:
    offload = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    assert torch.equal(magnitudes(use_dora=True, runtime_config=offload), magnitudes(use_dora=True))
