"""Walking a model that may already carry adapters: names as they were before any layer was wrapped.

``torch.compile(module)`` puts a wrapper around a module, too, and its child is called ``_orig_mod``. No name given here
has that part, so a compiled model and one that is not are the same to configs, files, statistics and fingerprints.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorafa.backends.embedding import is_table
from lorafa.backends.offload import identity_of
from lorafa.errors import AdapterError, TargetError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.layers.wrapper import Wrapper
from lorafa.settings.checks import found

PREFIX = "base_model.model."
"""What PeftModel and LoraModel put before the names of the user's model."""
_COMPILED = "_orig_mod"
"""Where torch.compile's wrapper of a module holds it."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself where ``module`` is what torch.compile has made of one."""
    while _is_compiled(module):
        module = module._modules[_COMPILED]  # type: ignore[assignment]
    return module


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module._modules.get(_COMPILED), nn.Module)


def uncompiled_name(name: str) -> str:
    """The name, of a module or a parameter, in the model as it was before any part of it was compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED) if _COMPILED in name else name


def embedding_of(model: nn.Module, getter: str) -> nn.Module | None:
    """What ``get_input_embeddings`` or ``get_output_embeddings`` of a model returns; None where there is no such."""
    ask = getattr(model, getter, None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # transformers' word for a model that reads no tokens
        return None
    return uncompiled(found) if isinstance(found, nn.Module) else None


def user_model(model: nn.Module) -> nn.Module:
    """The user's model in a PeftModel; any other model itself."""
    base = getattr(model, "base_model", None)
    inner = getattr(base, "model", None) if isinstance(getattr(base, "peft_config", None), dict) else None
    return inner if isinstance(inner, nn.Module) else model


def name_of(model: nn.Module) -> str | None:
    """The folder or Hub repository a model of transformers was loaded from, where it says so."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


@dataclass(frozen=True)
class Place:
    """A module and where it sits."""

    name: str
    """Dotted name as it was before wrapping and compiling."""
    path: str
    """Dotted name now, by which ``get_submodule`` finds it."""
    module: nn.Module
    overlaid: bool = False
    """Whether the module is to come there, and is not there yet; its weights are other layers'."""


def places(model: nn.Module, overlay: Mapping[str, nn.Module] | None = None) -> Iterator[Place]:
    """Every place a module of the original model has, repeated modules at each of their names.

    A wrapped module is given as its wrapper; what wrappers hold of their own is not entered. A compiled one is given
    without what torch.compile put around it.

    Args:
        overlay: name of a place -> the module that is to stand there, as if it did: a plan can be made for layers that
            are copies of others before they are put in.

    Raises:
        TargetError: the model has no place of a name in ``overlay``.
    """
    stack = [Place("", "", require_module(model))]
    waiting = dict(overlay or {})
    own = {id(module) for module in model.modules()} if waiting else set()
    while stack:
        place = stack.pop()
        if place.name in waiting:
            place = replace(place, module=waiting.pop(place.name))
        if own and id(place.module) not in own:
            place = replace(place, overlaid=True)
        while _is_compiled(place.module):
            place = replace(place, path=joined(place.path, _COMPILED), module=place.module._modules[_COMPILED])  # type: ignore[arg-type]
        yield place
        inside, path = place.module, place.path
        if isinstance(inside, Host) and not inside.nests:
            continue
        while isinstance(inside, Host):
            path, inside = joined(path, inside.wrapped_path), inside.wrapped()
        children = [Place(joined(place.name, name), joined(path, name), child) for name, child in _children(inside)]
        stack.extend(reversed(children))
    if waiting:
        raise TargetError(f"The model has no place called {shorten(map(repr, waiting), 3)} for another module.")


def layers_at(place: Place) -> Iterator[LoraLayer]:
    """The layer with adapters that stands at a place, and those inside it that adapt other parameters of the module."""
    module = place.module
    while isinstance(module, LoraLayer):
        yield module
        module = module.base_layer


def full_name(place: Place, layer: LoraLayer) -> str:
    """The name by which patterns of a config find a layer at a place: of the module, or of the parameter it adapts."""
    return place.name if layer.parameter_name is None else f"{place.name}.{layer.parameter_name}"


def pristine_of(module: nn.Module) -> nn.Module:
    """The module that a host stands for, with the weight nothing was merged into; any other module itself."""
    return module.pristine if isinstance(module, Host) else module


