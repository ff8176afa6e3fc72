"""DoRA with dropout in one function, against the formula in plain operations with the mask written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa import LoraConfig, get_peft_model
from lorafa.backends.nf4 import NF4Linear
from lorafa.numerics.dropped_base import dropped_base_linear
from lorafa.numerics.masks import draw_seed, dropout_probability, keep_mask
from toys.adapters import train

IN, OUT, RANK, SCALING, P = 12, 10, 3, 1.7, 0.3
SHAPES = {"x": (2, 6, IN), "weight": (OUT, IN), "bias": (OUT,), "gain": (OUT,), "A": (RANK, IN), "B": (OUT, RANK)}
TRAINED = ("x", "bias", "gain", "A", "B")


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def fused(t: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(7)
    given = {name: t[name] for name in ("weight", "bias", "gain")}
    return dropped_base_linear(t["x"], t["A"], t["B"], SCALING, dropout=P, **given)


def formula(t: dict[str, Tensor]) -> Tensor:
    """y = W x + b + (gain - 1) W d + gain s B A d, with the mask that the same seed draws."""
    torch.manual_seed(7)
    mask = keep_mask(12, IN, P, draw_seed(), torch.device("cpu")).view(2, 6, IN)
    d = t["x"] * mask.to(t["x"].dtype) / (1 - dropout_probability(P))
    W = t["weight"]
    return t["x"] @ W.T + t["bias"] + (t["gain"] - 1) * (d @ W.T) + t["gain"] * (SCALING * d @ t["A"].T @ t["B"].T)


def gradients(run: object, needed: tuple[str, ...], t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    own = {name: value.clone().requires_grad_(name in needed) for name, value in t.items()}
    y = run(own)  # type: ignore[operator]
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: own[name].grad for name in needed}


@pytest.mark.parametrize("needed", [c for n in range(1, 6) for c in itertools.combinations(TRAINED, n)], ids="+".join)
def test_output_and_gradients_are_those_of_the_formula(needed: tuple[str, ...]) -> None:
    y, found = gradients(fused, needed, tensors())
    wanted, right = gradients(formula, needed, tensors())
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    for name in needed:
        torch.testing.assert_close(found[name], right[name], rtol=1e-10, atol=1e-10, msg=name)


def model_of(dtype: torch.dtype, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=dtype)
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=P, **settings)  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(layer), config)
    train(model, 0.05)
    return model


def kept(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What is kept for backward beside parameters and what has no rows of x."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.shape[0] >= x.shape[0]:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_are_x_as_it_came_the_thin_product_and_one_product_with_the_base(dtype: torch.dtype) -> None:
    x = torch.randn(100, 64, dtype=dtype, requires_grad=True)
    shapes = sorted((tuple(one.shape), one.dtype) for one in kept(model_of(dtype), x))
    assert shapes == sorted([((100, 4), dtype), ((100, 48), dtype), ((100, 64), dtype)])
    frozen = sorted((tuple(one.shape), one.dtype) for one in kept(model_of(dtype, freeze_A=True), x))
    assert frozen == sorted([((100, 4), dtype), ((100, 48), dtype)])


def test_a_gain_of_one_and_no_change_leave_the_bits_of_the_base() -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 48, dtype=torch.bfloat16)
    x = torch.randn(30, 64, dtype=torch.bfloat16)
    wanted = base(x)
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=P))
    assert torch.equal(model.train()(x), wanted)


def test_codes_stand_for_the_weight_they_are_read_as() -> None:
    torch.manual_seed(0)
    quantized = NF4Linear(torch.randn(48, 64), torch.randn(48))
    x, found = torch.randn(9, 64, requires_grad=True), []
    for layer in (quantized, nn.Linear(64, 48)):
        if isinstance(layer, nn.Linear):
            layer.load_state_dict({"weight": quantized.dequantize(), "bias": quantized.bias})
        config = LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=P, init_seed=0)
        model = get_peft_model(nn.Sequential(layer), config)
        torch.manual_seed(1)
        train(model, 0.05)
        torch.manual_seed(2)
        y = model(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y.detach(), grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask(reentrant: bool) -> None:
    model = model_of(torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64, requires_grad=True)

    found = []
    for checkpointed in (True, False):
        torch.manual_seed(3)
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
        x.grad = None
    torch.testing.assert_close(found[0], found[1])
