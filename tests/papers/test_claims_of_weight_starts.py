"""What the papers of the starts computed from the weight claim, and their corners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, create_riemannian_optimizer, get_peft_model
from lorafa.errors import AdapterError, ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult
from lorafa.initializers.olora import OloraConfig
from lorafa.initializers.pissa import PissaConfig
from lorafa.numerics.linalg import leading_columns
from lorafa.optimizers import create_lorapro_optimizer, create_preconditioned_adamw
from lorafa.spec import LayerSpec
from toys.compare import close
from toys.models import Mlp
from toys.optimizers import adapted, batch, loss

RANK, SCALING = 6, 1.5
WEIGHT = torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WEIGHTS = {
    "tall": WEIGHT,
    "wide": WEIGHT.T.contiguous(),
    "transposed": WEIGHT.T,
    "experts": torch.randn(3, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
}


def start(name: str, weight: Tensor, rank: int = RANK, **spec: Any) -> InitResult:
    kind = "experts" if weight.dim() == 3 else "linear"
    settings = {"name": "layers.0.q_proj", "seed": 0, "kind": kind, "scaling": SCALING} | spec
    return INITIALIZERS.get(name)(weight, {}, LayerSpec(rank=rank, **settings))


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return WEIGHTS[request.param]


def identity(weight: Tensor) -> Tensor:
    return torch.eye(RANK, dtype=weight.dtype).expand(*weight.shape[:-2], RANK, RANK)


# ---- PiSSA, arXiv:2404.02948


@pytest.mark.parametrize("scaling", [1.0, 0.25, 4.0])
def test_pissa_takes_the_leading_triplets_and_leaves_the_tail_spectrum(weight: Tensor, scaling: float) -> None:
    """Equations 2-4: A A^T = B^T B = diag(sigma / s)."""
    result = start("pissa", weight, scaling=scaling)
    assert result.subtract_from_base
    sigma = torch.linalg.svdvals(weight)
    left = torch.linalg.svdvals(weight - scaling * result.B @ result.A)
    close(left[..., :-RANK], sigma[..., RANK:])
    assert left[..., -RANK:].abs().max() < 1e-12
    largest = torch.diag_embed(sigma[..., :RANK] / scaling)
    close(result.A @ result.A.mT, largest)
    close(result.B.mT @ result.B, largest)


def slowly_decaying(rows: int, columns: int) -> Tensor:
    """A weight whose singular values fall like i^-1/4, as slowly as those of trained ones, and its values."""
    values = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -0.25
    generator = torch.Generator().manual_seed(3)
    U, V = (
        torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64, generator=generator)).Q
        for n in (rows, columns)
    )
    return U * values @ V.mT


def test_pissa_of_a_wide_layer_holds_almost_all_the_best_triplets_do_and_exact_all_of_it() -> None:
    """Wide enough for the block Krylov method: 99.77 % of their energy is the least that was seen of real weights."""
    wide = slowly_decaying(320, 288)
    sigma = torch.linalg.svdvals(wide)
    result, exact = start("pissa", wide), start("pissa", wide, settings=PissaConfig(exact=True))
    found = SCALING * (result.A @ result.A.mT)
    close(result.B.mT @ result.B, result.A @ result.A.mT)
    close(found, torch.diag(found.diagonal()))
    assert 0.9977 < found.diagonal().square().sum() / sigma[:RANK].square().sum() < 1 - 1e-12
    left = torch.linalg.svdvals(wide - SCALING * result.B @ result.A)
    assert (left[:-RANK] > sigma[RANK:] - 1e-12).all()  # no approximation leaves less
    torch.testing.assert_close(left.square().sum(), sigma[RANK:].square().sum(), rtol=1e-3, atol=0)
    close(torch.linalg.svdvals(wide - SCALING * exact.B @ exact.A)[:-RANK], sigma[RANK:])


def test_pissa_of_full_rank_takes_everything() -> None:
    result = start("pissa", WEIGHT, 32)
    close(SCALING * result.B @ result.A, WEIGHT)


def test_pissa_is_computed_in_float32_from_a_half_precision_weight() -> None:
    result = start("pissa", WEIGHT.bfloat16())
    assert result.A.dtype is torch.float32
    sigma = torch.linalg.svdvals(WEIGHT.bfloat16().double())[:RANK]
    found = (result.A @ result.A.T).diagonal().double() * SCALING
    torch.testing.assert_close(found, sigma, rtol=1e-5, atol=1e-5)


def of_rank(rank: int) -> Tensor:
    """A random (48, 32) matrix of that rank, in float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, rank, generator=generator) @ torch.randn(rank, 32, generator=generator)


