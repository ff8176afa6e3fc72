"""Optimizers inside what training loops do: scalers, autocast, clipping, accumulation, compiled models, Trainer."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import lorafa.optimizers.adamw
from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.pairs import pairs_of
from toys.compare import trained_values
from toys.optimizers import adapted, batch, loss

LR = 1e-2
MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "exact": lambda model: create_lorafa_optimizer(model, lr=LR, weight_decay=0.1),
    "fold": lambda model: create_lorafa_optimizer(model, lr=LR, weight_decay=0.1, algorithm="fold"),
    "plus": lambda model: create_loraplus_optimizer(model, AdamW, lr=LR, loraplus_lr_ratio=4, fused=True),
    "riemannian": lambda model: create_riemannian_optimizer(model, AdamW, lr=LR, fused=True),
    "riemannian sgd": lambda model: create_riemannian_optimizer(model, SGD, lr=LR, momentum=0.9),
    "preconditioned": lambda model: create_preconditioned_adamw(model, lr=LR, weight_decay=0.1),
    "pro adamw": lambda model: create_lorapro_optimizer(model, lr=LR, weight_decay=0.1),
    "pro sgd": lambda model: create_lorapro_optimizer(model, lr=LR, form="sgd", momentum=0.9),
    "pro full": lambda model: create_lorapro_optimizer(model, lr=LR, form="full"),
}
EVERY = pytest.mark.parametrize("name", MAKERS)
LORA_FA = pytest.mark.parametrize("name", ["exact", "fold"])


def twins(dtype: torch.dtype = torch.float64) -> tuple[PeftModel, PeftModel]:
    model = adapted(dtype)
    return model, copy.deepcopy(model)


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    found, expected = trained_values(one), trained_values(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def step(model: nn.Module, optimizer: Optimizer, data: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss(model, data).backward()
    optimizer.step()


# ---- half precision


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled by step", "unscale_"])
@EVERY
def test_a_scaler_skips_a_step_on_an_infinite_gradient_which_leaves_no_trace(name: str, unscale: bool) -> None:
    model, plain = twins(torch.float32)
    optimizer, unscaled = MAKERS[name](model), MAKERS[name](plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data, before = batch(torch.float32), trained_values(model)

    def scaled_step(*, overflow: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(loss(model, data)).backward()
        if overflow:
            pairs_of(model)[0].B.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    scaled_step(overflow=True)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(value, before[key]) for key, value in trained_values(model).items())
    for _ in range(2):
        scaled_step(overflow=False)
        step(plain, unscaled, data)
    assert_same(model, plain, 1e-6)


@EVERY
def test_autocast_around_making_and_stepping_changes_no_bit(name: str) -> None:
    model, plain = twins(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer = MAKERS[name](model)
    other = MAKERS[name](plain)
    for _ in range(2):
        data = batch(torch.float32)
        step(plain, other, data)
        optimizer.zero_grad()
        loss(model, data).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step()
    assert_same(model, plain)


@pytest.mark.parametrize(
    ("first", "second"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=["up", "down"]
)
def test_moments_of_exact_follow_the_model_to_another_precision(first: torch.dtype, second: torch.dtype) -> None:
    """Loaded into an optimizer of the other precision, or kept by one whose model is cast under it."""
    model = adapted(first)
    optimizer = create_lorafa_optimizer(model, lr=LR)
    for _ in range(2):
        step(model, optimizer, batch(first))
    moments = [optimizer.state[pair.B]["exp_avg_sq"].clone() for pair in pairs_of(model)]

    cast = copy.deepcopy(model).to(second)
    loaded = create_lorafa_optimizer(cast, lr=LR)
    loaded.load_state_dict(optimizer.state_dict())
    for pair, moment in zip(pairs_of(cast), moments, strict=True):
        assert loaded.state[pair.B]["exp_avg_sq"].dtype is second
        assert torch.equal(loaded.state[pair.B]["exp_avg_sq"], moment.to(second))

    model.to(second)
    data = batch(second)
    step(model, optimizer, data)
    step(cast, loaded, data)
    assert_same(model, cast)
    assert all(
        optimizer.state[pair.B][key].dtype is second for pair in pairs_of(model) for key in ("exp_avg", "exp_avg_sq")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["exact", "preconditioned"])
def test_without_a_fused_kernel_the_steps_are_the_same(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = twins(torch.float64)
    for pair in (*pairs_of(model), *pairs_of(plain)):
        pair.A.data, pair.B.data = pair.A.data.to(dtype), pair.B.data.to(dtype)
    data = batch()
    optimizer = MAKERS[name](plain)
    for _ in range(3):
        step(plain, optimizer, data)
    monkeypatch.setattr(lorafa.optimizers.adamw, "_FUSED_ON", ())
    optimizer = MAKERS[name](model)
    for _ in range(3):
        step(model, optimizer, data)
    assert_same(model, plain, 1e-12 if dtype is torch.float64 else 1e-2)


# ---- the gradient a step sees


@EVERY
def test_ordinary_clipping_shortens_what_the_step_reads(name: str) -> None:
    """The first of two gradients is clipped: an optimizer that read the unclipped one would weigh them otherwise."""
    model, plain = twins()
    optimizer, other = MAKERS[name](model), MAKERS[name](plain)
    for clips in (True, False):
        data = batch()
        loss(model, data).backward()
        loss(plain, data).backward()
        if clips:
            norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.01)
            assert norm > 0.02
            for parameter in plain.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 0.01 / (norm + 1e-6)
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert_same(model, plain, 1e-12)


@EVERY
def test_accumulated_gradients_give_the_step_of_the_whole_batch(name: str) -> None:
    model, plain = twins()
    optimizer, other = MAKERS[name](model), MAKERS[name](plain)
    for _ in range(2):
        x, target = batch()
        step(plain, other, (x, target))
        optimizer.zero_grad()
        for part in zip(x.chunk(4), target.chunk(4), strict=True):
            (loss(model, part) / 4).backward()
        optimizer.step()
    assert_same(model, plain, 1e-9)


@pytest.mark.parametrize("name", ["exact", "fold", "pro adamw"])
def test_a_model_that_was_compiled_and_run_before_trains_as_in_eager_mode(name: str) -> None:
    model, plain = twins()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss(compiled, batch())  # with A still trained_values: freezing it must not be missed
    optimizer, other = MAKERS[name](compiled), MAKERS[name](plain)
    for _ in range(2):
        data = batch()
        step(compiled, optimizer, data)
        step(plain, other, data)
    assert_same(model, plain, 1e-10)


# ---- what LoRA-FA leaves alone


class Decompositions(TorchDispatchMode):
    """Counts the calls that decompose, invert or solve, whatever function of torch they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if re.search(r"linalg_(?!vector_norm)|cholesky|svd|eig|geqrf|qr|inverse|triangular_solve|lstsq", name):
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


