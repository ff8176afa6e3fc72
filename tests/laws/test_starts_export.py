"""The law of export: whatever its start, a trained adapter is plain LoRA on the base as it was, to PEFT and to us."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import STARTED, STARTS, initializer_of, read_by, settings_of, stats_for, train, with_adapter
from toys.layers import Single, base_layer, input_for
from toys.models import Two

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 5},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {"rank_pattern": {"second": 4}, "alpha_pattern": {"second": 7}, "use_rslora": True},
}
LAYERS = ("first", "second")
ON_THE_BASE = [start for start in STARTS if initializer_of(start).quantizer is None]
"""Starts whose adapter sits on the base as it was; those that quantize it are in tests/parity."""


def trained(start: bool | str, *, poor: bool = False, **settings: Any) -> PeftModel:
    """An adapter that has left its start; with ``poor`` the second layer has nothing to start from."""
    model = Two(poor=poor)
    stats = {name: stats_for(model.get_submodule(name).weight) for name in LAYERS}  # type: ignore[arg-type]
    if poor:
        stats["second"] = {key: torch.zeros_like(value) for key, value in stats["second"].items()}
    config = LoraConfig(r=2, target_modules=list(LAYERS), init_seed=0, **settings_of(start), **settings)
    adapted = get_peft_model(model, config, stats=read_by(start, stats))
    train(adapted)
    return adapted.eval()


def to_peft(base: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model of a file of ours, of which it has nothing to say: no unknown field, no missing key."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_comes_back(model: PeftModel, base: nn.Module, x: Tensor, folder: Path) -> PeftModel:
    """The file gives the same outputs, bit for bit, the same A and B, and trains the same of them."""
    loaded = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    assert torch.equal(loaded(x), model(x))
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(theirs[name], parameter), name
        assert theirs[name].requires_grad == parameter.requires_grad, name
    return loaded


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("start", ON_THE_BASE)
def test_peft_puts_it_on_the_untouched_base_with_equal_outputs(
    start: bool | str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, x = trained(start, **settings), torch.randn(5, 12)
    model.save_pretrained(tmp_path)
    assert not torch.allclose(model(x), Two()(x), atol=1e-2)
    torch.testing.assert_close(to_peft(Two(), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [start for start in ON_THE_BASE if initializer_of(start).variant is None])
def test_a_bias_of_B_goes_with_it(start: bool | str, tmp_path: Path) -> None:
    """PEFT refuses to make one beside a start with a name, but reads a file that has both."""
    model, x = trained(start, lora_bias=True), torch.randn(5, 12)
    model.save_pretrained(tmp_path)
    assert_comes_back(model, Two(), x, tmp_path)
    torch.testing.assert_close(to_peft(Two(), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("start", STARTS)
def test_it_comes_back_and_trains_on(start: bool | str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = trained(start, **settings)
    model.save_pretrained(tmp_path)
    assert_comes_back(model, Two(), torch.randn(5, 12), tmp_path)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (start, kind)
        for start, variant, kind in STARTED
        if variant == "lora" and start in ON_THE_BASE and kind.endswith(("Embedding", "Conv2d", "pytorch_utils.Conv1D"))
    ],
)
def test_peft_reads_it_on_tables_and_convolutions_too(start: bool | str, kind: str, tmp_path: Path) -> None:
    layer = base_layer(kind)
    base = {key: value.clone() for key, value in layer.state_dict().items()}
    model = with_adapter(Single(layer), kind, init_lora_weights=start, fan_in_fan_out=kind.endswith("Conv1D"))
    train(model)
    model.save_pretrained(tmp_path)
    fresh = base_layer(kind)
    fresh.load_state_dict(base)
    x = input_for(kind)
    torch.testing.assert_close(to_peft(Single(fresh), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


WITHOUT_SPECTRUM = ("kasa", "both_random", "loram_subtracted")
"""Starts that take something out of the base and need no singular value of it: KaSA drops those of zero as well."""


@pytest.mark.filterwarnings("ignore:init_lora_weights=.* has nothing to start from")
@pytest.mark.parametrize("start", STARTS)
def test_with_a_layer_that_fell_back_it_is_the_same_and_the_file_says_so(start: bool | str, tmp_path: Path) -> None:
    made = initializer_of(start)
    model, x = trained(start, poor=True, **SETTINGS["patterns"]), torch.randn(5, 12)
    model.save_pretrained(tmp_path)
    loaded = assert_comes_back(model, Two(poor=True), x, tmp_path)
    fallbacks = {path: layer.fallbacks for path, layer in model.base_model.lora_layers()}
    assert fallbacks["first"] == {}
    if made.needs or (made.moves_base and start not in WITHOUT_SPECTRUM):
        assert fallbacks["second"]["default"]
    assert {path: layer.fallbacks for path, layer in loaded.base_model.lora_layers()} == fallbacks
    if start in ON_THE_BASE:
        torch.testing.assert_close(to_peft(Two(poor=True), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)