POOR = {"zeros": torch.zeros(48, 32), "rank 3": of_rank(3), "experts": torch.stack([of_rank(8), of_rank(3)])}


@pytest.mark.parametrize("poor", POOR.values(), ids=POOR)
def test_pissa_of_a_weight_without_enough_singular_values_is_degenerate(poor: Tensor) -> None:
    """sigma = 0 makes a row of A and a column of B zero, and then the gradients of both."""
    found = 0 if not poor.any() else 3
    with pytest.raises(DegenerateError, match=f"^its weight has {found} singular values other than zero where 4 are"):
        start("pissa", poor, 4)
    if found:
        start("pissa", poor, 3)


def test_a_random_start_of_peft_is_not_found_again() -> None:
    text = (
        r"^The file does not hold what PEFT's 'pissa_niter_4' took from the base, and it was random\. Save it in PEFT "
        r"with path_initial_model_for_weight_conversion, or merged\.$"
    )
    with pytest.raises(ConfigError, match=text):
        start("pissa", WEIGHT, repeats=True, number=4)
    close(start("pissa", WEIGHT, repeats=True).A, start("pissa", WEIGHT, settings=PissaConfig(exact=True)).A)


# ---- OLoRA, arXiv:2406.01775


def test_olora_is_the_first_part_of_the_qr_decomposition(weight: Tensor) -> None:
    result = start("olora", weight)
    Q, R = torch.linalg.qr(weight)
    close(result.B, Q[..., :, :RANK])
    close(result.A, R[..., :RANK, :])
    close(result.B.mT @ result.B, identity(weight))
    assert result.subtract_from_base


def test_olora_leaves_in_the_base_what_is_orthogonal_to_b_and_no_scaling_is_divided_out(weight: Tensor) -> None:
    """W - Q_r R_r = (I - B B^T) W: its first r columns are zero, and with s the base loses s times as much."""
    result = start("olora", weight, scaling=1.0)
    rest = weight - result.B @ result.A
    close(rest[..., :RANK], torch.zeros_like(rest[..., :RANK]))
    assert (result.B.mT @ rest).abs().max() < 1e-12
    assert torch.equal(start("olora", weight, scaling=8.0).A, result.A)


def test_pivoted_olora_takes_the_column_farthest_from_those_before_it(weight: Tensor) -> None:
    result = start("olora", weight, settings=OloraConfig(pivoted=True))
    columns = leading_columns(weight, RANK)
    for step in range(RANK):
        known = result.B[..., :step]
        distances = torch.linalg.vector_norm(weight - known @ (known.mT @ weight), dim=-2)
        assert torch.equal(distances.argmax(-1), columns[..., step])
    close(result.B.mT @ result.B, identity(weight))
    close(result.A, result.B.mT @ weight)  # in the order of the layer's inputs, not in that of the pivots
    triangle = result.A.gather(-1, columns[..., None, :].expand(*result.A.shape[:-1], RANK))
    close(triangle.tril(-1), torch.zeros_like(triangle))


DEPENDENT = WEIGHT.clone()
DEPENDENT[:, 3] = DEPENDENT[:, :3].sum(1)


def test_olora_of_dependent_first_columns_is_degenerate_and_pivoting_takes_others() -> None:
    text = r"the first 6 columns of its weight are linearly dependent \(init_config={'pivoted': True} chooses others"
    with pytest.raises(DegenerateError, match=text):
        start("olora", DEPENDENT)
    start("olora", DEPENDENT, 3)
    result = start("olora", DEPENDENT, settings=OloraConfig(pivoted=True))
    close(result.B.mT @ result.B, identity(DEPENDENT))
    with pytest.raises(DegenerateError, match=r"^no 6 columns of its weight are independent"):
        start("olora", WEIGHT[:, :5] @ WEIGHT[:5], settings=OloraConfig(pivoted=True))


def test_olora_settings_reach_the_start_and_wrong_ones_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(DEPENDENT)
    settings: dict[str, Any] = {"target_modules": ["0"], "r": RANK, "init_lora_weights": "olora"}
    get_peft_model(model, LoraConfig(**settings, init_config={"pivoted": True}))
    assert model[0].fallbacks == {}
    with pytest.raises(ConfigError, match="pivoted must be True or False, found 'yes'"):
        LoraConfig(**settings, init_config={"pivoted": "yes"})


# ---- MiLoRA, arXiv:2406.09044


