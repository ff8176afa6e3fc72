"""Stacks of the file, as in transformers 5, are single experts of this model, as in transformers 4."""

from __future__ import annotations

from dataclasses import replace

from lorafa.errors import CheckpointError
from lorafa.io.layouts.base import OWN_LAYER, A, Arrangement, B, Contents, Factors, require_only
from lorafa.io.layouts.experts import EXPERTS, KNOWN, STACKS, experts_at
from lorafa.io.layouts.names import BaseNames
from lorafa.io.layouts.written import stack_of
from lorafa.surgery.patterns import numbers_of
from lorafa.surgery.walk import dotted_ends

_ORDER = ("gate_up_proj", "down_proj")
"""Stacked parameters in the order a module has them: the adapter of the first is the innermost."""


class ExpertsApart(Arrangement):
    """Each expert gets its A, and of its B the rows of each layer; rank and scaling stay."""

    what = "stacked experts for single ones"

    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        return {name for name in contents.factors if _experts(name, base) is not None}

    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        made: dict[str, Factors] = {}
        gone = self.claims(contents, base)
        for name in gone:
            made |= _apart(contents, name, base)
        config = contents.config
        left = [name for name in config.target_parameters or () if name.rpartition(".")[2] not in _ORDER]
        contents = replace(contents, config=replace(config, target_parameters=left or None))
        return contents.replaced(gone, made)


def _experts(name: str, base: BaseNames) -> str | None:
    """The module with single experts that a stacked module of the file stands for."""
    owner = name.partition(OWN_LAYER)[0]
    if not EXPERTS.search(owner):
        return None
    home = experts_at(owner, base)
    there = home is not None and any(
        f"{home}.0.{leaf}" in base.layers for groups in STACKS.values() for group in groups for leaf in group
    )
    return home if there else None


def _apart(contents: Contents, name: str, base: BaseNames) -> dict[str, Factors]:
    owner, home = name.partition(OWN_LAYER)[0], _experts(name, base)
    assert home is not None  # what is none was not claimed
    parameter = _parameter(contents, name)
    factors, config = contents.factors[name], contents.config
    require_only(contents.path, name, factors, KNOWN, "taking stacked experts apart")
    group = next((one for one in STACKS[parameter] if all(f"{home}.0.{leaf}" in base.layers for leaf in one)), None)
    count = sum(1 for other in base.modules if other.rpartition(".")[0] == home and other.rpartition(".")[2].isdigit())
    full = f"{owner}.{parameter}"
    rank, alpha = numbers_of(config, full)
    a, b = factors.tensors[A], factors.tensors[B]
    if group is None or a.shape[0] != count * rank or b.shape[1] != count * rank:
        raise CheckpointError(
            f"{contents.path}: {full} has A {tuple(a.shape)} and B {tuple(b.shape)} of rank {rank}, and {home} of this "
            f"model has {count} experts{'' if group else ' with other layers'}. Nothing was loaded."
        )
    made: dict[str, Factors] = {}
    stack_a, stack_b = stack_of(a, b, count)
    for expert in range(count):
        places = [f"{home}.{expert}.{leaf}" for leaf in group]
        sizes = [base.layers[place][0] for place in places]
        if sum(sizes) != b.shape[0] or any(base.layers[place][1] != a.shape[1] for place in places):
            raise CheckpointError(
                f"{contents.path}: {full} has A {tuple(a.shape)} and B {tuple(b.shape)}, and {', '.join(places)} of "
                f"this model have {sizes} rows and {base.layers[places[0]][1]} columns. Nothing was loaded."
            )
        for i, place in enumerate(places):
            rows = stack_b[expert, sum(sizes[:i]) : sum(sizes[: i + 1])]
            made[place] = Factors({A: stack_a[expert], B: rows}, rank, alpha)
    return made


def _parameter(contents: Contents, name: str) -> str:
    """Which stacked parameter the adapter is of: the file has the name of the module alone."""
    owner, inner = name.partition(OWN_LAYER)[0], name.count(OWN_LAYER)
    given = contents.config.target_parameters or []
    there = [p for p in _ORDER if any(end in given for end in dotted_ends(f"{owner}.{p}"))]
    depth = max(other.count(OWN_LAYER) for other in contents.factors if other.partition(OWN_LAYER)[0] == owner)
    if len(there) != depth + 1:
        raise CheckpointError(
            f"{contents.path} has adapters of {depth + 1} parameters of {owner}, and target_parameters={given!r} of "
            f"its config name {len(there)} of {' and '.join(_ORDER)}, so which is whose is not known. Nothing was "
            "loaded."
        )
    return there[depth - inner]
