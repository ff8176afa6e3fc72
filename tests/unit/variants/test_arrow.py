"""Arrow: the routed sum against its definition, prototypes, GenKnowSub, DoRA inside, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import ArrowConfig, LoraConfig, PeftModel, get_peft_model, mutate_base
from lorafa.errors import AdapterError, BackendError, ConfigError
from toys.adapters import only_layer, train
from toys.compare import close
from toys.layers import IN, Single

OUT = 10
Settings = dict[str, Any]
RANKS = [2, 3, 4]


def base(dtype: torch.dtype = torch.float64) -> Single:
    torch.manual_seed(0)
    return Single(nn.Linear(IN, OUT, dtype=dtype))


def routed(experts: list[Settings], *, general: list[Settings] | None = None, **arrow: Any) -> PeftModel:
    """A model with adapters of these settings, trained, and an active router over them."""
    everything = {f"task_{i}": each for i, each in enumerate(experts)}
    everything |= {f"gks_{i}": each for i, each in enumerate(general or [])}
    model: PeftModel | None = None
    for i, (name, settings) in enumerate(everything.items()):
        config = LoraConfig(**({"target_modules": ["layer"], "r": 2, "lora_alpha": 3, "init_seed": i} | settings))
        if model is None:
            model = get_peft_model(base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        torch.manual_seed(10 + i)
        train(model)
    assert model is not None
    router = ArrowConfig(**({"top_k": min(2, len(experts))} | arrow))
    router.gks_adapter_names = [name for name in everything if name.startswith("gks_")]
    model.add_adapter("router", LoraConfig(target_modules=["layer"], r=2, arrow_config=router))
    model.set_adapter("router", inference_mode=True)
    return model.eval()


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (3, 5)), IN, dtype=dtype, generator=torch.Generator().manual_seed(3))


def update(model: PeftModel, name: str) -> Tensor:
    """s B A of an adapter, (out, in)."""
    return only_layer(model).adapters[name].product().detach()


def by_hand(
    x: Tensor, updates: list[Tensor], top_k: int, temperature: float = 1.0, *, by_length: bool = False
) -> Tensor:
    """The routed change of the definition, token by token."""
    rows, directions = [], [torch.linalg.svd(each).Vh[0] for each in updates]
    for token in x.flatten(0, -2):
        scores = [direction.dot(token).abs() / (token.norm() if by_length else 1) for direction in directions]
        kept = sorted(range(len(updates)), key=lambda e: -scores[e])[:top_k]
        weights = torch.stack([scores[e] / temperature for e in kept]).softmax(0)
        rows.append(sum(c * (updates[e] @ token) for c, e in zip(weights, kept, strict=True)))
    return torch.stack(rows).view(*x.shape[:-1], OUT)  # type: ignore[arg-type]


def prototypes(model: PeftModel) -> Tensor:
    layer = only_layer(model)
    found: Tensor = layer.adapters["router"].variant.prototypes(layer, "router")  # type: ignore[attr-defined]
    return found


def weights_of(model: PeftModel, x: Tensor) -> Tensor:
    """c (..., E)."""
    found: Tensor
    found, _ = only_layer(model).adapters["router"].variant._weights(x, prototypes(model))  # type: ignore[attr-defined]
    return found


def change(model: PeftModel, x: Tensor) -> Tensor:
    """What the active adapter adds to the output of the base."""
    with model.disable_adapter():
        y = model(x)
    return (model(x) - y).detach()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("arrow", [{}, {"router_temperature": 0.3}, {"normalize_tokens": True}], ids=str)
def test_the_change_is_that_of_the_definition_with_different_ranks_scalings_and_biases(
    top_k: int, arrow: Settings
) -> None:
    experts: list[Settings] = [{"r": r, "lora_alpha": 3 + r, "use_rslora": r == 3} for r in RANKS]
    model, x = routed(experts, top_k=top_k, **arrow), inputs()
    updates = [update(model, f"task_{i}") for i in range(3)]
    by_length = arrow.get("normalize_tokens", False)
    wanted = by_hand(x, updates, top_k, arrow.get("router_temperature", 1.0), by_length=by_length)
    close(change(model, x), wanted, 1e-9)
    with torch.no_grad():
        close(change(model, x[0, :1]), wanted[0, :1], 1e-9)  # few rows
        assert model(x[:0]).shape == (0, 5, OUT)
        close(change(model, x[0, 0]), wanted[0, 0], 1e-9)


def test_a_bias_of_an_expert_counts_as_much_as_the_expert() -> None:
    model, x = routed([{"lora_bias": True}, {"lora_bias": True, "lora_alpha": 5}, {}], top_k=2), inputs()
    layer = only_layer(model)
    changed = change(model, x)
    biases = {name: layer.factor_bias(name) for name in ("task_0", "task_1")}
    with torch.no_grad():
        for bias in biases.values():
            assert bias is not None
            bias.zero_()
    without = change(model, x)
    weights = weights_of(model, x)
    assert (changed - without).abs().max() > 0.1
    with torch.no_grad():
        for bias in biases.values():
            assert bias is not None
            bias.fill_(1.0)
    close(change(model, x) - without, (1.5 * weights[..., :1] + 2.5 * weights[..., 1:2]).expand(3, 5, OUT), 1e-9)


def test_one_expert_is_that_adapter() -> None:
    model, x = routed([{}]), inputs()
    found = model(x)
    model.set_adapter("task_0")
    close(found, model(x))


def test_all_experts_at_an_infinite_temperature_are_the_uniform_average() -> None:
    model, x = routed([{"r": r} for r in RANKS], top_k=3, router_temperature=1e12), inputs()
    mean = torch.stack([update(model, f"task_{i}") for i in range(3)]).mean(0)
    close(change(model, x), x @ mean.T, 1e-9)


def test_the_sign_of_a_prototype_changes_nothing() -> None:
    model, x = routed([{}, {}, {}]), inputs()
    before = model(x)
    prototypes(model)[1] *= -1
    assert torch.equal(model(x), before)
    close(prototypes(model).norm(dim=1), torch.ones(3), 1e-9)


@pytest.mark.parametrize("gap", [0.5, 0.99, 0.9999])
def test_prototypes_are_exact_however_near_the_singular_values_are(gap: float) -> None:
    """Power iterations need the more steps the nearer sigma_2 / sigma_1 is to 1."""
    model = routed([{}, {}])
    layer = only_layer(model)
    Q = torch.linalg.qr(torch.randn(IN, 2, dtype=torch.float64)).Q
    U = torch.linalg.qr(torch.randn(OUT, 2, dtype=torch.float64)).Q
    turn = torch.randn(2, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_A["task_0"].weight.copy_(turn @ Q.T)
        layer.lora_B["task_0"].weight.copy_(U * torch.tensor([1.0, gap]) @ torch.linalg.inv(turn))
    layer.adapters_changed()
    close(prototypes(model)[0].dot(Q[:, 0]).abs(), torch.tensor(1.0), 1e-9)


def test_experts_come_and_go_and_prototypes_are_in_no_state_dict() -> None:
    model, x = routed([{}, {}, {}]), inputs()
    two = [update(model, "task_0"), update(model, "task_2")]
    assert not [key for key in model.state_dict() if "lora_arrow" in key]
    model.delete_adapter("task_1")
    assert prototypes(model).shape == (2, IN)
    close(change(model, x), by_hand(x, two, 2), 1e-9)
    model.add_adapter("other", LoraConfig(target_modules=["layer"], r=5, init_lora_weights=False, init_seed=4))
    close(change(model, x), by_hand(x, [*two, update(model, "other")], 2), 1e-9)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    for name in ("task_0", "task_2"):
        model.delete_adapter(name)
    with pytest.raises(AdapterError, match=r"The router 'router' has top_k=2 in its arrow_config, and 1 experts\."):
        model(x)
    model.delete_adapter("other")
    with pytest.raises(AdapterError, match=r"The router 'router' has no experts: no other adapter is on the layer"):
        model(x)


@pytest.mark.parametrize("start", ["pissa", "kasa"])
def test_experts_with_a_start_or_a_matrix_between_count_as_what_they_are(start: str) -> None:
    model, x = routed([{"init_lora_weights": start}, {}, {}]), inputs()
    close(change(model, x), by_hand(x, [update(model, f"task_{i}") for i in range(3)], 2), 1e-9)


def weighed(model: PeftModel, x: Tensor, experts: int) -> Tensor:
    """sum_e c_e (change of expert e alone), with the weights of the router."""
    weights = weights_of(model, x)
    total = torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype)
    for i in range(experts):
        model.set_adapter(f"task_{i}")
        total = total + weights[..., i, None] * change(model, x)
    model.set_adapter("router", inference_mode=True)
    return total


def test_over_dora_each_expert_counts_by_its_own_formula() -> None:
    model, x = routed([{"use_dora": True}, {}, {"use_dora": True, "r": 4, "init_lora_weights": "pissa"}]), inputs()
    close(change(model, x), weighed(model, x, 3), 1e-9)


def test_a_hook_on_an_expert_runs() -> None:
    model, x = routed([{}, {}]), inputs()
    before = change(model, x)
    handle = only_layer(model).lora_A["task_0"].register_forward_hook(lambda _, __, y: 2 * y)
    after = change(model, x)
    handle.remove()
    weights = weights_of(model, x)
    close(after - before, weights[..., :1] * (x @ update(model, "task_0").T), 1e-9)


def test_gradients_reach_the_experts_that_are_trained() -> None:
    model, x = routed([{}, {"r": 3}, {}]), inputs().requires_grad_()
    model.set_requires_grad(["task_0", "task_1", "task_2"])
    own = [p for p in model.parameters() if p.requires_grad]
    assert len(own) == 6
    layer, probe = only_layer(model), torch.randn(3, 5, OUT, dtype=torch.float64)
    weights = weights_of(model, x)
    wanted = layer.get_base_layer()(x)
    for i in range(3):
        A, B = layer.factor_A(f"task_{i}"), layer.factor_B(f"task_{i}")
        wanted = wanted + weights[..., i, None] * (layer.scaling[f"task_{i}"] * x @ A.T @ B.T)
    found = torch.autograd.grad((model(x) * probe).sum(), [x, *own])
    for mine, theirs in zip(found, torch.autograd.grad((wanted * probe).sum(), [x, *own]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_dropout_of_the_router_is_on_what_comes_out() -> None:
    model, x = routed([{}, {}]), inputs()
    layer = only_layer(model)
    kept = change(model, x)
    layer.lora_dropout["router"] = nn.Dropout(0.5)
    layer.train()
    ratio = change(model, x) / kept
    assert set(ratio.round(decimals=6).unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_it_is_the_same_up_to_rounding(dtype: torch.dtype) -> None:
    exact, x = routed([{}, {}, {}], top_k=3), inputs(dtype=dtype)
    low = copy.deepcopy(exact).to(dtype)
    assert low(x).dtype is dtype
    close(low(x).double(), copy.deepcopy(low).double()(x.double()), 0.05)


# ---- GenKnowSub


def test_genknowsub_subtracts_factors_as_peft_does_and_leaves_those_of_the_user_alone() -> None:
    model, x = routed([{}, {}, {"lora_alpha": 4}], general=[{}, {}], use_gks=True), inputs()
    layer, before = only_layer(model), {key: value.clone() for key, value in model.state_dict().items()}
    mean_A = (layer.factor_A("gks_0") + layer.factor_A("gks_1")) / 2
    mean_B = (layer.factor_B("gks_0") + layer.factor_B("gks_1")) / 2
    names = ("task_0", "task_1", "task_2")
    updates = [
        layer.scaling[name] * (layer.factor_B(name) - mean_B) @ (layer.factor_A(name) - mean_A) for name in names
    ]
    close(change(model, x), by_hand(x, [each.detach() for each in updates], 2), 1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
def test_exact_genknowsub_subtracts_the_mean_update(dora: bool) -> None:
    general: list[Settings] = [{"r": 3}, {"lora_alpha": 1, "lora_bias": not dora, "use_dora": dora}]
    experts: list[Settings] = [{"r": 4}, {}, {"lora_alpha": 4}]
    model, x = routed(experts, general=general, use_gks=True, exact_gks=True), inputs()
    mean = (update(model, "gks_0") + update(model, "gks_1")) / 2
    updates = [update(model, f"task_{i}") - mean for i in range(3)]
    directions = [torch.linalg.svd(each).Vh[0] for each in updates]
    for mine, theirs in zip(prototypes(model), directions, strict=True):
        close(mine.dot(theirs).abs(), torch.tensor(1.0), 1e-9)
    wanted = weighed(model, x, 3)
    for name in ("gks_0", "gks_1"):
        model.set_adapter(name)
        wanted = wanted - change(model, x) / 2
    model.set_adapter("router", inference_mode=True)
    close(change(model, x), wanted, 1e-9)


@pytest.mark.parametrize(
    ("experts", "general", "arrow", "text"),
    [
        ([{}, {"r": 4}], [{}], {}, r"they differ in shape: 'task_0' has r = 2, 'task_1' has r = 4.*Set exact_gks=True"),
        ([{}, {"use_dora": True}], [{}], {}, r"'task_1' \(dora\) has more than the two\. Set exact_gks=True"),
        ([{}, {}], [{"init_lora_weights": "pissa"}], {}, r"'gks_0' \(lora\) has more than the two"),
        ([{}, {}], [], {"exact_gks": True}, "general adapters are not on the layer: none is named. Load them"),
    ],
)
def test_what_genknowsub_cannot_subtract_is_said(
    experts: list[Settings], general: list[Settings], arrow: Settings, text: str
) -> None:
    model = routed(experts, general=general, use_gks=True, **arrow)
    with pytest.raises(AdapterError, match=rf"The router 'router' has use_gks=True in its arrow_config,.* {text}"):
        model(inputs())


def test_a_general_adapter_that_was_deleted_is_missed_by_name() -> None:
    model = routed([{}, {}], general=[{}, {}], use_gks=True)
    model.delete_adapter("gks_1")
    with pytest.raises(AdapterError, match=r"general adapters are not on the layer: 'gks_1'\. Load them"):
        model(inputs())


def test_factors_are_not_subtracted_under_dropout_of_the_experts() -> None:
    model = routed([{"lora_dropout": 0.5}, {}], general=[{}], use_gks=True)
    model(inputs())
    with pytest.raises(AdapterError, match=r"not done where experts have hooks or dropout of their own\. Remove the"):
        model.train()(inputs())


# ---- what is refused


def test_merging_is_refused_by_name() -> None:
    model = routed([{}, {}])
    said = r"adapter 'router': its update of '.*layer' \(arrow\) changes with the input"
    for function in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BackendError, match="Merging " + said):
            function()
    with pytest.raises(BackendError, match="Taking the start out of the base of " + said):
        mutate_base(model, "router")
    model.merge_adapter(["task_0"])  # an expert alone is a matrix
    model.unmerge_adapter()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, r"layer: an adapter with arrow_config routes to other adapters.* \(True, dora\) would"),
        ({"init_lora_weights": "pissa"}, r"so init_lora_weights of its config \('pissa', lora\) would count"),
        ({"alora_invocation_tokens": [1]}, r"ask for two formulas, alora and arrow"),
    ],
)
def test_a_router_with_a_formula_of_its_own_is_refused(settings: Settings, text: str) -> None:
    config = {"target_modules": ["layer"], "r": 2, "arrow_config": ArrowConfig()} | settings
    with pytest.raises(ConfigError, match=text):
        get_peft_model(base(), LoraConfig(**config))


def test_experts_that_decide_by_themselves_where_they_count_are_refused() -> None:
    model = routed([{}, {"alora_invocation_tokens": [1]}])
    with pytest.raises(AdapterError, match=r"The router 'router' cannot route to 'task_1', which is alora and decides"):
        model(inputs())


def test_a_hook_on_the_router_itself_is_refused() -> None:
    model = routed([{}, {}])
    only_layer(model).lora_A["router"].register_forward_hook(lambda *_: None)
    with pytest.raises(AdapterError, match=r"A hook is on lora_A of adapter 'router', which is never called: it"):
        model(inputs())


def test_settings_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"exact_gks=True says how to subtract general adapters, and use_gks"):
        ArrowConfig(exact_gks=True)
    with pytest.raises(ConfigError, match=r"normalize_tokens must be True or False, found 1"):
        ArrowConfig(normalize_tokens=1)  # type: ignore[arg-type]
