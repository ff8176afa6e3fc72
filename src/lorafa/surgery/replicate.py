"""Stacks of layers in which some stand several times: copies share the base weights and have adapters of their own.

``layer_replication=[[0, 4], [2, 5]]`` runs layers 0, 1, 2, 3, 2, 3, 4 (pass-through merging, as in SOLAR 10.7B,
arXiv:2312.15166, with the weights of the small model).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafa.backends import backend_of
from lorafa.config import LoraConfig
from lorafa.errors import BackendError, ConfigError, shorten
from lorafa.layers.host import Host
from lorafa.surgery.walk import Place, places, skeleton

Ranges = Sequence[tuple[int, int]]

_NUMBER = "layer_idx"
"""What transformers calls the number of its layer in a module, by which it finds keys and values."""
_COUNT = "num_hidden_layers"
_PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists in transformers' configs that have an entry a layer."""


class ReplicatedLayers(nn.ModuleList):
    """The stack that stands in a model in place of the one it is made of."""

    def __init__(
        self, layers: Iterable[nn.Module] = (), ranges: Ranges = (), original: nn.ModuleList | None = None
    ) -> None:
        """The stack of ``layers``; without the other two it is a slice of one, as ``stack[:2]`` makes it."""
        super().__init__(layers)
        self.ranges: list[tuple[int, int]] = [(start, end) for start, end in ranges]
        self._original: tuple[nn.ModuleList, ...] = () if original is None else (original,)  # no child: it does not run
        self.said: list[tuple[Any, dict[str, Any]]] = []
        """Configs that were made to say how many layers there are, with what they said before."""

    @property
    def original(self) -> nn.ModuleList:
        return self._original[0]

    @property
    def order(self) -> list[int]:
        """The number in the original stack of each layer here."""
        return [number for start, end in self.ranges for number in range(start, end)]


@dataclass(frozen=True)
class Replication:
    """How a model's stack of layers is to change, made beside it: the model is untouched until :meth:`apply`."""

    model: nn.Module
    name: str
    """The name of the stack in the model."""
    stack: ReplicatedLayers

    @property
    def overlay(self) -> dict[str, nn.Module]:
        return {self.name: self.stack}

    def apply(self) -> None:
        """Put the stack in, and let the model's config say how many layers there are."""
        _put(self.model, self.name, self.stack)
        _say(self.model, self.stack)

    def undo(self) -> None:
        put_back(self.model)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """The stack stands in the model for the length of a with-block."""
        self.apply()
        try:
            yield
        finally:
            self.undo()


def replication_of(model: nn.Module, config: LoraConfig) -> Replication | None:
    """What ``layer_replication`` asks of the model that is not there already; the config's own is settled.

    Raises:
        ConfigError: a range lies outside of the stack, the model has no single stack of layers, adapters are on it, or
            its layers are replicated in another way.
    """
    wanted, there = config.layer_replication, _there(model)
    if there is not None:
        if wanted and list(wanted) != there[1].ranges:
            raise ConfigError(
                f"layer_replication={_text(wanted)}, but the layers of this model are replicated by "
                f"{_text(there[1].ranges)} already, and they stand in one order for all adapters. Give that, or take "
                "the adapters off with unload() first."
            )
        return None
    if not wanted:
        return None
    place = _stack_of(model)
    count = len(place.module)  # type: ignore[arg-type]
    outside = [r for r in wanted if not 0 <= r[0] < r[1] <= count]
    if outside:
        raise ConfigError(
            f"layer_replication: {list(outside[0])} is no range of {place.name!r}, which has {count} layers: ranges "
            f"are [start, end) with 0 <= start < end <= {count}. Correct it."
        )
    if carrying := [module for module in place.module.modules() if isinstance(module, Host)]:
        raise ConfigError(
            f"layer_replication={_text(wanted)}: adapters are on the layers of {place.name!r} already "
            f"({len(carrying)} modules carry some), and they would not be where they were. Take them off with "
            "unload(), or put this one on first."
        )
    layers = list(place.module.children())
    numbers = [number for start, end in wanted for number in range(start, end)]
    copies = [_sharing(layers[number], position) for position, number in enumerate(numbers)]
    stack = ReplicatedLayers(copies, wanted, place.module)  # type: ignore[arg-type]
    stack.training = place.module.training
    return Replication(model, place.name, stack)


