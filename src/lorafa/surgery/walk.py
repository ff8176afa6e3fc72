"""Walking a model that may already carry adapters: names as they were before any layer was wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lorafa.checks import found
from lorafa.errors import AdapterError
from lorafa.layers.base import LoraLayer
from lorafa.layers.experts import LoraExperts
from lorafa.layers.saved import ModulesToSaveWrapper
from lorafa.layers.tokens import TrainableTokensWrapper

Host = LoraLayer | ModulesToSaveWrapper | TrainableTokensWrapper
"""A wrapper of lorafa. All have ``wrapped_path``, ``stored``, ``set_adapter``, ``set_requires_grad``,
``enable_adapters``, ``detach_adapter`` and ``plain``; an adapter that has nothing there is nothing to them."""
HOSTS = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)


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
    """Dotted name as it was before wrapping."""
    path: str
    """Dotted name now."""
    module: nn.Module


def places(model: nn.Module) -> Iterator[Place]:
    """Every place a module of the original model has, repeated modules at each of their names.

    A wrapped module is given as its wrapper; what wrappers hold of their own is not entered.
    """
    stack = [Place("", "", require_module(model))]
    while stack:
        place = stack.pop()
        yield place
        inside, path = place.module, place.path
        if isinstance(inside, LoraExperts):  # it wraps a whole module, whose children are the model's
            while isinstance(inside, LoraLayer):
                inside, path = inside.base_layer, _join(path, "base_layer")
        elif isinstance(inside, HOSTS):
            continue
        children = [Place(_join(place.name, name), _join(path, name), child) for name, child in _children(inside)]
        stack.extend(reversed(children))


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


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def skeleton(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what wrappers hold for adapters: no longer with a hundred than with one."""
    seen: set[int] = set()
    stack = [("", require_module(model))]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if isinstance(module, HOSTS):
            children = [(module.wrapped_path, module.get_submodule(module.wrapped_path))]
        else:
            children = list(_children(module))
        stack.extend((_join(path, name), child) for name, child in reversed(children))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` without those of adapters, shared ones at each of their names."""
    for path, module in skeleton(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _join(path, name), parameter


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """Every wrapper of lorafa in the model with its path, each once, in the order of the model."""
    for path, module in skeleton(model):
        if isinstance(module, HOSTS):
            yield path, module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoraLayer in the model with its path, each once."""
    for path, module in skeleton(model):
        if isinstance(module, LoraLayer):
            yield path, module


def tables(model: nn.Module) -> list[nn.Module]:
    """Input embedding and output head, wrapped or not, as a model of transformers names them."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    found = [getter() for getter in getters if callable(getter)]
    return [module for module in found if isinstance(module, nn.Module)]


def wrapped_places(model: nn.Module) -> list[str]:
    """The name of every place a wrapper of lorafa stands in."""
    return [place.name for place in places(model) if isinstance(place.module, HOSTS)]


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

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` at every place ``old`` has; if ``new`` wraps ``old``, ``old`` is found inside it from then on."""
        slots = self._slots.pop(id(old), [])
        for parent, name in slots:
            setattr(parent, name, new)
            self.history.append((parent, name, old))
        self._slots[id(new)] = slots
        for name, child in _children(new):
            self._slots.setdefault(id(child), []).append((new, name))
