"""One layer of the file is several of the model: a fused qkv_proj is q_proj, k_proj and v_proj."""

from __future__ import annotations

from lorafa.errors import CheckpointError
from lorafa.io.layouts.base import ROWS, A, Arrangement, B, Contents, Factors, require_only
from lorafa.io.layouts.fusions import at, fusions_of, groups_in, parent
from lorafa.io.layouts.names import BaseNames


class Split(Arrangement):
    """s B A of rows one after the other: each layer gets A and its rows of B, with the same rank and scaling.

    So do DoRA's norms and the bias of B, which belong to rows.
    """

    what = "a fused layer for its parts"

    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        return {name for name in contents.factors if _parts(name, contents, base)}

    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        made: dict[str, Factors] = {}
        gone = self.claims(contents, base)
        for name in gone:
            factors, parts = contents.factors[name], _parts(name, contents, base)
            require_only(contents.path, name, factors, ROWS, "cutting a layer into its parts")
            sizes = [base.layers[part][0] for part in parts]
            a, b = factors.tensors[A], factors.tensors[B]
            if sum(sizes) != b.shape[0] or any(base.layers[part][1:] != a.shape[1:] for part in parts):
                raise CheckpointError(
                    f"{contents.path}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, and the layers that would "
                    f"be its parts, {', '.join(parts)}, have {sizes} rows and {base.layers[parts[0]][1]} columns. "
                    "Nothing was loaded."
                )
            for i, part in enumerate(parts):
                rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
                cut = {key: tensor if key == A else tensor[rows] for key, tensor in factors.tensors.items()}
                made[part] = Factors(cut, factors.rank, factors.alpha)
        return contents.replaced(gone, made)


def _parts(name: str, contents: Contents, base: BaseNames) -> list[str]:
    """The layers of the model that a layer of the file, which the model has not, is made of."""
    found = parent(name, base)
    if found is None or at(*found) in base.modules:
        return []
    owner, leaf = found
    mixed, groups = fusions_of(owner, leaf)
    group = next(groups_in(base, owner, groups), ())
    if mixed and group:
        raise CheckpointError(
            f"{contents.path}: {name} holds the rows of {', '.join(group)} head by head, in an order that differs from "
            "model to model, so they cannot be told apart by their names. Merge the adapter into the model it was made "
            "for, convert that, and take the difference (convert_to_lora). Nothing was loaded."
        )
    return [at(owner, part) for part in group]
