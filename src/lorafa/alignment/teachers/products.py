"""Sums of updates with the rank of one: what teachers that average the student's products are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafa.errors import AdapterError, DivergedError
from lorafa.layers.base import LoraLayer
from lorafa.numerics.linalg import working_dtype
from lorafa.numerics.low_rank import nearest_product
from lorafa.surgery.walk import lora_layers, uncompiled_name

Values = Mapping[str, Tensor]
"""Parameter -> its value."""


@dataclass(frozen=True)
class Pair:
    """A and B of one trained update, by the names of their parameters."""

    layer: LoraLayer
    A: str
    B: str
    path: str = ""
    """Where the layer is in the model."""
    name: str = ""
    """What the adapter is called."""

    @property
    def square_of_scaling(self) -> float:
        """s^2, by which squares of B A are those of the update."""
        return float(self.layer.scaling[self.name]) ** 2

    def factors(self, values: Values) -> tuple[Tensor, Tensor]:
        """A (..., r, in) and B (..., out, r) in float32 or wider."""
        A, B = self.layer.matrix_A(values[self.A]), self.layer.matrix_B(values[self.B])
        return A.to(working_dtype(A.dtype)), B.to(working_dtype(B.dtype))


def trained_pairs(model: nn.Module, what: str, instead: str = "Take align=snapshot") -> list[Pair]:
    """The updates of which both factors are trained.

    Args:
        what: is done to their products, and ``instead``, what to do, for errors.

    Raises:
        AdapterError: an update that is trained is not s B A with the A and B that are stored, so that it cannot be
            averaged as a product.
    """
    names = {id(p): uncompiled_name(name) for name, p in model.named_parameters() if p.requires_grad}
    pairs = []
    for path, layer in lora_layers(model):
        for name, adapter in layer.adapters.items():
            parameters = layer.stored_parameters(name)
            trained = [key for key, p in parameters.items() if id(p) in names]
            if adapter.tied_to is not None or not trained:
                continue
            if not adapter.variant.is_plain_lora or layer.rank_groups(layer.get_base_layer()) != 1:
                raise AdapterError(
                    f"{what} the product of A and B, and the update of {path!r} ({adapter.variant.name}) is more than "
                    f"one product. {instead}, or train plain LoRA."
                )
            key_A, key_B = layer.factor_names
            if key_A in trained and key_B in trained:
                pairs.append(Pair(layer, names[id(parameters[key_A])], names[id(parameters[key_B])], path, name))
    return pairs


def weighed_sum(pairs: list[Pair], one: Values, other: Values, share: float) -> tuple[dict[str, Tensor], float]:
    """(1 - share) of one and ``share`` of the other: of updates as products, cut to their rank, of all else as it is.

    Stacked factors [sqrt(1 - b) B1, sqrt(b) B2] and [sqrt(1 - b) A1; sqrt(b) A2] have the sum as their product; the
    nearest product of the rank is that of its QR core.

    Returns:
        The values, and the share of the squared norm of the updates that the ranks could not hold.
    """
    values = {name: torch.lerp(value, other[name].to(value), share) for name, value in one.items()}
    kept = lost = 0.0
    roots = (1 - share) ** 0.5, share**0.5
    for pair in pairs:
        (A1, B1), (A2, B2) = pair.factors(one), pair.factors(other)
        stacked_A = torch.cat([roots[0] * A1, roots[1] * A2], dim=-2)
        stacked_B = torch.cat([roots[0] * B1, roots[1] * B2], dim=-1)
        if not bool(stacked_A.isfinite().all() & stacked_B.isfinite().all()):
            raise DivergedError(
                f"The adapter of {pair.path or pair.A!r} has inf or nan, which no teacher can be made of. Lower the "
                "learning rate, or go back to a checkpoint."
            )
        A, B, S = nearest_product(stacked_A, stacked_B, A1.shape[-2])
        squares = S.double().square() * pair.square_of_scaling
        kept, lost = kept + float(squares.sum()), lost + float(squares[..., A1.shape[-2] :].sum())
        values[pair.A] = pair.layer.stored_A(A).to(one[pair.A]).contiguous()
        values[pair.B] = pair.layer.stored_B(B).to(one[pair.B]).contiguous()
    return values, lost / kept if kept else 0.0
