"""Walking a model as if it carried one adapter alone: the names that a file of the adapter has.

What other adapters have put around a module is in the names of the live model and must not be in those of a file, which
is to be read on a model without them. A host that holds nothing of the adapter is passed over, and hosts of several
parameters of one module are nested as in PEFT, whichever was added first: the first parameter of the module innermost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.surgery.walk import joined, require_module, uncompiled


class Named(NamedTuple):
    """A module and its two names."""

    key: str
    """Its path in a model that carries the adapter alone, which is the one in files."""
    path: str
    """Its path in the model as it is."""
    module: nn.Module


def modules_alone(model: nn.Module, name: str) -> Iterator[Named]:
    """Every module of the model once, and of its hosts those that hold something of adapter ``name``.

    No path has the part that torch.compile puts into it, and what hosts hold for adapters is not entered.
    """
    seen: set[int] = set()
    stack = [Named("", "", require_module(model))]
    while stack:
        key, path, module = stack.pop()
        module = uncompiled(module)
        if id(module) in seen:
            continue
        if isinstance(module, Host):
            around, below = _hosts_at(key, path, module, name)
            new = [named for named in around if id(named.module) not in seen]
            seen |= {id(named.module) for named in new}
            yield from new
            stack.append(below)
            continue
        seen.add(id(module))
        yield Named(key, path, module)
        children = ((child, inside) for child, inside in module._modules.items() if inside is not None)
        stack.extend(reversed([Named(joined(key, child), joined(path, child), inside) for child, inside in children]))


def _hosts_at(key: str, path: str, module: nn.Module, name: str) -> tuple[list[Named], Named]:
    """The hosts in the place of a module that hold something of an adapter, the outermost in files first; the module.

    Only hosts of parameters stand around one another for the same adapter in any order; others stay as they are.
    """
    around: list[Named] = []
    while isinstance(module, Host):
        level: list[tuple[str, Host]] = []
        while isinstance(module, Host) and (not level or (module.nests and level[-1][1].nests)):
            level.append((path, module))
            path, module = joined(path, module.wrapped_path), uncompiled(module.wrapped())
        held = [(at, host) for at, host in level if name in host.held() and not host.is_empty(name)]
        for at, host in sorted(held, key=lambda one: -one[1].position):
            around.append(Named(key, at, host))
            key = joined(key, host.wrapped_path)
    return around, Named(key, path, module)


def hosts_alone(model: nn.Module, name: str) -> list[tuple[str, str, Host]]:
    """Every host that holds something of adapter ``name``: its path in files, its path now, and the host."""
    return [(key, path, host) for key, path, host in modules_alone(model, name) if isinstance(host, Host)]


def layers_alone(model: nn.Module, name: str) -> list[tuple[str, LoraLayer]]:
    """Every layer that carries adapter ``name`` and was not left empty, with the path that it has in files."""
    return [(key, layer) for key, _, layer in modules_alone(model, name) if isinstance(layer, LoraLayer)]
