"""LoRA-FA in use: what it holds, what it leaves alone, and what it works beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError
from lorafa.optimizers import LoraFAOptimizer, create_lorafa_optimizer
from lorafa.optimizers.pairs import pairs_of
from toys.adapters import adapted as adapted_kind
from toys.layers import KINDS, input_for
from toys.models import Mlp
from toys.optimizers import IN, adapted, batch, loss

BOTH = pytest.mark.parametrize("algorithm", ["exact", "fold"])


def run(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 5) -> None:
    torch.manual_seed(seed)
    dtype = pairs_of(model)[0].layer.get_base_layer().weight.dtype
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch(dtype)).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@BOTH
def test_only_B_moves(algorithm: str) -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2, algorithm=algorithm)
    before = values(model)
    run(model, optimizer, 100 if algorithm == "exact" else 5)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == ("lora_B" not in name), name


@BOTH
def test_the_state_is_two_numbers_for_each_of_B(algorithm: str) -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2, algorithm=algorithm)
    run(model, optimizer)
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values()
               if isinstance(v, Tensor) and v.dim())  # fmt: skip
    assert held == sum(2 * pair.B.numel() for pair in pairs_of(model))


def test_nothing_is_decomposed_after_the_optimizer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    calls: list[str] = []
    for owner, name in (
        *(
            (torch.linalg, name)
            for name in ("cholesky_ex", "cholesky", "svd", "qr", "eigh", "inv", "inv_ex", "pinv", "solve")
        ),
        *((torch, name) for name in ("cholesky_inverse", "inverse", "pinverse", "svd", "qr")),
    ):
        original = getattr(owner, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    run(model, optimizer, 4)
    assert calls == []
    pair = pairs_of(model)[0]
    with torch.no_grad():
        pair.A.mul_(2.0)  # as loading another adapter does
    run(model, optimizer, 2)
    assert calls == ["cholesky_ex", "cholesky_inverse"]


def test_the_scaling_is_read_from_each_layer() -> None:
    """rank_pattern and alpha_pattern give the layers different ones."""
    model = adapted(rank_pattern={"second": 2}, alpha_pattern={"first": 9.0}, use_rslora=True)
    pairs = {pair.path.rpartition(".")[2]: pair for pair in pairs_of(model)}
    assert pairs["first"].scaling == 9.0 / 3**0.5
    assert pairs["second"].scaling == 5.0 / 2**0.5
    optimizer = create_lorafa_optimizer(model, 3, 5.0, lr=1.0, use_rslora=True)
    loss(model, batch()).backward()
    for pair in pairs.values():
        gradient = optimizer.row_space.gradients()[pair.B]  # type: ignore[attr-defined]
        expected = pair.B.grad @ torch.linalg.inv(pair.A @ pair.A.T) / pair.scaling**2
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-11, atol=1e-12)


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["norm"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_trained_besides_is_trained_by_the_same_optimizer(settings: dict[str, Any], algorithm: str) -> None:
    model = adapted(**settings)
    optimizer = create_lorafa_optimizer(model, lr=1e-2, weight_decay=0.1, algorithm=algorithm)
    before = values(model)
    run(model, optimizer)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad and p.dim() == 1} <= {0.0}
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad and p.dim() > 1} == {0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_moves_by_its_projected_gradient(kind: str) -> None:
    """s g A is the gradient of the dense update within the rows of A, whatever layout the factors are stored in."""
    model = adapted_kind(kind, dtype=torch.float64)
    x = input_for(kind, torch.float64)
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    model(x).square().sum().backward()
    found = optimizer.row_space.gradients()  # type: ignore[attr-defined]
    for pair in pairs_of(model):
        g, A = pair.matrices_B(found[pair.B]), pair.matrices_A(pair.A)
        plain = pair.matrices_B(pair.B.grad)
        tolerance = 1e-9 if A.dtype is torch.float64 else 1e-4
        torch.testing.assert_close(pair.scaling**2 * g @ (A @ A.mT), plain, rtol=tolerance, atol=tolerance)
        assert found[pair.B].shape == pair.B.shape
    optimizer.step()


def test_an_inactive_adapter_and_a_path_with_lora_in_it_change_nothing() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_lora_block = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.my_lora_block(x)
            return y

    model = adapted(model=Outer())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    assert {pair.name for pair in optimizer.row_space.pairs} == {"default"}  # type: ignore[attr-defined]
    before = values(model)
    run(model, optimizer)
    assert all(torch.equal(v, before[n]) for n, v in model.named_parameters() if ".other." in n)


def test_layers_without_a_gradient_are_left_alone() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    first, second = pairs_of(model)
    loss(model, batch()).backward()
    first.B.grad = None
    before = first.B.clone()
    optimizer.step()
    assert torch.equal(first.B, before)
    assert optimizer.state[second.B]["step"] == 1
    assert first.B not in optimizer.state


@BOTH
def test_resuming_is_bit_equal(algorithm: str) -> None:
    whole = adapted(torch.float32)
    start = copy.deepcopy(whole)
    optimizer = create_lorafa_optimizer(whole, lr=1e-2, algorithm=algorithm)
    run(whole, optimizer, 2, seed=1)
    saved_model, saved = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, 3, seed=2)

    start.load_state_dict(saved_model)
    resumed = create_lorafa_optimizer(start, lr=1e-2, algorithm=algorithm)
    resumed.load_state_dict(saved)
    run(start, resumed, 3, seed=2)
    for name, value in start.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@BOTH
def test_a_closure_computes_the_loss_again(algorithm: str) -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2, algorithm=algorithm)
    data, before = batch(), pairs_of(model)[0].B.clone()
    expected = loss(model, data).item()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, data)
        value.backward()
        return value

    value = optimizer.step(closure)
    assert value.item() == pytest.approx(expected)
    assert not torch.equal(pairs_of(model)[0].B, before)


def test_accumulated_gradients_give_the_step_of_the_whole_batch() -> None:
    x, target = batch()
    results = []
    for parts in (1, 4):
        torch.manual_seed(3)
        model = adapted()
        optimizer = create_lorafa_optimizer(model, lr=1e-2)
        for part in zip(x.chunk(parts), target.chunk(parts), strict=True):
            (loss(model, part) / parts).backward()
        optimizer.step()
        results.append(pairs_of(model)[0].B.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_a_scaler_for_half_precision_gradients_works() -> None:
    model = adapted(torch.float32)
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    before = pairs_of(model)[0].B.clone()
    scaler.scale(loss(model, batch(torch.float32))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(pairs_of(model)[0].B, before)


def test_a_compiled_model_trains_as_the_plain_one() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    run(model, create_lorafa_optimizer(model, lr=1e-2))
    compiled = torch.compile(twin, backend="eager")
    run(compiled, create_lorafa_optimizer(compiled, lr=1e-2))
    for one, other in zip(pairs_of(model), pairs_of(twin), strict=True):
        torch.testing.assert_close(one.B, other.B, rtol=1e-10, atol=1e-12)


def test_a_start_that_does_not_count_stays_exactly_at_zero_when_folded() -> None:
    torch.manual_seed(1)
    base = Mlp().double()
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights="pissa"))
    create_lorafa_optimizer(model, lr=1e-2, algorithm="fold")
    assert torch.equal(model(x), expected)


def test_frozen_A_saves_the_layer_its_input() -> None:
    model = adapted()
    create_lorafa_optimizer(model, lr=1e-2)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(5, 11, IN, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model.base_model.model.first(x)
    assert tuple(x.shape) not in kept


# ---- what it refuses


def untouched(model: PeftModel) -> tuple[dict[str, Tensor], list[bool]]:
    return values(model), [p.requires_grad for p in model.parameters()]


def refuse(model: PeftModel, kind: type[Exception], match: str, **settings: Any) -> None:
    before, trains = untouched(model)
    for algorithm in ("exact", "fold"):
        with pytest.raises(kind, match=match):
            create_lorafa_optimizer(model, **{"lr": 1e-3, "algorithm": algorithm} | settings)
    assert [p.requires_grad for p in model.parameters()] == trains
    for name, value in model.named_parameters():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_arguments_the_model_does_not_have_are_refused_with_both_values() -> None:
    model = adapted()
    refuse(model, ConfigError, r"r=128 was given, but the adapters have r=3", r=128)
    refuse(model, ConfigError, r"lora_alpha=32 was given, but the adapters have lora_alpha=5", lora_alpha=32)
    refuse(model, ConfigError, r"use_rslora=True was given, but the adapters have use_rslora=False", use_rslora=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1.0}, r"lr must be a number >= 0"),
        ({"weight_decay": -0.1}, r"weight_decay must be"),
        ({"betas": (0.9, 1.0)}, r"betas must be"),
        ({"eps": -1e-8}, r"eps must be"),
        ({"algorithm": "inexact"}, r"algorithm.*exact"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    refuse(adapted(), ConfigError, match, **settings)


def test_no_bias_correction_is_refused_for_fold() -> None:
    with pytest.raises(ConfigError, match=r"not defined for algorithm='fold'"):
        create_lorafa_optimizer(adapted(), lr=1e-3, algorithm="fold", correct_bias=False)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"Mlp has no layer with an active adapter.*get_peft_model"):
        create_lorafa_optimizer(Mlp(), lr=1e-3)


def test_dependent_rows_of_A_are_refused() -> None:
    model = adapted()
    with torch.no_grad():
        pairs_of(model)[1].A[2] = 2 * pairs_of(model)[1].A[0]
    text = r"second, adapter 'default': A has dependent rows.*which init_lora_weights='orthogonal' has not\."
    refuse(model, AdapterError, text)
    with torch.no_grad():
        pairs_of(model)[1].A.zero_()
    refuse(model, AdapterError, r"second, adapter 'default': A is zero.*freeze_A=True")


def test_factors_that_are_not_finite_are_refused() -> None:
    model = adapted()
    with torch.no_grad():
        pairs_of(model)[0].B[0, 0] = float("nan")
    refuse(model, AdapterError, r"first, adapter 'default': B \(rank 3\) holds nan or inf")


def test_a_shard_or_a_quantized_factor_is_refused() -> None:
    model = adapted()
    pair = pairs_of(model)[0]
    whole = pair.B.data
    pair.B.data = whole.flatten()[:5]
    refuse(model, BackendError, r"B is a shard of a factor \(Parameter, shape \(5,\)\)")
    pair.B.data = whole
    pair.A.requires_grad_(False)
    pair.A.data = pair.A.data.to(torch.float8_e4m3fn)
    with pytest.raises(BackendError, match=r"A is stored as torch.float8_e4m3fn"):
        create_lorafa_optimizer(model, lr=1e-3)


def test_another_active_adapter_than_at_the_start_is_refused_before_anything_moves() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    loss(model, batch()).backward()
    before = values(model)
    with pytest.raises(AdapterError, match=r"made for adapter 'default', active now: 'other'"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@BOTH
def test_a_state_of_other_shapes_is_refused_before_anything_is_loaded(algorithm: str) -> None:
    small, large = adapted(), adapted(r=4)
    optimizer = create_lorafa_optimizer(small, lr=1e-2, algorithm=algorithm)
    other = create_lorafa_optimizer(large, lr=1e-3, algorithm=algorithm)
    run(small, optimizer)
    run(large, other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"shape \(10, 4\), its saved exp_avg has \(10, 3\); nothing was loaded"):
        other.load_state_dict(optimizer.state_dict())
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][index][k])) for k, v in state.items())
    one_layer = create_lorafa_optimizer(adapted(target_modules=["first"]), lr=1e-2, algorithm=algorithm)
    with pytest.raises(CheckpointError, match=r"groups of \[1\] parameters, this one of \[2\]"):
        other.load_state_dict(one_layer.state_dict())


def test_the_state_of_the_other_algorithm_is_refused() -> None:
    """Its moments are those of another B."""
    one, two = adapted(), adapted()
    exact, fold = create_lorafa_optimizer(one, lr=1e-2), create_lorafa_optimizer(two, lr=1e-2, algorithm="fold")
    run(one, exact)
    run(two, fold)
    with pytest.raises(CheckpointError, match=r"saved optimizer is exact, this one is fold; nothing was loaded"):
        fold.load_state_dict(exact.state_dict())
    with pytest.raises(CheckpointError, match=r"saved optimizer is fold, this one is exact; nothing was loaded"):
        exact.load_state_dict(fold.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_twice_is_folding_once_in_half_precision_too(dtype: torch.dtype) -> None:
    model = adapted(torch.float32)
    for pair in pairs_of(model):
        pair.A.data, pair.B.data = pair.A.data.to(dtype), pair.B.data.to(dtype)
    create_lorafa_optimizer(model, lr=1e-2, algorithm="fold")
    once = values(model)
    create_lorafa_optimizer(model, lr=1e-2, algorithm="fold")
    assert all(torch.equal(value, once[name]) for name, value in model.named_parameters())


def test_the_class_needs_pairs() -> None:
    with pytest.raises(ConfigError, match=r"given no pairs. Call create_lorafa_optimizer"):
        LoraFAOptimizer([nn.Parameter(torch.zeros(2, 2))])
