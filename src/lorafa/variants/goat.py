"""GOAT: a router sends each token to some of the experts that share A and B out (Fan et al. 2025, arXiv:2502.16894).

Expert i has rows i d to (i + 1) d of A and the same columns of B, d = r / E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorafa.adapter import AdaptedLayer, Adapter, Extra, Stage, Variant
from lorafa.errors import AdapterError, BackendError, ConfigError
from lorafa.initializers.goat import GoatConfig, rank_of_expert, strength
from lorafa.numerics.fused import compute_dtype
from lorafa.numerics.linalg import working_dtype
from lorafa.spec import LayerSpec, Shape

if TYPE_CHECKING:
    from typing_extensions import Self


class Routed:
    """Where the tokens of one call were sent, layer by layer."""

    def __init__(self, mask: Tensor | None) -> None:
        """Start with nothing.

        Args:
            mask: (rows, tokens), 0 at padding, or None.
        """
        self.mask = mask
        self._found: dict[AdaptedLayer, list[tuple[Tensor, Tensor, Tensor | None]]] = {}

    def add(self, layer: AdaptedLayer, gates: Tensor, chosen: Tensor, index: Tensor | None = None) -> None:
        """Note one pass of a layer: ``gates`` (..., E) with gradients, ``chosen`` (..., k) experts.

        Args:
            index: of the rows of the call that they are of, (rows,); None: all.
        """
        mask = self.mask if self.mask is None or index is None else self.mask[index.to(self.mask.device)]
        self._found.setdefault(layer, []).append((gates, chosen, mask))

    def of(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor] | None:
        """Gates (tokens, E) and chosen experts (tokens, k) of all passes of a layer; None if it did not run.

        Padding is left out where the layer saw the rows and tokens of the mask.
        """
        parts = [_kept(*found) for found in self._found.get(layer, ())]
        return (torch.cat([gates for gates, _ in parts]), torch.cat([chosen for _, chosen in parts])) if parts else None


def _kept(gates: Tensor, chosen: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates (tokens, E) and choices (tokens, k) without those of padding, where ``mask`` says which is."""
    if mask is not None and gates.shape[:-1] == mask.shape:
        kept = mask.to(gates.device) != 0
        return gates[kept], chosen[kept]
    return gates.reshape(-1, gates.shape[-1]), chosen.reshape(-1, chosen.shape[-1])


