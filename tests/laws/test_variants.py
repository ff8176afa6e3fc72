"""The law of variants: the change of the output is the change of the weight, on every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import get_peft_model
from lorafa.errors import ConfigError
from lorafa.layers import LAYERS
from lorafa.variants import VARIANTS
from toys.adapters import DEFINED, VARIANT, adapted, config_for, initializer_of, only_layer, with_starts
from toys.compare import close
from toys.layers import KINDS, backend_for, base_layer, input_for

OVER_A_START = [
    (variant, kind, start)
    for variant, kind, start in with_starts(DEFINED, "pissa")
    if initializer_of(start).moves_base and backend_for(kind).host != "attention"
]
UNDEFINED = [(v, k) for v in VARIANT for k in KINDS if (v, k) not in DEFINED]


def made(variant: str, kind: str, **settings: object) -> nn.Module:
    return adapted(kind, **VARIANT[variant], **settings)


def run_with_weight(kind: str, layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The output of ``layer`` if its weight were ``weight`` (out, in): written out where a formula is short."""
    backend = backend_for(kind)
    if backend.host == "linear":
        return nn.functional.linear(x, weight.to(x.dtype), bias)
    if backend.host == "embedding":
        return weight.T[x]
    changed = backend.with_weight(layer, weight, bias)
    y: Tensor = changed(x, x, x)[0] if backend.host == "attention" else changed(x)
    return y


def test_every_variant_is_under_the_laws() -> None:
    """Gates, which have no weight to compare with, are under a law of their own (test_gates.py)."""
    under = {name for names in VARIANT for name in names.split(" over ")}
    assert under == {name for name in VARIANTS.names() if VARIANTS.get(name).stage != "gate"}


@pytest.mark.matrix(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_variant_changes_the_output_exactly_as_it_changes_the_weight(
    variant: str, kind: str, bias: bool, dtype: torch.dtype
) -> None:
    model, x = made(variant, kind, bias=bias, dtype=dtype), input_for(kind, dtype)
    layer, backend = only_layer(model), backend_for(kind)
    base = layer.get_base_layer()
    if backend.host == "attention":  # its output projection carries an adapter too; here the input projection is meant
        out_proj = layer.base_layer.out_proj
        nn.init.zeros_(out_proj.lora_B["default"].weight)
        base.out_proj = out_proj.base_layer
    weight = backend.weight(base)
    with torch.no_grad():
        expected = run_with_weight(
            kind, base, weight + layer.adapters["default"].delta_weight(weight), backend.bias(base), x
        )
        by_weight_alone = run_with_weight(kind, base, weight, backend.bias(base), x)
        actual = model(x)
    quantized = backend_for(kind).quantized and dtype is torch.float64  # scales are float32
    close(actual, expected, torch.float32 if quantized else dtype)
    assert (expected - by_weight_alone).abs().max() > 0.05, "the adapter does something"


@pytest.mark.parametrize(("variant", "kind", "start"), OVER_A_START)
def test_variant_law_holds_over_a_frozen_start(variant: str, kind: str, start: bool | str) -> None:
    settings = VARIANT[variant] | {"init_lora_weights": start}
    model, x = adapted(kind, dtype=torch.float64, **settings), input_for(kind, torch.float64)
    layer, backend = only_layer(model), backend_for(kind)
    base = layer.get_base_layer()
    weight = backend.weight(base)
    adapter = layer.adapters["default"]
    assert adapter.start is not None
    with torch.no_grad():
        expected = run_with_weight(kind, base, weight + adapter.delta_weight(weight), backend.bias(base), x)
        close(model(x), expected, torch.float32 if backend_for(kind).quantized else torch.float64)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("variant", "kind"), [case for case in DEFINED if backend_for(case[1]).host == "linear"])
def test_an_input_without_rows_gives_no_rows_and_gradients_of_zero(variant: str, kind: str, dropout: float) -> None:
    model, x = made(variant, kind, lora_dropout=dropout), input_for(kind)[:0]
    with torch.no_grad():
        wanted = only_layer(model).get_base_layer()(x).shape
        assert model.eval()(x).shape == wanted
    y = model.train()(x)
    assert y.shape == wanted
    y.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize(("variant", "kind"), UNDEFINED)
def test_variant_refuses_a_kind_of_layer_it_is_not_defined_on(variant: str, kind: str) -> None:
    model = nn.Module()
    model.layer = base_layer(kind)
    with pytest.raises(ConfigError, match=f"{variant} is not defined on {backend_for(kind).host} layers"):
        get_peft_model(model, config_for(kind, **VARIANT[variant]))


def test_hosts_of_every_variant_are_kinds_of_layer() -> None:
    for name in VARIANTS.names():
        assert VARIANTS.get(name).hosts <= set(LAYERS.names())


