"""What QA-LoRA (arXiv:2309.14717) and BD-LoRA (PEFT's documentation) promise: claims about numbers, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model, initialize
from lorafa.errors import ConfigError
from toys.adapters import only_layer
from toys.compare import close
from toys.formulas import IN, OUT, R, inputs, kept_for_backward, on_linear
from toys.layers import Single

# ---- QA-LoRA (arXiv:2309.14717)


def grouped_codes(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a group-wise quantized weight: W = scale * (code - zero) (equation 1)."""
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    return ((groups - low) / scale).round(), scale, -low / scale


@pytest.mark.parametrize("size", [2, 4, 12])
def test_qalora_merges_into_the_zero_points_of_a_quantized_weight_and_leaves_its_codes(size: int) -> None:
    """Section 3.3: a merge is zero - (s B A) / scale for each group, with the codes and scales as they are."""
    model = on_linear(use_qalora=True, qalora_group_size=size)
    layer = only_layer(model)
    codes, scale, zero = grouped_codes(layer.base_weight().detach(), size)
    layer.get_base_layer().weight.data = (scale * (codes - zero)).flatten(1)
    by_group = layer.adapters["default"].product().unflatten(1, (-1, size))
    assert by_group.abs().max() > 0.05
    close(by_group, by_group[..., :1].expand_as(by_group))
    merged = model.merge_and_unload().layer.weight
    close(merged, (scale * (codes - (zero - by_group[..., :1] / scale))).flatten(1))


def test_qalora_sees_the_means_of_groups_times_their_number_and_has_fewer_parameters() -> None:
    """The factor is PEFT's: the sum over a group, which is the paper's, times in / g^2."""
    model = on_linear(use_qalora=True, qalora_group_size=4)
    layer, x = only_layer(model), inputs(3, 5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (R, IN // 4)
    pooled = x.unflatten(-1, (6, 4)).mean(-1) * 6
    close(model(x), layer.base_layer(x) + 1.5 * pooled @ A.T @ B.T)


def test_qalora_keeps_one_number_a_group_for_backward_and_learns_the_same() -> None:
    x = inputs(50)
    plain, grouped = on_linear(), on_linear(use_qalora=True, qalora_group_size=4)
    assert kept_for_backward(plain, x) - kept_for_backward(grouped, x) >= 8 * 50 * (IN - IN // 4) - 8 * R * IN
    layer = only_layer(grouped)
    probe = torch.randn(50, OUT, dtype=torch.float64)
    (grouped(x) * probe).sum().backward()
    A, B = (holder["default"].weight.detach().requires_grad_() for holder in (layer.lora_A, layer.lora_B))
    pooled = x.unflatten(-1, (6, 4)).mean(-1) * 6
    (1.5 * pooled @ A.T @ B.T * probe).sum().backward()
    close(layer.lora_A["default"].weight.grad, A.grad)
    close(layer.lora_B["default"].weight.grad, B.grad)


def test_a_start_that_makes_dense_factors_is_refused_before_any_data_is_read() -> None:
    config = LoraConfig(r=2, target_modules=["0"], use_qalora=True, qalora_group_size=2, init_lora_weights="lora_one")
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(batch)
        return model(batch).square().sum()  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match=r"0: init_lora_weights='lora_one' makes .* or drop use_qalora\."):
        initialize(nn.Sequential(nn.Linear(8, 8)), config, [torch.randn(4, 8)], loss=loss)
    assert not seen


def test_qalora_refuses_groups_that_do_not_fill_the_inputs_and_starts_of_dense_factors() -> None:
    with pytest.raises(ConfigError, match=r"layer: its 24 inputs are no whole .* qalora_group_size=16. Set a size"):
        on_linear(use_qalora=True)
    with pytest.raises(ConfigError, match=r"init_lora_weights='pissa' makes A and B of shapes \(4, 24\) and \(10, 4\)"):
        on_linear(use_qalora=True, qalora_group_size=4, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="lora_bias=True does not work with use_qalora=True"):
        on_linear(use_qalora=True, qalora_group_size=4, lora_bias=True)


# ---- BD-LoRA: PEFT's documentation of BdLoraConfig


@pytest.mark.parametrize("count", [1, 2])
def test_bdlora_with_blocks_of_A_needs_of_each_share_of_the_inputs_its_own_block_alone(count: int) -> None:
    model = on_linear(use_bdlora={"target_modules_bd_a": ["layer"], "nblocks": count})
    layer, x = only_layer(model), inputs(5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (R, IN // count)
    shares = zip(x.chunk(count, -1), A.chunk(count), B.chunk(count, 1), strict=True)
    close(model(x) - layer.base_layer(x), 1.5 * sum(part @ block.T @ columns.T for part, block, columns in shares))


def test_bdlora_with_blocks_of_B_makes_each_share_of_the_outputs_by_its_own_block_alone() -> None:
    model = on_linear(use_bdlora={"target_modules_bd_b": ["lay"], "nblocks": 2})
    layer, x = only_layer(model), inputs(5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert B.shape == (OUT, R // 2)
    shares = [x @ rows.T @ block.T for rows, block in zip(A.chunk(2), B.chunk(2), strict=True)]
    close(model(x) - layer.base_layer(x), 1.5 * torch.cat(shares, -1))


def test_bdlora_starts_as_the_base_and_its_random_A_by_the_inputs_of_a_row() -> None:
    torch.manual_seed(0)
    settings = {"target_modules_bd_a": ["layer"], "nblocks": 2}
    model = get_peft_model(Single(nn.Linear(IN, OUT)), LoraConfig(r=400, target_modules=["layer"], use_bdlora=settings))
    layer, x = only_layer(model), inputs(5, dtype=torch.float32)
    assert torch.equal(model(x), layer.base_layer(x))
    bound = (IN / 2) ** -0.5
    assert 0.98 * bound < float(layer.lora_A["default"].weight.abs().max()) <= bound


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, r"layer is named by neither target_modules_bd_a nor target_modules_bd_b .* match_strict=False"),
        ({"target_modules_bd_a": ["lay"], "target_modules_bd_b": ["yer"]}, r"layer is named by .*_bd_a and by"),
        ({"target_modules_bd_a": ["layer"], "nblocks": 3}, r"layer: A is 4 x 24, and use_bdlora.nblocks=3 does not"),
        ({"target_modules_bd_b": ["layer"], "nblocks": 4}, r"layer: B is 10 x 4, and .* both numbers. Set one that"),
    ],
)
def test_bdlora_refuses_lists_and_blocks_that_do_not_fit(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        on_linear(use_bdlora=settings)


def test_bdlora_that_is_not_strict_gives_other_layers_plain_lora() -> None:
    model = on_linear(use_bdlora={"target_modules_bd_a": ["other"], "match_strict": False, "nblocks": 2})
    adapter = only_layer(model).adapters["default"]
    assert adapter.A.shape == (R, IN)
    assert adapter.factors[0] is adapter.A