def tied_groups(everything: Iterable[Place]) -> list[list[Place]]:
    """The modules that share a weight, group by group; the first of each, an embedding if there is one, owns it.

    A module that is overlaid computes with another's weight and is trained apart from it, so it is in no group.
    """
    by_weight: dict[Hashable, dict[int, Place]] = {}
    for place in everything:
        module = pristine_of(place.module)
        if module._parameters.get("weight") is not None and not place.overlaid:
            by_weight.setdefault(identity_of(module, "weight"), {}).setdefault(id(place.module), place)
    groups = (list(group.values()) for group in by_weight.values() if len(group) > 1)
    return [sorted(group, key=lambda p: not is_table(pristine_of(p.module))) for group in groups]


def require_module(model: object) -> nn.Module:
    """The model; raises AdapterError for what is none, such as the name of one."""
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"The model must be a torch.nn.Module, found {found(model)}. Load it first, for example with "
            "AutoModelForCausalLM.from_pretrained."
        )
    return model


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_children``, which gives a module that has several names in one parent at the first of them only."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


def dotted_ends(name: str) -> list[str]:
    """The dotted ends of a name, shortest first: q_proj, self_attn.q_proj, ..."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def joined(prefix: str, name: str) -> str:
    """The name of what is called ``name`` in the module ``prefix``; the model itself has an empty one."""
    return f"{prefix}.{name}" if prefix else name


def skeleton(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what wrappers hold for adapters: no longer with a hundred than with one.

    A compiled module and what torch.compile put around it have the same name.
    """
    seen: set[int] = set()
    stack = [("", require_module(model))]
    while stack:  # the most frequent of all loops over a model, so without a call a child
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        if isinstance(module, Host):
            stack.append((prefix + module.wrapped_path, module.wrapped()))
            continue
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((path if name == _COMPILED else prefix + name, child))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` without those of adapters, shared ones at each of their names."""
    for path, module in skeleton(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield joined(path, name), parameter


def layers_of(found: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, LoraLayer]]:
    """The hosts of a model that are layers with adapters."""
    return [(path, host) for path, host in found if isinstance(host, LoraLayer)]


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """Every wrapper of lorafa in the model with its path, each once, in the order of the model."""
    for path, module in skeleton(model):
        if isinstance(module, Host):
            yield path, module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoraLayer in the model with its path, each once."""
    for path, module in skeleton(model):
        if isinstance(module, LoraLayer):
            yield path, module


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every wrapper of a module that is trained beside the factors, with its path, each once."""
    return ((path, host) for path, host in hosts(model) if isinstance(host, Wrapper))


def tables(model: nn.Module) -> list[nn.Module]:
    """Input embedding and output head, wrapped or not, as a model of transformers names them."""
    found = (embedding_of(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings"))
    return [module for module in found if module is not None]


def wrapped_places(model: nn.Module) -> list[str]:
    """The name of every place a wrapper of lorafa stands in."""
    return [place.name for place in places(model) if isinstance(place.module, Host)]


def adapter_names(model: nn.Module) -> list[str]:
    """Every adapter some layer of the model carries, in order of appearance."""
    return list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.adapters))


class Parents:
    """Where every module of a model sits, so that one can be put in another's place without a search."""

    def __init__(self, model: nn.Module) -> None:
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        self.history: list[tuple[nn.Module, str, nn.Module]] = []
        for _, parent in skeleton(model):
            for name, child in _children(parent):
                self._slots.setdefault(id(child), []).append((parent, name))

    def of(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """(parent, name) of every place a module has."""
        return list(self._slots.get(id(module), ()))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` at every place ``old`` has; if ``new`` wraps ``old``, ``old`` is found inside it from then on.

        What torch.compile has made of ``old`` would go on running it: in its place comes the same made of ``new``.
        """
        slots = self._slots.pop(id(old), [])
        for i, (parent, name) in enumerate(slots):
            if name == _COMPILED:
                again: Any = type(parent)
                slots[i] = (again(new, parent.dynamo_ctx), name)
                self.replace(parent, slots[i][0])
                continue
            setattr(parent, name, new)
            self.history.append((parent, name, old))
        self._slots[id(new)] = slots
        for name, child in _children(new):
            self._slots.setdefault(id(child), []).append((new, name))
