"""Tools that work through ``lora_A``, ``lora_B``, ``lora_dropout``: hooks fire and count, modules can be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.base import LoraLayer
from toys.adapters import DEFINED, VARIANT, adapted, only_layer, starts_of, train
from toys.compare import close
from toys.layers import Single, backend_for, input_for

LINEAR = "torch.nn.modules.linear.Linear"
CONV2D = "torch.nn.modules.conv.Conv2d"
ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
UNCALLED = ("bdlora", "velora", "monteclora")
"""Formulas that are not computed by calling the modules, in training at least."""
CALLED = [
    (v, k) for v, k in DEFINED if backend_for(k).host in ("linear", "conv") and v.split(" over ")[-1] not in UNCALLED
]
"""(variant, kind of layer) that have a product with the layer's input, and so modules that can be called."""
WITH_STARTS = [(v, k, start) for v, k in CALLED for start in starts_of(v, False, "pissa")]


def parts(layer: LoraLayer) -> tuple[nn.Module, nn.Module, nn.Module]:
    return layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]


def watch(module: nn.Module) -> None:
    """A hook that changes nothing."""
    module.register_forward_hook(lambda *_: None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ran(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y: Tensor = model(x)
    y.sin().sum().backward()
    return y.detach(), gradients(model)


def is_exact(kind: str) -> bool:
    return not backend_for(kind).quantized


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind", "start"), WITH_STARTS, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["lora_A", "lora_B", "lora_dropout"])
def test_a_hook_that_only_looks_changes_neither_output_nor_gradients(
    variant: str, kind: str, start: bool | str, which: int
) -> None:
    dtype = torch.float64 if is_exact(kind) else torch.float32
    settings = VARIANT[variant] | {"init_lora_weights": start}
    model, x = adapted(kind, dtype=dtype, **settings), input_for(kind, dtype)
    y, grads = ran(model, x)
    watch(parts(only_layer(model))[which])
    watched, grads_watched = ran(model, x)
    close(watched, y, dtype)
    assert grads.keys() == grads_watched.keys()
    for name in grads:
        close(grads_watched[name], grads[name], dtype)


@pytest.mark.parametrize(("variant", "kind"), CALLED, ids=str)
def test_forward_and_backward_hooks_fire_on_every_module_of_the_adapter(variant: str, kind: str) -> None:
    settings = VARIANT[variant] | {"init_lora_weights": starts_of(variant, False)[0]}
    model = adapted(kind, lora_dropout=0.25, **settings)
    fired: list[str] = []
    for name, module in zip(("A", "B", "dropout"), parts(only_layer(model)), strict=True):
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: fired.append(f"after {name}"))
        module.register_full_backward_hook(lambda *_, name=name: fired.append(f"backward {name}"))
    x = input_for(kind).requires_grad_()
    model(x).sum().backward()
    assert fired == [
        *("before dropout", "after dropout", "before A", "after A", "before B", "after B"),
        *("backward B", "backward A", "backward dropout"),
    ]


@pytest.mark.parametrize("kind", [LINEAR, CONV2D])
@pytest.mark.parametrize("start", [False, "pissa"])
def test_what_a_hook_returns_takes_the_place_of_the_product_and_a_start_is_still_subtracted(
    kind: str, start: bool | str
) -> None:
    model, x = adapted(kind, dtype=torch.float64, init_lora_weights=start), input_for(kind, torch.float64)
    layer = only_layer(model)
    own = layer.adapters["default"].start_of(x) if start == "pissa" else torch.zeros(())
    layer.lora_B["default"].register_forward_hook(lambda module, args, y: torch.ones_like(y))
    close(model(x), layer.base_layer(x) + layer.scaling["default"] - own)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_watched_layer_with_a_start_computes_the_base_at_step_0(variant: str) -> None:
    settings = VARIANT[variant]
    model = adapted(LINEAR, dtype=torch.float64, trained=False, init_lora_weights="pissa", **settings)
    watch(only_layer(model).lora_A["default"])
    x = input_for(LINEAR, torch.float64)
    close(model(x), only_layer(model).base_layer(x))


def test_every_adapter_of_a_layer_counts_if_one_is_watched() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    model.add_adapter("b", LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    y, grads = ran(model, x)
    watch(only_layer(model).lora_B["b"])
    watched, grads_watched = ran(model, x)
    close(watched, y)
    assert grads.keys() == grads_watched.keys()


@pytest.mark.parametrize("lora_bias", [False, True])
def test_per_sample_gradients_taken_by_hooks_are_those_of_single_samples(lora_bias: bool) -> None:
    """The activation and gradient of each row, outer product by outer product (Opacus)."""
    model = adapted(LINEAR, dtype=torch.float64, lora_bias=lora_bias)
    layer, x = only_layer(model), torch.randn(5, 8, dtype=torch.float64)
    wanted = []
    for row in x:
        model.zero_grad()
        model(row[None]).sin().sum().backward()
        wanted.append((layer.lora_A["default"].weight.grad.clone(), layer.lora_B["default"].weight.grad.clone()))
    seen: dict[str, Tensor] = {}
    for name in ("lora_A", "lora_B"):
        module = getattr(layer, name)["default"]
        module.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(f"{name} in", args[0].detach()))
        module.register_full_backward_hook(lambda m, gi, go, name=name: seen.__setitem__(f"{name} out", go[0]))
    model(x).sin().sum().backward()
    for i, name in enumerate(("lora_A", "lora_B")):
        close(torch.einsum("no,ni->noi", seen[f"{name} out"], seen[f"{name} in"]), torch.stack([w[i] for w in wanted]))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_watched_adapter_in_float32_takes_inputs_in_bfloat16(autocast: bool) -> None:
    model, x = adapted(LINEAR, dtype=torch.bfloat16), input_for(LINEAR, torch.bfloat16)
    assert only_layer(model).lora_A["default"].weight.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
        watch(only_layer(model).lora_A["default"])
        watched = model(x)
    assert watched.dtype is torch.bfloat16
    close(watched, y, torch.bfloat16)


@pytest.fixture
def on_all_modules() -> Iterator[list[nn.Module]]:
    """The modules that a hook on all modules of the process has seen."""
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    yield seen
    handle.remove()


def test_a_hook_on_all_modules_sees_the_base_and_the_adapter(on_all_modules: list[nn.Module]) -> None:
    model = adapted(LINEAR)
    layer = only_layer(model)
    model(input_for(LINEAR))
    assert {id(module) for module in (layer, layer.base_layer, *parts(layer))} <= {id(m) for m in on_all_modules}


# ---- dropout


def set_p(layer: LoraLayer) -> None:
    layer.lora_dropout["default"].p = 0.0


def put_identity(layer: LoraLayer) -> None:
    layer.lora_dropout["default"] = nn.Identity()


def put_in_eval_mode(layer: LoraLayer) -> None:
    layer.lora_dropout["default"].eval()


@pytest.mark.parametrize("switch", [set_p, put_identity, put_in_eval_mode])
@pytest.mark.parametrize("kind", [LINEAR, CONV2D])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_that_is_switched_off_drops_nothing_in_training(
    variant: str, kind: str, switch: Callable[[LoraLayer], None]
) -> None:
    model = adapted(kind, dtype=torch.float64, lora_dropout=0.5, use_dora=variant == "dora")
    x = input_for(kind, torch.float64)
    expected = model.eval()(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    switch(only_layer(model))
    close(model(x), expected)


def test_dropout_in_training_mode_drops_in_a_model_in_eval_mode() -> None:
    model, x = adapted(LINEAR, lora_dropout=0.5), input_for(LINEAR)
    model.eval()
    only_layer(model).lora_dropout["default"].train()
    assert not torch.equal(model(x), model(x))


class Negated(nn.Dropout):
    """A dropout with a forward of its own, in either mode."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


@pytest.mark.parametrize("kind", [LINEAR, CONV2D])
@pytest.mark.parametrize("start", [False, "pissa"])
def test_another_lora_dropout_acts_on_the_adapters_input_alone(kind: str, start: bool | str) -> None:
    model, x = adapted(kind, dtype=torch.float64, init_lora_weights=start), input_for(kind, torch.float64)
    layer = only_layer(model)
    A, B = layer.adapters["default"].A, layer.adapters["default"].B
    update = layer.low_rank(x, A, B, layer.scaling["default"])
    start_part = layer.adapters["default"].start_of(x) if start == "pissa" else 0
    layer.lora_dropout["default"] = Negated()
    for mode in (True, False):
        close(model.train(mode)(x), layer.base_layer(x) - update - start_part)


def test_another_lora_dropout_acts_on_all_that_dora_adds_to_the_base() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64, bias=False, use_dora=True), input_for(LINEAR, torch.float64)
    plain = only_layer(model).base_layer(x)
    added = model(x) - plain
    only_layer(model).lora_dropout["default"] = Negated()
    close(model(x), plain - added)


# ---- factors in other modules


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_doubled_B(**settings: Any) -> tuple[nn.Module, LoraLayer, Tensor]:
    model, x = adapted(LINEAR, dtype=torch.float64, **settings), input_for(LINEAR, torch.float64)
    layer = only_layer(model)
    old, new = layer.lora_B["default"], Doubled(4, 24, bias=False)
    new.weight = old.weight
    layer.lora_B["default"] = new
    return model, layer, x


def test_a_module_with_another_forward_in_place_of_lora_B_computes_with_it() -> None:
    model, layer, x = with_doubled_B()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    close(model(x), layer.base_layer(x) + 2 * 1.5 * x @ A.T @ B.T)


def test_a_forward_put_on_lora_A_is_called() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    layer = only_layer(model)
    own, plain = layer.lora_A["default"].forward, layer.base_layer(x)
    update = model(x) - plain
    layer.lora_A["default"].forward = lambda x: 3 * own(x)
    close(model(x), plain + 3 * update)


def test_a_sequence_of_modules_in_place_of_lora_A_is_called() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    layer = only_layer(model)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    layer.lora_A["default"] = nn.Sequential(A, nn.Tanh())
    close(model(x), layer.base_layer(x) + 1.5 * (x @ A.weight.T).tanh() @ B.weight.T)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_bias_on_a_factor_counts(name: str) -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    layer = only_layer(model)
    factor, y = getattr(layer, name)["default"], model(x)
    factor.bias = nn.Parameter(torch.randn(factor.out_features, dtype=torch.float64))
    constant = factor.bias if name == "lora_B" else layer.lora_B["default"].weight @ factor.bias
    close(model(x), y + 1.5 * constant)
    with pytest.raises(AdapterError, match="lora_A or lora_B of adapter 'default' was replaced by one with a bias"):
        model.merge_adapter()


def test_a_parametrized_factor_computes_and_merges_with_the_weight_it_has() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model, x = adapted(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    layer = only_layer(model)
    plain = layer.base_layer(x)
    update = model(x) - plain
    parametrize.register_parametrization(layer.lora_A["default"], "weight", Half())
    close(model(x), plain + update / 2)
    model.merge_adapter()
    close(model(x), plain + update / 2)


def test_other_settings_of_a_convolution_in_place_of_lora_A_count() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    model = get_peft_model(Single(layer), LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False))
    x, adapted_layer = torch.randn(2, 4, 5, 5, dtype=torch.float64), only_layer(model)
    A, B = adapted_layer.lora_A["default"], adapted_layer.lora_B["default"]
    A.padding, A.dilation = (2, 2), (2, 2)
    z = nn.functional.conv2d(x, A.weight, padding=2, dilation=2)
    close(model(x), layer(x) + 4 * nn.functional.conv2d(z, B.weight))
    with pytest.raises(AdapterError, match=r"was replaced by one with a bias or with other settings, so its weights"):
        model.merge_adapter()


def test_a_factor_with_another_forward_is_not_merged() -> None:
    model, layer, x = with_doubled_B()
    y = model(x)
    said = r"lora_B of adapter 'default' was replaced by a Doubled or given another forward, so the update is no matrix"
    for action in (model.merge_adapter, model.base_model.merge_and_unload, lambda: layer.get_delta_weight("default")):
        with pytest.raises(AdapterError, match=said):
            action()
        assert torch.equal(model(x), y)


def test_dora_does_not_measure_what_is_no_matrix() -> None:
    model, _, x = with_doubled_B(use_dora=True)
    with pytest.raises(AdapterError, match="Put the module that was there back, or call the model as it is"):
        model(x)


# ---- what is never called


@pytest.mark.parametrize(
    ("settings", "holder"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"init_lora_weights": "kasa"}, "lora_diag"),
        ({"init_lora_weights": "lora_sb"}, "lora_core"),
    ],
    ids=str,
)
def test_a_hook_on_what_a_variant_only_reads_is_refused(settings: dict[str, Any], holder: str) -> None:
    model = adapted(LINEAR, **settings)
    watch(getattr(only_layer(model), holder)["default"])
    with pytest.raises(AdapterError, match=f"A hook is on {holder} of adapter 'default', which is never called: its"):
        model(input_for(LINEAR))


@pytest.mark.parametrize("kind", [ATTENTION, "experts (E, out, in)", "matrix parameter"])
def test_a_hook_on_a_factor_of_a_layer_that_changes_its_weight_is_refused(kind: str) -> None:
    model, x = adapted(kind), input_for(kind)
    y = model(x)
    watch(only_layer(model).lora_A["default"])
    with pytest.raises(AdapterError, match=r"A hook is on lora_A of adapter 'default', which is never called: a Lora"):
        model(x)
    with model.disable_adapter():
        model(x)
    only_layer(model).lora_A["default"]._forward_hooks.clear()
    assert torch.equal(model(x), y)


def test_a_formula_without_a_place_between_its_factors_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafa.variants.kasa import KaSA

    monkeypatch.delattr(KaSA, "between")
    model = adapted(LINEAR, init_lora_weights="kasa")
    watch(only_layer(model).lora_A["default"])
    with pytest.raises(BackendError, match=r"A hook is on lora_A, .* and kasa is not computed by calling them. Remove"):
        model(input_for(LINEAR))


# ---- modules of two layers that share a weight


def test_hooks_on_a_factor_that_two_layers_share_see_both() -> None:
    first, second = nn.Linear(6, 6, bias=False).double(), nn.Linear(6, 6, bias=False).double()
    second.weight = first.weight
    net = nn.Sequential(first, second)
    config = LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights=False, ensure_weight_tying=True)
    model, x = get_peft_model(net, config), torch.randn(3, 6, dtype=torch.float64)
    train(model)
    y, seen = model(x), []
    net[0].lora_A["default"].register_forward_hook(lambda module, args, z: seen.append(args[0]))
    close(model(x), y)
    assert len(seen) == 2
