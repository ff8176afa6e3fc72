"""Dropout that is drawn again: forward and backward see one mask, wherever it comes from."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, dropout_source, get_peft_model
from lorafa.errors import ConfigError
from lorafa.numerics.dropped_base import dropped_base_linear
from lorafa.numerics.dropping import Source, dropping
from lorafa.numerics.fused import low_rank_linear

SOURCES: list[Source] = ["generator", "tables"]
CPU = torch.device("cpu")


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, W, A, B = torch.randn(21, 12), torch.randn(9, 12), torch.randn(3, 12), torch.randn(9, 3)
    return {name: t.to(dtype) for name, t in {"x": x, "W": W, "A": A, "B": B}.items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kept", ["x and gradient", "x", "gradient", "neither"])
def test_what_is_drawn_again_is_what_was_drawn(source: Source, kept: str) -> None:
    x, grad = torch.randn(70, 13, dtype=torch.float64), torch.randn(70, 13, dtype=torch.float64)
    drop = dropping(0.3, CPU, source)
    dropped = drop.into(x)
    mask = (dropped != 0).double()
    torch.rand(5)  # what is drawn in between is nobody's business
    state = torch.get_rng_state()
    again, through = drop.again(x if "x" in kept else None, grad.clone() if "gradient" in kept else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert (again is None) == ("x" not in kept)
    assert (through is None) == ("gradient" not in kept)
    if again is not None:
        assert torch.equal(again, dropped)
    if through is not None:  # without the scale
        torch.testing.assert_close(through * drop.scale, mask * grad / 0.7, rtol=1e-4, atol=0)
    torch.testing.assert_close(dropped * drop.scale, mask * x / 0.7, rtol=1e-4, atol=0)


@pytest.mark.parametrize("source", SOURCES)
def test_the_share_that_is_dropped_is_the_probability(source: Source) -> None:
    n = 400_000
    share = (dropping(0.2, CPU, source).into(torch.ones(4, n // 4)) == 0).double().mean().item()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_gives_the_same_masks_and_the_next_call_others(source: Source) -> None:
    def two() -> list[Tensor]:
        torch.manual_seed(3)
        return [dropping(0.5, CPU, source).into(torch.ones(8, 8)) for _ in range(2)]

    (first, second), (again, _) = two(), two()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("train", ["all", "B", "A"])
def test_gradients_are_those_of_the_formula_with_the_mask_that_was_drawn(source: Source, train: str) -> None:
    t = tensors()
    given = {n: t[n].clone().requires_grad_(n == "x" or train in ("all", n)) for n in ("x", "A", "B")}
    torch.manual_seed(7)
    mask = dropping(0.4, CPU, source)
    mask = (mask.into(torch.ones_like(t["x"])) * mask.scale).detach()
    torch.manual_seed(7)
    y = low_rank_linear(given["x"], given["A"], given["B"], 1.7, weight=t["W"], dropout=0.4, source=source)
    torch.rand(3)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    plain = {n: v.detach().clone().requires_grad_(v.requires_grad) for n, v in given.items()}
    expected = plain["x"] @ t["W"].T + 1.7 * (plain["x"] * mask) @ plain["A"].T @ plain["B"].T
    (expected * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, value in given.items():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, plain[name].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", SOURCES)
def test_gradients_of_a_norm_are_those_of_the_formula_with_the_mask_that_was_drawn(source: Source) -> None:
    t, gain = tensors(), torch.rand(9, dtype=torch.float64) + 0.5
    given = {n: v.clone().requires_grad_() for n, v in (t | {"gain": gain}).items() if n != "W"}
    torch.manual_seed(7)
    mask = dropping(0.4, CPU, source)
    mask = (mask.into(torch.ones_like(t["x"])) * mask.scale).detach()
    torch.manual_seed(7)
    x, A, B, gain = given.values()
    y = dropped_base_linear(x, A, B, 1.7, weight=t["W"], bias=None, gain=gain, dropout=0.4, source=source)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    p = {n: v.detach().clone().requires_grad_() for n, v in given.items()}
    d = p["x"] * mask
    expected = p["x"] @ t["W"].T + (p["gain"] - 1) * (d @ t["W"].T) + p["gain"] * (1.7 * d @ p["A"].T @ p["B"].T)
    (expected * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, value in given.items():
        torch.testing.assert_close(value.grad, p[name].grad, rtol=1e-10, atol=1e-10)


def test_rows_that_lie_askew_in_memory_are_dropped_as_their_copy_is() -> None:
    """Kernels read memory of their own many elements at a time, and draw for so many."""
    wide = torch.randn(9 * 7 + 1, dtype=torch.float32)
    askew = wide[1:].view(9, 7)
    torch.manual_seed(1)
    drop = dropping(0.5, CPU, "generator")
    assert torch.equal(drop.into(askew), drop.again(askew.clone(), None)[0])


def model(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    config = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=dropout, init_lora_weights=False)
    adapted = get_peft_model(base, config)
    return adapted.double().train()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_run_again_in_backward_drop_the_same(source: Source, use_reentrant: bool) -> None:
    """Outside of the block, too: a call keeps to the source it began with."""
    from torch.utils.checkpoint import checkpoint

    adapted, x = model(), torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    other: Source = "tables" if source == "generator" else "generator"

    def gradients(checkpointed: bool) -> list[Tensor]:
        adapted.zero_grad()
        inner = adapted.base_model.model
        plain = type(inner).forward

        def again(self: nn.Module, value: Tensor) -> Tensor:
            return checkpoint(lambda v: plain(self, v), value, use_reentrant=use_reentrant)

        torch.manual_seed(5)
        with dropout_source(source):
            inner.forward = again.__get__(inner) if checkpointed else plain.__get__(inner)
            y = adapted(x)
        with dropout_source(other):
            y.square().sum().backward()
        return [p.grad.clone() for p in adapted.parameters() if p.grad is not None]

    expected, found = gradients(False), gradients(True)
    assert len(expected) == len(found) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_another_source_is_refused() -> None:
    message = "dropout_source is one of 'generator', 'tables', found 'table'."
    with pytest.raises(ConfigError, match=re.escape(message)), dropout_source("table"):  # type: ignore[arg-type]
        pass
