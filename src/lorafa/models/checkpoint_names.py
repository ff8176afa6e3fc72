"""Which tensors of a checkpoint make which parameters of a model of transformers, and the way back.

A checkpoint and the model it is loaded into need not have the same names: prefixes come and go, and experts that a file
holds one by one are one stack in the model. transformers knows the conversions and their inverses; they are asked here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafa.errors import CheckpointError, first_line, shorten


@dataclass(frozen=True)
class Group:
    """Tensors of a checkpoint that together make some parameters."""

    stored: tuple[str, ...]
    """Their names in the checkpoint."""
    names: tuple[str, ...]
    """The names in the model of what they make."""
    conversion: Any = None
    """transformers' converter, with a pattern for each of ``stored``; None: one tensor, as it is."""
    patterns: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    """The names of ``stored`` as the converter knows them."""

    def to_model(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """What the tensors of the checkpoint make, by names in the model."""
        if self.conversion is None:
            return {self.names[0]: tensors[self.stored[0]]}
        converter = copy.deepcopy(self.conversion)
        for name, pattern in zip(self.stored, self.patterns, strict=True):
            converter.add_tensor(self.names[0], name, pattern, tensors[name])
        return _first_of_each(converter.convert(self.names[0], model=model, config=model.config))

    def to_stored(self, values: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The inverse of :meth:`to_model`."""
        if self.conversion is None:
            return {self.stored[0]: values[self.names[0]]}
        back = copy.deepcopy(self.conversion).reverse_transform()
        first = ""
        for name in self.names:
            renamed, pattern = back.rename_source_key(name)
            first = first or renamed
            back.add_tensor(renamed, name, pattern, values[name])
        made = _first_of_each(back.convert(first, model=model, config=model.config))
        outer = dict(zip(self.inner, self.stored, strict=True))
        return {outer.get(name, name): value for name, value in made.items()}


def _first_of_each(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Names:
    """A checkpoint beside a model."""

    groups: tuple[Group, ...]
    unused: tuple[str, ...]
    """Tensors the model has no place for."""

    def by_name(self) -> dict[str, Group]:
        """The group of each parameter of the model."""
        return {name: group for group in self.groups for name in group.names}


def names_of(model: Any, stored: Mapping[str, tuple[int, ...]]) -> Names:
    """Match a checkpoint with a model, as transformers does when it loads the one into the other.

    Args:
        model: on the meta device.
        stored: the shape of each tensor of the checkpoint, by its name there.

    Raises:
        CheckpointError: a conversion does not go with the tensors, or has no way back.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    parts: dict[str, list[tuple[str, str, str]]] = {}
    plain: dict[str, str] = {}
    unused = []
    for name in sorted(stored, key=natural_order):
        inner, _ = rename_source_key(name, renamings, [])
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = name, None
        if renamed not in own:
            unused.append(name)
        elif pattern is None:
            if (other := plain.setdefault(renamed, name)) != name:
                raise CheckpointError(
                    f"The tensors {other!r} and {name!r} are both for {renamed!r}. Remove one of them."
                )
        else:
            parts.setdefault(renamed, []).append((name, pattern, inner))
    groups = [Group((name,), (renamed,)) for renamed, name in plain.items()]
    groups += [_converted(model, first, found, by_pattern, stored) for first, found in parts.items()]
    return Names(tuple(groups), tuple(unused))


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key to sort dotted names by, with their numbers as numbers: layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _converted(
    model: Any,
    first: str,
    found: list[tuple[str, str, str]],
    by_pattern: Mapping[str, Any],
    stored: Mapping[str, tuple[int, ...]],
) -> Group:
    """A group with a conversion, which is tried on shapes in both directions."""
    names, patterns, inner = (tuple(column) for column in zip(*found, strict=True))
    group = Group(names, (first,), by_pattern[patterns[0]], patterns, inner)
    shapes = {name: torch.empty(stored[name], device="meta") for name in names}
    try:
        made = group.to_model(shapes, model)
        group = Group(names, tuple(made), group.conversion, patterns, inner)
        back = {name: tuple(tensor.shape) for name, tensor in group.to_stored(made, model).items()}
    except Exception as error:  # of transformers: any kind
        raise CheckpointError(
            f"The conversion of {shorten(names, 2)} to {first!r} failed: {first_line(error)}. Merge in memory: load "
            "the model, merge_and_unload, save_pretrained."
        ) from error
    if back != {name: tuple(stored[name]) for name in names}:
        raise CheckpointError(
            f"transformers makes {first!r} of {shorten(names, 2)}, and has no way back to tensors of these names and "
            f"shapes: it gives {shorten(back, 2)}. Merge in memory: load the model, merge_and_unload, save_pretrained."
        )
    return group


def stored_name(model: Any, name: str) -> str:
    """What a checkpoint calls a parameter that it does not hold yet; the model finds it by that name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) or [] if isinstance(one, WeightRenaming)]
    own = model.state_dict()
    back = name
    for one in reversed(renamings):
        back, _ = one.reverse_transform().rename_source_key(back)
    for wanted in (name, back):
        if rename_source_key(wanted, renamings, [], model.base_model_prefix, own)[0] == name:
            return wanted
    raise CheckpointError(f"No name in a checkpoint of this model leads to {name!r}, so it cannot be written.")