@LORA_FA
def test_nothing_is_decomposed_in_a_step_of_lora_fa(name: str) -> None:
    model = adapted()
    with Decompositions() as made:
        optimizer = MAKERS[name](model)
    assert made.calls, "A is decomposed when the optimizer is made"
    with Decompositions() as stepping:
        for _ in range(3):
            step(model, optimizer, batch())
    assert stepping.calls == []


@LORA_FA
def test_a_hundred_steps_of_lora_fa_do_not_change_a_bit_of_A(name: str) -> None:
    model = adapted(torch.float32)
    optimizer = MAKERS[name](model)
    before, data = {pair: (pair.A.clone(), pair.B.clone()) for pair in pairs_of(model)}, batch(torch.float32)
    for _ in range(100):
        step(model, optimizer, data)
    for pair, (A, B) in before.items():
        assert torch.equal(pair.A, A)
        assert not torch.equal(pair.B, B)


# ---- grouped convolutions: group e of the outputs has ranks of its own, a pair for itself


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y.flatten(2).mT


class Patches(nn.Module):
    """The groups one by one, on the patches a kernel of 3 x 3 sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(36, 3, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 3).mT
        return torch.cat([self.first(patches), self.second(patches)], dim=-1)


@EVERY
def test_a_step_on_a_grouped_convolution_is_that_of_a_pair_for_each_group(name: str) -> None:
    whole = get_peft_model(Convolution().double(), LoraConfig(r=4, lora_alpha=6, target_modules=["conv"]))
    parts = get_peft_model(Patches().double(), LoraConfig(r=2, lora_alpha=3, target_modules=["first", "second"]))
    (pair,), separate = pairs_of(whole), pairs_of(parts)
    with torch.no_grad():
        for one in (pair, *separate):
            one.layer.get_base_layer().weight.zero_()
        pair.A.copy_(torch.randn_like(pair.A))
        pair.B.copy_(torch.randn_like(pair.B))
        for part, A, B in zip(separate, pair.A.flatten(1).chunk(2), pair.B.flatten(1).chunk(2), strict=True):
            part.A.copy_(A)
            part.B.copy_(B)
    optimizers = MAKERS[name](whole), MAKERS[name](parts)
    for _ in range(3):
        x = torch.randn(5, 4, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(whole(x), parts(x), rtol=1e-9, atol=1e-9)
        for model, optimizer in zip((whole, parts), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    for factor in ("A", "B"):
        expected = torch.cat([getattr(part, factor) for part in separate])
        torch.testing.assert_close(getattr(pair, factor).flatten(1), expected, rtol=1e-9, atol=1e-9)


# ---- Trainer, as the documents show it


@LORA_FA
def test_the_trainer_of_transformers_takes_the_steps_of_a_loop_by_hand(name: str, tmp_path: Path) -> None:
    """With a cosine schedule, accumulation and clipping: Trainer(optimizers=(optimizer, scheduler))."""
    transformers = pytest.importorskip("transformers")
    from toys.language_models import llama

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="none", init_seed=0)
    model, plain = (get_peft_model(llama(), config) for _ in range(2))
    frozen = {key: p.clone() for key, p in model.named_parameters() if "lora_" not in key}

    def of(one: nn.Module) -> tuple[Optimizer, Any]:
        optimizer = create_lorafa_optimizer(model=one, r=4, lora_alpha=8, lr=LR, algorithm=name)
        return optimizer, transformers.get_cosine_schedule_with_warmup(
            optimizer, num_warmup_steps=2, num_training_steps=6
        )

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 32, (24, 8))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.02,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    run = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=of(model))
    run.train()
    handle.remove()

    optimizer, scheduler = of(plain)
    norms = []
    for index, given in enumerate(seen):
        plain(**given).loss.backward()
        if index % 2:
            norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.02)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert min(norms) > 0.02, "every step is clipped"
    logged = [line for line in run.state.log_history if "grad_norm" in line]
    cosine = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert [line["learning_rate"] / LR for line in logged] == pytest.approx([0, 0.5, *cosine])
    assert [line["grad_norm"] for line in logged] == pytest.approx(norms, rel=1e-4)
    assert_same(model, plain, 1e-6)
    assert all("lora_B" in key for key in trained_values(model))
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)
    for pair, other in zip(pairs_of(model), pairs_of(plain), strict=True):
        assert torch.equal(pair.A, other.A)
        assert bool(pair.B.any())
