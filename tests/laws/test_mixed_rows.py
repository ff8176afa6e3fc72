"""The law of rows: a batch that mixes adapters gives each row what it gets alone, and each adapter its own gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, prepare_model_for_compiled_hotswap
from lorafa.errors import BackendError
from toys.adapters import DEFINED, VARIANT, adapted, config_for, read_by, stats_for, train
from toys.compare import close, refused
from toys.layers import PARAMETERS, backend_for, computed_in, input_for, weight_for

Names = Sequence[str | Sequence[str]]
MIXED = [
    (variant, kind)
    for variant, kind in DEFINED
    if backend_for(kind).host != "attention" and (kind not in PARAMETERS or kind == "matrix parameter")
]
ORDERS: dict[str, Names] = {
    "every other": ["default", "second", "default", "__base__", "second"],
    "side by side": ["second", "second", "default", "default", "default"],
    "several a row": [["default", "second"], "default", "__base__", ["second", "default"], []],
    "base alone": ["__base__"] * 5,
}


def two_adapters(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """Two adapters of one kind, of other ranks where the formula leaves a choice, and of other scalings."""
    torch.manual_seed(0)
    model = adapted(kind, dtype=dtype, **settings)
    config = config_for(kind, **(settings | {"r": 2, "lora_alpha": 5}))
    stats = read_by(config.init_lora_weights, {"layer": stats_for(weight_for(kind))})
    model.add_adapter("second", config, stats=stats)
    model.set_requires_grad("second")
    train(model)
    return model


def alone(model: PeftModel, x: Tensor, names: Names, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The output for each row, the model called with it alone and its adapters active."""
    outputs = []
    for row, chosen in zip(x, names, strict=True):
        listed = [chosen] if isinstance(chosen, str) else list(chosen)
        listed = [name for name in listed if name != "__base__"]
        model.base_model.set_adapter(listed)
        outputs.append(call(row[None]))
    model.base_model.set_adapter("default")
    model.set_requires_grad(list(model.peft_config))
    return outputs


def gradients(model: nn.Module, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a loss in which every number of the output counts differently, by parameter."""
    model.zero_grad(set_to_none=True)
    found = torch.cat(list(outputs))
    (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_alone(model: PeftModel, x: Tensor, names: Names, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The sum of the gradients of each row, each called by itself, of the same loss."""
    count, total = len(x), dict[str, Tensor]()
    for i, chosen in enumerate(names):
        listed = [n for n in ([chosen] if isinstance(chosen, str) else chosen) if n != "__base__"]
        model.base_model.set_adapter(listed)
        model.zero_grad(set_to_none=True)
        y = call(x[i : i + 1])
        weights = torch.linspace(-1, 1, count * y.numel(), dtype=y.dtype)[i * y.numel() : (i + 1) * y.numel()]
        if y.requires_grad:
            (y * weights.view_as(y)).sum().backward()  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, torch.zeros_like(p)) + p.grad
    model.base_model.set_adapter("default")
    model.set_requires_grad(list(model.peft_config))
    return total


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("order", "variant", "kind"),
    # how rows are told apart is the same for all formulas
    [(order, v, k) for v, k in MIXED for order in (ORDERS if v in ("lora", "dora") else ("every other",))],
)
def test_every_row_is_as_it_is_alone(order: str, variant: str, kind: str) -> None:
    model = two_adapters(kind, **VARIANT[variant]).eval()
    exact = all(p.dtype is torch.float64 for p in model.parameters() if p.requires_grad)
    tolerance = 1e-9 if exact and computed_in(kind, torch.float64) is torch.float64 else 1e-4
    x = input_for(kind, torch.float64)
    names = ORDERS[order][: len(x)]
    with torch.no_grad():
        expected = torch.cat(alone(model, x, names, model))
        close(model(x, adapter_names=list(names)), expected, tolerance)
    if any(p.requires_grad for p in model.parameters()) and order != "base alone":
        found = gradients(model, [model(x, adapter_names=list(names))])
        wanted = gradients_alone(model, x, names, model)
        for name in found.keys() | wanted.keys():
            zeros = torch.zeros(())
            close(found.get(name, zeros), wanted.get(name, zeros).expand_as(found.get(name, zeros)), tolerance)


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_biases_starts_and_scalings_are_those_of_the_row(settings: dict[str, Any]) -> None:
    kind = "torch.nn.modules.linear.Linear"
    model = two_adapters(kind, **settings).eval()
    x, names = input_for(kind, torch.float64), ORDERS["every other"]
    with torch.no_grad():
        close(model(x, adapter_names=names), torch.cat(alone(model, x, names, model)), 1e-10)
    found, wanted = gradients(model, [model(x, adapter_names=names)]), gradients_alone(model, x, names, model)
    assert found.keys() == wanted.keys()
    for name in found:
        close(found[name], wanted[name], 1e-9)


