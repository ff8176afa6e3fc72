"""Slots for ranks: factors with room for more ranks than an adapter has, so that another adapter can take its place.

The ranks beyond the adapter's own are rows of zeros in A and columns of zeros in B. They add nothing, get no gradient
from each other, and no file holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lorafa.layers.base import LoraLayer


def slots_of(layer: LoraLayer, name: str) -> int:
    """How many ranks the factors of an adapter have room for."""
    adapter = layer.adapters[name]
    return adapter.rank if adapter.slots is None else adapter.slots


def widened(layer: LoraLayer, A: Tensor, B: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Factors in the stored layout, with zeros for the ranks up to ``slots``.

    Of a convolution with groups each has its share of the slots, and its own ranks come first there.
    """
    groups = layer.rank_groups(layer.get_base_layer())
    matrix_A, matrix_B = layer.matrix_A(A), layer.matrix_B(B)
    rows = _by_group(matrix_A, groups)
    more = slots // groups - rows.shape[-2]
    rows = nn.functional.pad(rows, (0, 0, 0, more)).flatten(-3, -2)
    return layer.stored_A(rows), layer.stored_B(nn.functional.pad(matrix_B, (0, more)))


def narrowed(layer: LoraLayer, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`widened`: the first ``rank`` ranks of factors in the stored layout."""
    rows, columns = _first(layer, layer.matrix_A(A), layer.matrix_B(B), rank)
    return layer.stored_A(rows).contiguous(), layer.stored_B(columns).contiguous()


def used_factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Dense A (r, in) and B (out, r) of the whole update of an adapter, free slots left out.

    What is made of factors has their rank, and pruning counts their entries, zeros among them.
    """
    adapter = layer.adapters[name]
    A, B = adapter.factors
    if adapter.start is not None or slots_of(layer, name) == adapter.rank:  # a start has no slots beside its own ranks
        return A, B
    return _first(layer, A, B, adapter.rank)


def _first(layer: LoraLayer, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    groups = layer.rank_groups(layer.get_base_layer())
    own = rank // groups
    return _by_group(A, groups)[..., :own, :].flatten(-3, -2), B[..., :own]


def _by_group(A: Tensor, groups: int) -> Tensor:
    """A (..., r, in) as (..., groups, r / groups, in)."""
    return A.reshape(*A.shape[:-2], groups, -1, A.shape[-1])


def without_free(layers: Iterable[tuple[str, LoraLayer]], name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By key the factors of adapter ``name`` without free slots, for the layers where it has some."""
    found: dict[str, Tensor] = {}
    for (key_A, key_B), layer in _with_free(layers, name, values):
        factors = narrowed(layer, values[key_A], values[key_B], layer.adapters[name].rank)
        found |= zip((key_A, key_B), factors, strict=True)
    return found


def with_free(layers: Iterable[tuple[str, LoraLayer]], name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By key the factors of adapter ``name`` with its free slots, for the layers where it has some."""
    found: dict[str, Tensor] = {}
    for (key_A, key_B), layer in _with_free(layers, name, values):
        factors = widened(layer, values[key_A], values[key_B], slots_of(layer, name))
        found |= zip((key_A, key_B), factors, strict=True)
    return found


def _with_free(
    layers: Iterable[tuple[str, LoraLayer]], name: str, values: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, str], LoraLayer]]:
    for path, layer in layers:
        key_A, key_B = (f"{path}.{key}" for key in layer.factor_names)
        if slots_of(layer, name) > layer.adapters[name].rank and key_A in values and key_B in values:
            yield (key_A, key_B), layer
