"""KaSA beside PEFT: what asks for it, its file, its penalties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa import KasaConfig, LoraConfig, PeftModel, get_peft_model, penalty
from lorafa.errors import ConfigError

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


def adapted_by(library: Any, **settings: Any) -> nn.Module:
    config = library.LoraConfig(
        r=3, lora_alpha=6, target_modules=["first", "second"],
        kasa_config=library.KasaConfig(**settings) if library is lorafa else peft.tuners.lora.KasaConfig(**settings),
    )  # fmt: skip
    return library.get_peft_model(Net(), config)  # type: ignore[no-any-return]


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_the_config_asks_for_it_as_in_peft() -> None:
    model = adapted_by(lorafa)
    assert [type(adapter.variant).__name__ for adapter in _adapters(model)] == ["KaSA", "KaSA"]
    assert model.peft_config["default"].start.name == "kasa"
    assert model.peft_config["default"].init_lora_weights is True  # as PEFT reads it
    assert LoraConfig(kasa_config={"beta": 0.5}).kasa_config == KasaConfig(beta=0.5)
    assert LoraConfig(init_lora_weights="kasa").kasa_config == KasaConfig()
    assert LoraConfig.from_dict(LoraConfig(kasa_config={"beta": 0.5}).to_dict()).kasa_config == KasaConfig(beta=0.5)
    with pytest.raises(ConfigError, match=r"kasa_config is set but would be ignored: init_lora_weights is 'gaussian'"):
        LoraConfig(kasa_config=KasaConfig(), init_lora_weights="gaussian")


def test_a_file_of_peft_computes_here_what_it_computes_there(tmp_path: Path) -> None:
    theirs = moved(adapted_by(peft)).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(Net(), tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_file_of_ours_is_plain_lora_there(tmp_path: Path) -> None:
    ours = moved(adapted_by(lorafa)).eval()
    ours.save_pretrained(tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(), tmp_path)(x), ours(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), ours(x), rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.3, "gamma": 0.0}, {"beta": 0.0, "gamma": 0.2}], ids=str)
def test_the_penalty_and_its_gradients_are_those_of_peft(settings: dict[str, float], tmp_path: Path) -> None:
    theirs = moved(adapted_by(peft, **settings))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    wanted = theirs.base_model._get_kasa_loss()
    torch.testing.assert_close(penalty(ours), wanted, rtol=1e-5, atol=1e-8)
    wanted.backward()
    penalty(ours).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) >= 2
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_the_penalty_is_the_formula_of_the_paper() -> None:
    model = moved(get_peft_model(Net().double(), LoraConfig(
        r=3, target_modules=["first"], kasa_config=KasaConfig(beta=0.3, gamma=0.2)
    ), autocast_adapter_dtype=False))  # fmt: skip
    (adapter,) = _adapters(model)
    A, B, d = adapter.A, adapter.B, adapter.extra("diagonal")
    one = torch.eye(3, dtype=torch.float64)
    apart = ((B.T @ B - one) ** 2).sum().sqrt() + ((A @ A.T - one) ** 2).sum().sqrt()
    torch.testing.assert_close(penalty(model), 0.3 * (d**2).sum() + 0.2 * apart, rtol=1e-12, atol=1e-12)


def _adapters(model: nn.Module) -> list[Any]:
    return [layer.adapters["default"] for _, layer in model.base_model.lora_layers()]
