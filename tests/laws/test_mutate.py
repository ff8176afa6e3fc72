"""Taking a start out of the base weights changes where it is subtracted, not what is computed; and it can be undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, mutate_base, restore_base
from lorafa.errors import AdapterError, BackendError, LoraError
from toys.adapters import STARTS, VARIANT, adapted, config_for, initializer_of, starts_of, with_adapter
from toys.compare import EXACT, values_of
from toys.layers import KINDS, backend_for, input_for

MOVING = [start for start in STARTS if initializer_of(start).moves_base and not initializer_of(start).quantizer]
MOVED = [(start, variant) for variant in VARIANT for start in starts_of(variant, *MOVING) if start in MOVING]
LINEAR = "torch.nn.modules.linear.Linear"
ALLOWED = [
    kind
    for kind in KINDS
    if backend_for(kind).host in ("linear", "embedding", "conv") and not backend_for(kind).quantized
]
"""Whose weights may change: not the quantized ones."""


def state(model: nn.Module) -> dict[str, Tensor]:
    return values_of(model)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layer_of(model: PeftModel) -> Any:
    return model.get_base_model().layer


@pytest.mark.parametrize(("start", "variant"), MOVED)
def test_the_base_is_w_less_the_start_and_outputs_and_gradients_stay(start: str, variant: str) -> None:
    model = adapted(LINEAR, dtype=torch.float64, **VARIANT[variant] | {"init_lora_weights": start})
    x, layer = input_for(LINEAR, torch.float64), layer_of(model)
    W, own = layer.base_layer.weight.clone(), layer.adapters["default"]
    A0, B0, s = own.start.A.clone(), own.start.B.clone(), own.scaling

    def run() -> tuple[Tensor, list[Tensor]]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        y = model(x)
        return y, list(torch.autograd.grad(y.sin().sum(), parameters))

    before, gradients = run()
    mutate_base(model)
    torch.testing.assert_close(layer.base_layer.weight, W - s * B0 @ A0, rtol=0, atol=1e-14)
    after, gradients_after = run()
    torch.testing.assert_close(after, before, rtol=0, atol=EXACT[torch.float64])
    for one, other in zip(gradients, gradients_after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    restore_base(model)
    assert torch.equal(layer.base_layer.weight, W)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ALLOWED)
def test_it_holds_on_every_layer_that_adds_to_an_output(kind: str) -> None:
    model = adapted(kind, dtype=torch.float64, init_lora_weights="pissa")
    x = input_for(kind, torch.float64)
    before = model(x)
    mutate_base(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=EXACT[torch.float64])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if backend_for(kind).quantized])
def test_codes_are_no_weight_that_a_start_could_be_taken_out_of(kind: str) -> None:
    model = adapted(kind, init_lora_weights="pissa")
    text = r"layer: a \w+ is quantized: .* would be rounded to codes again, .* Leave the base unchanged"
    refused(model, mutate_base, BackendError, text)


def test_a_forward_pass_then_computes_with_rank_r() -> None:
    model = adapted(LINEAR, init_lora_weights="pissa")
    own = layer_of(model).adapters["default"]
    assert own.running_factors[0].shape[0] == 8
    mutate_base(model)
    assert own.running_factors[0].shape[0] == 4
    assert own.factors[0].shape[0] == 8


@pytest.mark.parametrize("variant", ["lora", "dora"])  # those that go with any start
def test_dropout_acts_on_the_adapter_alone(variant: str) -> None:
    model = adapted(LINEAR, dtype=torch.float64, init_lora_weights="pissa", lora_dropout=0.5, **VARIANT[variant])
    model.train()
    x = input_for(LINEAR, torch.float64)

    def mean() -> tuple[Tensor, Tensor]:
        """Of 1000 outputs, and its standard error."""
        outputs = torch.stack([model(x).detach() for _ in range(1000)])
        return outputs.mean(0), outputs.std(0) / len(outputs) ** 0.5

    before, error = mean()
    mutate_base(model)
    after, other = mean()
    assert bool(((after - before).abs() < 6 * (error.square() + other.square()).sqrt()).all())


def test_what_is_saved_merged_and_disabled_is_that_of_the_pristine_base(tmp_path: Path) -> None:
    model, x = adapted(LINEAR, init_lora_weights="pissa"), input_for(LINEAR)
    W = layer_of(model).base_layer.weight.clone()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    merged = layer_of(model).base_layer.weight.clone()
    model.unmerge_adapter()
    with model.disable_adapter():
        alone = model(x)
    mutate_base(model)
    model.save_pretrained(tmp_path / "after")
    files = [load_file(tmp_path / when / "adapter_model.safetensors") for when in ("before", "after")]
    assert equal(*files)
    with model.disable_adapter():
        assert torch.equal(model(x), alone)
    model.merge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, merged)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, W)
    mutate_base(model)
    assert torch.equal(model.unload().layer.weight, W)


@pytest.mark.parametrize(
    "rescale", [lambda layer: layer.scale_layer(2.0), lambda layer: layer.set_scale("default", 0.0)], ids=["scale", "0"]
)
def test_another_scaling_brings_the_pristine_base_back(rescale: Callable[[Any], None]) -> None:
    model, other = (adapted(LINEAR, init_lora_weights="pissa") for _ in range(2))
    other.load_state_dict(model.state_dict())
    x = input_for(LINEAR)
    mutate_base(model)
    for one in (model, other):
        rescale(layer_of(one))
    assert torch.equal(model(x), other(x))


def test_half_precision_rounds_the_base_and_says_how_much() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    W = base[0].weight.clone()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert torch.equal(model(x), x @ W.mT)
    mutate_base(model)
    layer = model.get_base_model()[0]
    own = layer.adapters["default"]
    error = (layer.base_layer.weight.float() + own.start_product() - W.float()).detach()
    assert 1e-4 < float(error.norm() / W.float().norm()) < 3e-3
    restore_base(model)
    assert torch.equal(model(x), x @ W.mT)


def second(model: PeftModel) -> None:
    model.add_adapter("second", config_for(LINEAR))


def refused(model: PeftModel, action: Callable[[PeftModel], Any], error: type[LoraError], match: str) -> None:
    before = state(model)
    with pytest.raises(error, match=match):
        action(model)
    assert equal(state(model), before)


def test_what_cannot_be_done_is_said_and_changes_nothing() -> None:
    model = adapted(LINEAR, init_lora_weights="pissa")
    refused(model, lambda m: mutate_base(m, "nobody"), AdapterError, "no adapter 'nobody'")
    mutate_base(model)
    refused(model, mutate_base, AdapterError, "taken out of the base weights already")
    second(model)
    refused(model, lambda m: m.set_adapter("second"), AdapterError, r"Call restore_base\(model\) before activating")
    refused(model, lambda m: m.delete_adapter("default"), AdapterError, r"restore_base\(model\) before deleting it")
    restore_base(model)
    alone = r"'default' must be the only one there .* are 'default', 'second'\. Call delete_adapter\('second'\) first"
    refused(model, mutate_base, AdapterError, alone)
    model.delete_adapter("second")
    active = r"'default' alone must be active before .* Active are: none\. Call set_adapter\('default'\) first"
    model.base_model.set_adapter([])
    refused(model, mutate_base, AdapterError, active)
    model.set_adapter("default")
    model.merge_adapter()
    refused(model, mutate_base, AdapterError, "merged into the base weights")


@pytest.mark.parametrize("model", [None, "model", {}], ids=str)
@pytest.mark.parametrize("action", [mutate_base, restore_base])
def test_what_is_no_model_is_refused(action: Callable[[Any], None], model: Any) -> None:
    with pytest.raises(AdapterError, match=rf"{action.__name__} takes a model with adapters, found {model!r}"):
        action(model)


def test_an_adapter_without_a_start_has_nothing_to_take_out() -> None:
    refused(adapted(LINEAR), mutate_base, AdapterError, "'default' has no start that belongs to the base weights")


def test_layers_that_change_their_weight_in_forward_are_refused() -> None:
    model = with_adapter(adapted("matrix parameter").unload(), "matrix parameter", init_lora_weights="pissa")
    refused(model, mutate_base, BackendError, "adds its update to the weight in every forward pass")
