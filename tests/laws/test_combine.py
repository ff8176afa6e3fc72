"""The law of combining: the weighted sum of the updates, whatever layers, formulas, starts and scalings they have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorafa import LoraConfig
from lorafa.surgery.combining import COMBINATIONS
from lorafa.surgery.walk import lora_layers
from toys.adapters import DEFINED, VARIANT, adapted, only_layer, quick_first, with_starts
from toys.combined import SVD_TYPES, deltas, density_for, distance, several, two_on, weighted
from toys.compare import assert_equal_bits, assert_unchanged, close, everything
from toys.language_models import llama
from toys.layers import KINDS, backend_for
from toys.models import Convolution, Linears, Tied

LINEAR = "torch.nn.modules.linear.Linear"
STARTED = [(start, variant, kind) for variant, kind, start in with_starts(DEFINED, True, "pissa")]
PRODUCTS = [case for case in STARTED if "dora" not in case[1]]
"""Those whose update is a product of two factors."""
DENSE = list({backend_for(kind).host: kind for kind in KINDS if not backend_for(kind).quantized}.values())
"""One of each kind of layer: how the base stores its weight changes nothing for a combination of updates."""
WEIGHTS = {"default": 0.7, "other": -1.3}
WEIGHTS_OF_TWO = {"a": 0.7, "b": -1.3}


def tolerance(kind: str) -> float:
    return 1e-5 if backend_for(kind).quantized else 1e-12


def settings(variant: str, start: bool | str) -> dict[str, Any]:
    return VARIANT[variant] | {"init_lora_weights": start}


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "variant", "kind"), quick_first(STARTED))
def test_cat_or_a_full_svd_is_the_weighted_sum(start: bool | str, variant: str, kind: str) -> None:
    model = two_on(kind, **settings(variant, start))
    wanted = weighted(model, WEIGHTS)
    asked: dict[str, Any] = {"combination_type": "cat"}
    if (start, variant, kind) not in PRODUCTS:  # rank 8 is all that layers of 24 x 8 have
        asked = {"svd_rank": 8}
    report = model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", **asked)
    assert distance(deltas(model, "sum"), wanted) < tolerance(kind)
    assert report.relative == pytest.approx(0, abs=tolerance(kind))
    assert report.energy == pytest.approx(sum(float(d.double().square().sum()) for d in wanted.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("start", "variant", "kind"), [case for case in PRODUCTS if case[1] == "lora" or case[2] == LINEAR]
)
def test_one_adapter_of_weight_one_is_copied_to_the_bit(start: bool | str, variant: str, kind: str) -> None:
    model = adapted(kind, dtype=torch.float64, **settings(variant, start))
    model.add_weighted_adapter(["default"], [1.0], "twin")
    for _, layer in lora_layers(model.get_base_model()):
        assert_equal_bits(layer.adapters["twin"].product(), layer.adapters["default"].product())
        assert layer.adapters["twin"].variant.is_plain_lora


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_so_it_is_whatever_the_type_where_all_entries_are_kept(combination: str) -> None:
    model = two_on(LINEAR, use_rslora=True)
    model.add_weighted_adapter(["default"], [1.0], "twin", combination, **density_for(combination, 1.0))
    (twin, delta), *_ = zip(deltas(model, "twin").values(), deltas(model, "default").values(), strict=True)
    assert_equal_bits(twin, delta)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("rank", [7, 8])
def test_an_svd_of_as_many_ranks_as_there_are_is_cat(kind: str, rank: int) -> None:
    model = two_on(kind)  # of ranks 4 and 3
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "cat", "cat")
    report = model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "svd", "svd", svd_rank=rank)
    assert distance(deltas(model, "svd"), deltas(model, "cat")) < tolerance(kind)
    assert report.lost == 0 or report.relative < 1e-12
    ranks = {name: {layer.r[name] for _, layer in lora_layers(model.get_base_model())} for name in ("cat", "svd")}
    assert ranks == {"cat": {7}, "svd": {rank}}


@pytest.mark.parametrize("combination", [kind for kind in COMBINATIONS if "ties" in kind])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_of_equal_adapters_is_that_adapter(combination: str, method: str) -> None:
    torch.manual_seed(0)
    on = {"target_modules": ["first", "second"], "r": 3, "lora_alpha": 5}
    model = several(Linears().double(), a=LoraConfig(**on), b=LoraConfig(**on), c=LoraConfig(**on))
    for _, layer in lora_layers(model.get_base_model()):
        for name in ("b", "c"):
            for key, parameter in layer.stored_parameters(name).items():
                parameter.data.copy_(layer.stored_parameters("a")[key])
    model.add_weighted_adapter(
        ["a", "b", "c"], [1.0] * 3, "same", combination, density=1.0, majority_sign_method=method
    )
    assert distance(deltas(model, "same"), deltas(model, "a")) < 1e-12


@pytest.mark.filterwarnings("ignore:combination_type='linear' sums")
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("kind", DENSE)
def test_base_and_what_counts_stay_to_the_bit_and_the_result_is_plain_lora_of_scaling_one(
    kind: str, combination: str
) -> None:
    ranks_may_differ = "svd" in combination or combination == "cat"
    model = two_on(kind, torch.bfloat16, r=3, lora_alpha=4, init_lora_weights="pissa" if ranks_may_differ else True)
    before = everything(model)
    with torch.random.fork_rng():
        model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", combination, **density_for(combination))
    for _, layer in lora_layers(model.get_base_model()):
        adapter = layer.adapters["sum"]
        assert (adapter.scaling, adapter.variant.is_plain_lora, adapter.start) == (1.0, True, None)
        assert not any(p.requires_grad for p in layer.stored_parameters("sum").values())
    assert model.active_adapters == ["other"]
    model.delete_adapter("sum")
    assert_unchanged(before, model)


@pytest.mark.parametrize("combination", [kind for kind in COMBINATIONS if kind != "cat"])
@pytest.mark.parametrize("kind", DENSE)
def test_one_adapter_with_all_its_entries_comes_out_whatever_the_type(kind: str, combination: str) -> None:
    model = two_on(kind)
    rank = {"svd_rank": 6} if combination in SVD_TYPES else {}  # asks for a computation instead of a copy
    with_density = density_for(combination, 1.0)
    model.add_weighted_adapter(["other"], [2.0], "same", combination, **with_density, **rank)
    assert distance(deltas(model, "same"), weighted(model, {"other": 2.0})) < 10 * tolerance(kind)


@pytest.mark.parametrize("kind", DENSE)
def test_svd_is_the_nearest_update_of_its_rank_and_says_what_is_lost(kind: str) -> None:
    model = two_on(kind)
    wanted = weighted(model, WEIGHTS)
    report = model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", svd_rank=2)
    values = [torch.linalg.svdvals(matrix) for matrix in wanted.values()]
    lost = [float(found[..., 2:].square().sum()) for found in values]
    shares = [(one / float(found.square().sum())) ** 0.5 for one, found in zip(lost, values, strict=True)]
    assert [error.relative for error in report.layers.values()] == pytest.approx(shares, rel=1e-6)
    assert {error.rank for error in report.layers.values()} == {2}
    assert report.lost == pytest.approx(sum(lost), rel=1e-6)
    assert distance(deltas(model, "sum"), wanted) == pytest.approx(report.relative, rel=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_on_a_grouped_convolution_outputs_add_up(groups: int) -> None:
    torch.manual_seed(0)
    on = {"target_modules": ["conv"]}
    model = several(
        Convolution(2, groups=groups).double(), a=LoraConfig(r=4, **on), b=LoraConfig(r=2, lora_alpha=5, **on)
    )
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    layer = dict(lora_layers(model.get_base_model()))["conv"]

    def change(name: str) -> torch.Tensor:
        model.set_adapter(name)
        with torch.no_grad():
            return layer(x) - layer.base_layer(x)

    wanted = 0.4 * change("a") - 2 * change("b")
    model.add_weighted_adapter(["a", "b"], [0.4, -2.0], "cat", "cat")
    report = model.add_weighted_adapter(["a", "b"], [0.4, -2.0], "svd", svd_rank=6)
    model.add_weighted_adapter(["a", "b"], [0.4, -2.0], "kept", "magnitude_prune_svd", density=1.0, svd_rank=6)
    for name in ("cat", "svd", "kept"):
        close(change(name), wanted, 1e-12)
    assert report.relative == pytest.approx(0, abs=1e-7)


def test_layers_that_one_adapter_has_alone_are_in_the_union() -> None:
    torch.manual_seed(0)
    model = several(
        Linears().double(),
        a=LoraConfig(r=2, target_modules=["first", "second"], rank_pattern={"second": 4}, alpha_pattern={"first": 7}),
        b=LoraConfig(r=3, target_modules="first|head", use_rslora=True),
        c=LoraConfig(r=3, target_modules=["head"], exclude_modules=["first"]),
    )
    weights = {"a": -0.5, "b": 2.0, "c": 1.0}
    wanted = weighted(model, weights)
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(
            [*weights], [*weights.values()], kind, kind, **({"svd_rank": 4} if kind == "svd" else {})
        )
    assert distance(deltas(model, "cat"), wanted) < 1e-12
    assert {path: layer.adapters["cat"].rank for path, layer in lora_layers(model.get_base_model())} == {
        "first": 5, "second": 4, "head": 6
    }  # fmt: skip
    assert wanted.keys() == deltas(model, "svd").keys()


@pytest.mark.parametrize("alike", [True, False])
def test_ends_that_share_a_weight_share_the_combination_where_all_adapters_do(alike: bool) -> None:
    on = {"target_modules": ["embed", "head"]}
    model = several(
        Tied(),
        a=LoraConfig(r=2, ensure_weight_tying=True, **on),
        b=LoraConfig(r=3, ensure_weight_tying=alike, **on),
    )
    wanted = weighted(model, {"a": 1.0, "b": 0.5})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", "cat")
    assert distance(deltas(model, "sum"), wanted) < 1e-12
    tied = [layer.adapters["sum"].tied_to is not None for _, layer in lora_layers(model.get_base_model())]
    assert sum(tied) == (1 if alike else 0)


@pytest.mark.filterwarnings("ignore:combination_type='linear' sums")
def test_biases_of_B_are_summed_by_weight_and_scaling() -> None:
    torch.manual_seed(0)
    on = {"target_modules": ["first", "second"]}
    model = several(
        Linears().double(),
        a=LoraConfig(r=2, lora_alpha=6, lora_bias=True, **on),
        b=LoraConfig(r=4, lora_alpha=2, lora_bias=True, **on),
        c=LoraConfig(r=4, **on),
    )
    for kind in COMBINATIONS:
        adapters, weights = (
            (["a", "b", "c"], [0.5, -1.0, 1.0]) if "svd" in kind or kind == "cat" else (["b", "c"], [1.0, 2.0])
        )
        model.add_weighted_adapter(adapters, weights, kind, kind, **density_for(kind))
        scaled = {"a": 0.5 * 3, "b": -1.0 / 2} if "a" in adapters else {"b": 1 / 2}
        for _, layer in lora_layers(model.get_base_model()):
            wanted = sum(s * layer.adapters[name].bias for name, s in scaled.items())
            close(layer.adapters[kind].bias, wanted, 1e-12)


def trimmed(tensor: torch.Tensor, density: float) -> torch.Tensor:
    least = tensor.abs().flatten().sort(descending=True).values[int(density * tensor.numel()) - 1]
    return torch.where(tensor.abs() >= least, tensor, 0)


def merged_by_sign(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """TIES: signs are those of the plain sum, and the weighted entries that have them are averaged."""
    stack = torch.stack(tensors)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    weighted = torch.tensor(weights, dtype=stack.dtype)[:, None, None] * stack
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def test_updates_are_scaled_before_they_are_pruned_and_weighted_after_and_factors_both_after() -> None:
    """With scalings that differ: the entries and signs that are kept of updates depend on them, of factors not."""
    torch.manual_seed(0)
    on: dict[str, Any] = {"target_modules": ["first"], "r": 3}
    model = several(
        Linears().double(), a=LoraConfig(lora_alpha=7, **on), b=LoraConfig(use_rslora=True, **on), c=LoraConfig(**on)
    )
    names, weights, density = ["a", "b", "c"], [0.7, -1.2, 2.0], 0.37
    adapters = [only_layer(model).adapters[name] for name in names]
    scaled = [weight * float(one.scaling) for weight, one in zip(weights, adapters, strict=True)]
    updates = [trimmed(one.product().detach(), density) for one in adapters]
    roots = [math.copysign(abs(factor) ** 0.5, factor) for factor in scaled]
    A = merged_by_sign([trimmed(one.A, density) for one in adapters], roots)
    B = merged_by_sign([trimmed(one.B, density) for one in adapters], list(map(abs, roots)))
    wanted = {
        "ties_svd": merged_by_sign(updates, weights),
        "magnitude_prune_svd": 0.7 * updates[0] - 1.2 * updates[1] + 2.0 * updates[2],
        "ties": (B @ A).detach(),
    }
    for kind, update in wanted.items():
        rank = {"svd_rank": min(update.shape)} if "svd" in kind else {}
        model.add_weighted_adapter(names, weights, kind, kind, density=density, **rank)
        close(deltas(model, kind)["first"], update, 1e-12)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(kind: str) -> None:
    torch.manual_seed(0)
    on = {"target_modules": ["first", "second"]}
    model = several(Linears().double(), a=LoraConfig(r=3, **on), b=LoraConfig(r=3, **on))

    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.randint(1000, ()).item())
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", kind, density=0.5, seed=seed)
        found = deltas(model, "new")
        model.delete_adapter("new")
        return found

    one, again, other = made(1), made(1), made(2)
    assert all(torch.equal(one[path], again[path]) for path in one)
    assert not any(torch.equal(one[path], other[path]) for path in one)
    assert not torch.equal(one["first"][:, :8], one["second"][:, :8][: len(one["first"])])


def test_dare_is_the_weighted_sum_on_average_over_seeds() -> None:
    torch.manual_seed(0)
    on = {"target_modules": ["first"]}
    model = several(Linears().double(), a=LoraConfig(r=3, **on), b=LoraConfig(r=3, **on))
    wanted = weighted(model, {"a": 1.0, "b": -0.5})["first"]
    total = torch.zeros_like(wanted)
    for seed in range(200):
        model.add_weighted_adapter(
            ["a", "b"], [1.0, -0.5], "new", "dare_linear_svd", density=0.6, seed=seed, svd_rank=12
        )
        total += deltas(model, "new")["first"]
        model.delete_adapter("new")
    once = (0.4 / 0.6) ** 0.5  # of the norm: the spread of one draw, which 200 make smaller
    assert float((total / 200 - wanted).norm() / wanted.norm()) < 2 * once / 200**0.5


@pytest.mark.parametrize("kind", DENSE)
def test_merged_and_disabled_adapters_stay_so(kind: str) -> None:
    model = two_on(kind)
    wanted = weighted(model, WEIGHTS)
    model.merge_adapter()
    model.disable_adapter_layers()
    before = everything(model)
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", "cat")
    assert distance(deltas(model, "sum"), wanted) < 1e-12
    for _, layer in lora_layers(model.get_base_model()):
        assert (layer.merged_adapters, layer.disable_adapters) == (["other"], True)
    model.delete_adapter("sum")
    assert_unchanged(before, model)


def test_copies_of_layers_have_a_combination_each() -> None:
    on: dict[str, Any] = {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]}
    model = several(llama(), a=LoraConfig(r=3, **on), b=LoraConfig(r=2, **on))
    wanted = weighted(model, WEIGHTS_OF_TWO)
    assert len(wanted) == 3
    model.add_weighted_adapter([*WEIGHTS_OF_TWO], [*WEIGHTS_OF_TWO.values()], "sum", "cat")
    assert distance(deltas(model, "sum"), wanted) < 1e-5
    assert model.peft_config["sum"].layer_replication == [(0, 2), (1, 2)]


def test_parts_that_are_compiled_have_the_names_they_had() -> None:
    torch.manual_seed(0)
    base = Linears().double()
    base.first = torch.compile(base.first)  # type: ignore[assignment]
    on = {"target_modules": ["first", "second"]}
    model = several(base, a=LoraConfig(r=3, **on), b=LoraConfig(r=2, **on))
    wanted = weighted(model, WEIGHTS_OF_TWO)
    report = model.add_weighted_adapter([*WEIGHTS_OF_TWO], [*WEIGHTS_OF_TWO.values()], "sum", "cat")
    assert distance(deltas(model, "sum"), wanted) < 1e-12
    assert set(report.layers) == {"first", "second"}
