"""Adapters on linear layers and transformers' Conv1D: when the fused path steps aside, what PEFT's readers see."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import BackendError
from lorafa.layers import linear as linear_module
from lorafa.numerics.fused import low_rank_linear
from lorafa.variants import lora as lora_module
from toys.adapters import adapted, only_layer, train
from toys.compare import close
from toys.layers import Single

LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"


def by_formula(layer: nn.Module, x: Tensor, scaling: float = 1.5) -> Tensor:
    base = layer.get_base_layer()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return nn.functional.linear(x, base.weight + scaling * B @ A, base.bias)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model = adapted(LINEAR, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    close(model(x), by_formula(only_layer(model), x))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each fused call: whether the base weight was in it."""
    calls: list[bool] = []

    def spy(*args: object, **kwargs: object) -> Tensor:
        calls.append(kwargs.get("weight") is not None)
        return low_rank_linear(*args, **kwargs)  # type: ignore[arg-type]

    for module in (lora_module, linear_module):
        monkeypatch.setattr(module, "low_rank_linear", spy)
    return calls


@pytest.mark.parametrize("kind", [LINEAR, CONV1D])
def test_base_and_adapter_are_one_fused_call(kind: str, counted: list[bool]) -> None:
    adapted(kind)(torch.randn(3, 8))
    assert counted == [True]


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_on_the_base_layer_fire(register: str, counted: list[bool]) -> None:
    model, fired = adapted(LINEAR, dtype=torch.float64), []
    layer = only_layer(model)
    handle = getattr(layer.base_layer, register)(lambda *args: fired.append(True))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert fired == [True]
    assert counted == [False]
    close(y, by_formula(layer, x))
    handle.remove()
    model(x)
    assert counted == [False, True]


def test_hook_that_changes_the_base_output_counts() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    layer = only_layer(model)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    close(model(x), by_formula(layer, x) + 1)


