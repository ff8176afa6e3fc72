"""Arrow: each token goes to the adapters of its layer that it fits best (Ostapenko et al. 2024, arXiv:2405.11157).

The router is an adapter itself, whose own A and B do not count; the others on the layer are its experts. GenKnowSub
takes the mean of general adapters out of them first (arXiv:2505.10939).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lorafa.adapter import AdaptedLayer, Adapter, Extra, Stage, Variant
from lorafa.errors import AdapterError, ConfigError
from lorafa.numerics.fused import compute_dtype, is_traced
from lorafa.numerics.linalg import top_right, working_dtype
from lorafa.settings.methods import ArrowConfig
from lorafa.spec import LayerSpec, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

_HOLDER = "lora_arrow"


class Group(NamedTuple):
    """What a router finds on its layer."""

    experts: list[Adapter]
    general: list[Adapter]
    """Adapters whose mean is taken out of the experts; none without GenKnowSub."""


class Arrow(Variant):
    """sum_e c_e (update of expert e) x. With v_e, the top right singular vector of s_e B_e A_e, |<x, v_e>| is a token's
    score for e; c is the softmax of its ``top_k`` largest, divided by the temperature, and 0 elsewhere.

    The experts are all other adapters of the layer but general ones and other routers, also those that came after it.
    The vectors follow when adapters are added, loaded or deleted, and not when values are changed in place.
    """

    name = "arrow"
    stage: ClassVar[Stage] = "gate"
    switch = "arrow_config"
    extras: Mapping[str, Extra] = {"prototypes": Extra(_HOLDER, trained=False, saved=False)}
    hosts = frozenset({"linear"})
    uniform = False
    one_product = False
    has_own_update: ClassVar[bool] = False

    def __init__(self, settings: ArrowConfig, inner: Variant) -> None:
        super().__init__(inner)
        self.settings = settings

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        """The formula on one layer.

        Raises:
            ConfigError: a formula or a start is asked for, which would count for nothing.
        """
        assert inner is not None
        if not inner.is_plain_lora or config.start.initializer.moves_base:
            what = "init_lora_weights" if config.start.initializer.moves_base else "the formula"
            raise ConfigError(
                f"{spec.name}: an adapter with arrow_config routes to other adapters and has no update of its own, so "
                f"{what} of its config ({config.init_lora_weights!r}, {inner.name}) would count for nothing. Leave "
                "both at their defaults; the experts may have others."
            )
        return cls(config.arrow_config, inner)

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        return super().shapes(weight, spec) | {"prototypes": (0, weight.shape[-1])}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """None yet: they follow from the adapters of the layer."""
        return {"prototypes": torch.zeros(0, weight.shape[-1])}

    # ---- the adapters of the layer

    def group(self, layer: AdaptedLayer) -> Group:
        """The experts of this router on a layer, and the general adapters."""
        named = self.settings.gks_adapter_names or []
        others = {name: a for name, a in layer.adapters.items() if type(a.variant) is not Arrow}
        general = [others[name] for name in named if name in others] if self.settings.use_gks else []
        return Group([adapter for name, adapter in others.items() if name not in named], general)

    def problem(self, layer: AdaptedLayer) -> str | None:
        """What keeps the router from working on a layer, in words to stand behind its name; None: nothing."""
        experts, general = found = self.group(layer)
        top_k, named = self.settings.top_k, self.settings.gks_adapter_names or []
        if not experts:
            return "has no experts: no other adapter is on the layer. Load them, or use create_arrow_model"
        if top_k > len(experts):
            return f"has top_k={top_k} in its arrow_config, and {len(experts)} experts. Lower top_k, or load more"
        gated = next((a for a in experts + general if any(v.stage == "gate" for v in a.variant.chain())), None)
        if gated is not None:
            return (
                f"cannot route to {gated.name!r}, which is {gated.variant.name} and decides by itself where it counts. "
                "Delete it, or train it without"
            )
        if self.settings.use_gks and len(general) < max(len(named), 1):
            missing = [name for name in named if name not in layer.adapters]
            return (
                f"has use_gks=True in its arrow_config, and general adapters are not on the layer: "
                f"{', '.join(map(repr, missing)) or 'none is named'}. Load them, or use create_arrow_model"
            )
        return self._factors_misfit(found) if self._subtracts_factors else None

    def _factors_misfit(self, found: Group) -> str | None:
        """Why A and B of general adapters cannot be subtracted from those of the experts."""
        adapters = found.experts + found.general
        other = next((a for a in adapters if not a.variant.is_plain_lora or a.has_bias or a.start is not None), None)
        if other is not None:
            why = f"{other.name!r} ({other.variant.name}) has more than the two"
        elif len({adapter.rank for adapter in adapters}) > 1:
            listed = ", ".join(f"{adapter.name!r} has r = {adapter.rank}" for adapter in adapters)
            why = f"they differ in shape: {listed}"
        else:
            return None
        return (
            f"has use_gks=True in its arrow_config, which subtracts A from A and B from B, and {why}. Set "
            "exact_gks=True, which subtracts their updates"
        )

    @property
    def _subtracts_factors(self) -> bool:
        return self.settings.use_gks and not self.settings.exact_gks

    def changed(self, layer: AdaptedLayer, name: str) -> None:
        """Forget the prototypes. They are found when they are asked for: an adapter that is being loaded has no values
        at first."""
        super().changed(layer, name)
        holder = layer.holder_of(_HOLDER, name)
        holder.weight = layer.extra(_HOLDER, name)[:0]

    def prototypes(self, layer: AdaptedLayer, name: str) -> Tensor:
        """v_e of the experts on a layer, (E, in); found anew if its adapters have changed.

        Args:
            name: of the router.

        Raises:
            AdapterError: the adapters on the layer do not go with the router.
        """
        known = layer.extra(_HOLDER, name)
        if len(known):
            return known
        if (problem := self.problem(layer)) is not None:
            raise AdapterError(f"The router {name!r} {problem}.")
        found = self.group(layer)
        with torch.no_grad():
            vectors = [top_right(*self._update(adapter, found.general)) for adapter in found.experts]
            layer.holder_of(_HOLDER, name).weight = made = torch.stack(vectors).to(known.dtype)
        return made

    def _update(self, expert: Adapter, general: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
        """A and B of what counts of an expert: without what is general, and scaled where that makes a difference."""
        A, B = expert.factors
        if not general:
            return A, B
        if self._subtracts_factors:
            mean_A, mean_B = _means(general)
            return A - mean_A, B - mean_B
        parts = [(A, B * expert.scaling)]
        parts += [(a, b * (-g.scaling / len(general))) for g in general for a, b in (g.factors,)]
        return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)

    # ---- the formula

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The weighted sum of the experts' changes; the router's dropout acts on it.

        Raises:
            AdapterError: the adapters on the layer do not go with the router.
        """
        layer = adapter.layer
        if not adapter.as_made:
            layer.require_uncalled(adapter, "it routes to other adapters and has no update of its own")
        weights, chosen = self._weights(x, self.prototypes(layer, adapter.name))
        found = self.group(layer)
        few = 0 < chosen.numel() < len(found.experts)
        if few and chosen.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced():
            used = sorted(set(chosen.flatten().tolist()))  # on another device this would wait for it
            weights, found = weights[..., used], Group([found.experts[i] for i in used], found.general)
        if all(_is_a_product(one) for one in found.experts + found.general):
            change = self._by_stack(found, x, weights)
        elif self._subtracts_factors:
            raise AdapterError(
                f"The router {adapter.name!r} subtracts A from A and B from B (use_gks=True), which is not done where "
                "experts have hooks or dropout of their own. Remove the hooks, call eval(), or set exact_gks=True."
            )
        else:
            change = self._one_by_one(found, x, y, weights)
        return adapter.drop(change)

    def _weights(self, x: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """c (..., E), in float32 or wider, and the experts (..., top_k) that have any."""
        scores = nn.functional.linear(x, prototypes.to(x.dtype)).abs()
        scores = scores.to(working_dtype(scores.dtype))
        if self.settings.normalize_tokens:
            lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scores.dtype)
            scores = scores / lengths.clamp_min(torch.finfo(scores.dtype).tiny)
        largest, chosen = scores.topk(self.settings.top_k, dim=-1)
        kept = (largest / self.settings.router_temperature).softmax(dim=-1)
        return torch.zeros_like(scores).scatter(-1, chosen, kept), chosen

    def _by_stack(self, found: Group, x: Tensor, weights: Tensor) -> Tensor:
        """One product with all A, the weights of the token on what comes out, one product with all B."""
        parts, scales = list(found.experts), [one.scaling for one in found.experts]
        if self.settings.exact_gks:  # weights sum to 1, so that what is general is taken out once
            count = len(found.general)
            parts, scales = parts + found.general, scales + [-one.scaling / count for one in found.general]
            weights = torch.cat([weights, weights.new_ones(*weights.shape[:-1], count)], dim=-1)
        factors = [one.running_factors for one in parts]
        A, B = torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], dim=1)
        if self._subtracts_factors:
            mean_A, mean_B = _means(found.general)
            A = (A.view(len(parts), *mean_A.shape) - mean_A).flatten(0, 1)
            B = (B.view(len(B), len(parts), -1) - mean_B[:, None]).flatten(1)
        dtype = compute_dtype(x)
        if x.numel() <= A.numel() and not torch.is_grad_enabled():  # to convert the factors would cost the most
            dtype = torch.promote_types(dtype, A.dtype)
        weights = _scaled(weights, scales).to(dtype)
        z = nn.functional.linear(x.to(dtype), A.to(dtype))
        routed = _on_ranks(z, weights, [own.shape[0] for own, _ in factors])
        change = nn.functional.linear(routed, B.to(dtype))
        for i, one in enumerate(parts):
            if one.bias is not None:
                change = change + weights[..., i, None] * one.bias.to(dtype)
        return change

    def _one_by_one(self, found: Group, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The change of each expert by its own formula (DoRA), weighed."""
        change: Tensor | None = None
        for i, one in enumerate(found.experts):
            own = one.delta_output(x, y)
            own = weights[..., i, None].to(own.dtype) * own
            change = own if change is None else change + own
        assert change is not None
        for one in found.general:
            change = change - one.delta_output(x, y) / len(found.general)
        return change


def _is_a_product(adapter: Adapter) -> bool:
    """Whether its change is s B A x, and nobody waits for calls of its modules."""
    return adapter.variant.plain and adapter.as_made and not adapter.dropout


def _means(adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """The mean of A and that of B."""
    factors = [adapter.factors for adapter in adapters]
    return torch.stack([A for A, _ in factors]).mean(dim=0), torch.stack([B for _, B in factors]).mean(dim=0)


def _scaled(weights: Tensor, scales: Sequence[float | Tensor]) -> Tensor:
    """Each column of ``weights`` (..., E) times its scale."""
    first = scales[0]
    if isinstance(first, float) and all(isinstance(scale, float) and scale == first for scale in scales):
        return weights * first
    return torch.stack([weights[..., i] * scale for i, scale in enumerate(scales)], dim=-1)


def _on_ranks(z: Tensor, weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """z (..., sum of the ranks), each part of it times its column of ``weights`` (..., E)."""
    if len(set(ranks)) == 1:
        return (z.view(*weights.shape, ranks[0]) * weights[..., None]).flatten(-2)
    parts = torch.split(z, list(ranks), dim=-1)
    return torch.cat([part * weights[..., i, None] for i, part in enumerate(parts)], dim=-1)
