"""What is trained beside the factors: whole modules (``modules_to_save``) and single embedding rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from lorafa.config import LoraConfig, TaskType
from lorafa.errors import ConfigError, TargetError, did_you_mean, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.saved import ModulesToSaveWrapper
from lorafa.layers.tokens import TrainableTokensWrapper
from lorafa.surgery.walk import Parents, Place, hosts, places

_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(frozen=True)
class AuxiliaryPlan:
    """Modules to copy and embedding rows to train; nothing has been changed yet."""

    saved: list[nn.Module] = field(default_factory=list)
    tokens: list[tuple[nn.Module, list[int], nn.Module | None]] = field(default_factory=list)
    """(embedding, row indices, the head that shares its weight or None)."""

    def apply(self, name: str, parents: Parents) -> None:
        wrappers = [_saved_wrapper(module, parents) for module in self.saved]
        for wrapper in wrappers:
            wrapper.attach(name)
        _keep_ties(wrappers, name)
        for embedding, indices, head in self.tokens:
            rows = _tokens_wrapper(embedding, None, parents)
            rows.attach(name, indices)
            if head is not None:
                _tokens_wrapper(head, rows, parents)


def with_heads(config: LoraConfig) -> LoraConfig:
    """A copy of the config whose ``modules_to_save`` names the new heads that its ``task_type`` trains."""
    given = config.modules_to_save or []
    heads = [name for name in _heads(config) if name not in given]
    return replace(config, modules_to_save=[*given, *heads] or config.modules_to_save)


def _heads(config: LoraConfig) -> tuple[str, ...]:
    return _HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()


def plan_auxiliary(
    model: nn.Module, config: LoraConfig, adapted: list[nn.Module], *, lenient: bool = False
) -> AuxiliaryPlan:
    """Find the modules ``modules_to_save`` and ``trainable_token_indices`` mean.

    Args:
        lenient: warn of a name in ``modules_to_save`` that matches nothing instead of raising; for a config that comes
            with a file, whose tensors are checked one by one anyway.

    Raises:
        TargetError: a name matches nothing, or a module that an adapter is put on.
        ConfigError: a token index outside the table.
    """
    everything = [place for place in places(model) if place.name]
    saved = _saved_modules(everything, config, lenient)
    taken = {id(module): "an adapter" for module in adapted} | {id(module): "modules_to_save" for module in saved}
    return AuxiliaryPlan(saved, _token_rows(model, everything, config, taken))


def _saved_modules(everything: list[Place], config: LoraConfig, lenient: bool) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for name in config.modules_to_save or ():
        hits = [p for p in everything if p.name == name or p.name.endswith(f".{name}")]
        hits = hits or [p for p in everything if re.fullmatch(rf"(.*\.)?{name}", p.name)]
        if not hits and name not in _heads(config):  # of the usual names of heads a model has one
            leaves = sorted({p.name.rpartition(".")[2] for p in everything})
            message = (
                f"modules_to_save: {name!r} matches no module.{did_you_mean(name, leaves)} "
                f"The last names of the model's modules are: {shorten(leaves, 12)}."
            )
            if not lenient:
                raise TargetError(message)
            warnings.warn(message, stacklevel=2)
        for place in hits:
            if not isinstance(place.module, ModulesToSaveWrapper) and any(True for _ in hosts(place.module)):
                raise TargetError(
                    f"modules_to_save: {place.name!r} carries an adapter already, so it cannot also be trained in "
                    "full. Take it out of one of the two."
                )
            found[id(place.module)] = place.module
    return list(found.values())


def _saved_wrapper(module: nn.Module, parents: Parents) -> ModulesToSaveWrapper:
    if isinstance(module, ModulesToSaveWrapper):
        return module
    wrapper = ModulesToSaveWrapper(module)
    parents.replace(module, wrapper)
    return wrapper


def _keep_ties(wrappers: Iterable[ModulesToSaveWrapper], name: str) -> None:
    """Let copies share a weight where their originals do."""
    first: dict[int, nn.Module] = {}
    for wrapper in wrappers:
        duplicate = wrapper.modules_to_save[name]
        for key, parameter in wrapper.original_module.named_parameters(recurse=False):
            owner = first.setdefault(id(parameter), duplicate)
            if owner is not duplicate:
                setattr(duplicate, key, getattr(owner, key))


def _token_rows(
    model: nn.Module, everything: list[Place], config: LoraConfig, taken: dict[int, str]
) -> list[tuple[nn.Module, list[int], nn.Module | None]]:
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    by_name = wanted if isinstance(wanted, dict) else {_input_embedding(model, everything): wanted}
    found: list[tuple[nn.Module, list[int], nn.Module | None]] = []
    for name, indices in by_name.items():
        hits = [p for p in everything if p.name == name or p.name.endswith(f".{name}")]
        if not hits:
            leaves = sorted({p.name.rpartition(".")[2] for p in everything})
            raise TargetError(
                f"trainable_token_indices: {name!r} matches no module.{did_you_mean(name, leaves)} "
                f"The last names of the model's modules are: {shorten(leaves, 12)}."
            )
        for module in {id(p.module): p.module for p in hits}.values():
            if id(module) in taken:
                raise TargetError(
                    f"trainable_token_indices: {name!r} is also trained by {taken[id(module)]}. Take it out of one."
                )
            base = module.original_module if isinstance(module, TrainableTokensWrapper) else module
            rows = getattr(base, "weight", None)
            if rows is None or rows.dim() != 2:
                raise TargetError(f"trainable_token_indices: {name!r} is a {type(base).__name__}, not a table of rows.")
            outside = [i for i in indices if i >= rows.shape[0]]
            if outside:
                raise ConfigError(
                    f"trainable_token_indices: {outside[0]} is outside the {rows.shape[0]} rows of {name!r}. "
                    "Resize the embedding first if these tokens are new."
                )
            if isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
                raise TargetError(
                    f"trainable_token_indices: {name!r} is adapted or trained in full by another adapter already, so "
                    "its rows cannot be trained too. Use the same way for all adapters."
                )
            found.append((module, list(indices), _head_of(model, base, name, taken)))
    return found


def _input_embedding(model: nn.Module, everything: list[Place]) -> str:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    name = next((p.name for p in everything if p.module is embedding), None)
    if name is None:
        raise TargetError(
            "trainable_token_indices: the model does not say which module is its input embedding. "
            "Name it: trainable_token_indices={'embed_tokens': [...]}."
        )
    return name


def _head_of(model: nn.Module, embedding: nn.Module, name: str, taken: dict[int, str]) -> nn.Module | None:
    """The head whose weight is the table, unless it gets a copy of its own by modules_to_save."""
    head = _tied_head(model, embedding)
    if head is None or taken.get(id(head)) == "modules_to_save":
        return None
    if id(head) in taken or isinstance(head, (LoraLayer, ModulesToSaveWrapper)):
        raise TargetError(
            f"trainable_token_indices: the output head shares the table of {name!r}, so its rows are trained too, but "
            "it is adapted or trained in full itself. Take it out of one of the two."
        )
    return head


def _tied_head(model: nn.Module, embedding: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None or head is embedding or isinstance(head, TrainableTokensWrapper):
        return None
    original = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
    return head if getattr(original, "weight", None) is embedding.weight else None


def _tokens_wrapper(
    module: nn.Module, tied_to: TrainableTokensWrapper | None, parents: Parents
) -> TrainableTokensWrapper:
    if isinstance(module, TrainableTokensWrapper):
        return module
    wrapper = TrainableTokensWrapper(module, tied_to)
    parents.replace(module, wrapper)
    return wrapper
