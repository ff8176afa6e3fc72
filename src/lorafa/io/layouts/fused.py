"""Several layers of the file are one of the model: q_proj, k_proj and v_proj are a fused qkv_proj."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from lorafa.errors import CheckpointError
from lorafa.io.layouts.base import BIAS, NORMS, ROWS, A, Arrangement, B, Contents, Factors, block_diagonal, require_only
from lorafa.io.layouts.fusions import EQUAL, at, fusions_of, parent
from lorafa.io.layouts.names import BaseNames

Key = tuple[str, tuple[str, ...]]
"""A layer of the model, and the last names of those it holds."""


class Fused(Arrangement):
    """s B A of rows one after the other, of rank the sum of ranks: A's one below the other, B block-diagonal.

    A layer that the file has no adapter of has rows of zeros. Scalings that differ go into B.
    """

    what = "parts for the layer that is fused of them"

    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        return {name for parts in _found(contents, base).values() for name in parts.values()}

    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        made: dict[str, Factors] = {}
        found = _found(contents, base)
        for (whole, group), parts in found.items():
            for name in parts.values():
                require_only(contents.path, name, contents.factors[name], ROWS, "fusing layers")
            made[whole] = _fused(contents, whole, group, parts, base)
        return contents.replaced([name for parts in found.values() for name in parts.values()], made)


def _found(contents: Contents, base: BaseNames) -> dict[Key, dict[str, str]]:
    """A layer of the model -> last name -> the layer of the file, which the model has not."""
    found: dict[Key, dict[str, str]] = defaultdict(dict)
    for name in contents.factors:
        place = parent(name, base)
        if place is None or at(*place) in base.modules:
            continue
        owner, leaf = place
        for fused in (layer for layer in base.layers if layer.rpartition(".")[0] == owner):
            mixed, groups = fusions_of(owner, fused.rpartition(".")[2])
            group = next((one for one in groups if leaf in one), None)
            if group is not None and mixed:
                raise CheckpointError(
                    f"{contents.path}: {name} is a part of {fused} in this model, which holds the rows of its parts "
                    "head by head, in an order that differs from model to model. Merge the adapter into the model it "
                    "was made for, convert that, and take the difference (convert_to_lora). Nothing was loaded."
                )
            if group is not None:
                found[fused, group][leaf] = name
    return found


def _fused(
    contents: Contents, whole: str, group: tuple[str, ...], parts: Mapping[str, str], base: BaseNames
) -> Factors:
    layers = {leaf: contents.factors[parts[leaf]] for leaf in group if leaf in parts}
    owner = next(iter(parts.values())).rpartition(".")[0]
    for leaf in group:
        contents.require_meant(at(owner, leaf))
    sizes = _sizes(contents, whole, group, layers, base)
    lacking = [leaf for leaf in group if leaf not in layers or NORMS not in layers[leaf].tensors]
    if 0 < len(lacking) < len(group):
        raise CheckpointError(
            f"{contents.path}: {whole} of this model is one layer with DoRA's norm of each row, and the file has none "
            f"for the rows of {', '.join(lacking)}. Merge it into the model it was made for. Nothing was loaded."
        )
    first = next(iter(layers.values()))
    scaling, like = contents.scaling(first), first.tensors[B]
    rank = sum(one.tensors[A].shape[0] for one in layers.values())
    blocks = [
        contents.B_at(scaling, layers[leaf]) if leaf in layers else like.new_zeros(rows, 0)
        for leaf, rows in zip(group, sizes, strict=True)
    ]
    tensors = {A: torch.cat([one.tensors[A] for one in layers.values()]), B: block_diagonal(blocks)}
    if any(BIAS in one.tensors for one in layers.values()):
        tensors[BIAS] = torch.cat([
            layers[leaf].tensors[BIAS] * (contents.scaling(layers[leaf]) / scaling)
            if leaf in layers and BIAS in layers[leaf].tensors
            else like.new_zeros(rows)
            for leaf, rows in zip(group, sizes, strict=True)
        ])  # fmt: skip
    if NORMS in first.tensors:
        tensors[NORMS] = torch.cat([layers[leaf].tensors[NORMS] for leaf in group])
    return Factors(tensors, rank, contents.alpha(scaling, rank))


def _sizes(
    contents: Contents, whole: str, group: tuple[str, ...], layers: Mapping[str, Factors], base: BaseNames
) -> list[int]:
    """How many rows of the fused layer each part has."""
    total, columns = base.layers[whole][:2]
    known = {leaf: int(one.tensors[B].shape[0]) for leaf, one in layers.items()}
    for one, other in EQUAL.items():
        if one in group and other in group and (size := known.get(one, known.get(other))) is not None:
            known.setdefault(one, size)
            known.setdefault(other, size)
    missing = [leaf for leaf in group if leaf not in known]
    for leaf in missing:
        known[leaf] = (total - sum(known.get(one, 0) for one in group if one not in missing)) // len(missing)
    widths = {int(one.tensors[A].shape[1]) for one in layers.values()}
    if sum(known[leaf] for leaf in group) != total or min(known.values()) <= 0 or widths != {columns}:
        raise CheckpointError(
            f"{contents.path}: {', '.join(group)} would be {whole} of this model, which has {total} rows and {columns} "
            f"columns, and theirs are {[known[leaf] for leaf in group]} and {sorted(widths)}. Nothing was loaded."
        )
    return [known[leaf] for leaf in group]
