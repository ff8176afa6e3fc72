"""The starts of LoRA-GA's scripts: both factors random, singular vectors of W, and LoRA-GA with its clip.

Expected are the formulas of their `run_exp.py`; the laws of all starts are in tests/laws.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import InitResult
from lorafa.initializers.both_random import SAMPLERS_A, SAMPLERS_B, BothRandomConfig
from lorafa.initializers.pissa import pissa
from lorafa.initializers.svd_of_weight import SvdOfWeightConfig
from lorafa.settings.methods import LoraGAConfig
from lorafa.spec import LayerSpec
from toys.adapters import stats_for

OUT, IN, RANK, S = 48, 32, 4, 1.5
W = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def start(name: str, settings: Any = None, weight: Tensor = W, rank: int = RANK, seed: int = 0) -> InitResult:
    made = INITIALIZERS.get(name)
    stats = stats_for(weight) if made.needs else {}
    spec = LayerSpec(name="q_proj", kind="linear", rank=rank, scaling=S, seed=seed, settings=settings)
    return made(weight, stats, spec)


def spread(sampler: str, factor: str, rows: int, columns: int) -> float:
    """The standard deviation of many draws."""
    table = SAMPLERS_A if factor == "A" else SAMPLERS_B
    return float(table[sampler]((2000, rows, columns), 0.02, torch.Generator().manual_seed(0)).std())


@pytest.mark.parametrize(
    ("sampler", "of_A", "of_B"),
    [
        ("unit", IN**-0.5, OUT**-0.5),
        ("kaiming", (3 * IN) ** -0.5, (2 / RANK) ** 0.5),
        ("fan_out_kaiming", (2 / RANK) ** 0.5, (2 / OUT) ** 0.5),
        ("xavier", (2 / (RANK + IN)) ** 0.5, (2 / (RANK + OUT)) ** 0.5),
        ("gaussian", 0.02, 0.02),
        ("zeros", 0.0, 0.0),
        ("orthogonal", IN**-0.5, OUT**-0.5),
    ],
)
def test_samplers_have_the_spread_of_torch_nn_init(sampler: str, of_A: float, of_B: float) -> None:
    """A is (r, in) and B (out, r): the fan in of A is in, that of B is r."""
    assert spread(sampler, "A", RANK, IN) == pytest.approx(of_A, rel=0.01)
    assert spread(sampler, "B", OUT, RANK) == pytest.approx(of_B, rel=0.01)


def test_a_kaiming_a_is_uniform_and_an_orthogonal_factor_orthonormal() -> None:
    result = start("both_random", BothRandomConfig(lora_A="kaiming", lora_B="orthogonal"))
    assert result.A.abs().max() <= IN**-0.5
    torch.testing.assert_close(result.B.mT @ result.B, torch.eye(RANK), rtol=1e-5, atol=1e-6)
    result = start("both_random", BothRandomConfig(lora_A="orthogonal"))
    torch.testing.assert_close(result.A @ result.A.mT, torch.eye(RANK), rtol=1e-5, atol=1e-6)


def test_both_factors_are_drawn_apart_and_their_product_is_taken_out() -> None:
    result = start("both_random", weight=torch.zeros(IN, IN))
    assert not torch.allclose(result.A, result.B.mT)
    assert result.subtract_from_base
    assert not torch.equal(result.A, start("both_random", weight=torch.zeros(IN, IN), seed=1).A)


@pytest.mark.parametrize(("name", "config"), [("both_random", BothRandomConfig), ("svd_of_weight", SvdOfWeightConfig)])
def test_scale_stable_goes_by_the_fourth_root_of_each_side(name: str, config: Any) -> None:
    """There the sides are names that the branch of random factors has not set."""
    bare = start(name, config() if name == "both_random" else config(scale="unit"))
    stable = start(name, config(scale="stable", stable_gamma=9.0))
    torch.testing.assert_close(stable.A, bare.A * IN**0.25 / 3)
    torch.testing.assert_close(stable.B, bare.B * OUT**0.25 / 3)


def test_singular_vectors_of_the_weight_at_each_scale() -> None:
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    top = U[:, :RANK], sigma[:RANK], Vh[:RANK]
    best = top[0] * top[1] @ top[2]
    close = {"rtol": 1e-6, "atol": 1e-8}
    scales = ("default", "unit", "normalized")
    by_scale = {scale: start("svd_of_weight", SvdOfWeightConfig(scale=scale)) for scale in scales}
    torch.testing.assert_close(S * by_scale["default"].B @ by_scale["default"].A, best, **close)
    torch.testing.assert_close(by_scale["unit"].B @ by_scale["unit"].A, top[0] @ top[2], **close)
    normalized = by_scale["normalized"]
    torch.testing.assert_close(normalized.B @ normalized.A, RANK / top[1].sum() * best, **close)
    torch.testing.assert_close(normalized.B.mT @ normalized.B, normalized.A @ normalized.A.mT, **close)
    same = pissa(W, {}, LayerSpec(name="q_proj", kind="linear", rank=RANK, scaling=S, seed=0))
    assert torch.equal(by_scale["default"].A, same.A)


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize("name", ["both_random", "svd_of_weight"])
def test_norm_clip_makes_the_start_no_larger_than_the_weight(name: str, experts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = 0.01 * torch.randn(*experts, OUT, IN, dtype=torch.float64, generator=generator)
    config = {"both_random": BothRandomConfig, "svd_of_weight": SvdOfWeightConfig}[name]
    scale = "stable" if name == "svd_of_weight" else "default"
    free, held = (start(name, config(scale=scale, norm_clip=clip), weight) for clip in (False, True))
    largest, limit = ((S * free.B @ free.A).abs().amax((-2, -1)), weight.abs().amax((-2, -1)))
    assert bool((largest > limit).all())
    torch.testing.assert_close((S * held.B @ held.A).abs().amax((-2, -1)), limit.to(held.A), rtol=1e-5, atol=0)
    root = (limit / largest).sqrt()[..., None, None]
    torch.testing.assert_close(held.A, (free.A * root).to(held.A), rtol=1e-5, atol=1e-9)
    small = start(name, config(scale=scale, norm_clip=True), 1e4 * weight)
    assert torch.equal(small.A, start(name, config(scale=scale), 1e4 * weight).A)


def test_lora_ga_clipped_is_lora_ga_where_nothing_is_too_large() -> None:
    settings = LoraGAConfig(stable_gamma=64)
    large = 10 * W
    assert torch.equal(start("lora_ga_clipped", settings, large).A, start("lora_ga", settings, large).A)
    clipped, free = (start(name, LoraGAConfig(scale="unit"), W / 1e3) for name in ("lora_ga_clipped", "lora_ga"))
    assert float((S * clipped.B @ clipped.A).abs().max()) == pytest.approx(float(W.abs().max()) / 1e3)
    torch.testing.assert_close(clipped.A / clipped.A.norm(), free.A / free.A.norm())


def test_settings_out_of_range_are_refused() -> None:
    for config, message in (
        ({"lora_A": "normal"}, "lora_A .*normal"),
        ({"lora_B": "normal"}, "lora_B .*normal"),
        ({"scale": "unit"}, "scale .*unit"),
        ({"lora_A_std": 0}, "lora_A_std must be a number > 0"),
        ({"norm_clip": 1}, "norm_clip must be True or False"),
        ({"lora_A": "zeros", "lora_B": "zeros"}, "both zeros, so neither would get a gradient"),
    ):
        with pytest.raises(ConfigError, match=message):
            BothRandomConfig(**config)
    with pytest.raises(ConfigError, match=r"scale .*half"):
        SvdOfWeightConfig(scale="half")
    with pytest.raises(ConfigError, match="norm_clip must be True or False"):
        SvdOfWeightConfig(norm_clip="no")  # type: ignore[arg-type]
