"""Single experts of the file, as in transformers 4, are stacks of this model, as in transformers 5."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.errors import CheckpointError
from lorafa.io.layouts.base import A, Arrangement, B, Contents, Factors, block_diagonal, require_only
from lorafa.io.layouts.experts import KNOWN, ONE_EXPERT, STACKS, experts_at, require_in_order
from lorafa.io.layouts.names import BaseNames
from lorafa.io.layouts.written import stored_stack
from lorafa.numerics.low_rank import padded

Key = tuple[str, tuple[str, ...]]
"""A stacked parameter, and the last names of an expert's layers that it holds."""
Members = dict[tuple[int, str], str]
"""(expert, last name) -> the layer of the file."""


class ExpertsStacked(Arrangement):
    """gate and up of an expert are rows of one matrix: A's one below the other, B block-diagonal, rank their sum.

    An expert, or a layer of it, that the file has no adapter of has zeros; a lower rank is filled up with zeros.
    """

    what = "single experts for stacked ones"

    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        return {name for members in _found(contents, base).values() for name in members.values()}

    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        found = _found(contents, base)
        made: dict[str, Factors] = {}
        for (parameter, group), members in found.items():
            for name in members.values():
                require_only(contents.path, name, contents.factors[name], KNOWN, "stacking experts")
            require_in_order(contents.path, parameter.rpartition(".")[0], base)
            made[parameter] = _stacked(contents, parameter, group, members, base)
        return contents.replaced([name for members in found.values() for name in members.values()], made)


def _found(contents: Contents, base: BaseNames) -> dict[Key, Members]:
    found: dict[Key, Members] = defaultdict(dict)
    for name in contents.factors:
        match = ONE_EXPERT.match(name)
        owner = experts_at(match[1], base) if match and name not in base.modules else None
        if match is None or owner is None:
            continue
        for stack, groups in STACKS.items():
            group = next((one for one in groups if match[3] in one), None)
            if group is not None and len(base.parameters.get(f"{owner}.{stack}", ())) == 3:
                found[f"{owner}.{stack}", group][int(match[2]), match[3]] = name
                break
    return found


def _stacked(contents: Contents, parameter: str, group: tuple[str, ...], members: Members, base: BaseNames) -> Factors:
    """The adapter of a stack (E, out, in) out of those of single layers."""
    experts, out, columns = base.parameters[parameter]
    factors = {place: contents.factors[name] for place, name in members.items()}
    rows = out // len(group)
    for (expert, _), one in factors.items():
        a, b = one.tensors[A], one.tensors[B]
        if expert >= experts or a.shape[1] != columns or b.shape[0] != rows or rows * len(group) != out:
            raise CheckpointError(
                f"{contents.path}: {members[expert, _]} has A {tuple(a.shape)} and B {tuple(b.shape)}, and "
                f"{parameter} of this model has {experts} experts of {rows} rows and {columns} columns for it. Nothing "
                "was loaded."
            )
    owner = next(iter(members.values())).rpartition(".")[0].rpartition(".")[0]
    for expert in range(experts):
        for leaf in group:
            contents.require_meant(f"{owner}.{expert}.{leaf}")
    first = next(iter(factors.values()))
    scaling = contents.scaling(first)
    ranks = dict.fromkeys(group, 0)
    for (_, leaf), one in factors.items():
        ranks[leaf] = max(ranks[leaf], one.tensors[A].shape[0])
    rank = sum(ranks.values())
    made = [_expert(contents, factors, expert, group, ranks, rows, columns, scaling) for expert in range(experts)]
    a, b = stored_stack(torch.stack([one for one, _ in made]), torch.stack([other for _, other in made]))
    return Factors({A: a, B: b}, rank, contents.alpha(scaling, rank))


def _expert(
    contents: Contents,
    factors: Mapping[tuple[int, str], Factors],
    expert: int,
    group: tuple[str, ...],
    ranks: Mapping[str, int],
    rows: int,
    columns: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one expert."""
    like = next(iter(factors.values())).tensors[A]
    As, Bs = [], []
    for leaf in group:
        one = factors.get((expert, leaf))
        if one is None:
            As.append(like.new_zeros(ranks[leaf], columns))
            Bs.append(like.new_zeros(rows, ranks[leaf]))
            continue
        a, b = padded(one.tensors[A], contents.B_at(scaling, one), ranks[leaf])
        As.append(a)
        Bs.append(b)
    return torch.cat(As), block_diagonal(Bs)