def settled_ranges(model: nn.Module, config: LoraConfig) -> list[tuple[int, int]] | None:
    """``layer_replication`` as it holds for the model: a later adapter's is that of the first."""
    there = _there(model)
    return config.layer_replication if there is None else list(there[1].ranges)


def planned_places(model: nn.Module, replication: Replication | None) -> list[Place]:
    """Every place of the model as it will be."""
    return list(places(model, None if replication is None else replication.overlay))


def require_not_replicated(model: nn.Module) -> None:
    """Raises BackendError where layers share weights: each would need a weight of its own once something is merged."""
    if there := _there(model):
        raise BackendError(
            f"Merging: the layers of {there[0]!r} are replicated (layer_replication={_text(there[1].ranges)}) and "
            "share their weights, of which each would need one of its own; nothing was merged. Keep the adapter "
            "beside them."
        )


def put_back(model: nn.Module) -> None:
    """Bring the stack back that the replicated one was made of, and what the config said of it."""
    there = _there(model)
    if there is None:
        return
    name, stack = there
    _put(model, name, stack.original)
    for config, before in stack.said:
        for entry, value in before.items():
            setattr(config, entry, value)


def _there(model: nn.Module) -> tuple[str, ReplicatedLayers] | None:
    return next(((name, m) for name, m in skeleton(model) if isinstance(m, ReplicatedLayers)), None)


def _stack_of(model: nn.Module) -> Place:
    """The one list of layers of a model, of the length that its config says, if it says one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    count = getattr(getattr(model, "config", None), _COUNT, None)
    lists = [p for p in places(model) if isinstance(p.module, nn.ModuleList) and len(p.module)]
    outer = [p for p in lists if not any(p.name.startswith(f"{q.name}.") for q in lists)]
    found = [p for p in outer if count is None or len(p.module) == count]  # type: ignore[arg-type]
    if len(found) != 1:
        said = f"{len(found)}: {shorten([p.name for p in found], 3)}" if found else "none"
        raise ConfigError(
            f"layer_replication needs a model with one list of layers, and a {type(model).__name__} has {said}. Drop "
            "it."
        )
    return found[0]


def _sharing(layer: nn.Module, number: int) -> nn.Module:
    """A layer of other modules with the same parameters and buffers, which counts as layer ``number``.

    It also shares the configs, and what quantized layers keep beside their parameters.
    """
    shared: list[Any] = [*layer.parameters(), *layer.buffers()]
    shared += [m.config for m in layer.modules() if hasattr(m, "config")]
    found = [(backend, m) for m in layer.modules() if (backend := backend_of(m)) is not None]
    shared += [kept for backend, m in found for kept in backend.keeps_beside(m)]
    made = copy.deepcopy(layer, {id(thing): thing for thing in shared})
    for module in made.modules():
        if isinstance(getattr(module, _NUMBER, None), int):
            module.layer_idx = number  # type: ignore[assignment]
    return made


def _put(model: nn.Module, name: str, stack: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, stack)


def _say(model: nn.Module, stack: ReplicatedLayers) -> None:
    """Let the config of the model, and those of the models inside, speak of the layers of the stack."""
    before = len(stack.original)
    found = {id(c): c for c in (getattr(module, "config", None) for module in model.modules()) if c is not None}
    for config in found.values():
        if getattr(config, _COUNT, None) != before:
            continue
        entries = {name: getattr(config, name, None) for name in _PER_LAYER}
        lists = {name: list(value) for name, value in entries.items() if isinstance(value, (list, tuple))}
        stack.said.append((config, {_COUNT: before, **lists}))
        setattr(config, _COUNT, len(stack))
        for name, value in lists.items():
            if len(value) == before:
                setattr(config, name, [value[number] for number in stack.order])


def _text(ranges: Ranges) -> str:
    return str([list(r) for r in ranges])
