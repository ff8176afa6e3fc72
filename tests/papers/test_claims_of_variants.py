"""What the papers of single formulas promise: claims about numbers, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence
from torch.utils.checkpoint import checkpoint

from lorafa import LoraConfig, PeftModel, get_peft_model, penalty
from lorafa.errors import ConfigError
from toys.adapters import only_layer, train
from toys.compare import close
from toys.layers import Single
from toys.watch import Kept

OUT, IN, R = 10, 24, 4


def on_linear(dtype: torch.dtype = torch.float64, **settings: object) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["layer"], r=R, lora_alpha=6, init_seed=1, **settings)  # type: ignore[arg-type]
    model = get_peft_model(Single(nn.Linear(IN, OUT)).to(dtype), config, autocast_adapter_dtype=False)
    train(model)
    return model


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def kept_for_backward(model: PeftModel, x: Tensor) -> int:
    with Kept(*model.parameters(), *model.buffers()) as kept:
        model(x)
    return kept.bytes


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


# ---- VeLoRA (arXiv:2405.17991)

VECTORS = ("batch_average", "batch_average_once", "random")


def velora(groups: int = 6, **settings: Any) -> dict[str, Any]:
    return {"velora_config": {"num_groups": groups} | settings}


def gradients(model: PeftModel, x: Tensor, probe: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x) * probe).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) >= 2
    return found


def vector_of(model: PeftModel) -> Tensor:
    return only_layer(model).adapters["default"].extra("vector")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init_type", VECTORS)
def test_velora_computes_lora_and_its_gradients_but_for_that_of_A(init_type: str, use_dora: bool) -> None:
    plain, ours = on_linear(use_dora=use_dora), on_linear(use_dora=use_dora, **velora(init_type=init_type, scale=0.5))
    x, probe = inputs(7, 5).requires_grad_(), torch.randn(7, 5, OUT, dtype=torch.float64)
    close(ours(x), plain(x))
    expected, of_x = gradients(plain, x, probe), x.grad
    x.grad = None
    found = gradients(ours, x, probe)
    close(x.grad, of_x)  # type: ignore[arg-type]
    for name, grad in found.items():
        if "lora_A" not in name:
            close(grad, expected[name])
        else:
            assert (grad - expected[name]).abs().max() > 0.1


@pytest.mark.parametrize("groups", [5, 6, 23])
def test_the_gradient_of_A_is_that_of_inputs_projected_on_the_vector_group_by_group(groups: int) -> None:
    """Equations 3 and 4: x_g -> s (x_g v) v, with zeros after the last input where groups are not full."""
    model, x, probe = on_linear(**velora(groups, scale=0.7)), inputs(8), torch.randn(8, OUT, dtype=torch.float64)
    found = gradients(model, x, probe)
    size = -(-IN // groups)
    padded = torch.cat([x, torch.zeros(8, -IN % size, dtype=torch.float64)], 1).unflatten(1, (-1, size))
    v = vector_of(model)
    mean = padded.flatten(0, 1).mean(0)
    close(v, mean / mean.norm())
    projected = (0.7 * (padded @ v)[..., None] * v).flatten(1)[:, :IN]
    B = only_layer(model).lora_B["default"].weight
    (of_A,) = (grad for name, grad in found.items() if "lora_A" in name)
    close(of_A, 1.5 * (probe @ B).T @ projected)


def test_inputs_whose_groups_lie_along_the_vector_lose_nothing() -> None:
    v = torch.randn(4, dtype=torch.float64)
    x = (inputs(8)[:, :6, None].abs() * v).flatten(1)
    plain, ours = on_linear(), on_linear(**velora())
    probe = torch.randn(8, OUT, dtype=torch.float64)
    expected, found = gradients(plain, x, probe), gradients(ours, x, probe)
    for name, grad in found.items():
        close(grad, expected[name])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_velora_keeps_one_number_a_group_for_backward(dtype: torch.dtype, dropout: float) -> None:
    x = inputs(100, dtype=dtype)
    settings = {"lora_dropout": dropout}
    plain = kept_for_backward(on_linear(dtype, **settings), x)
    ours = kept_for_backward(on_linear(dtype, **settings, **velora()), x)
    saved = 100 * (IN - 6) * dtype.itemsize
    assert saved - 8 * IN // 6 <= plain - ours <= saved


def test_velora_takes_its_vector_from_each_batch_from_the_first_or_from_none() -> None:
    for init_type, moves in zip(VECTORS, (True, False, False), strict=True):
        model = on_linear(**velora(init_type=init_type))
        at_start = vector_of(model).clone()
        assert bool(at_start.any()) == (init_type == "random")
        seen = []
        for number in range(2):
            model(inputs(4) + number)
            seen.append(vector_of(model).clone())
            close(seen[-1].norm(), torch.ones(()), torch.float32)
        assert torch.equal(seen[0], seen[1]) is not moves
        model.eval()(inputs(4) + 5)
        assert torch.equal(vector_of(model), seen[-1]), "only training takes it"
        if init_type == "random":
            assert torch.equal(at_start, seen[0])


def test_a_batch_keeps_its_own_vector_until_its_backward() -> None:
    model, probe = on_linear(**velora()), torch.randn(8, OUT, dtype=torch.float64)
    alone = gradients(model, inputs(8), probe)
    model.zero_grad()
    loss = (model(inputs(8)) * probe).sum()
    model(inputs(8) + 1)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in alone:
            close(parameter.grad, alone[name])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("settings", [velora(), {"monteclora_config": {"sample_scaler": 0.1}}], ids=["velora", "mc"])
def test_layers_that_run_again_in_backward_learn_the_same(settings: dict[str, Any], reentrant: bool) -> None:
    model, probe = on_linear(lora_dropout=0.3, **settings), torch.randn(8, OUT, dtype=torch.float64)
    x, found = inputs(8).requires_grad_(), []
    for again in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        (y * probe).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("init_type", VECTORS)
def test_velora_compiled_learns_from_what_it_would_keep(init_type: str) -> None:
    x, probe = inputs(8), torch.randn(8, OUT, dtype=torch.float64)
    expected = gradients(on_linear(**velora(init_type=init_type)), x, probe)
    model = on_linear(**velora(init_type=init_type))
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled(x), model(x))
    model.zero_grad()
    (compiled(x) * probe).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close(parameter.grad, expected[name])


def test_velora_in_eval_mode_learns_exactly_and_refuses_what_would_compress_nothing() -> None:
    x, probe = inputs(8), torch.randn(8, OUT, dtype=torch.float64)
    expected, found = (gradients(model.eval(), x, probe) for model in (on_linear(), on_linear(**velora())))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"layer: velora_config.num_groups=24 cuts its 24 inputs into groups of one"):
        on_linear(**velora(24))
    with pytest.raises(ConfigError, match="freeze_A=True freezes A, and velora_config works by the gradient of A"):
        on_linear(**velora(), freeze_A=True)


# ---- MonteCLoRA (arXiv:2411.04358)


def monteclora(**settings: Any) -> dict[str, Any]:
    return {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.1} | settings}


def noise(model: PeftModel) -> Tensor:
    adapter = only_layer(model).adapters["default"]
    return adapter.running_factors[0].detach() - adapter.A.detach()


def test_monteclora_draws_around_A_in_training_and_is_lora_in_eval() -> None:
    plain, model, x = on_linear(), on_linear(**monteclora()), inputs(6)
    layer = only_layer(model)
    holders = (layer.lora_A, layer.lora_B)
    with torch.no_grad():
        for ours, theirs in zip(holders, (only_layer(plain).lora_A, only_layer(plain).lora_B), strict=True):
            ours["default"].weight.copy_(theirs["default"].weight)
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(5)
    first = model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), first)
    close(model.eval()(x), plain(x))
    close(model.merge_and_unload()(x), plain(x))


def test_monteclora_noise_has_the_variance_of_its_distributions() -> None:
    """A row of sum_n w_n E_n has variance c^2 v_i sum w^2, and v_i has the mean r exp(2 sigma_i)."""
    model = on_linear(**monteclora(num_samples=2))
    adapter = only_layer(model).adapters["default"]
    with torch.no_grad():
        adapter.extra("sigma").copy_(torch.tensor([-0.5, 0.0, 0.5, 1.0]))
    squares, variances, drawn = [], [], []
    for _ in range(3000):
        found = noise(model)
        weights, v = adapter.extra("weights").clone(), adapter.extra("variances").diagonal().clone()
        squares.append(found.square().mean(1) / weights.square().sum() / v / 0.01)
        variances.append(v)
        drawn.append(found.mean())
        close(weights.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(torch.stack(squares).mean(0), torch.ones(R, dtype=torch.float64), rtol=0.02, atol=0)
    expected = R * torch.exp(2 * adapter.extra("sigma").detach())
    torch.testing.assert_close(torch.stack(variances).mean(0), expected, rtol=0.08, atol=0)
    assert abs(float(torch.stack(drawn).mean())) < 0.01


@pytest.mark.parametrize("use_entropy", [False, True])
def test_the_penalty_is_the_divergences_of_the_distributions(use_entropy: bool) -> None:
    model = on_linear(**monteclora(dirichlet_prior=0.3, kl_loss_weight=0.01, use_entropy=use_entropy))
    model(inputs(3))
    adapter = only_layer(model).adapters["default"]
    sigma, omega, variances, weights = (
        adapter.extra(kind).detach() for kind in ("sigma", "omega", "variances", "weights")
    )
    dirichlet = kl_divergence(Dirichlet(omega.exp()), Dirichlet(torch.full_like(omega, 0.3)))
    zero, one = torch.zeros(R, dtype=torch.float64), torch.eye(R, dtype=torch.float64)
    gaussian = 3 * kl_divergence(MultivariateNormal(zero, variances), MultivariateNormal(zero, one))
    V = torch.diag(torch.exp(2 * sigma))
    wishart = R / 2 * (V.trace() - V.logdet() - R)  # of W(V, r) from W(1, r)
    entropy = weights.square().sum() if use_entropy else 0.0
    close(penalty(model), 0.01 * (dirichlet + gaussian + wishart) + entropy)


def test_the_penalty_has_the_gradients_of_the_draws_it_is_about() -> None:
    """Against differences of penalties after the same draws from moved parameters."""
    model = on_linear(**monteclora(kl_loss_weight=0.2, use_entropy=True))
    adapter = only_layer(model).adapters["default"]

    def value() -> Tensor:
        torch.manual_seed(7)
        model(inputs(3))
        return penalty(model)

    value().backward()
    for kind in ("sigma", "omega"):
        parameter = adapter.extra(kind)
        for i in range(len(parameter)):
            ends = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    parameter[i] += step
                ends.append(value().detach())
            with torch.no_grad():
                parameter[i] += 1e-6
            difference = (ends[0] - ends[1]) / 2e-6
            torch.testing.assert_close(parameter.grad[i], difference, rtol=1e-5, atol=1e-7)  # type: ignore[index]


def test_the_penalty_is_the_mean_over_layers_and_backward_may_follow_another_draw() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0", "1"], **monteclora(kl_loss_weight=1.0))
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    adapters = [layer.adapters["default"] for _, layer in model.base_model.lora_layers()]
    x = torch.randn(3, 8)
    model(x)
    total = penalty(model)
    torch.testing.assert_close(total, sum(a.variant.penalty(a) for a in adapters) / 2)
    model(x)  # as in activation checkpointing
    total.backward()
    assert all(a.extra("sigma").grad.abs().max() > 0 for a in adapters)


def test_monteclora_learns_its_spread_from_the_loss() -> None:
    model = on_linear(**monteclora())
    found = gradients(model, inputs(6), torch.randn(6, OUT, dtype=torch.float64))
    assert sum("lora_monteclora_sampler" in name and bool(grad.any()) for name, grad in found.items()) == 2
