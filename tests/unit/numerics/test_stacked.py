"""One product over the stacked factors of several groups of rows is the product of each group by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafa.context import Layout, Rows
from lorafa.numerics.rows import Product, add_stacked_, stacked
from toys.compare import close

IN, OUT = 6, 4
CHOICES: dict[str, tuple[tuple[str, ...], ...]] = {
    "in order, one size": (("a",), ("a",), ("b",), ("b",), (), ()),
    "in order, other sizes": (("a",), ("b",), ("b",), ()),
    "mixed up, one size": (("a",), ("b",), (), (), ("b",), ("a",)),
    "mixed up, other sizes": (("b",), ("a",), (), ("b",), ("a", "b"), ("a",)),
}


def products() -> dict[str, Product]:
    """Two changes of other ranks and scalings."""
    generator = torch.Generator().manual_seed(1)

    def of_rank(rank: int, scaling: float | Tensor) -> Product:
        A = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
        return A, torch.randn(OUT, rank, generator=generator, dtype=torch.float64), scaling

    return {"a": of_rank(3, 0.5), "b": of_rank(1, torch.tensor(-2.0, dtype=torch.float64))}


@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_every_row_gets_the_changes_of_its_own_group(choices: tuple[tuple[str, ...], ...], places: int) -> None:
    known = products()
    layout: Layout = Rows(choices).layout(len(choices), torch.device("cpu"), sort=True)
    assert layout.groups is not None
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(choices), places, IN, generator=generator, dtype=torch.float64)
    y = torch.randn(len(choices), places, OUT, generator=generator, dtype=torch.float64)
    wanted = y.clone()
    for row, chosen in enumerate(choices):
        for A, B, scaling in (known[name] for name in chosen):
            wanted[row] += scaling * x[row] @ A.T @ B.T
    stack = stacked([[known[name] for name in part.adapters] for part in layout.parts])
    add_stacked_(y, x, stack, layout.groups.gather, layout.groups.back)
    close(y, wanted)


def test_groups_of_very_different_sizes_are_not_stacked() -> None:
    choices = (*[("a",)] * 9, ("b",), ("c",))
    assert Rows(choices).layout(len(choices), torch.device("cpu"), sort=True).groups is None