@pytest.mark.parametrize("places", [1, 12])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_free_slots_of_ranks_change_no_row_and_no_gradient(settings: dict[str, Any], places: int) -> None:
    """Rows and columns of zeros add nothing, and scalings that are held in tensors are the numbers they were."""
    kind, names = "torch.nn.modules.linear.Linear", ORDERS["several a row"]
    plain, prepared = (two_adapters(kind, **settings) for _ in range(2))
    prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    x = input_for(kind, torch.float64)[:, :1].repeat(1, places, 1)[: len(names)]
    with torch.no_grad():
        close(prepared.eval()(x, adapter_names=names), plain.eval()(x, adapter_names=names), 1e-7)
    found, wanted = (gradients(one, [one(x, adapter_names=names)]) for one in (prepared, plain))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        padded = found[name]
        assert padded.shape == gradient.shape or padded.shape in {(8, gradient.shape[1]), (gradient.shape[0], 8)}
        own = padded[tuple(slice(side) for side in gradient.shape)]
        close(own, gradient, 1e-7)
        assert padded.count_nonzero() == own.count_nonzero()


def test_the_order_of_rows_makes_no_difference() -> None:
    kind = "torch.nn.modules.linear.Linear"
    model = two_adapters(kind).eval()
    x, names = input_for(kind, torch.float64), list(ORDERS["every other"])
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        y = model(x, adapter_names=names)
        close(model(x[order], adapter_names=[names[i] for i in order]), y[order], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_few_places_are_as_exact_as_in_a_batch_of_their_own(dtype: torch.dtype) -> None:
    kind = "torch.nn.modules.linear.Linear"
    model = two_adapters(kind, dtype).eval()
    x, names = input_for(kind, dtype)[:, :1], ORDERS["every other"]
    with torch.no_grad():
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
        close(model(x, adapter_names=names), torch.cat(alone(model, x, names, model)), tolerance)


def test_attention_is_refused_by_name() -> None:
    kind = "torch.nn.modules.activation.MultiheadAttention"
    model = two_adapters(kind).eval()
    with refused(model, BackendError, r"lora\.MultiheadAttention\) is one for all rows"):
        model(input_for(kind, torch.float64), adapter_names=["default", "second"])
    with torch.no_grad():
        x = input_for(kind, torch.float64)
        with model.disable_adapter():
            expected = model(x)
        close(model(x, adapter_names=["__base__"] * 2), expected)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6, dtype=torch.float64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = nn.functional.one_hot(input_ids, 8).double()
        y: Tensor = self.layer(x)
        return y


def test_invocations_are_found_in_the_rows_of_their_adapter() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Router(), LoraConfig(target_modules=["layer"], r=2, alora_invocation_tokens=[3, 1]), "default"
    )
    model.add_adapter("second", LoraConfig(target_modules=["layer"], r=3, alora_invocation_tokens=[5]))
    model.add_adapter("plain", LoraConfig(target_modules=["layer"], r=3))
    model.set_requires_grad(["second", "plain"])
    train(model)
    ids = torch.tensor([[3, 1, 5, 2], [2, 3, 1, 5], [5, 3, 1, 1], [0, 1, 3, 1], [3, 1, 5, 5]])
    names = ["default", "second", "default", "plain", "second"]
    found, wanted = gradients(model, [model(ids, adapter_names=names)]), gradients_alone(model, ids, names, model)
    for name in found:
        close(found[name], wanted.get(name, torch.zeros_like(found[name])), 1e-9)
    with torch.no_grad():
        close(model(ids, adapter_names=names), torch.cat(alone(model, ids, names, model)), 1e-12)


def test_routers_count_the_tokens_of_their_own_rows() -> None:
    from lorafa import penalty

    def made() -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(Router(), LoraConfig(target_modules=["layer"], r=4, init_lora_weights="goat",
                                                    init_config={"experts": 2, "top_k": 1}))  # fmt: skip
        model.add_adapter("plain", LoraConfig(target_modules=["layer"], r=3))
        train(model)
        return model

    ids = torch.tensor([[3, 1, 5, 2], [2, 3, 1, 5], [5, 3, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, 1]])

    mixed, single = made(), made()
    for model in (mixed, single):
        inner = model.get_base_model()
        forward = inner.forward
        inner.forward = lambda input_ids, attention_mask=None, forward=forward: forward(input_ids)  # type: ignore[method-assign,assignment,misc]
    mixed(input_ids=ids, attention_mask=mask, adapter_names=["default", "plain", "default"])
    single(input_ids=ids[[0, 2]], attention_mask=mask[[0, 2]])
    close(penalty(mixed), penalty(single), 1e-12)
