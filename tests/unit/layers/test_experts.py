"""Adapters on bare parameters (target_parameters): matrices, stacks of experts in both layouts, several at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lorafa.errors import TargetError
from lorafa.layers.experts import LoraExperts
from toys.adapters import train
from toys.compare import close

E, IN, HIDDEN = 3, 6, 5


class Mixture(nn.Module):
    """Stacks up (E, hidden, in) and down (E, in, hidden), or both transposed, and a matrix that routes."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = torch.randn(E, HIDDEN, IN).double(), torch.randn(E, IN, HIDDEN).double()
        self.up = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.router = nn.Parameter(torch.randn(E, IN).double())
        self.act = nn.Tanh()

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        shares = (x @ self.router.T).softmax(-1)  # (T, E)
        each = self.act(x @ up) @ down  # (E, T, in)
        return scale * torch.einsum("te,eti->ti", shares, each)


class Model(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.experts, self.head = Mixture(transposed), nn.Linear(IN, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.experts(x, scale=0.5))
        return y


def adapted(*parameters: str, transposed: bool = False, **settings: object) -> PeftModel:
    config = {"target_modules": [], "target_parameters": list(parameters), "r": 2, "lora_alpha": 3} | settings
    model = get_peft_model(Model(transposed), LoraConfig(**config))  # type: ignore[arg-type]
    train(model)
    return model


def host_of(model: PeftModel, parameter: str) -> LoraExperts:
    host = model.get_base_model().experts
    while host.parameter_name != parameter:
        host = host.base_layer
    return host


def with_updates(model: PeftModel, *parameters: str) -> Model:
    """A plain model whose parameters hold the updates, expert by expert, by the formula and PEFT's storage layout."""
    inner = model.get_base_model()
    experts = inner.experts.get_base_layer()
    twin = Model(experts.is_transposed)
    twin.head.load_state_dict({key.replace("base_layer.", ""): v for key, v in inner.head.state_dict().items()})
    twin.experts.load_state_dict(experts.state_dict())
    for parameter in parameters:
        host = host_of(model, parameter)
        A, B = host.lora_A["default"].weight, host.lora_B["default"].weight
        stored = getattr(twin.experts, parameter).data
        if stored.dim() == 2:
            stored += 1.5 * B @ A
            continue
        r = A.shape[0] // E
        for e in range(E):  # A: (E r, in), expert by expert; B: (out, r E), the expert fastest
            delta = 1.5 * B[:, e::E] @ A[e * r : (e + 1) * r]
            stored[e] += delta.T if experts.is_transposed else delta
    return twin


X = torch.randn(7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHOICES = [("up",), ("down",), ("router",), ("up", "down"), ("up", "down", "router")]


@pytest.mark.parametrize("transposed", [False, True], ids=["(E, out, in)", "(E, in, out)"])
@pytest.mark.parametrize("parameters", CHOICES, ids=str)
def test_output_is_that_of_the_updated_parameters(parameters: tuple[str, ...], transposed: bool) -> None:
    model = adapted(*(f"experts.{p}" for p in parameters), transposed=transposed)
    close(model(X), with_updates(model, *parameters)(X))


@pytest.mark.parametrize("transposed", [False, True], ids=["(E, out, in)", "(E, in, out)"])
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa"])
def test_every_start_merges_unmerges_unloads_and_can_be_switched_off(start: bool | str, transposed: bool) -> None:
    model = adapted("experts.up", "experts.down", "experts.router", transposed=transposed, init_lora_weights=start)
    base = with_updates(model)
    with torch.no_grad():
        expected = model(X)
        assert not torch.allclose(expected, base(X), atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(X), base(X))
        model.merge_adapter()
        close(model(X), expected)
        with model.disable_adapter():
            assert torch.equal(model(X), base(X))
        merged = copy.deepcopy(model).merge_and_unload()
        assert type(merged.experts) is Mixture
        close(merged(X), expected)
        model.unmerge_adapter()
        assert torch.equal(model(X), expected)
        experts = model.get_base_model().experts.get_base_layer()
        plain = model.unload()
        assert plain.experts is experts
        assert torch.equal(plain(X), base(X))


def test_gradients_are_those_of_the_updated_parameters() -> None:
    model = adapted("experts.up", "experts.router")
    twin = with_updates(model, "up", "router")
    model(X).square().sum().backward()
    twin(X).square().sum().backward()
    host = host_of(model, "up")
    A, B = host.lora_A["default"].weight, host.lora_B["default"].weight
    for e in range(E):
        close(A.grad[e * 2 : e * 2 + 2], 1.5 * B[:, e::E].T @ twin.experts.up.grad[e])
        close(B.grad[:, e::E], 1.5 * twin.experts.up.grad[e] @ A[e * 2 : e * 2 + 2].T)
    host = host_of(model, "router")
    close(host.lora_B["default"].weight.grad, 1.5 * twin.experts.router.grad @ host.lora_A["default"].weight.T)
    assert host.get_base_layer().up.grad is None


def test_parameters_of_one_module_make_nested_layers_with_pefts_names() -> None:
    shapes = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(adapted("experts.up", "experts.down")).items()}
    inner, outer = "base_model.model.experts.base_layer.", "base_model.model.experts."
    assert shapes == {
        f"{inner}lora_A.weight": (E * 2, IN),
        f"{inner}lora_B.weight": (HIDDEN, 2 * E),
        f"{outer}lora_A.weight": (E * 2, HIDDEN),
        f"{outer}lora_B.weight": (IN, 2 * E),
    }


def test_a_second_adapter_uses_the_layers_that_are_there() -> None:
    model = adapted("experts.up", "experts.down")
    config = {"target_modules": [], "r": 2, "lora_alpha": 3, "init_lora_weights": False}
    model.add_adapter("b", LoraConfig(target_parameters=["experts.down", "experts.up"], **config))
    model.add_adapter("c", LoraConfig(target_parameters=["experts.router"], **config))
    first = with_updates(model, "up", "down")(X)
    assert sum(isinstance(module, LoraExperts) for module in model.modules()) == 3
    close(model(X), first)
    outputs = {}
    with torch.no_grad():
        for name in ("b", "c", "default"):
            model.set_adapter(name)
            outputs[name] = model(X)
            model.merge_adapter()
            close(model(X), outputs[name])
            model.unmerge_adapter()
        close(outputs["default"], first)
        assert not torch.allclose(outputs["b"], outputs["c"])
        model.base_model.set_adapter(["default", "b", "c"])
        together = model(X)
        model.merge_adapter(["default"])
        model.merge_adapter(["b", "c"])
        close(model(X), together)
        model.unmerge_adapter()
        model.delete_adapter("b")
        model.set_adapter("default")
        close(model(X), first)


def test_layer_inside_the_module_keeps_its_adapter_too() -> None:
    class Inner(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Linear(HIDDEN, HIDDEN).double()

    model = Model()
    model.experts = Inner()
    peft = get_peft_model(model, LoraConfig(target_modules=["act"], target_parameters=["experts.up"], r=2))
    train(peft)
    with torch.no_grad():
        expected = peft(X)
        peft.merge_adapter()
        close(peft(X), expected)
        peft.unmerge_adapter()
        assert torch.equal(peft(X), expected)
        close(peft.merge_and_unload()(X), expected)


def test_parameter_of_a_wrong_shape_is_refused() -> None:
    model = nn.Module()
    model.layer = nn.Conv2d(2, 2, 1)
    text = r"'layer.weight' has 4 dimensions \(2, 2, 1, 1\); an adapter needs a matrix"
    with pytest.raises(TargetError, match=text):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["layer.weight"]))


def test_parameter_of_a_layer_that_is_adapted_as_a_whole_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'head.weight' belongs to a layer that target_modules adapts as a whole"):
        get_peft_model(Model(), LoraConfig(target_modules=["head"], target_parameters=["head.weight"]))


def test_weight_of_a_linear_layer_can_be_adapted_as_a_parameter() -> None:
    model = get_peft_model(Model(), LoraConfig(target_modules=[], target_parameters=["head.weight"], r=2, lora_alpha=3))
    train(model)
    host = model.get_base_model().head
    A, B = host.lora_A["default"].weight, host.lora_B["default"].weight
    h = model.get_base_model().experts(X, scale=0.5)
    close(model(X), nn.functional.linear(h, host.base_layer.weight + 1.5 * B @ A, host.base_layer.bias))
