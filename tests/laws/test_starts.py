"""The law of starts: a fresh adapter changes nothing, and its numbers come from (seed, adapter, path) alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import (
    STARTED,
    STARTED_AT_BASE,
    STARTS,
    VARIANT,
    config_for,
    initializer_of,
    only_layer,
    quick_first,
    read_by,
    settings_of,
    stats_for,
    train,
    with_adapter,
)
from toys.compare import values_of
from toys.layers import KINDS, Single, backend_for, base_layer, input_for
from toys.models import Pair

LINEAR = "torch.nn.modules.linear.Linear"


def fresh(kind: str, dtype: torch.dtype, **settings: object) -> tuple[nn.Module, PeftModel]:
    """A base model, and the same one (the same layer object) with a fresh adapter."""
    layer = base_layer(kind, dtype=dtype)
    return Single(layer), with_adapter(Single(layer), kind, **settings)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "variant", "kind"), quick_first(STARTED_AT_BASE))
def test_model_computes_the_same_function_at_step_zero(start: bool | str, variant: str, kind: str) -> None:
    base, model = fresh(kind, torch.float64, **VARIANT[variant] | {"init_lora_weights": start})
    x = input_for(kind, torch.float64)
    tolerance = 1e-5 if backend_for(kind).quantized else 1e-12  # the factors on a quantized layer are float32
    torch.testing.assert_close(model(x), base(x), rtol=tolerance, atol=tolerance)


IN_UNITS_OF_S = (False, "lora_one", "functional", "lora_da", "loram")
"""Starts whose s B A is as large as s is: a random one, and steps of size s / gamma."""
TAKEN_IN_UNITS_OF_S = ("olora", "both_random", "lora_ga", "lora_ga_clipped", "lora_ga_peft", "loram_subtracted")
"""Starts that take s B A out of the base for A and B in which there is no s; of the others B A has 1 / s."""


@pytest.mark.parametrize("start", STARTS)
def test_with_rslora_a_start_is_what_it_is_without_or_as_much_larger_as_s_is(start: bool | str) -> None:
    """s = alpha / sqrt(r) in the place of alpha / r. Files of both are in tests/laws/test_starts_export.py."""
    base, x = base_layer(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    weights, outputs, taken = [], [], []
    for stable in (False, True):
        model = with_adapter(Single(copy.deepcopy(base)), LINEAR, init_lora_weights=start, use_rslora=stable)
        layer = only_layer(model)
        assert layer.scaling["default"] == (6 / 4**0.5 if stable else 6 / 4)
        weights.append(layer.base_weight().double() + layer.get_delta_weight("default"))
        outputs.append(model(x))
        own = layer.adapters["default"]
        taken.append(torch.zeros(()) if own.start is None else own.start_product())
    tolerance = 1e-5 if initializer_of(start).quantizer else 1e-12
    if start in IN_UNITS_OF_S:
        weights[0] = base.weight + 2 * (weights[0] - base.weight)
        assert not torch.allclose(weights[0], base.weight, atol=1e-4)
    else:
        torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights[1], weights[0], rtol=tolerance, atol=tolerance)
    if initializer_of(start).keeps_function:
        torch.testing.assert_close(outputs[1], Single(base)(x), rtol=1e-12, atol=1e-12)
    larger = 2 if start in TAKEN_IN_UNITS_OF_S else 1
    torch.testing.assert_close(taken[1], larger * taken[0], rtol=1e-10, atol=1e-12)
    assert bool(taken[0].any()) == initializer_of(start).moves_base


@pytest.mark.parametrize("start", [s for s, variant, kind in STARTED_AT_BASE if (variant, kind) == ("lora", LINEAR)])
def test_a_warning_says_where_dropout_takes_away_of_the_base(start: bool | str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        base, model = fresh(LINEAR, torch.float64, init_lora_weights=start, lora_dropout=0.5)
    x = input_for(LINEAR, torch.float64)
    kept = torch.allclose(model.train()(x), base(x), rtol=1e-9, atol=1e-9)
    told = any("of which dropout takes away too" in str(each.message) for each in said)
    assert told == (not kept)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("start", [True, "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_lora_with_a_zero_factor_gives_the_bits_of_the_base(
    kind: str, start: bool | str, training: bool, dtype: torch.dtype
) -> None:
    base, model = fresh(kind, dtype, init_lora_weights=start)
    x = input_for(kind, dtype)
    y = model.train(training)(x)
    for parameter in base.parameters():  # nn.MultiheadAttention takes another kernel where none needs a gradient
        parameter.requires_grad_(parameter.is_floating_point())
    assert torch.equal(y, base.train(training)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("out", "in_"), [(192, 576), (576, 1536), (100, 33)])
def test_plain_lora_gives_the_bits_of_the_base_at_the_sizes_of_a_model(
    out: int, in_: int, bias: bool, dtype: torch.dtype
) -> None:
    base = nn.Linear(in_, out, bias=bias, dtype=dtype)
    model = get_peft_model(Single(base), config_for(LINEAR, r=8))
    for shape in ((8, 33), (7,), (1, 1), ()):
        x = torch.randn(*shape, in_).to(dtype)
        assert torch.equal(model(x), base(x)), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pissa_gives_the_bits_of_the_base_on_a_linear_layer(dtype: torch.dtype) -> None:
    base, model = fresh(LINEAR, dtype, init_lora_weights="pissa")
    x = input_for(LINEAR, dtype)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_random_start_does_change_the_function(kind: str) -> None:
    base, model = fresh(kind, torch.float64, init_lora_weights=False)
    x = input_for(kind, torch.float64)
    assert not torch.allclose(model(x), base(x), atol=1e-3)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "variant", "kind"), quick_first(STARTED))
def test_training_leaves_the_base_and_what_was_taken_of_it_alone(start: bool | str, variant: str, kind: str) -> None:
    layer = base_layer(kind)
    before = values_of(layer)
    model = with_adapter(Single(layer), kind, **VARIANT[variant] | {"init_lora_weights": start})
    taken = {name: value.clone() for name, value in model.named_buffers() if ".lora_start." in name}
    train(model)
    model(input_for(kind))
    assert all(torch.equal(value, model.get_buffer(name)) for name, value in taken.items())
    after = {key.replace("out_proj.base_layer.", "out_proj."): value for key, value in values_of(layer).items()}
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def start_of(model: PeftModel, path: str, adapter: str = "default") -> torch.Tensor:
    layer = model.get_base_model().get_submodule(path)
    A, B = layer.factor_A(adapter), layer.factor_B(adapter)
    return torch.cat([A.flatten(), B.flatten()]).detach()


def with_targets(*targets: str, **settings: object) -> LoraConfig:
    return LoraConfig(target_modules=list(targets), r=4, **({"init_seed": 1} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_start_of_a_layer_does_not_depend_on_the_other_targets(start: bool | str) -> None:
    alone = get_peft_model(Pair(), with_targets("v_proj", init_lora_weights=start))
    together = get_peft_model(Pair(), with_targets("q_proj", "v_proj", "embed", init_lora_weights=start))
    assert torch.equal(start_of(alone, "v_proj"), start_of(together, "v_proj"))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_start_differs_by_layer_seed_and_adapter(start: bool | str) -> None:
    model = get_peft_model(Pair(), with_targets("q_proj", "v_proj", init_lora_weights=start))
    model.add_adapter("second", with_targets("q_proj", init_lora_weights=start))
    other = get_peft_model(Pair(), with_targets("q_proj", init_lora_weights=start, init_seed=2))
    starts = [start_of(model, "q_proj"), start_of(model, "v_proj"), start_of(model, "q_proj", "second")]
    starts.append(start_of(other, "q_proj"))
    for i, one in enumerate(starts):
        assert not any(torch.equal(one, another) for another in starts[:i])


def test_without_init_seed_the_start_follows_manual_seed() -> None:
    starts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        starts.append(start_of(get_peft_model(Pair(), with_targets("q_proj", init_seed=None)), "q_proj"))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("start", STARTS)
def test_making_an_adapter_draws_nothing_from_the_global_random_state(start: bool | str) -> None:
    model, before = Pair(), torch.get_rng_state()
    stats = {name: stats_for(model.q_proj.weight) for name in ("q_proj", "v_proj")}
    get_peft_model(model, with_targets("q_proj", "v_proj", **settings_of(start)), stats=read_by(start, stats))
    assert torch.equal(torch.get_rng_state(), before)


def test_factors_are_float32_on_a_half_precision_base_unless_told_otherwise() -> None:
    kind = LINEAR
    for dtype in (torch.bfloat16, torch.float16):
        model = get_peft_model(Single(base_layer(kind, dtype=dtype)), config_for(kind))
        assert only_layer(model).factor_A("default").dtype is torch.float32
        model = get_peft_model(Single(base_layer(kind, dtype=dtype)), config_for(kind), autocast_adapter_dtype=False)
        assert only_layer(model).factor_A("default").dtype is dtype
