"""Files whose names carry what other adapters had put around the modules of the model they were saved from.

A wrapper of another adapter is in the names of what lies inside it, and adapters on several parameters of one module
are told apart by their depth alone. PEFT numbers the depths by what the model carried before (its wrappers stay when an
adapter is deleted), so its files may have other depths than a model with this adapter alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple, NoReturn

from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.errors import CheckpointError, shorten
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.walk import places, pristine_of

_WRAPPING = ("base_layer", "original_module", "token_adapter")
"""What wrappers of adapters call the module inside them."""
Level = Mapping[str, str]
"""The name of a tensor on one level -> its key."""
Levels = Mapping[int, Level]
"""Depth -> the tensors there."""


class _Bare(NamedTuple):
    """A key without what wrappers around parameters have put into it, and that of a base tensor without any."""

    key: str
    module: str | None
    """The module that it adapts a parameter of; None for all other tensors."""
    depth: int
    """How many wrappers of that module are around the one it is of."""


def as_if_alone(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], want: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """The tensors of a file by the names that a model with this adapter alone gives them, as far as that is sure.

    What cannot be placed keeps its key.

    Args:
        model: the user's model, on which the adapter is.
        want: by key, tensors of the shapes that the adapter has here.
        path: of the file, for the error.

    Raises:
        CheckpointError: two parameters of a module have factors of equal shapes, and the file shows that it was saved
            from a model on which other adapters had been, so that their depths do not say which is whose.
    """
    modules = {place.name: pristine_of(place.module) for place in places(model)}
    have, wanted = ({key: _bare(key, modules) for key in side} for side in (tensors, want))
    moved = _others(have, wanted)
    there, here = _levels(have), _levels(wanted)
    history, doubtful = bool(moved), []
    for module in sorted(there.keys() & here.keys()):
        file, own = there[module], here[module]
        ways = _ways(file, own, tensors, want)
        fits_as_it_is = sorted(file) == sorted(own) and tuple(sorted(own)) in ways
        if ways and not fits_as_it_is:
            history = True
            moved |= _renamed(file, own, ways[0])
        if len(ways) > 1:
            doubtful.append(module)
    if history and doubtful:
        _refuse(model, name, doubtful[0], modules[doubtful[0]], path)
    return {moved.get(key, key): tensor for key, tensor in tensors.items()}


def _bare(key: str, modules: Mapping[str, nn.Module]) -> _Bare:
    parts, kept, depths = key.split("."), "", Counter[str]()
    for place, part in enumerate(parts):
        own = f"{kept}.{part}".removeprefix(".")
        if kept in modules and own not in modules:
            carries_parameters = backend_of(modules[kept]) is None
            if part in _WRAPPING and (carries_parameters or all(word in _WRAPPING for word in parts[place:-1])):
                depths[kept] += 1
                continue
            if part.startswith("lora_") and carries_parameters:
                return _Bare(".".join([*kept.split("."), *parts[place:]]), kept, depths[kept])
        kept = own
    return _Bare(kept, None, 0)


def _others(have: Mapping[str, _Bare], wanted: Mapping[str, _Bare]) -> dict[str, str]:
    """New keys of what lies inside wrapped modules, where one tensor alone has the name without wrappers."""
    given, asked = ({key: bare for key, bare in side.items() if bare.module is None} for side in (have, wanted))
    counts = Counter(bare.key for bare in given.values()), Counter(bare.key for bare in asked.values())
    places = {bare.key: key for key, bare in asked.items() if key not in have}
    return {
        key: places[bare.key]
        for key, bare in given.items()
        if key not in wanted and bare.key in places and all(count[bare.key] == 1 for count in counts)
    }


def _levels(found: Mapping[str, _Bare]) -> dict[str, dict[int, dict[str, str]]]:
    """By module, and by depth, the keys of what adapts its parameters, by their last names."""
    levels: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key, bare in found.items():
        if bare.module is not None:
            levels[bare.module][bare.depth][bare.key.removeprefix(f"{bare.module}.")] = key
    return levels


def _ways(
    there: Levels, here: Levels, tensors: Mapping[str, Tensor], want: Mapping[str, Tensor]
) -> list[tuple[int, ...]]:
    """How the levels of a file can be those here, by their shapes: for each, outermost first, its depth here."""
    if len(there) != len(here):
        return []
    given = [_shapes(there[depth], tensors) for depth in sorted(there)]
    asked = {depth: _shapes(level, want) for depth, level in here.items()}
    return [way for way in permutations(sorted(here)) if given == [asked[depth] for depth in way]]


def _shapes(level: Level, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[key].shape) for name, key in level.items()}


def _renamed(there: Levels, here: Levels, way: Sequence[int]) -> dict[str, str]:
    """The key here of each key of the file, for one of the ways."""
    levels = zip(sorted(there), way, strict=True)
    return {key: here[own][name] for depth, own in levels for name, key in there[depth].items()}


def _refuse(model: nn.Module, name: str, place: str, module: nn.Module, path: str | Path) -> NoReturn:
    layers = (layer for _, layer in layers_alone(model, name) if layer.nests)
    names = [str(layer.parameter_name) for layer in layers if layer.get_base_layer() is module]
    raise CheckpointError(
        f"{path} was saved from a model on which other adapters had been, so its names do not say in which order the "
        f"adapters of {shorten(sorted(names), 4)} of {place!r} lie in it, and factors of equal shapes do not either. "
        "Save it from a model that carries it alone, or give its layers by key_mapping the names they have there: the "
        "parameter that the module has first is the innermost. Nothing was loaded."
    )
