"""GOAT: the routed change and its scaling, files, what is refused."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, create_lorafa_optimizer, get_peft_model, mutate_base, penalty
from lorafa.errors import AdapterError, BackendError, ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.models.head_loss import supports_chunked_loss
from lorafa.variants.goat import GOAT
from lorafa.variants.lora import LoRA
from toys.adapters import only_layer, train
from toys.compare import close
from toys.goat import ALPHA, IN, OUT, D, E, One, R, adapted, config, inputs
from toys.language_models import llama


def by_hand(layer: LoraLayer, x: Tensor, top_k: int, s: float) -> Tensor:
    """The output of the definition, token by token and expert by expert."""
    A, B, router = layer.factor_A("default"), layer.factor_B("default"), layer.lora_router["default"].weight
    start, base = layer.adapters["default"].start, layer.get_base_layer()
    assert start is not None
    rows = []
    for token in x.reshape(-1, IN):
        gates = (router @ token).softmax(0)
        largest = sorted(range(E), key=lambda i: -gates[i])[:top_k]
        change = -s * start.B @ (start.A @ token)
        for i in largest:
            own = slice(i * D, (i + 1) * D)
            change = change + s * gates[i] / sum(gates[j] for j in largest) * B[:, own] @ (A[own] @ token)
        rows.append(base(token) + change)
    return torch.stack(rows).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize(
    ("rule", "s"), [("classic", ALPHA / D), ("rs", ALPHA / D**0.5), ("goat", (3 * IN / D) ** 0.5), (0.7, 0.7)]
)
def test_the_output_and_all_gradients_are_those_of_the_definition(top_k: int, rule: str | float, s: float) -> None:
    model, x = adapted(top_k=top_k, scaling=rule), inputs()
    layer, probe = only_layer(model), torch.randn(3, 5, OUT, dtype=torch.float64)
    own = [p for p in model.parameters() if p.requires_grad]
    assert len(own) == 3
    found, wanted = model(x.requires_grad_()), by_hand(layer, x, top_k, s)
    close(found, wanted)
    close(model(x[0, 0]), wanted[0, 0])
    assert model(x[:0]).shape == (0, 5, OUT)
    for mine, theirs in zip(
        torch.autograd.grad((found * probe).sum(), [x, *own]),
        torch.autograd.grad((wanted * probe).sum(), [x, *own]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_at_its_start_random_routing_gives_the_base_on_average() -> None:
    """W_res x + s sum w_i B_i A_i x over all sets of k experts of equal weights has the mean W x."""
    model, x = adapted(trained=False, top_k=2), inputs(1)
    layer, outputs = only_layer(model), []
    for chosen in combinations(range(E), 2):
        with torch.no_grad():
            layer.lora_router["default"].weight.zero_()[list(chosen)] = x[0]  # the same gate for both, less for others
            outputs.append(model(x))
    base = layer.get_base_layer()(x)
    assert all((output - base).abs().max() > 1e-3 for output in outputs)
    close(torch.stack(outputs).mean(0), base)


def test_training_moves_the_experts_and_not_what_the_base_is_left_without() -> None:
    model, x = adapted(trained=False, top_k=E), inputs()
    layer = only_layer(model)
    with torch.no_grad():
        A, B, W = layer.factor_A("default").clone(), layer.factor_B("default").clone(), layer.base_weight()
        bias = layer.base_bias()
        train(model)
        layer.factor_B("default").zero_()
        close(model(x), nn.functional.linear(x, W - ALPHA / D / E * B @ A, bias))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_weights_of_a_token_sum_to_one_over_the_chosen_experts(top_k: int) -> None:
    adapter = only_layer(adapted(top_k=top_k)).adapters["default"]
    weights = adapter.variant._weights(adapter, inputs())  # type: ignore[attr-defined]
    close(weights.sum(-1), torch.ones(3, 5))
    assert bool(((weights > 0).sum(-1) == top_k).all())


def test_one_expert_is_the_plain_adapter() -> None:
    model, x = adapted(experts=1, top_k=1), inputs()
    layer = only_layer(model)
    A, B = layer.factor_A("default"), layer.factor_B("default")
    start = layer.adapters["default"].start
    assert start is not None
    update = ALPHA / R * (B @ A - start.B @ start.A)
    close(model(x), layer.get_base_layer()(x) + x @ update.T)


def test_the_scaling_that_is_set_later_scales_all_of_it() -> None:
    model, x = adapted(), inputs()
    layer = only_layer(model)
    base = layer.get_base_layer()(x)
    once = model(x) - base
    layer.set_scale("default", 2)
    close(model(x) - base, 2 * once)
    layer.adapters["default"].scaling = torch.tensor(ALPHA / R)
    close(model(x) - base, once)


def test_dropout_is_on_the_experts_input_alone() -> None:
    """With one feature the experts see x doubled or nothing; the router and what the base lost see x."""
    model = adapted(lora_dropout=0.5).train()
    layer = only_layer(model)
    one = nn.functional.one_hot(torch.tensor([3]), IN).double()
    with torch.no_grad():
        start = layer.adapters["default"].start
        assert start is not None
        lost = -ALPHA / D * one @ (start.B @ start.A).T
        base = layer.get_base_layer()(one)
        experts = model.eval()(one) - base - lost
        found = [model.train()(one) - base - lost for _ in range(40)]
    kept = [torch.allclose(each, 2 * experts) for each in found]
    assert all(twice or each.abs().max() < 1e-12 for twice, each in zip(kept, found, strict=True))
    assert 5 < sum(kept) < 35


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_low_precision_gets_the_change_up_to_its_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = One().to(dtype)
    model = get_peft_model(base, config())
    train(model, 0.1)
    layer = only_layer(model)
    exact = copy.deepcopy(model).double()
    x = inputs().to(dtype)
    gates = (x.double() @ layer.lora_router["default"].weight.double().T).softmax(-1).sort(dim=-1).values
    sure = (gates[..., -2] - gates[..., -3]) > 0.02  # no rounding turns the choice round
    assert sure.sum() > 8
    close(model(x)[sure].double(), exact(x.double())[sure], 0.05)
    assert model(x).dtype is dtype


# ---- files, and what is refused


def test_a_file_gives_the_same_bits_and_trains_on(tmp_path: Path) -> None:
    model, x = adapted(top_k=3, scaling="rs", balance=0.25), inputs()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(One(), tmp_path, is_trainable=True)
    assert torch.equal(again(x), model(x))
    assert torch.equal(penalty(again), penalty(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    low = PeftModel.from_pretrained(One(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(low(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_merging_and_everything_else_that_takes_one_matrix_is_refused() -> None:
    model = adapted()
    said = r"adapter 'default': its update of '.*layer' \(goat\) changes with the input"
    for function in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BackendError, match="Merging " + said):
            function()
    with pytest.raises(BackendError, match="Taking the start out of the base of " + said):
        mutate_base(model)
    with pytest.raises(AdapterError, match=r"adapter 'default' is goat, in which each token has parts of A and B"):
        create_lorafa_optimizer(model, r=R, lora_alpha=ALPHA, lr=1e-3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, r"layer: init_lora_weights='goat' routes tokens to parts of plain A and B.* dora in it"),
        ({"use_rslora": True}, r"layer: use_rslora=True scales by the whole rank.*init_config=\{'scaling': 'rs'\}"),
        ({"r": 6}, r"layer: GOAT gives each of 4 experts the rank r / 4, found r = 6\. Set r"),
        ({"r": 12}, r"layer: GOAT takes r / 4 = 3 singular values of each of 4 segments of .*, which have 2\. Set r"),
        ({"lora_bias": True}, "lora_bias=True does not work with init_lora_weights='goat'"),
        ({"alora_invocation_tokens": [1]}, "ask for two formulas, alora and goat"),
        ({"top_k": 5}, "top_k=5 is more than there are experts, 4"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adapted(**settings)


def test_other_kinds_of_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="0: goat is not defined on embedding layers"):
        get_peft_model(nn.Sequential(nn.Embedding(9, 8)), config(("0",)))


def test_a_hook_on_a_factor_would_never_run_and_is_refused() -> None:
    model, x = adapted(), inputs()
    handle = only_layer(model).lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(AdapterError, match=r"A hook is on lora_A of adapter 'default', which is never called: its exp"):
        model(x)
    handle.remove()
    model(x)


def test_a_weight_of_too_low_a_rank_starts_with_experts_that_change_nothing() -> None:
    base = One()
    with torch.no_grad():
        base.layer.weight.zero_()
    with pytest.warns(UserWarning, match="goat"):
        model = get_peft_model(base, config())
    x = inputs()
    assert torch.equal(model(x), only_layer(model).get_base_layer()(x))


def test_a_choice_by_rounding_does_not_count_against_the_chunked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses are compared without adapters that route tokens, whose output may change by the last bit of another
    kernel; noise stands for it here. One that does not route is a part of the comparison."""
    noisy = {"q_proj", "down_proj"}
    for settings, formula in (({"init_lora_weights": "goat", "init_config": {"experts": 2}}, GOAT), ({}, LoRA)):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=noisy, **settings))
        assert model.routes_tokens == (formula is GOAT)
        with monkeypatch.context() as patched:
            patched.setattr(formula, "fused", lambda *_: None)
            patched.setattr(formula, "delta_output", lambda _, __, ___, y: torch.randn_like(y))
            said = supports_chunked_loss(model)
        assert said is None if formula is GOAT else "on a few tokens the model's own loss is" in str(said)
        model.disable_adapter_layers()
        assert not model.routes_tokens
        assert supports_chunked_loss(model) is None
        assert model.base_model.lora_layers()[0][1].disable_adapters, "as it was"
