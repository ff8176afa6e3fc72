"""`pissa_niter_N`: N steps of the block Krylov method, on a weight whose singular values decay slowly."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import only_layer, train

OUT, IN, RANK = 180, 200, 4
NUMBERS = (1, 4, 16)
VALUES = torch.arange(1, OUT + 1, dtype=torch.float64) ** -0.5
BEST = VALUES[:RANK].square().sum()
"""The energy of the leading triplets."""


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(n, OUT, generator=generator, dtype=torch.float64)).Q for n in (OUT, IN))
    return U * VALUES @ V.mT


def base(dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = nn.Linear(IN, OUT, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight())
        layer.bias.copy_(torch.linspace(-1, 1, OUT))
    return nn.Sequential(layer).to(dtype)


def started(start: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"], init_lora_weights=start, init_seed=seed)
    return get_peft_model(base(dtype), config).eval()


def taken(model: PeftModel) -> Tensor:
    """s B0 A0, what the start takes out of the weight."""
    return only_layer(model).adapters["default"].start_product()


def captured(start: str, seed: int = 0) -> float:
    """The share of the leading triplets' energy that the weight has lost without s B0 A0."""
    W = weight()
    left = (W - taken(started(start, seed=seed))).square().sum()
    return float((W.square().sum() - left) / BEST)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_steps_capture_more_of_the_leading_triplets(seed: int) -> None:
    """No rank-r product can hold more than they do, and eight steps are what "pissa" takes."""
    found = {number: captured(f"pissa_niter_{number}", seed) for number in (1, 2, 4, 8, 16)}
    shares = list(found.values())
    assert shares == sorted(set(shares))
    assert shares[-1] <= 1 + 1e-12
    assert shares[0] < 0.98
    assert shares[2] > 0.98
    assert shares[-1] > 0.9999
    assert captured("pissa", seed) == pytest.approx(found[8], rel=1e-12)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_steps_go_at_least_as_far_as_as_many_of_subspace_iteration(number: int) -> None:
    """What PEFT computes for the same name: torch.svd_lowrank with q = r. Its range is one of those searched here."""
    W, shares = weight(), []
    for seed in range(5):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=RANK, niter=number)
        left = (W - U * S @ V.mT).square().sum()
        shares.append(float((W.square().sum() - left) / BEST))
    assert captured(f"pissa_niter_{number}") > max(shares)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_and_b_are_balanced_whatever_the_number(number: int) -> None:
    """A A^T = B^T B = diag(S / s), with S the singular values of s B A."""
    model = started(f"pissa_niter_{number}")
    A, B = only_layer(model).factor_A("default"), only_layer(model).factor_B("default")
    S = torch.linalg.svdvals(taken(model))[:RANK]
    torch.testing.assert_close(A @ A.mT, torch.diag(S / 1.5), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(B.mT @ B, torch.diag(S / 1.5), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", NUMBERS)
def test_step_zero_is_the_base_bit_for_bit(number: int, dtype: torch.dtype) -> None:
    model, plain, x = started(f"pissa_niter_{number}", dtype), base(dtype).eval(), torch.randn(7, IN).to(dtype)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(only_layer(model).get_base_layer().weight, plain[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("number", NUMBERS)
def test_trained_it_is_plain_lora_on_the_base_as_it_was(number: int, tmp_path: Path) -> None:
    model, x = started(f"pissa_niter_{number}", torch.float32), torch.randn(7, IN)
    train(model, 0.05)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that only lorafa has
        theirs = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path).eval()
    assert theirs.peft_config["default"].r == 2 * RANK
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), base(torch.float32)(x), atol=1e-2)
    assert torch.equal(PeftModel.from_pretrained(base(torch.float32), tmp_path).eval()(x), model(x))