def test_lora_delta_is_the_scaled_product_of_its_factors() -> None:
    layer = only_layer(adapted("torch.nn.modules.linear.Linear", dtype=torch.float64, r=4, lora_alpha=6))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    close(layer.get_delta_weight("default"), 6 / 4 * torch.einsum("or,ri->oi", B, A))


def test_lora_bias_is_scaled_and_added() -> None:
    kind = "torch.nn.modules.linear.Linear"
    model, x = adapted(kind, dtype=torch.float64, r=4, lora_alpha=6, lora_bias=True), input_for(kind, torch.float64)
    layer = only_layer(model)
    A, B, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_B["default"].bias
    base = layer.get_base_layer()
    close(model(x), x @ base.weight.T + base.bias + 1.5 * ((x @ A.T) @ B.T + b))


@pytest.mark.parametrize("kind", [kind for variant, kind in DEFINED if variant == "dora"])
def test_rows_of_a_dora_weight_have_the_magnitudes_as_lengths(kind: str) -> None:
    layer = only_layer(adapted(kind, dtype=torch.float64, use_dora=True))
    weight = layer.base_weight().double()
    merged = weight + layer.adapters["default"].delta_weight(weight)
    magnitude = layer.lora_magnitude_vector["default"].weight.flatten()
    torch.testing.assert_close(merged.norm(dim=1), magnitude.abs().double(), rtol=1e-5, atol=1e-5)


def test_dora_takes_its_norm_as_a_constant_in_backward() -> None:
    """Section 4.3 of the paper: gradients are those of m * (W + s B A) / c with c = ||W + s B A|| held fixed."""
    kind = "torch.nn.modules.linear.Linear"
    model, x = adapted(kind, dtype=torch.float64, use_dora=True), input_for(kind, torch.float64)
    layer, probe = only_layer(model), torch.randn(5, 7, 24, dtype=torch.float64)
    (model(x) * probe).sum().backward()
    holders = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    A, B, m = (holder["default"].weight.detach().clone().requires_grad_() for holder in holders)
    base = layer.get_base_layer()
    updated = base.weight + 1.5 * B @ A
    c = updated.detach().norm(dim=1)
    ((x @ ((m / c)[:, None] * updated).T + base.bias) * probe).sum().backward()
    for holder, parameter in zip(holders, (A, B, m), strict=True):
        close(holder["default"].weight.grad, parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dora_starts_at_the_base_and_trains_where_a_row_of_the_weight_has_no_length(dtype: torch.dtype) -> None:
    """Also where magnitudes are float16, whose least number is larger than the length a row of zeros is given."""
    kind = "torch.nn.modules.linear.Linear"
    base, x = base_layer(kind, dtype=dtype), input_for(kind, dtype)
    with torch.no_grad():
        base.weight[1] = 0
        base.weight[2] *= 1e-9
    config = config_for(kind, use_dora=True)
    model = get_peft_model(nn.ModuleDict({"layer": base}), config, autocast_adapter_dtype=False)
    layer = only_layer(model)
    assert layer.adapters["default"].extra("magnitude").dtype is dtype
    y = layer(x)
    assert torch.equal(y, base(x))
    y.float().square().sum().backward()
    grad = layer.factor_B("default").grad
    assert grad is not None
    assert bool(grad.isfinite().all())
    assert bool((grad[1] != 0).any())
    with torch.no_grad():
        layer.factor_B("default").sub_(grad.sign() / 8)
    assert bool(layer(x).isfinite().all())
    assert bool(layer.get_delta_weight("default").isfinite().all())


def test_dora_with_dropout_drops_the_input_of_base_and_change_alike() -> None:
    """With drop(x) the output is y + (rho - 1) W drop(x) + rho s B A drop(x): Equation 5 and the authors' code."""
    kind = "torch.nn.modules.linear.Linear"
    model = adapted(kind, dtype=torch.float64, use_dora=True, lora_dropout=0.5)
    layer = only_layer(model)
    base, adapter = layer.get_base_layer(), layer.adapters["default"]
    one = nn.functional.one_hot(torch.tensor([3]), base.in_features).double()  # it is kept and doubled, or dropped
    with torch.no_grad():
        y, low_rank = base(one)[0], adapter.product()
        gain = layer.lora_magnitude_vector["default"].weight / (base.weight + low_rank).norm(dim=1)
        kept = y + 2 * ((gain - 1) * base.weight[:, 3] + gain * low_rank[:, 3])
        outputs = [model(one)[0] for _ in range(40)]
    for output in outputs:
        close(output, min(y, kept, key=lambda candidate: (candidate - output).abs().max()))
    assert 5 < sum(torch.allclose(output, kept) for output in outputs) < 35
