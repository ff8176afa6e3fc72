"""What adapters on a model without values would change in it: which tensors, and how each is made when it is due."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafa.errors import BackendError
from lorafa.io.skeleton import Skeleton, tensors_of
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.layers.tied import owner_of
from lorafa.surgery.walk import hosts, places


@dataclass(frozen=True)
class Change:
    """New values for some tensors of the model."""

    place: str
    """The module that they are in, by its name before anything was put on the model."""
    keys: Mapping[str, Hashable]
    """Tensor in that module -> what its values come from; equal where they are the same."""
    chain: tuple[Host, ...] = ()
    """The hosts at the place, the outermost first; none where the values are in the model already."""
    also: tuple[str, ...] = ()
    """Other names of the place."""

    def sources(self) -> dict[str, Hashable]:
        """Name of a tensor in the model -> what its values come from."""
        places = (self.place, *self.also)
        return {joined(place, key): source for place in places for key, source in self.keys.items()}

    def values(self, skeleton: Skeleton, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors by name, as merging the adapters ``names`` in memory leaves them.

        Raises:
            AdapterError: a value would not be finite.
            BackendError: a layer cannot take the update in.
        """
        if not self.chain:
            return {joined(self.place, key): skeleton.like[joined(self.place, key)] for key in self.keys}
        with _mounted(skeleton, self.chain[-1], self.place) as real, torch.no_grad():
            before = {id(tensor) for tensor in tensors_of(real).values()}
            made = {key: t for key, t in _merged(self.chain, names).items() if id(t) not in before}
        if made.keys() != self.keys.keys():
            raise RuntimeError(f"{self.place}: {sorted(made)} were made where {sorted(self.keys)} were planned")
        return {joined(self.place, key): tensor.detach() for key, tensor in made.items()}


def joined(path: str, key: str) -> str:
    return f"{path}.{key}".removeprefix(".")


def changes_of(skeleton: Skeleton, names: Sequence[str], filled: Sequence[str]) -> list[Change]:
    """Everything that merging would change; no value of the base is read.

    Args:
        names: the adapters that are merged, which all count.
        filled: tensors of the base that the adapters' files bring.

    Raises:
        BackendError: a layer could not take an update in.
    """
    found = [_of_chain(skeleton, chain, place, also, names) for chain, place, also in _chains(skeleton.model)]
    changes = [change for change in found if change is not None and change.keys]
    known = {name for change in changes for name in change.sources()}
    for name in filled:
        if name not in known:
            place, _, key = name.rpartition(".")
            changes.append(Change(place, {key: id(skeleton.like[name])}))
    return changes


def _chains(model: nn.Module) -> Iterator[tuple[tuple[Host, ...], str, tuple[str, ...]]]:
    """The hosts of each place with its name, and the other names it has."""
    named: dict[int, list[str]] = {}
    for place in places(model):
        if isinstance(place.module, Host):
            named.setdefault(id(place.module), []).append(place.name)
    names_by_path: dict[str, str] = {}
    inside: set[int] = set()
    for path, host in hosts(model):
        if id(host) in inside:
            continue
        name, *also = named.get(id(host)) or [_name_within(path, names_by_path)]
        chain, inner = [host], host.get_submodule(host.wrapped_path)
        names_by_path[joined(path, host.wrapped_path)] = name
        within = joined(path, host.wrapped_path)
        while isinstance(inner, Host):
            chain.append(inner)
            inside.add(id(inner))
            within = joined(within, inner.wrapped_path)
            names_by_path[within] = name
            inner = inner.get_submodule(inner.wrapped_path)
        yield tuple(chain), name, tuple(also)


def _name_within(path: str, names_by_path: Mapping[str, str]) -> str:
    """The name of what is at ``path`` inside a module that a host stands for."""
    around = max((outer for outer in names_by_path if path.startswith(f"{outer}.")), key=len, default=None)
    return path if around is None else joined(names_by_path[around], path[len(around) + 1 :])


def _of_chain(
    skeleton: Skeleton, chain: tuple[Host, ...], place: str, also: tuple[str, ...], names: Sequence[str]
) -> Change | None:
    keys: dict[str, Hashable] = {}
    rows = {host: host.rows_from(names) for host in chain}
    with _mounted(skeleton, chain[-1], place, empty=True) as blank:
        for host in reversed(chain):
            for key, source in _changed(host, rows[host], blank, place, names).items():
                keys[key] = (keys[key], source) if key in keys else source
    return Change(place, keys, chain, also) if keys else None


def _changed(
    host: Host, rows: Hashable | None, blank: nn.Module, place: str, names: Sequence[str]
) -> dict[str, Hashable]:
    """Which tensors of its module a host gives other values, and what these come from."""
    if isinstance(host, LoraLayer):
        return _changed_by_layer(host, place, names)
    if rows is not None:
        return {"weight": ("rows", rows)}
    module = host.unwrapped(names)
    if module is blank or isinstance(module, Host):
        return {}
    return {key: ("copy", id(tensor)) for key, tensor in tensors_of(module).items()}


def _changed_by_layer(layer: LoraLayer, place: str, names: Sequence[str]) -> dict[str, Hashable]:
    here = layer.mergeable(names)
    if not here:
        return {}
    try:
        layer.require_mergeable()
        bias = layer.updated_bias([layer.adapters[name] for name in here])
    except BackendError as error:
        raise BackendError(f"{place}: {error}") from error
    owner = owner_of(layer, here)
    source = ("update", id(layer if owner is None else owner), tuple(here))
    key = layer.parameter_name or layer.backend.weight_name
    changed: dict[str, Hashable] = {key: source}
    if bias is not None:
        changed[layer.backend.bias_name] = (*source, "bias")
    return changed


def _merged(chain: Sequence[Host], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the module of a place, which is mounted, with the adapters folded in; the hosts are as before
    afterwards."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for layer in chain:
            if isinstance(layer, LoraLayer) and (here := layer.mergeable(names)):
                layer.put_merged(layer.merged_base(here), here)
        plain: nn.Module = chain[-1].unwrapped(names)
        for outer in reversed(chain[:-1]):
            taken.append(_put(outer, plain))
            plain = outer.unwrapped(names)
        return tensors_of(plain)
    finally:
        for parent, leaf, old in reversed(taken):
            setattr(parent, leaf, old)
        for layer in chain:
            if isinstance(layer, LoraLayer):
                layer.unmerge()


def _put(host: Host, module: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """Let ``module`` be what a host stands for; how to take it back."""
    path, _, leaf = host.wrapped_path.rpartition(".")
    parent = host.get_submodule(path) if path else host
    old = parent.get_submodule(leaf)
    setattr(parent, leaf, module)
    return parent, leaf, old


@contextmanager
def _mounted(skeleton: Skeleton, host: Host, place: str, *, empty: bool = False) -> Iterator[nn.Module]:
    """The module that a host stands for has its values inside the block, or with ``empty`` zeros."""
    module = host.get_submodule(host.wrapped_path)
    real = skeleton.mounted(module, place, empty=empty)
    parent, leaf, old = _put(host, real)
    try:
        yield real
    finally:
        setattr(parent, leaf, old)
        if isinstance(host, LoraLayer):
            _ = host.backend  # looked up anew, so that the layer lets go of the module that was mounted
