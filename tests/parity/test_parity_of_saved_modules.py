"""Modules to save, base weights and targets from tensors mean what they mean in PEFT; files go both ways."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafa
from lorafa.errors import TargetError
from toys.parity import quiet, trained


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.layer_norm(self.q(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.final_norm, self.head = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final_norm(self.norm(x))) + self.heads["a"](x) * self.scales[0]  # type: ignore[no-any-return]


NAMES = (["norm"], ["layer_norm", "norm"], ["layers.0.norm"], ["1.norm"], ["final_norm", "head"], ["layers.1"], ["a"],
         ["layers.0", "head"])  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_modules_to_save_are_pefts_and_files_go_both_ways(names: list[str], tmp_path: Path) -> None:
    x, found = torch.randn(5, 4), {}
    settings: dict[str, Any] = {"r": 2, "target_modules": ["layers.0.q" if "layers.0" not in names else "layers.1.q"],
                                "modules_to_save": names}  # fmt: skip
    for lib in (lorafa, peft):
        with quiet():
            made = lib.get_peft_model(Net(), lib.LoraConfig(**settings))
            torch.manual_seed(1)
            with torch.no_grad():
                for _, p in sorted(made.named_parameters()):
                    if p.requires_grad:
                        p.add_(torch.randn_like(p))
            made.eval().save_pretrained(tmp_path / lib.__name__)
            found[lib.__name__] = made(x)
    files = [load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in found]
    assert files[0] == files[1]
    for reader in (lorafa, peft):
        for writer in found:
            with quiet():
                loaded = reader.PeftModel.from_pretrained(Net(), tmp_path / writer)
            torch.testing.assert_close(loaded(x), found[writer], rtol=1e-5, atol=1e-5)


def test_a_module_inside_one_that_is_saved_is_saved_with_it(tmp_path: Path) -> None:
    config = lorafa.LoraConfig(r=2, target_modules=["layers.1.q"], modules_to_save=["layers.0", "0.norm"])
    made = trained(lorafa.get_peft_model(Net(), config)).eval()
    wrapped = [name for name, module in made.named_modules() if hasattr(module, "modules_to_save")]
    assert "base_model.model.layers.0" in wrapped
    assert "base_model.model.layers.0.original_module.norm" not in wrapped
    made.save_pretrained(tmp_path)
    x = torch.randn(5, 4)
    torch.testing.assert_close(lorafa.PeftModel.from_pretrained(Net(), tmp_path)(x), made(x))


def test_a_regular_expression_is_written_as_the_names_it_means(tmp_path: Path) -> None:
    config = lorafa.LoraConfig(r=2, target_modules=["head"], modules_to_save=[r"layers\..*\.norm"])
    made = lorafa.get_peft_model(Net(), config)
    assert made.peft_config["default"].modules_to_save == ["layers.0.norm", "layers.1.norm"]
    assert config.modules_to_save == [r"layers\..*\.norm"]
    with torch.no_grad():
        made.get_base_model().layers[0].norm.modules_to_save["default"].weight.add_(1)
    made.eval().save_pretrained(tmp_path)
    x = torch.randn(5, 4)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(x), made(x), rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["heads"]}, r"'heads' is a ModuleDict, which is never called.* Name its parts: heads\.a\."),
    ({"modules_to_save": ["layers"]}, r"'layers' is a ModuleList, .* Name its parts: layers\.0, layers\.1\."),
    ({"modules_to_save": ["scales"]}, r"'scales' is a ParameterList, .* Name a module that is called\."),
    ({"modules_to_save": ["ayers"]}, r"'layers', whose name ends in 'ayers', is a ModuleList"),
    (
        {"target_modules": ["layers.0.q"], "modules_to_save": [".0"]},
        r"'layers\.0', whose name ends in '\.0', is also to get",
    ),
    (
        {"target_modules": ["head"], "modules_to_save": ["ead"]},
        r"'head', whose name ends in 'ead', is also to get an adapter",
    ),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED, ids=str)
def test_what_cannot_be_saved_as_a_module_is_refused_before_anything_is_wrapped(
    settings: dict[str, Any], text: str
) -> None:
    base = Net()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(TargetError, match=text):
        lorafa.get_peft_model(base, lorafa.LoraConfig(**{"target_modules": ["head"]} | settings))
    assert [name for name, _ in base.named_modules()] == names


# ---- base weights


@pytest.mark.parametrize("merged", [False, True])
def test_base_weights_are_named_as_in_peft_and_can_be_replaced(merged: bool) -> None:
    settings: dict[str, Any] = {
        "r": 2,
        "target_modules": ["q", "a"],
        "modules_to_save": ["head"],
        "init_lora_weights": False,
    }
    fresh = {key: value.clone() for key, value in Net().state_dict().items()}
    with quiet():
        ours, theirs = (lib.get_peft_model(Net(), lib.LoraConfig(**settings)) for lib in (lorafa, peft))
    assert lorafa.get_base_model_state_dict(ours).keys() == peft.get_base_model_state_dict(theirs).keys()
    if merged:
        ours.merge_adapter()
    found = lorafa.get_base_model_state_dict(ours)
    assert found.keys() == fresh.keys()
    assert all(torch.equal(found[key], fresh[key]) for key in fresh)
    other = {key: value + 1 for key, value in fresh.items()}
    if merged:
        with pytest.raises(lorafa.LoraError, match="merged into the base weights"):
            lorafa.set_base_model_state_dict(ours, other)
        return
    assert lorafa.set_base_model_state_dict(ours, other) == ([], [])
    peft.set_base_model_state_dict(theirs, other)
    for key, value in lorafa.get_base_model_state_dict(ours).items():
        assert torch.equal(value, other[key])
        assert torch.equal(peft.get_base_model_state_dict(theirs)[key], other[key])
    with pytest.raises(lorafa.LoraError, match=r"The state dict does not fit the base(.|\n)*missing in the file \(1\)"):
        lorafa.set_base_model_state_dict(ours, {key: other[key] for key in list(other)[1:]})
    some = lorafa.set_base_model_state_dict(ours, {"head.bias": torch.zeros(3), "more": torch.zeros(1)}, strict=False)
    assert len(some.missing_keys) == len(other) - 1
    assert some.unexpected_keys == ["more"]
    with pytest.raises(lorafa.LoraError, match=r"head\.bias: the file has 4, the model 3"):
        lorafa.set_base_model_state_dict(ours, {"head.bias": torch.zeros(4)}, strict=False)


# ---- targets from tensors


def test_layers_that_get_an_adapter_may_be_those_of_a_state_dict(tmp_path: Path) -> None:
    source = lorafa.get_peft_model(
        Net(), lorafa.LoraConfig(r=2, target_modules=["layers.1.q", "head"], init_lora_weights=False)
    )
    tensors = lorafa.get_peft_model_state_dict(source)
    asked = lorafa.LoraConfig(r=2, target_modules=["out"])
    for given in (tensors, {key.removeprefix("base_model.model."): value for key, value in tensors.items()}):
        base = lorafa.inject_adapter_in_model(asked, Net(), state_dict=given)
        lorafa.set_peft_model_state_dict(base, given)
        x = torch.randn(5, 4)
        torch.testing.assert_close(base(x), source(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=["out"]), Net(),
            state_dict={key.removeprefix("base_model.model."): value for key, value in tensors.items()},
        )  # fmt: skip
    adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert [name for name, module in base.named_modules() if hasattr(module, "lora_A")] == adapted
    for wrong, text in (
        ({"head.weight": torch.zeros(1)}, r"state_dict has no factors of a LoRA adapter; its keys are: head\.weight\."),
        (
            {"haed.lora_A.weight": torch.zeros(1)},
            r"factors of 1 layers that the model does not have: haed\. Did you mean",
        ),
    ):
        with pytest.raises(TargetError, match=text):
            lorafa.inject_adapter_in_model(asked, Net(), state_dict=wrong)
