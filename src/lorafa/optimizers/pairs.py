"""The pairs (A, B) an optimizer works on: found through the layers that own them, and stacked where shapes agree.

A parameter's name and its place among ``model.parameters()`` say nothing here: adapters of several names, magnitudes,
biases and modules whose path contains "lora" stand between the factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.base import LoraLayer
from lorafa.settings.checks import found


@dataclass(frozen=True, eq=False)
class Pair:
    """The two factors of one adapter on one layer."""

    path: str
    """Dotted name of the layer, for messages."""
    layer: LoraLayer
    name: str
    """Name of the adapter."""

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter as it was when the pair was found; another may have taken its name since."""
        return self.layer.adapters[self.name]

    @property
    def scaling(self) -> float:
        return float(self.layer.adapters[self.name].scaling)

    @cached_property
    def A(self) -> nn.Parameter:
        """The parameter, in the layout it is stored in."""
        table, key = self._places[0]
        return table[key]  # type: ignore[return-value]

    @cached_property
    def B(self) -> nn.Parameter:
        table, key = self._places[1]
        return table[key]  # type: ignore[return-value]

    @cached_property
    def _places(self) -> list[tuple[dict[str, nn.Parameter | None], str]]:
        """Where the layer keeps A and B: a module's table of parameters, and the name there."""
        places = []
        for key in self.layer.factor_names:
            holder, _, inner = key.partition(".")
            held = getattr(self.layer, holder)
            places.append((held[self.name]._parameters, inner) if inner else (held._parameters, self.name))
        return places

    def is_in_place(self) -> bool:
        """Whether the layer still holds the parameters the pair was found with."""
        (of_A, key_A), (of_B, key_B) = self._places
        return of_A.get(key_A) is self.A and of_B.get(key_B) is self.B

    def matrices_A(self, stored: Tensor) -> Tensor:
        """A, or something of its shape such as its gradient, as (E, r, in): a pair each expert or group has for itself.

        Group e of a convolution has r of the layer's E r ranks, and its share of the outputs.
        """
        matrix = self.layer.matrix_A(stored)
        return matrix if self._is_stack else matrix.reshape(self._groups, -1, matrix.shape[-1])

    def matrices_B(self, stored: Tensor) -> Tensor:
        """B, or something of its shape, as (E, out, r)."""
        matrix = self.layer.matrix_B(stored)
        return matrix if self._is_stack else matrix.reshape(self._groups, -1, matrix.shape[-1])

    def stored_A(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices_A`."""
        return self.layer.stored_A(matrices if self._is_stack else matrices.flatten(0, 1)).view(self.A.shape)

    def stored_B(self, matrices: Tensor) -> Tensor:
        return self.layer.stored_B(matrices if self._is_stack else matrices.flatten(0, 1)).view(self.B.shape)

    @cached_property
    def _is_stack(self) -> bool:
        return self.layer.matrix_A(self.A).dim() == 3

    @cached_property
    def _groups(self) -> int:
        return self.layer.rank_groups(self.layer.get_base_layer())

    def used_scaling(self) -> float:
        """The scaling, where it is divided by.

        Raises:
            AdapterError: it is 0.
        """
        if self.scaling == 0:
            raise AdapterError(
                f"{self.path}, adapter {self.name!r}: its scaling is 0, so it changes nothing and no step of it can be "
                "worked out. Set another scaling (set_scale), or take the adapter off. Nothing was changed."
            )
        return self.scaling

    def check_active(self) -> None:
        """Raise if this adapter no longer counts on its layer: its gradient would be missing, or another's."""
        if self.layer.adapters.get(self.name, self.adapter) is not self.adapter:
            raise AdapterError(
                f"{self.path}: the optimizer was made for an adapter {self.name!r} that was deleted; another one has "
                "its name now. Make a new optimizer. Nothing was changed."
            )
        active = self.layer.active_adapters
        if self.name not in active or self.name not in self.layer.adapters:
            raise AdapterError(
                f"{self.path}: the optimizer was made for adapter {self.name!r}, active now: "
                f"{', '.join(map(repr, active)) or 'none'}. Call set_adapter({self.name!r}), or make a new optimizer. "
                "Nothing was changed."
            )
        self.check_unmerged()

    def check_unmerged(self) -> None:
        if self.name in self.layer.merged_adapters:
            raise AdapterError(
                f"{self.path}: adapter {self.name!r} is merged, so it gets no gradient. Call unmerge_adapter() first."
            )


def pairs_of(model: nn.Module, *, folding: bool = False) -> list[Pair]:
    """The factors of every active adapter, in the order of the layers; a layer that is used twice counts once.

    Args:
        model: a PeftModel, any model with adapters injected, or a wrapper around one (DDP, torch.compile).
        folding: also those with a matrix between B and A (KaSA), or with A and B in parts (GOAT), for methods that do
            not read the one for the other.

    Raises:
        AdapterError: no layer has an active adapter, one is merged, has a matrix between its factors or routes
            tokens to parts of them, or holds nan or inf, or none is trained.
        BackendError: a factor is spread over processes, or is not a floating-point tensor of its full shape.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"An optimizer is made for a model with adapters, found {found(model)}.")
    pairs = [
        Pair(path, layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for name in layer.active_adapters
        if name in layer.adapters and layer.stored_parameters(name)  # what is tied belongs to another layer
    ]
    if not pairs:
        raise AdapterError(
            f"{type(model).__name__} has no layer with an active adapter. Wrap it first: "
            "model = get_peft_model(model, LoraConfig(...)), or call set_adapter(name)."
        )
    for pair in pairs:
        if not pair.adapter.variant.one_product and not folding:
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r} is {pair.adapter.variant.name}, in which each token has parts of "
                "A and B, and this optimizer is made for the product of the two. Use a stock optimizer such as "
                "torch.optim.AdamW. Nothing was changed."
            )
        if not pair.adapter.variant.factors_are_stored and not folding:
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r} is {pair.adapter.variant.name}, whose update is not the product "
                "of B and A as they are stored, for which this optimizer is made. Use a stock optimizer such as "
                "torch.optim.AdamW. Nothing was changed."
            )
        _check(pair)
    if not any(factor.requires_grad for factor in factors_of(pairs)):
        names = ", ".join(sorted({repr(pair.name) for pair in pairs}))
        raise AdapterError(
            f"No factor of adapter {names} is trained. Load it with is_trainable=True, or make the adapter without "
            "inference_mode=True. One that trains neither (LoRA-SB) takes a stock optimizer such as torch.optim.AdamW."
        )
    return pairs


def _check(pair: Pair) -> None:
    pair.check_unmerged()
    for factor, tensor in (("A", pair.A), ("B", pair.B)):
        where = f"{pair.path}, adapter {pair.name!r}: {factor}"
        if hasattr(tensor, "device_mesh") or tensor.dim() < 2 or tensor.numel() == 0:
            raise BackendError(
                f"{where} is a shard of a factor ({type(tensor).__name__}, shape {tuple(tensor.shape)}). This "
                "optimizer needs whole factors: leave the adapters unsharded, or use a stock optimizer on them."
            )
        if tensor.is_meta:
            raise BackendError(f"{where} is on the meta device and has no values. Load the adapter's weights first.")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise BackendError(
                f"{where} is stored as {tensor.dtype}. This optimizer needs float64, float32, bfloat16 or float16."
            )
    check_finite(pair)


def check_finite(pair: Pair) -> None:
    """Raise an AdapterError where a factor holds nan or inf."""
    for factor, tensor in (("A", pair.A), ("B", pair.B)):
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r}: {factor} (rank {pair.adapter.rank}) holds nan or inf. "
                "The adapter was probably trained to divergence: start it anew, or load an earlier checkpoint."
            )


def factors_of(pairs: Iterable[Pair]) -> list[nn.Parameter]:
    """A and B of every pair."""
    return [factor for pair in pairs for factor in (pair.A, pair.B)]


def groups_of(model: nn.Module, pairs: Sequence[Pair], weight_decay: float, **own: Any) -> list[dict[str, Any]]:
    """Groups of both factors of ``pairs`` and of what is trained besides, each with the settings ``own``."""
    factors = {"params": factors_of(pairs), "weight_decay": weight_decay}
    return filled([factors, *other_groups(model, pairs, weight_decay)], **own)


def filled(groups: Iterable[dict[str, Any]], **own: Any) -> list[dict[str, Any]]:
    """The groups that have parameters, with the settings ``own``."""
    return [group | own for group in groups if group["params"]]


def other_groups(model: nn.Module, pairs: Iterable[Pair], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of what is trained besides the factors of ``pairs``: matrices, and vectors, which are not decayed.

    These are magnitudes, biases, modules_to_save, token rows. A group may be empty.
    """
    factors = set(map(id, factors_of(pairs)))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    return [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]


def trained_together(pairs: Iterable[Pair], method: str) -> list[Pair]:
    """The pairs of which A and B are trained; those of which neither is are left out.

    Raises:
        AdapterError: a pair has one frozen factor.
    """
    trained = []
    for pair in pairs:
        if pair.A.requires_grad != pair.B.requires_grad:
            frozen, instead = ("B", "a stock optimizer such as torch.optim.AdamW")
            if pair.B.requires_grad:
                frozen, instead = ("A", "create_lorafa_optimizer, which trains B alone")
            raise AdapterError(
                f"{pair.path}, adapter {pair.name!r}: {frozen} is frozen, but {method} moves A and B together. Use "
                f"{instead}."
            )
        if pair.A.requires_grad:
            trained.append(pair)
    return trained


def by_shape(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs whose factors can be stacked: equal shapes as matrices, dtype and device."""
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        A, B = pair.matrices_A(pair.A), pair.matrices_B(pair.B)
        groups.setdefault((A.shape[1:], B.shape[1:], A.dtype, B.dtype, B.device), []).append(pair)
    return list(groups.values())
