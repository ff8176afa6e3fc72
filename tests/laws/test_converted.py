"""The law of conversion: every update that is a matrix becomes the plain LoRA of a rank that is nearest to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from lorafa.io.convert import convert
from lorafa.surgery.walk import lora_layers
from toys.adapters import DEFINED, VARIANT, adapted, initializer_of, only_layer, train
from toys.compare import assert_unchanged, close, everything
from toys.layers import Single, base_layer, input_for
from toys.models import Tied, Two

DENSE = [(v, k) for v, k in DEFINED if "." not in k or k.startswith(("torch.nn", "transformers"))]
"""On layers that keep their weight as it is: codes and their rounding are another matter."""


def fresh(model: PeftModel, kind: str) -> nn.Module:
    """The model of one layer with the same base weights and no adapter."""
    layer = base_layer(kind)
    layer.load_state_dict({key: value.clone() for key, value in base_of(model).state_dict().items()})
    return Single(layer)


def base_of(model: PeftModel) -> nn.Module:
    found = model.unload().layer
    assert isinstance(found, nn.Module)
    return found


def delta(model: PeftModel) -> list[Tensor]:
    return [layer.adapters["default"].delta_weight(layer.base_weight()) for _, layer in lora_layers(model)]


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
@pytest.mark.parametrize(("variant", "kind"), DENSE)
def test_at_full_rank_it_is_the_same_function_to_our_loader(variant: str, kind: str, tmp_path: Path) -> None:
    settings = VARIANT[variant] | ({"fan_in_fan_out": True} if kind.endswith("Conv1D") else {})
    model = adapted(kind, **settings).eval()
    x = input_for(kind)
    with torch.no_grad():
        expected = model(x)
    before = everything(model)
    save_as_lora(tmp_path, model, 8)
    assert_unchanged(before, model)
    made = convert(model, 8)
    assert made.lost.share < 1e-10
    loaded = PeftModel.from_pretrained(fresh(model, kind), tmp_path)
    with torch.no_grad():
        close(loaded(x), expected, 1e-4)
    assert {float(layer.adapters["default"].scaling) for _, layer in lora_layers(loaded)} <= {1.0, 2.0}


CODES = [(v, k) for v, k in DEFINED if (v, k) not in DENSE and v in ("lora", "kasa", "dora")]


@pytest.mark.parametrize(("variant", "kind"), CODES)
def test_on_codes_it_is_the_update_of_the_weight_they_stand_for(variant: str, kind: str) -> None:
    model = adapted(kind, **VARIANT[variant])
    (whole,) = delta(model)
    made = convert(model, 8)
    product = made.tensors["layer.lora_B.weight"].float() @ made.tensors["layer.lora_A.weight"].float()
    close(product, whole.detach().float(), 1e-4)


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
@pytest.mark.parametrize("variant", VARIANT)
@pytest.mark.parametrize("rank", [1, 3])
def test_what_a_rank_loses_is_what_the_singular_values_say(variant: str, rank: int) -> None:
    model = adapted("torch.nn.modules.linear.Linear", **VARIANT[variant])
    (whole,) = delta(model)
    values = torch.linalg.svdvals(whole.detach().double()).square()
    made = convert(model, rank)
    A, B = made.tensors["layer.lora_A.weight"], made.tensors["layer.lora_B.weight"]
    assert (A.shape[0], made.config.r, made.config.lora_alpha) == (rank, rank, rank)
    assert made.lost.share == pytest.approx(float(values[rank:].sum() / values.sum()), abs=1e-6)
    left = (whole.detach() - B @ A).double().square().sum() / values.sum()
    assert float(left) == pytest.approx(made.lost.share, abs=1e-6)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_share_gives_each_layer_the_least_rank_that_keeps_it(use_dora: bool, tmp_path: Path) -> None:
    model = get_peft_model(Two(), LoraConfig(r=6, target_modules=["first", "second"], use_dora=use_dora))
    train(model)
    config, tensors = convert_to_lora(model, 0.8)
    for name, whole in zip(("first", "second"), delta(model), strict=True):
        energies = torch.linalg.svdvals(whole.detach().double()).square()
        rank = tensors[f"base_model.model.{name}.lora_A.weight"].shape[0]
        assert float(energies[:rank].sum() / energies.sum()) >= 0.8
        assert float(energies[: rank - 1].sum() / energies.sum()) < 0.8
        assert config.rank_pattern.get(name, config.r) == config.alpha_pattern.get(name, config.lora_alpha) == rank
    save_as_lora(tmp_path, model, 1.0)
    x = torch.randn(4, 12)
    close(PeftModel.from_pretrained(Two(), tmp_path)(x), model.eval()(x), 1e-4)


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["second"], "target_modules": ["first"]},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": True},
        {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 9}, "use_rslora": True},
        {"init_lora_weights": "pissa", "use_dora": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_is_trained_beside_the_layers_goes_along(settings: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(Two(), LoraConfig(**({"r": 3, "target_modules": ["first", "second"]} | settings)))
    train(model)
    save_as_lora(tmp_path, model, 10)
    x = torch.randn(4, 12)
    close(PeftModel.from_pretrained(Two(), tmp_path)(x), model.eval()(x), 1e-4)


@pytest.mark.filterwarnings("ignore:Adapter 'default' as plain LoRA")
def test_adapters_that_are_one_by_a_tie_become_two_of_the_same_update(tmp_path: Path) -> None:
    model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["embed", "proj"], ensure_weight_tying=True))
    train(model)
    save_as_lora(tmp_path, model, 6)
    x = torch.randint(10, (4,))
    with torch.no_grad():
        expected = model.eval()(x)
        close(PeftModel.from_pretrained(Tied(), tmp_path)(x), expected, 1e-4)


def test_names_that_end_alike_get_their_own_ranks() -> None:
    """Patterns match the ends of names: "a" would match "inner.a" as well."""
    base = nn.ModuleDict({"a": nn.Linear(6, 6), "inner": nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})})
    model = get_peft_model(base, LoraConfig(r=5, target_modules=["a", "b"]))
    with torch.no_grad():
        for rank, (_, layer) in enumerate(lora_layers(model), 1):
            layer.lora_B["default"].weight.normal_()
            layer.lora_B["default"].weight[:, rank:] = 0
    config, tensors = convert_to_lora(model, 1.0 - 1e-6)
    ranks = {key.removeprefix("base_model.model."): t.shape[0] for key, t in tensors.items() if "lora_A" in key}
    assert ranks == {"a.lora_A.weight": 1, "inner.a.lora_A.weight": 2, "inner.b.lora_A.weight": 3}
    plain = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(6, 6), "inner": nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})}),
        LoraConfig(r=config.r, target_modules=["a", "b"], rank_pattern=config.rank_pattern),
    )
    assert {path: layer.r["default"] for path, layer in lora_layers(plain.get_base_model())} == {
        "a": 1,
        "inner.a": 2,
        "inner.b": 3,
    }


def test_starts_that_move_the_base_are_on_the_pristine_one() -> None:
    for start in ("pissa", "milora", "olora"):
        assert initializer_of(start).moves_base
        model = adapted("torch.nn.modules.linear.Linear", init_lora_weights=start)
        made = convert(model, 8)
        layer = only_layer(model)
        close(
            made.tensors["layer.lora_B.weight"] @ made.tensors["layer.lora_A.weight"],
            layer.adapters["default"].delta_weight(layer.base_weight()).detach(),
            1e-4,
        )


def test_peft_gives_the_converted_adapter_the_same_outputs(tmp_path: Path) -> None:
    import peft

    model = get_peft_model(Two(), LoraConfig(r=3, target_modules=["first", "second"], use_dora=True))
    train(model)
    save_as_lora(tmp_path, model, 10)
    x = torch.randn(4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(Two(), tmp_path).eval()
    close(theirs(x), model.eval()(x), 1e-4)
