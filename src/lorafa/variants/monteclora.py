"""MonteCLoRA: A is the mean of a distribution that is sampled in training (Seth et al. 2024, arXiv:2411.04358).

    A + sum_n w_n E_n        n = 1 ... N samples, row i of E_n is N(0, c^2 v_i)

The variances v are drawn from a Wishart distribution around exp(2 sigma), the weights w from a Dirichlet distribution
with parameters exp(omega); sigma and omega are trained. In eval mode, merged and in exports it is LoRA with A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorafa.adapter import AdaptedLayer, Adapter, Extra, Tensors, Variant, full_precision
from lorafa.numerics.fused import is_traced
from lorafa.numerics.linalg import working_dtype
from lorafa.numerics.masks import draw_seed
from lorafa.settings.methods import MontecloraConfig
from lorafa.spec import LayerSpec, Shape
from lorafa.variants.lora import LoRA

if TYPE_CHECKING:
    from typing_extensions import Self

_HOLDER = "lora_monteclora_sampler"
_LEAST_VARIANCE = 1e-3  # PEFT's
_LEAST_ALPHA = 1e-6


class MonteCLoRA(LoRA):
    """LoRA with noise on A in training, whose spread is learned.

    sigma, (r,), and omega, (N,), start uniform in [0, 1). The last variances and weights drawn are stored, as in PEFT,
    because the penalty is about them.
    """

    name = "monteclora"
    switch = "monteclora_config"
    extras: Mapping[str, Extra] = {
        "sigma": Extra(_HOLDER, key="std_prior"),
        "omega": Extra(_HOLDER, key="expert_weights_prior"),
        "variances": Extra(_HOLDER, key="gaussian_var_prior", trained=False),
        "weights": Extra(_HOLDER, key="expert_weights", trained=False),
        "drawn": Extra(_HOLDER, key="drawn", trained=False, saved=False),
    }
    hosts = frozenset({"linear"})
    learns_from_A = True
    takes_empty_ranks = False
    averages_penalty: ClassVar[bool] = True

    def __init__(self, settings: MontecloraConfig) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        return cls(config.monteclora_config)

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        rank, count = (spec.rank,), (self.settings.num_samples,)
        own = {"sigma": rank, "omega": count, "variances": rank * 2, "weights": count, "drawn": count}
        return super().shapes(weight, spec) | own

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        generator, count = spec.generator("monteclora"), self.settings.num_samples
        return {
            "sigma": torch.rand(spec.rank, generator=generator),
            "omega": torch.rand(count, generator=generator),
            "variances": torch.eye(spec.rank),
            "weights": torch.full((count,), 1 / count),
            "drawn": torch.zeros(count),
        }

    def changed(self, layer: AdaptedLayer, name: str) -> None:
        """Nothing is known of the numbers that the stored weights were drawn from."""
        with torch.no_grad():
            layer.extra(_HOLDER, name, "drawn").zero_()

    def is_called(self, adapter: Adapter) -> bool:
        return not adapter.layer.training

    def factors(self, tensors: Tensors, *, training: bool = False) -> tuple[Tensor, Tensor]:
        """A with the noise of a new draw in training, which is then the last one."""
        A, B = tensors.A, tensors.B
        if not training:
            return A, B
        with full_precision(A):
            return A + self._noise(tensors).to(A.dtype), B

    def _noise(self, tensors: Tensors) -> Tensor:
        """c sum_n w_n E_n, (r, in), in float32 or float64; drawn by torch.manual_seed, again where layers run again."""
        A, dtype = tensors.A, working_dtype(tensors.A.dtype)
        rank, count = A.shape[0], self.settings.num_samples
        generator = None if is_traced() else torch.Generator(A.device).manual_seed(draw_seed())

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=A.device)

        # the diagonal of a Wishart matrix of r degrees of freedom: a chi-squared number each
        chi_squared = normal(rank, rank).square().sum(1)
        variances = (torch.exp(2 * tensors.extra("sigma").to(dtype)) * chi_squared).clamp_min(_LEAST_VARIANCE)
        drawn = normal(count)
        weights = _weights(tensors.extra("omega").to(dtype), drawn)
        with torch.no_grad():
            tensors.extra("variances").copy_(torch.diag(variances))
            tensors.extra("weights").copy_(weights)
            tensors.extra("drawn").copy_(drawn)
        mixed = torch.tensordot(weights, normal(count, *A.shape), 1)
        noise: Tensor = self.settings.sample_scaler * variances.sqrt()[:, None] * mixed
        return noise

    def penalty(self, adapter: Adapter) -> Tensor:
        """The divergences of the Dirichlet, the Wishart and the last Gaussian distribution from their priors, weighted.

        With ``use_entropy`` also sum w^2 of the last weights, which is least where all samples count alike. The last
        draws have the gradients they had in the forward pass. PEFT has the gamma functions of the Dirichlet divergence
        with the opposite sign, so that it is none: it may be negative.
        """
        dtype = working_dtype(adapter.A.dtype)
        sigma, omega = adapter.extra("sigma").to(dtype), adapter.extra("omega").to(dtype)
        variances = adapter.extra("variances").diagonal().to(dtype, copy=True)  # a new draw takes its place
        grows = torch.where(variances > _LEAST_VARIANCE, torch.exp(2 * (sigma - sigma.detach())), 1.0)
        divergence = (
            _dirichlet_divergence(omega.exp(), self.settings.dirichlet_prior)
            + len(sigma) / 2 * _excess(torch.exp(2 * sigma))
            + len(omega) / 2 * _excess(variances * grows)
        )
        total = self.settings.kl_loss_weight * divergence
        if self.settings.use_entropy:
            drawn = adapter.extra("drawn").to(dtype, copy=True)
            own = _weights(omega, drawn)
            known = drawn.any().to(dtype)
            weights = adapter.extra("weights").to(dtype, copy=True) + known * (own - own.detach())
            total = total + weights.square().sum()
        return total


def _weights(omega: Tensor, drawn: Tensor) -> Tensor:
    """w, (N,), from N normal numbers: a softmax of Gaussians near to Dirichlet(exp(omega)) (Laplace's bridge)."""
    alpha, count = omega.exp().clamp_min(_LEAST_ALPHA), len(omega)
    means = alpha.log() - alpha.log().mean()
    variances = (1 - 2 / count) / alpha + (1 / alpha).sum() / count**2
    spread: Tensor = (variances.clamp_min(_LEAST_ALPHA) + _LEAST_ALPHA).sqrt()
    return torch.softmax(means + spread * drawn, dim=0)


def _excess(variances: Tensor) -> Tensor:
    """sum v - log v - 1: twice the divergence of N(0, diag(v)) from N(0, 1)."""
    return (variances - variances.log() - 1).sum()


def _dirichlet_divergence(alpha: Tensor, prior: float) -> Tensor:
    """KL(Dirichlet(alpha) || Dirichlet(prior, ..., prior))."""
    beta = torch.full_like(alpha, prior)
    normal = torch.lgamma(alpha.sum()) - torch.lgamma(beta.sum()) - (torch.lgamma(alpha) - torch.lgamma(beta)).sum()
    divergence: Tensor = normal + ((alpha - beta) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
    return divergence
