"""What the papers of the starts computed from the weight claim, and their corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult, LayerSpec
from lorafa.initializers.olora import OloraConfig
from lorafa.linalg import leading_columns

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


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return WEIGHTS[request.param]


def identity(weight: Tensor) -> Tensor:
    return torch.eye(RANK, dtype=weight.dtype).expand(*weight.shape[:-2], RANK, RANK)


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
    with pytest.raises(ConfigError, match="pivoted is a switch, found 'yes'"):
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
