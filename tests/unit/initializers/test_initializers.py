"""Where A and B start: each start's own property, from its paper (in brackets), in float64 where it is a formula."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import InitResult, initializer
from lorafa.initializers.goat import GoatConfig
from lorafa.numerics.linalg import fix_signs, truncated_svd
from lorafa.spec import LayerSpec
from toys.adapters import stats_for


def start(
    name: str, weight: Tensor, rank: int, *, kind: str = "linear", scaling: float = 1.5, **spec: Any
) -> InitResult:
    settings, made = {"name": "layers.0.q_proj", "seed": 0} | spec, INITIALIZERS.get(name)
    if name == "goat":
        settings = {"settings": GoatConfig(experts=2)} | settings
    stats = stats_for(weight) if made.needs else {}  # of a wide weight they take minutes
    return made(weight, stats, LayerSpec(kind=kind, rank=rank, scaling=scaling, **settings))


WEIGHT = torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EXPERTS = torch.randn(3, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def only_linear(name: str) -> bool:
    made = INITIALIZERS.get(name)
    return bool(made.needs or made.quantizer or made.variant)


@pytest.mark.parametrize(
    ("name", "weight"),
    [(n, w) for n in INITIALIZERS.names() for w in (WEIGHT, EXPERTS) if w.dim() == 2 or not only_linear(n)],
)
def test_factors_have_the_shapes_of_the_weight_and_the_rank(name: str, weight: Tensor) -> None:
    result = start(name, weight, 4, kind="experts" if weight.dim() == 3 else "linear")
    assert result.A.shape == (*weight.shape[:-2], 4, 32)
    assert result.B.shape == (*weight.shape[:-2], 48, 4)
    assert result.A.dtype in (torch.float32, torch.float64)
    assert torch.isfinite(result.A).all()
    assert torch.isfinite(result.B).all()


@pytest.mark.parametrize("name", INITIALIZERS.names())
def test_start_is_a_pure_function_of_weight_and_spec(name: str) -> None:
    before = WEIGHT.clone()
    first = start(name, WEIGHT, 4)
    torch.rand(7)
    second = start(name, WEIGHT, 4)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert torch.equal(WEIGHT, before)


@pytest.mark.parametrize("name", [n for n in INITIALIZERS.names() if not INITIALIZERS.get(n).reads_weight])
def test_start_that_does_not_read_the_weight_takes_a_shape_alone(name: str) -> None:
    alone, with_values = start(name, WEIGHT.to("meta"), 4), start(name, WEIGHT, 4)
    assert torch.equal(alone.A, with_values.A)
    assert torch.equal(alone.B, with_values.B)


@pytest.mark.parametrize("name", ["kaiming", "random", "gaussian", "orthogonal"])
def test_experts_start_differently(name: str) -> None:
    A = start(name, EXPERTS, 4, kind="experts").A
    assert not torch.equal(A[0], A[1])


@pytest.mark.parametrize("name", INITIALIZERS.names())
def test_an_initializer_goes_by_the_name_and_docstring_of_its_function(name: str) -> None:
    start = INITIALIZERS.get(name)
    assert (start.__name__, start.__doc__) == (name, start.function.__doc__)


def test_an_initializer_declares_what_it_says_and_nothing_else() -> None:
    function = INITIALIZERS.get("kaiming").function
    start = initializer(needs=("gradient",), trains="A")(function)
    assert (start.needs, start.trains, start.also, start.keeps_function) == (("gradient",), "A", (), True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'need'"):
        initializer(need=("gradient",))(function)  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        start.needs = ()  # type: ignore[misc]


def test_kaiming_is_uniform_with_bound_one_over_root_in_and_B_zero() -> None:
    """LoRA (2106.09685), loralib: variance 1 / (3 in)."""
    result = start("kaiming", torch.empty(8, 400, device="meta"), 200)
    bound = 400**-0.5
    assert result.A.abs().max() <= bound
    assert result.A.abs().max() > 0.999 * bound
    assert result.A.mean().abs() < 5 * bound / (3 * result.A.numel()) ** 0.5
    torch.testing.assert_close(result.A.var().item(), 1 / (3 * 400), rtol=0.02, atol=0)
    assert not result.B.any()
    assert not result.subtract_from_base


def test_kaiming_factors_are_nearly_orthogonal_rows() -> None:
    """A A^T is I / 3 up to O(1/sqrt(in)): what LoRA-FA later relies on."""
    A = start("kaiming", torch.empty(8, 4096, device="meta"), 16).A
    assert torch.linalg.cond(A @ A.T) < 1.4
    torch.testing.assert_close((A @ A.T).diagonal().mean().item(), 1 / 3, rtol=0.02, atol=0)


@pytest.mark.parametrize("rank", [4, 32])
def test_gaussian_has_standard_deviation_one_over_rank(rank: int) -> None:
    """1/r, not 1/sqrt(r)."""
    result = start("gaussian", torch.empty(8, 5000, device="meta"), rank)
    torch.testing.assert_close(result.A.std().item(), 1 / rank, rtol=0.03, atol=0)
    assert result.A.mean().abs() < 5 / rank / result.A.numel() ** 0.5
    assert not result.B.any()


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_embeddings_start_with_A_zero_and_B_standard_normal(name: str) -> None:
    result = start(name, torch.empty(500, 60, device="meta"), 32, kind="embedding", is_table=True)
    assert not result.A.any()
    torch.testing.assert_close(result.B.std().item(), 1.0, rtol=0.03, atol=0)
    assert result.B.abs().max() > 3


def test_random_start_has_both_factors_non_zero() -> None:
    result = start("random", WEIGHT, 4)
    assert 0 < result.A.abs().max() <= 32**-0.5
    assert 0 < result.B.abs().max() <= 4**-0.5


@pytest.mark.parametrize("rank", [2, 4, 16, 30])
@pytest.mark.parametrize("weight", [WEIGHT, EXPERTS], ids=["matrix", "experts"])
def test_orthogonal_factors_are_non_zero_and_their_product_is_zero(weight: Tensor, rank: int) -> None:
    result = start("orthogonal", weight, rank, kind="experts" if weight.dim() == 3 else "linear")
    assert result.A.dtype is torch.float64
    product = result.B @ result.A
    assert product.abs().max() < 1e-15
    for factor in (result.A, result.B):
        assert torch.linalg.matrix_rank(factor).eq(rank // 2).all()
        assert 0.01 < factor.std() < 0.2  # Gaussian / 10, halved by the projection


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(
        ConfigError, match=r"init_lora_weights='orthogonal' .* even rank, found r=3 of layers.0.q_proj. Use 4"
    ):
        start("orthogonal", WEIGHT, 3)


@pytest.mark.parametrize("rank", [33, 100])
def test_rank_beyond_the_singular_vectors_is_refused(rank: int) -> None:
    text = rf"q_proj: rank {rank} is larger than min\(out, in\) = 32 of its weight \(48, 32\).* exclude_modules"
    with pytest.raises(ConfigError, match=text):
        start("pissa", WEIGHT, rank)


def test_svd_has_fixed_signs_and_the_right_factors() -> None:
    U, S, Vh = truncated_svd(WEIGHT, 5)
    best = torch.linalg.svd(WEIGHT)
    torch.testing.assert_close(U @ torch.diag(S) @ Vh, best.U[:, :5] @ torch.diag(best.S[:5]) @ best.Vh[:5])
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = fix_signs(-U, -Vh)
    assert torch.equal(flipped[0], U)
    assert torch.equal(flipped[1], Vh)


def output_spread(rank: int, *, use_rslora: bool) -> float:
    """Standard deviation of s B A x with A and B of fixed variance, over forty draws of them."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    peft = get_peft_model(model, LoraConfig(target_modules=["0"], r=rank, lora_alpha=8, use_rslora=use_rslora))
    layer, squares = model[0], []
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for _ in range(40):
            layer.lora_A["default"].weight.normal_()
            layer.lora_B["default"].weight.normal_()
            squares.append(peft(torch.randn(100, 256)).square().mean())
    return float(torch.stack(squares).mean().sqrt())


def test_rank_stabilized_updates_are_of_one_size_whatever_the_rank() -> None:
    """rsLoRA (2312.03732): s = alpha / sqrt(r) keeps the size; alpha / r shrinks it like 1 / sqrt(r)."""
    assert output_spread(64, use_rslora=True) / output_spread(4, use_rslora=True) == pytest.approx(1, rel=0.05)
    assert output_spread(64, use_rslora=False) / output_spread(4, use_rslora=False) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(("settings", "scaling"), [({}, 3.0), ({"use_rslora": True}, 6.0)])
def test_scaling_is_alpha_over_rank_or_its_root(settings: dict[str, bool], scaling: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    get_peft_model(model, LoraConfig(target_modules=["0"], r=4, lora_alpha=12, **settings))
    assert model[0].scaling["default"] == scaling
