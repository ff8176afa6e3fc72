"""The update of a layer as plain LoRA on the pristine base: exactly where it is one, else the nearest of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafa.adapter import Start
from lorafa.errors import BackendError, ConfigError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import used_factors
from lorafa.numerics.linalg import working_dtype
from lorafa.numerics.truncation import Truncated, truncated_matrix, truncated_product
from lorafa.settings.checks import found, is_int
from lorafa.surgery.activate import require_adapters, require_unmerged
from lorafa.surgery.alone import layers_alone


@dataclass(frozen=True)
class Lost:
    """What a rank leaves out of the updates, as energy: squared Frobenius norms."""

    layers: dict[str, tuple[float, float]]
    """Path of a layer -> (what is lost, all there was)."""

    @property
    def share(self) -> float:
        """What is lost of the energy of all updates, between 0 and 1."""
        total = sum(total for _, total in self.layers.values())
        return sum(lost for lost, _ in self.layers.values()) / total if total else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Path of a layer -> the share of its own energy that is lost; the largest first."""
        found = {path: lost / total if total else 0.0 for path, (lost, total) in self.layers.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def in_words(self) -> str:
        """One sentence, with the share of the energy of all updates, and of the layer that loses most."""
        path, share = next(iter(self.shares.items()))
        return (
            f"{self.share:.3%} of the energy of {len(self.layers)} updates is lost (squared Frobenius norm); most in "
            f"{path}: {share:.3%}."
        )


def check_rank(name: str, rank: object) -> None:
    """Raises ConfigError unless ``rank`` is a whole number of 1 or more, or a share of energy in (0, 1]."""
    if is_int(rank) and rank >= 1:  # type: ignore[operator]
        return
    if isinstance(rank, float) and 0 < rank <= 1:
        return
    raise ConfigError(
        f"{name} is a whole number of 1 or more, or a share of the energy to keep in (0, 1] such as 0.99, found "
        f"{found(rank)}."
    )


def require_matrices(model: nn.Module, name: str) -> list[tuple[str, LoraLayer]]:
    """The layers that adapter ``name`` changes, by their paths in its file, where the update of each is one matrix.

    Raises:
        AdapterError: there is no such adapter, or it is merged.
        BackendError: an update changes with the input (aLoRA, Arrow, GOAT).
    """
    require_adapters(model, [name])
    require_unmerged(model, name, "converting it")
    layers = layers_alone(model, name)
    changing = [(path, layer.adapters[name].variant) for path, layer in layers if not _is_matrix(layer, name)]
    if changing:
        path, variant = changing[0]
        raise BackendError(
            f"Adapter {name!r} cannot be converted to plain LoRA: its update of {path!r} ({variant.name}) changes with "
            f"the input, and so do {len(changing)} of {len(layers)}. There is no matrix that does the same; keep the "
            "adapter as it is."
        )
    return layers


def require_other_ranks(layers: list[tuple[str, LoraLayer]]) -> None:
    """Raises BackendError for convolutions of several groups, whose B (out, r / groups) is no factor of the update."""
    grouped = [path for path, layer in layers if layer.rank_groups(layer.get_base_layer()) > 1]
    if grouped:
        raise BackendError(
            f"An adapter cannot be given another rank on {shorten(map(repr, grouped), 3)}: "
            f"{'that is a convolution' if len(grouped) == 1 else 'those are convolutions'} of several groups, by which "
            "B is divided. Keep the adapter as it is."
        )


def _is_matrix(layer: LoraLayer, name: str) -> bool:
    return layer.adapters[name].variant.uniform


def largest_rank(layer: LoraLayer) -> int:
    """The rank of any matrix in the place of the layer's: the smaller of its sides."""
    out, in_ = layer.backend.full_shape(layer.get_base_layer())[-2:]
    return min(out, in_)


@torch.no_grad()
def truncated(layer: LoraLayer, name: str, rank: int | float) -> Truncated:
    """The whole update of adapter ``name``, its scaling in B, at a rank; A is (r, in), or (E, r, in) of a stack.

    Where it is s B A, the factors are decomposed and no (out, in) matrix is formed.
    """
    adapter = layer.adapters[name]
    if adapter.variant.plain:
        A, B = adapter.factors
        dtype = working_dtype(B.dtype)
        return truncated_product(A.to(dtype), adapter.scaling * B.to(dtype), rank)
    return truncated_matrix(adapter.delta_weight(layer.base_weight()), rank)


def exact_factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Dense A and B of the whole update s B A, of rank 2 r where a start is subtracted; scaling not in them.

    Raises:
        BackendError: it is no such product (DoRA).
    """
    adapter = layer.adapters[name]
    if not adapter.variant.plain:
        raise BackendError(f"The update of {adapter.variant.name} is no product of A and B.")
    if adapter.start is None:
        return used_factors(layer, name)
    return stacked(adapter.variant.factors(adapter), adapter.start)


def stacked(factors: tuple[Tensor, Tensor], start: Start | None) -> tuple[Tensor, Tensor]:
    """[A; A0] and [B, -B0]: the factors of B A - B0 A0 that keep the bits of A and B, as files have them."""
    A, B = factors
    if start is None:
        return A, B
    return torch.cat([A, start.A.to(A)], dim=-2), torch.cat([B, -start.B.to(B)], dim=-1)
