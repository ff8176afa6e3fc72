"""The law of combinations: any start goes with any formula, training method and layer, or an error says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import PeftModel
from lorafa.errors import AdapterError, BackendError, ConfigError, LoraError
from toys.adapters import STARTS, adapted, config_for, initializer_of, only_layer, read_by, stats_for, with_adapter
from toys.layers import Single, base_layer, input_for

LINEAR, CONV = "torch.nn.modules.linear.Linear", "torch.nn.modules.conv.Conv2d"
TABLE = "torch.nn.modules.sparse.Embedding"
COMBINED: dict[str, dict[str, Any]] = {
    "alone": {},
    "DoRA": {"use_dora": True},
    "frozen A": {"freeze_A": True},
    "DoRA, frozen A": {"use_dora": True, "freeze_A": True},
    "dropout": {"lora_dropout": 0.3},
    "bias of B": {"lora_bias": True},
}
Refusal = tuple[type[LoraError], str]


def refusal(start: bool | str, settings: dict[str, Any], kind: str) -> Refusal | None:
    """Why a combination is not there, by what the start declares."""
    made, asked = initializer_of(start), f"init_lora_weights={start!r}"
    if settings.get("freeze_A") and made.trains == "A":
        return ConfigError, f"freeze_A=True leaves nothing to train: {asked} trains A alone. Drop one"
    if settings.get("lora_bias") and made.variant is not None:
        return ConfigError, f"lora_bias=True does not work with {asked}. Drop one"
    if made.variant is not None and kind != LINEAR:
        over = "dora over " if settings.get("use_dora") else ""
        return ConfigError, f"layer: {over}{made.variant} is not defined on .* layers"
    if made.needs and kind != LINEAR:
        return ConfigError, f"layer: {asked} reads statistics of linear layers, and this is .* Leave it out"
    if made.quantizer is not None and kind != LINEAR:
        return BackendError, f"{asked} quantizes dense linear layers, and 'layer' is a .* Leave it out"
    if settings.get("lora_bias") and kind == TABLE:
        return ConfigError, "layer: lora_bias is not defined on embedding layers. Exclude it, or set lora_bias=False"
    return None


CASES = [(start, name, kind) for start in STARTS for name in COMBINED for kind in (LINEAR, CONV, TABLE)]
REFUSED = [case for case in CASES if refusal(case[0], COMBINED[case[1]], case[2])]
MADE = [case for case in CASES if case not in REFUSED]


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "name", "kind"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(start: bool | str, name: str, kind: str) -> None:
    error, text = refusal(start, COMBINED[name], kind)  # type: ignore[misc]
    with pytest.raises(error, match=text):
        adapted(kind, init_lora_weights=start, **COMBINED[name])


@pytest.mark.matrix(4)
@pytest.mark.filterwarnings("ignore:layer. lora_dropout does not act on embedding layers")
@pytest.mark.parametrize(("start", "name", "kind"), MADE)
def test_step_zero_is_that_of_the_start_alone(start: bool | str, name: str, kind: str) -> None:
    """For the starts that leave the base's function as it was, tests/laws/test_starts.py says what that is."""
    layer, x = base_layer(kind, dtype=torch.float64), input_for(kind, torch.float64)
    alone = with_adapter(Single(copy.deepcopy(layer)), kind, init_lora_weights=start)
    combined = with_adapter(Single(layer), kind, init_lora_weights=start, **COMBINED[name])
    tolerance = 1e-5 if initializer_of(start).quantizer else 1e-12  # the factors on a quantized layer are float32
    torch.testing.assert_close(combined.eval()(x), alone.eval()(x), rtol=tolerance, atol=tolerance)


def trained_parameters(model: PeftModel, start: bool | str, settings: dict[str, Any], adapter: str) -> set[str]:
    """What a combination says it trains: the start's factors but for a frozen A, and all else the formula adds."""
    layer = only_layer(model)
    factors = dict(zip(layer.factor_names, "AB", strict=True))
    trains = initializer_of(start).trains.replace("A" if settings.get("freeze_A") else "", "")
    found = {id(p) for key, p in layer.stored_parameters(adapter).items() if factors.get(key, "") in trains}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def with_gradient(model: PeftModel, x: Tensor, target: Tensor) -> set[str]:
    """The parameters that got a gradient; raises for one that is all zero."""
    model.zero_grad(set_to_none=True)
    (model(x) - target).square().sum().backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    dead = [name for name, gradient in found.items() if not gradient.any()]
    assert not dead, dead
    return set(found)


@pytest.mark.matrix(4)
@pytest.mark.filterwarnings("ignore:layer. lora_dropout does not act on embedding layers")
@pytest.mark.parametrize(("start", "name", "kind"), MADE)
def test_gradients_reach_what_is_trained_and_nothing_else(start: bool | str, name: str, kind: str) -> None:
    settings, x = COMBINED[name], input_for(kind)
    model = adapted(kind, trained=False, init_lora_weights=start, **settings)
    target = torch.randn_like(model(x))
    wanted = trained_parameters(model, start, settings, "default")
    (model(x) - target).square().sum().backward()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == wanted
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert with_gradient(model, x, target) == wanted  # a factor that was zero has moved: nothing stays at zero


PARTNERS = (True, "pissa")
"""One that starts at zero and one that is taken out of the base."""


@pytest.mark.parametrize(
    ("first", "second"),
    [pair for start in STARTS for partner in PARTNERS for pair in ((start, partner), (partner, start))],
)
def test_two_starts_on_one_base_add_up_and_train_one_at_a_time(first: bool | str, second: bool | str) -> None:
    x, base = input_for(LINEAR, torch.float64), base_layer(LINEAR, dtype=torch.float64)
    model = with_adapter(Single(base), LINEAR, init_lora_weights=first).eval()
    beside = config_for(LINEAR, init_lora_weights=second, r=2)
    stats = read_by(second, {"layer": stats_for(base.weight)})  # type: ignore[arg-type]
    if initializer_of(second).quantizer is not None:
        text = f"init_lora_weights={second!r} quantizes dense linear layers, but 'layer' carries other .*'default'"
        with pytest.raises(AdapterError, match=text):
            model.add_adapter("beside", beside, stats=stats)
        return
    model.add_adapter("beside", beside, stats=stats)
    outputs = {}
    for active in ("default", "beside", "default beside"):
        model.base_model.set_adapter(active.split())
        outputs[active] = model(x).detach()
    with model.disable_adapter():
        none = model(x)
    torch.testing.assert_close(outputs["default beside"] - none, outputs["default"] + outputs["beside"] - 2 * none)
    tolerance = 1e-5 if initializer_of(first).quantizer else 1e-12
    for start, active in ((first, "default"), (second, "beside")):
        if initializer_of(start).keeps_function:
            torch.testing.assert_close(outputs[active], none, rtol=tolerance, atol=tolerance)
        model.set_adapter(active)
        target = torch.randn_like(none)
        (model(x) - target).square().sum().backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == trained_parameters(model, start, {}, active)
        model.zero_grad(set_to_none=True)