class GOAT(Variant):
    """s sum_i w_i B_i A_i x, with the k largest gates softmax(R x) of a token, brought to a sum of 1, as w.

    R (E, in) is trained. Asked for by its start, ``goat``, whose (s / E) sum_i B_i A_i the base is left without: what a
    router adds on average that knows nothing.
    """

    name = "goat"
    stage: ClassVar[Stage] = "gate"
    extras: Mapping[str, Extra] = {"router": Extra("lora_router")}
    hosts = frozenset({"linear"})
    gathers = True
    uniform = False
    one_product = False

    def __init__(self, settings: GoatConfig, inner: Variant) -> None:
        super().__init__(inner)
        self.settings, self._inside = settings, inner

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        """The formula on one layer.

        Raises:
            ConfigError: the rank is no multiple of the number of experts, or another formula of B A or a setting of the
                scaling is asked for that would not count.
        """
        assert inner is not None
        if not inner.is_plain_lora:
            raise ConfigError(
                f"{spec.name}: init_lora_weights={config.init_lora_weights!r} routes tokens to parts of plain A and B, "
                f"and the config asks for {inner.name} in it. Drop one of the two."
            )
        if config.use_rslora:
            raise ConfigError(
                f"{spec.name}: use_rslora=True scales by the whole rank, and GOAT's experts have scalings of their "
                "own. Set init_config={'scaling': 'rs'} for alpha / sqrt(r / experts), and use_rslora=False."
            )
        settings = config.start_settings() or GoatConfig()
        rank_of_expert(settings, spec)
        return cls(settings, inner)

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        return super().shapes(weight, spec) | {"router": (self.settings.experts, weight.shape[-1])}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """R ~ U(-1 / sqrt(in), 1 / sqrt(in)), as linear layers start."""
        bound = 1 / math.sqrt(weight.shape[-1])
        router = torch.empty(self.settings.experts, weight.shape[-1])
        return {"router": router.uniform_(-bound, bound, generator=spec.generator("router"))}

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        raise BackendError(f"Between A and B of {self.name} stand the weights of each token, which z does not say.")

    # ---- the formula

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The change of the experts that each token is routed to; the router sees x without dropout."""
        layer = adapter.layer
        if not adapter.as_made:
            layer.require_uncalled(adapter, "its experts are routed to by the values of A and B")
        scaling, dtype = self._scaling(adapter), compute_dtype(x)
        A, B = self._inside.factors(adapter, training=layer.training)
        x = x.to(dtype)
        z = nn.functional.linear(adapter.drop(x), A.to(dtype))
        weights = (self._weights(adapter, x) * scaling).to(dtype)
        routed = z.view(*weights.shape, adapter.rank // self.settings.experts) * weights[..., None]
        change = nn.functional.linear(routed.flatten(-2), B.to(dtype))
        start = adapter.running_start
        return change if start is None else change - layer.low_rank(x, start.A, start.B, scaling)

    def _weights(self, adapter: Adapter, x: Tensor) -> Tensor:
        """w (..., E) in float32 or wider: the gates of the chosen experts over their sum, and 0."""
        logits = nn.functional.linear(x, adapter.extra("router").to(x.dtype))
        gates = logits.to(working_dtype(logits.dtype)).softmax(dim=-1)
        largest, chosen = gates.topk(self.settings.top_k, dim=-1)
        routed: Routed | None = adapter.layer.call.gathering(adapter.name)
        if routed is not None:
            part = adapter.layer.call.part
            routed.add(adapter.layer, gates, chosen, None if part is None else part.index)
        return torch.zeros_like(gates).scatter(-1, chosen, largest / largest.sum(dim=-1, keepdim=True))

    def _scaling(self, adapter: Adapter) -> float | Tensor:
        """The factor s on B_i A_i: as the settings say, times what the adapter's own scaling was set to since."""
        own = adapter.initial_scaling
        rank, in_ = adapter.A.shape
        return strength(self.settings, own, rank, in_) * (adapter.scaling / own)

    # ---- the balance of the experts

    def fact(self, arguments: Mapping[str, Any]) -> Routed:
        """What the layers of one call put their gates into; padding is known by ``attention_mask`` (rows, tokens)."""
        mask = arguments.get("attention_mask")
        return Routed(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """c E sum_i f_i P_i over the tokens of the last call with gradients; None where this layer did not run in it.

        f_i is the share of expert i in all choices, which has no gradient, and P_i its mean gate. The loss is c, which
        is ``balance`` of the settings, where all experts are used alike, and E c where one is used alone.

        Raises:
            AdapterError: there was no such call through the PeftModel.
            BackendError: the layer ran without gradients in it.
        """
        experts, coefficient = self.settings.experts, self.settings.balance
        if not coefficient:
            return None
        routed: Routed | None = adapter.layer.call.last(adapter.name)
        if routed is None:
            raise AdapterError(
                f"Adapter {adapter.name!r} has a balance loss over the tokens of the last call with gradients, and "
                "there was none through the PeftModel in which it counted. Call the PeftModel first, or set "
                "init_config={'balance': 0}."
            )
        found = routed.of(adapter.layer)
        if found is None:
            return None
        gates, chosen = found
        if torch.is_grad_enabled() and adapter.extra("router").requires_grad and not gates.requires_grad:
            raise BackendError(
                f"Adapter {adapter.name!r} has a balance loss, and the layers ran without gradients in a call with "
                "them: reentrant gradient checkpointing runs them again where the loss is known already. Pass "
                "use_reentrant=False to it, or set init_config={'balance': 0}."
            )
        if not len(gates):
            return None
        shares = torch.bincount(chosen.flatten(), minlength=experts).to(gates.dtype) / chosen.numel()
        return coefficient * experts * (shares * gates.mean(dim=0)).sum()