def test_milora_takes_the_smallest_triplets_and_leaves_the_principal_part(weight: Tensor) -> None:
    result = start("milora", weight)
    sigma = torch.linalg.svdvals(weight)
    kept = torch.linalg.svdvals(weight - SCALING * result.B @ result.A)
    close(kept[..., :-RANK], sigma[..., :-RANK])
    assert kept[..., -RANK:].abs().max() < 1e-12
    smallest = torch.diag_embed(sigma[..., -RANK:] / SCALING)
    close(result.A @ result.A.mT, smallest)
    close(result.B.mT @ result.B, smallest)
    assert result.subtract_from_base


def test_milora_and_pissa_share_the_weight_out_between_them() -> None:
    rank = min(WEIGHT.shape) // 2
    parts = [start(name, WEIGHT, rank) for name in ("pissa", "milora")]
    close(sum((SCALING * part.B @ part.A for part in parts), torch.zeros(48, 32)), WEIGHT)


def test_milora_of_a_weight_with_singular_values_of_zero_is_degenerate() -> None:
    """Its smallest triplets are zero: factors made of them have no gradients."""
    with pytest.raises(DegenerateError, match="its weight has 3 singular values other than zero where 6 are needed"):
        start("milora", (WEIGHT[:, :29] @ torch.randn(29, 32, dtype=torch.float64)).float())
    with pytest.raises(ConfigError, match=r"rank 33 is larger than min\(out, in\) = 32"):
        start("milora", WEIGHT, 33)


# ---- MiCA, arXiv:2604.01694


def test_mica_starts_in_the_directions_the_weight_uses_least_and_changes_nothing(weight: Tensor) -> None:
    result = start("mica", weight)
    U = torch.linalg.svd(weight, full_matrices=False).U[..., -RANK:]
    close(result.B @ result.B.mT, U @ U.mT)  # the sign of a singular vector is free
    close(result.B.mT @ result.B, identity(weight))
    close(torch.linalg.vector_norm(result.B.mT @ weight, dim=-1), torch.linalg.svdvals(weight)[..., -RANK:])
    assert not result.A.any()
    assert not result.subtract_from_base


def test_mica_takes_directions_a_weight_does_not_use_at_all() -> None:
    poor = WEIGHT[:, :20] @ WEIGHT[:20, :]
    result = start("mica", poor)
    assert (result.B.mT @ poor).abs().max() < 1e-12
    close(result.B.mT @ result.B, identity(poor))
    with pytest.raises(ConfigError, match=r"rank 33 is larger than min\(out, in\) = 32"):
        start("mica", WEIGHT, 33)
    with pytest.raises(DegenerateError, match="its weight is not finite"):
        start("mica", WEIGHT / 0)


MICA: dict[str, Any] = {"target_modules": ["first", "second"], "r": 3, "init_lora_weights": "mica"}


def trainable(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[1] for name, p in model.named_parameters() if p.requires_grad}


def test_mica_trains_a_alone_whichever_way_the_adapter_comes_to_train(tmp_path: Path) -> None:
    base, data = Mlp().double(), batch()
    model = adapted(model=copy.deepcopy(base), **MICA)
    frozen = [layer.factor_B("default").clone() for _, layer in model.base_model.lora_layers()]
    before = model(data[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
    assert not torch.allclose(model(data[0]), before, atol=1e-3)
    assert trainable(model) == {"A.default.weight"}
    for B, (_, layer) in zip(frozen, model.base_model.lora_layers(), strict=True):
        assert torch.equal(layer.factor_B("default"), B)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("plain")
    assert trainable(model) == {"A.plain.weight", "B.plain.weight"}
    model.set_adapter("default")
    assert trainable(model) == {"A.default.weight"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert torch.equal(loaded(data[0]), model(data[0]))
    assert trainable(loaded) == {"A.default.weight"}


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("Riemannian preconditioning", lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)),
        ("LoRA-One's preconditioned AdamW", lambda model: create_preconditioned_adamw(model, lr=1e-2)),
        ("LoRA-Pro", lambda model: create_lorapro_optimizer(model, lr=1e-2)),
    ],
)
def test_optimizers_that_move_both_factors_refuse_mica(method: str, make: Callable[[nn.Module], object]) -> None:
    model = adapted(**MICA)
    with pytest.raises(AdapterError, match=rf"adapter 'default': B is frozen, but {method} moves A and B together"):
        make(model)
    assert trainable(model) == {"A.default.weight"}


def test_a_frozen_a_leaves_mica_nothing_to_train() -> None:
    text = r"freeze_A=True leaves nothing to train: init_lora_weights='mica' trains A alone\. Drop one of the two\."
    with pytest.raises(ConfigError, match=text):
        LoraConfig(**MICA, freeze_A=True)
