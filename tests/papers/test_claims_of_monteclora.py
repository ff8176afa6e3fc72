"""What MonteCLoRA promises (arXiv:2411.04358): claims about numbers, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

from lorafa import LoraConfig, PeftModel, get_peft_model, penalty
from toys.adapters import only_layer
from toys.compare import close
from toys.formulas import OUT, R, gradients, inputs, learns_the_same_again, on_linear


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_noise_is_drawn_again_where_layers_run_again_in_backward(reentrant: bool) -> None:
    learns_the_same_again(on_linear(lora_dropout=0.3, **monteclora()), reentrant)


def test_monteclora_compiled_draws_its_noise_and_learns_its_spread() -> None:
    model, x = on_linear(**monteclora()), inputs(6)
    compiled = torch.compile(model, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    second.sum().backward()
    adapter = only_layer(model).adapters["default"]
    assert adapter.extra("sigma").grad.abs().max() > 0  # type: ignore[union-attr]
    drawn = adapter.extra("variances").clone()
    compiled(x)
    assert not torch.equal(adapter.extra("variances"), drawn)