def test_forward_put_on_the_instance_counts(counted: list[bool]) -> None:
    """As accelerate's offloading does it."""
    model, x = adapted(LINEAR, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    layer = only_layer(model)
    original = layer.base_layer.forward
    layer.base_layer.forward = lambda x: original(x) + 1
    close(model(x), by_formula(layer, x) + 1)
    assert counted == [False]


def test_subclass_with_a_forward_of_its_own_counts(counted: list[bool]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = get_peft_model(Single(Doubled(8, 24)), LoraConfig(target_modules=["layer"], r=4))
    train(model)
    layer, x = only_layer(model), torch.randn(3, 8)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(model(x), 2 * layer.base_layer(x) / 2 + 2 * (x @ A.T @ B.T))
    assert counted == [False]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"])
def test_computed_weight_carries_an_adapter_but_cannot_be_merged_into(norm: Callable[..., nn.Module]) -> None:
    base = Single(norm(nn.Linear(8, 24).double()))
    model = get_peft_model(base, LoraConfig(target_modules=["layer"], r=4, lora_alpha=6))
    train(model)
    layer, x = only_layer(model), torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    close(expected, by_formula(layer, x), torch.float32)
    with pytest.raises(BackendError, match=r"this \w+ of torch: its weight is computed .* unmerged, or remove"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)


def test_trained_base_weight_and_bias_get_their_gradients() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    layer = only_layer(model)
    layer.base_layer.requires_grad_(True)
    model(x).sum().backward()
    close(layer.base_layer.weight.grad, x.sum(0).expand(24, 8))
    close(layer.base_layer.bias.grad, torch.full((24,), 3.0, dtype=torch.float64))


def test_adapters_add_up_in_any_number() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    for name, rank in (("b", 2), ("c", 6)):
        model.add_adapter(name, LoraConfig(target_modules=["layer"], r=rank, init_lora_weights=False))
    model.base_model.set_adapter(["default", "b", "c"])
    layer = only_layer(model)
    deltas = [layer.get_delta_weight(name) for name in ("default", "b", "c")]
    close(model(x), nn.functional.linear(x, layer.base_layer.weight + sum(deltas), layer.base_layer.bias))
    model.set_adapter("b")
    close(model(x), nn.functional.linear(x, layer.base_layer.weight + deltas[1], layer.base_layer.bias))


def test_only_the_active_adapters_train() -> None:
    model = adapted(LINEAR)
    model.add_adapter("b", LoraConfig(target_modules=["layer"], r=2))
    layer = only_layer(model)

    def trains(name: str) -> bool:
        return layer.lora_A[name].weight.requires_grad and layer.lora_B[name].weight.requires_grad

    assert (trains("default"), trains("b")) == (True, False)
    model.set_adapter("b")
    assert (trains("default"), trains("b")) == (False, True)
    model.set_adapter("default", inference_mode=True)
    assert (trains("default"), trains("b")) == (False, False)
    assert not layer.base_layer.weight.requires_grad


def test_deleting_an_adapter_takes_all_of_it_away() -> None:
    model = adapted(LINEAR, use_dora=True, init_lora_weights="pissa")
    keys = set(model.state_dict())
    model.add_adapter("b", LoraConfig(target_modules=["layer"], r=2, use_dora=True, init_lora_weights="pissa"))
    model.delete_adapter("b")
    layer = only_layer(model)
    assert set(model.state_dict()) == keys
    for table in (layer.r, layer.scaling, layer.lora_alpha, layer.use_rslora, layer.use_dora, layer.adapters):
        assert set(table) == {"default"}


def test_scale_is_set_multiplied_and_brought_back() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    layer = only_layer(model)
    layer.set_scale("default", 2)
    assert layer.scaling["default"] == 2 * 6 / 4
    close(model(x), by_formula(layer, x, 3.0))
    layer.scale_layer(0.5)
    layer.scale_layer(4)
    close(model(x), by_formula(layer, x, 6.0))
    layer.unscale_layer(4)
    close(model(x), by_formula(layer, x, 1.5))
    layer.scale_layer(7)
    layer.unscale_layer()
    close(model(x), by_formula(layer, x, 1.5))


def test_layer_answers_as_pefts_does() -> None:
    model = adapted(LINEAR, r=4, lora_alpha=6, lora_dropout=0.1)
    layer = only_layer(model)
    assert (layer.in_features, layer.out_features) == (8, 24)
    assert layer.r["default"] == 4
    assert layer.lora_alpha["default"] == 6
    assert layer.scaling["default"] == 1.5
    assert layer.lora_dropout["default"].p == 0.1
    assert layer.lora_A["default"].weight.shape == (4, 8)
    assert layer.lora_B["default"].weight.shape == (24, 4)
    assert layer.lora_A["default"].in_features == 8
    assert layer.weight is layer.get_base_layer().weight
    assert layer.bias is layer.get_base_layer().bias
    assert layer.active_adapters == ["default"]
    assert layer.active_adapter == ["default"]
    assert not layer.merged
    assert not layer.disable_adapters
    assert repr(layer).startswith("LoraLinear(\n  default: r=4, scaling=1.5\n")


def test_dropout_acts_in_training_mode_only_and_on_the_adapter_only() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64, lora_dropout=0.5), torch.randn(50, 8, dtype=torch.float64)
    layer = only_layer(model)
    close(model.eval()(x), by_formula(layer, x))
    assert not torch.allclose(model.train()(x), by_formula(layer, x))
    nn.init.zeros_(layer.lora_B["default"].weight)
    close(model(x), layer.base_layer(x))


def test_mean_over_dropout_is_the_output_without_it() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64, lora_dropout=0.3), torch.randn(1, 8, dtype=torch.float64)
    layer = only_layer(model)
    with torch.no_grad():
        samples = model(x.expand(40_000, 8)) - layer.base_layer(x)
        expected = by_formula(layer, x) - layer.base_layer(x)
        error = samples.std(0) / 200
    assert ((samples.mean(0) - expected).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("kind", [LINEAR, CONV1D])
def test_model_survives_deepcopy_pickle_and_torch_save(kind: str) -> None:
    model, x = adapted(kind, use_dora=True, init_lora_weights="pissa"), torch.randn(3, 8)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            only_layer(twin).lora_B["default"].weight.add_(1)
        assert not torch.allclose(twin(x), model(x))
        assert only_layer(twin).adapters["default"].layer is only_layer(twin)


def test_moving_a_model_to_another_dtype_moves_the_adapter_and_its_frozen_start() -> None:
    model, x = adapted(LINEAR, init_lora_weights="pissa"), torch.randn(3, 8)
    expected = model(x)
    model.double()
    torch.testing.assert_close(model(x.double()).float(), expected, rtol=1e-5, atol=1e-5)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
