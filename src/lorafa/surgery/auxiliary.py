"""What is trained beside the factors: whole modules (``modules_to_save``) and single embedding rows."""

from __future__ import annotations

import re
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import nn

from lorafa.backends import backend_of
from lorafa.backends.oddities import computed, described, tensor_like
from lorafa.backends.offload import identity_of
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, TargetError, did_you_mean, refuse, shorten, warn
from lorafa.layers.base import LoraLayer
from lorafa.layers.saved import ModulesToSaveWrapper
from lorafa.layers.tokens import TrainableTokensWrapper
from lorafa.settings.expressions import CALLED, fits
from lorafa.settings.methods import TaskType
from lorafa.surgery.bypassed import Bypassed
from lorafa.surgery.targets import Target, spelled_targets
from lorafa.surgery.walk import Parents, Place, embedding_of, hosts, tied_groups

_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

Rows = tuple[nn.Module, list[int], list[nn.Module]]
"""An embedding, indices of its rows, and the modules that share its weight and follow it."""


@dataclass(frozen=True)
class AuxiliaryPlan:
    """Modules to copy and embedding rows to train; nothing has been changed yet."""

    saved: list[nn.Module] = field(default_factory=list)
    tokens: list[Rows] = field(default_factory=list)
    keep_ties: bool = True
    """Whether copies of modules that share a weight share theirs."""

    def apply(self, name: str, parents: Parents) -> None:
        wrappers = [_saved_wrapper(module, parents) for module in self.saved]
        for wrapper in wrappers:
            wrapper.attach(name)
        if self.keep_ties:
            _keep_ties(wrappers, name)
        for embedding, indices, followers in self.tokens:
            rows = _tokens_wrapper(embedding, None, parents)
            rows.attach(name, indices)
            for follower in followers:
                _tokens_wrapper(follower, rows, parents)


def name_saved(draft: LoraConfig, named: list[Place], *, lenient: bool) -> None:
    """Settle ``modules_to_save`` of a draft: with the new heads its ``task_type`` trains, and names for expressions.

    PEFT would take a regular expression for a name. If an embedding and its head are both named, their copies are tied
    in any case, so ``ensure_weight_tying`` is set; not where the config comes with a file (``lenient``), which may hold
    copies that were trained apart. With more than two modules it is not set: PEFT could not read the file.
    """
    given = draft.modules_to_save or []
    heads = [name for name in _heads(draft) if name not in given]
    if not (given or heads):
        return
    draft.modules_to_save = list(dict.fromkeys(n for name in [*given, *heads] for n in _spelled(named, name)))
    groups, saved = tied_groups(named), _saved_of(draft, named)
    pair = len(groups) == 1 and len(groups[0]) == 2 and all(id(place.module) in saved for place in groups[0])
    draft.ensure_weight_tying = draft.ensure_weight_tying or (pair and not lenient)


def _saved_of(config: LoraConfig, named: list[Place]) -> set[int]:
    return {id(p.module) for name in config.modules_to_save or () for p in modules_called(named, name)}


def _spelled(named: Iterable[Place], name: str) -> list[str]:
    hits = modules_called(named, name)
    return [name] if not hits or any(place.name.endswith(name) for place in hits) else [place.name for place in hits]


def name_tied_ends(model: nn.Module, draft: LoraConfig, named: list[Place], targets: Sequence[Target]) -> bool:
    """Let a draft with ``ensure_weight_tying`` name all modules that share a weight, where it names one of them.

    Returns:
        Whether it names more modules now, so that its targets are to be found again.

    Raises:
        ConfigError: of modules that share a weight, one is to be trained in full and one to get an adapter.
    """
    groups, adapted = tied_groups(named), {id(target.module) for target in targets}
    to_save, to_adapt = (_other_ends(groups, ids) for ids in (_saved_of(draft, named), adapted))
    both = to_save.keys() & to_adapt.keys()
    if both:
        raise ConfigError(
            f"ensure_weight_tying: {' and '.join(map(repr, both.pop()))} share one weight, but one is trained in full "
            "(modules_to_save) and one gets an adapter (target_modules). Name them in one of the two, or set "
            "ensure_weight_tying=False."
        )
    if not (to_save or to_adapt or draft.trainable_token_indices):
        warn(
            "ensure_weight_tying=True has nothing to tie: no module that target_modules or modules_to_save names "
            "shares its weight with another one."
        )
    saved_names, target_names = list(chain(*to_save.values())), list(chain(*to_adapt.values()))
    if saved_names:
        draft.modules_to_save = [*(draft.modules_to_save or ()), *saved_names]
    if target_names:
        draft.target_modules = _with_names(spelled_targets(model, draft, named, targets), target_names)
    return bool(saved_names or target_names)


def _other_ends(groups: Iterable[list[Place]], chosen: Container[int]) -> dict[tuple[str, ...], list[str]]:
    """Names of the groups of which a module is chosen -> names of their modules that are not."""
    return {
        tuple(place.name for place in group): [place.name for place in group if id(place.module) not in chosen]
        for group in groups
        if any(id(place.module) in chosen for place in group)
    }


def _with_names(targets: set[str] | str | None, names: list[str]) -> set[str] | str | None:
    if isinstance(targets, str):  # one regular expression for the whole name
        return "|".join((f"(?:{targets})", *map(re.escape, names)))
    return targets if targets is None else targets | {*names}


def _heads(config: LoraConfig) -> tuple[str, ...]:
    return _HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()


def plan_auxiliary(
    model: nn.Module,
    config: LoraConfig,
    named: list[Place],
    adapted: list[nn.Module],
    *,
    lenient: bool = False,
) -> AuxiliaryPlan:
    """Find the modules ``modules_to_save`` and ``trainable_token_indices`` mean.

    Args:
        named: every named place of the model.
        adapted: the modules that get an adapter.
        lenient: warn of a name in ``modules_to_save`` that matches nothing instead of raising; for a config that comes
            with a file, whose tensors are checked one by one anyway.

    Raises:
        TargetError: a name matches nothing, or a module that an adapter is put on.
        ConfigError: a token index outside the table.
    """
    keep_ties = config.ensure_weight_tying or not lenient
    if not (config.modules_to_save or config.trainable_token_indices):
        return AuxiliaryPlan([], [], keep_ties=keep_ties)
    saved = _saved_modules(named, config, Bypassed(model, named), {id(m) for m in adapted}, lenient)
    taken = {id(module): "an adapter" for module in adapted} | {id(module): "modules_to_save" for module in saved}
    rows = _with_followers(_token_rows(model, named, config, taken), tied_groups(named), config, taken)
    return AuxiliaryPlan(saved, rows, keep_ties=keep_ties)


def other_rows(
    model: nn.Module, config: LoraConfig, named: list[Place], adapted: list[nn.Module], name: str
) -> tuple[list[int], list[int]] | None:
    """The rows a config means of a table, and those that adapter ``name`` has of it, where they are not the same."""
    if not config.trainable_token_indices:
        return None
    for module, indices, _ in plan_auxiliary(model, config, named, adapted, lenient=True).tokens:
        here = module.token_adapter.token_indices.get(name, []) if isinstance(module, TrainableTokensWrapper) else []
        if here != indices:
            return indices, here
    return None


def _saved_modules(
    named: list[Place], config: LoraConfig, bypassed: Bypassed, adapted: Container[int], lenient: bool
) -> list[nn.Module]:
    """The modules to copy; what is inside one of them is copied with it."""
    found: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for name in config.modules_to_save or ():
        hits = modules_called(named, name)
        if not hits and name not in _heads(config):  # of the usual names of heads a model has one
            leaves = sorted({p.name.rpartition(".")[2] for p in named})
            message = (
                f"modules_to_save: {name!r} matches no module.{did_you_mean(name, leaves)} "
                f"The last names of the model's modules are: {shorten(leaves, 12)}."
            )
            if lenient:
                warn(message)
            else:
                refuse(TargetError(message), "It was passed over: no such module is trained.")
        for place in hits:
            if not isinstance(place.module, ModulesToSaveWrapper) and any(True for _ in hosts(place.module)):
                raise TargetError(
                    f"modules_to_save: {place.name!r} carries an adapter already, so it cannot also be trained in "
                    "full. Take it out of one of the two."
                )
            why = None if config.ensure_weight_tying else bypassed.hands_out(place)
            if why is not None and not lenient:
                raise TargetError(f"modules_to_save: {why}")
            if why is not None:
                warn(f"modules_to_save: {why}")
            _check_can_be_saved(place, name, adapted)
            found[id(place.module)] = place.module
            inside |= {id(inner) for inner in place.module.modules() if inner is not place.module}
    return [module for key, module in found.items() if key not in inside]


def _check_can_be_saved(place: Place, name: str, adapted: Container[int]) -> None:
    """Raises TargetError for a module that gets an adapter, or holds one that does, or that is never called itself."""
    ending = "" if place.name == name else f", whose name ends in {name!r},"
    if type(place.module).forward is nn.Module.forward and "forward" not in vars(place.module):
        parts = [f"{place.name}.{child}" for child, _ in place.module.named_children()]
        raise TargetError(
            f"modules_to_save: {place.name!r}{ending} is a {type(place.module).__name__}, which is never called: the "
            f"model uses what is in it, so a copy of the whole would not be trained. Name "
            f"{'its parts: ' + shorten(parts, 3) if parts else 'a module that is called'}."
        )
    if any(id(inner) in adapted for inner in place.module.modules()):
        raise TargetError(
            f"modules_to_save: {place.name!r}{ending} is also to get an adapter, as a whole or in part "
            "(target_modules, target_parameters). Take it out of one of the two, or write the full name of the module "
            "that is meant."
        )


def modules_called(named: Iterable[Place], name: str) -> list[Place]:
    """Places whose name ends in ``name``, at a dot or not, as in PEFT: "norm" means input_layernorm, too.

    If there is none, those it is a regular expression for.
    """
    hits = [p for p in named if p.name.endswith(name)]
    return hits or [p for p in named if fits("modules_to_save", name, p.name, CALLED)]


def _saved_wrapper(module: nn.Module, parents: Parents) -> ModulesToSaveWrapper:
    if isinstance(module, ModulesToSaveWrapper):
        return module
    wrapper = ModulesToSaveWrapper(module)
    parents.replace(module, wrapper)
    return wrapper


def _keep_ties(wrappers: Iterable[ModulesToSaveWrapper], name: str) -> None:
    """Let copies share a weight where their originals do."""
    first: dict[Hashable, nn.Module] = {}
    for wrapper in wrappers:
        duplicate = wrapper.modules_to_save[name]
        for key, _ in wrapper.original_module.named_parameters(recurse=False):
            owner = first.setdefault(identity_of(wrapper.original_module, key), duplicate)
            if owner is not duplicate:
                setattr(duplicate, key, getattr(owner, key))


def _token_rows(
    model: nn.Module, named: list[Place], config: LoraConfig, taken: dict[int, str]
) -> list[tuple[Place, list[int]]]:
    wanted = config.trainable_token_indices
    if not wanted:
        return []
    by_name = wanted if isinstance(wanted, dict) else {_input_embedding(model, named): wanted}
    found: list[tuple[Place, list[int]]] = []
    for name, indices in by_name.items():
        hits = [p for p in named if p.name == name or p.name.endswith(f".{name}")]
        if not hits:
            leaves = sorted({p.name.rpartition(".")[2] for p in named})
            raise TargetError(
                f"trainable_token_indices: {name!r} matches no module.{did_you_mean(name, leaves)} "
                f"The last names of the model's modules are: {shorten(leaves, 12)}."
            )
        for place in {id(p.module): p for p in reversed(hits)}.values():
            module = place.module
            if id(module) in taken:
                raise TargetError(
                    f"trainable_token_indices: {name!r} is also trained by {taken[id(module)]}. Take it out of one."
                )
            base = module.original_module if isinstance(module, TrainableTokensWrapper) else module
            hosted = isinstance(module, (LoraLayer, ModulesToSaveWrapper))
            rows = getattr(base, "weight", None) if hosted else tensor_like(base, "weight")
            if rows is None or rows.dim() != 2:
                raise TargetError(f"trainable_token_indices: {name!r} is a {type(base).__name__}, not a table of rows.")
            if max(indices, default=0) >= rows.shape[0]:
                raise ConfigError(
                    f"trainable_token_indices: {max(indices)} is outside the {rows.shape[0]} rows of {name!r}. If "
                    "these tokens are new, call model.resize_token_embeddings(len(tokenizer)) first."
                )
            if hosted:
                raise TargetError(
                    f"trainable_token_indices: {name!r} is adapted or trained in full by another adapter already, so "
                    "its rows cannot be trained too. Use the same way for all adapters."
                )
            odd = _odd_table(base)
            if odd is not None:
                raise TargetError(
                    f"trainable_token_indices: rows of {name!r} cannot be trained: of this {described(base)}, {odd}. "
                    "Take it out."
                )
            found.append((place, list(indices)))
    return found


def _odd_table(table: nn.Module) -> str | None:
    """Why other rows in its weight may not be what the module then looks up or multiplies with."""
    backend = backend_of(table)
    if backend is None:
        return "it is no layer that a back end knows"
    return backend.serves(table) or backend.reads(table) or computed(table, backend.weight_name)


def _with_followers(
    asked: list[tuple[Place, list[int]]], groups: list[list[Place]], config: LoraConfig, taken: dict[int, str]
) -> list[Rows]:
    """The rows of each table that is named, followed by the modules that share it unless they have rows of their own.

    Raises:
        TargetError: a module that would follow is adapted or trained in full.
        ConfigError: one would not follow, and ``ensure_weight_tying`` asks for one table.
    """
    rows = {id(place.module): indices for place, indices in asked}
    followers: dict[int, list[nn.Module]] = {}
    for group in groups:
        owner, *others = group
        if config.ensure_weight_tying:
            _check_one_table(group, rows)
        if id(owner.module) in rows:
            followers[id(owner.module)] = [p.module for p in others if _follows(p, owner, rows, taken)]
    following = {id(module) for modules in followers.values() for module in modules}
    found: list[Rows] = []
    for place, indices in asked:
        if id(place.module) in following:
            continue
        if isinstance(place.module, TrainableTokensWrapper) and place.module.is_tied:
            raise TargetError(
                f"trainable_token_indices: {place.name!r} follows the rows of another module for the adapters that are "
                "there, so it cannot have rows of its own now. Name the same rows of both."
            )
        found.append((place.module, indices, followers.get(id(place.module), [])))
    return found


def _check_one_table(group: list[Place], rows: dict[int, list[int]]) -> None:
    own = {place.name: rows[id(place.module)] for place in group if id(place.module) in rows}
    if own and any(indices != own.get(group[0].name) for indices in own.values()):
        raise ConfigError(
            f"ensure_weight_tying: {' and '.join(repr(place.name) for place in group)} share one table, but "
            f"trainable_token_indices names rows of {own}. Name those of {group[0].name!r}, which the others follow, "
            "or set ensure_weight_tying=False."
        )


def _follows(place: Place, owner: Place, rows: dict[int, list[int]], taken: dict[int, str]) -> bool:
    """Whether a module trains the rows of the module whose table it shares."""
    module, indices = place.module, rows[id(owner.module)]
    if taken.get(id(module)) == "modules_to_save" or rows.get(id(module), indices) != indices:
        return False
    apart = isinstance(module, TrainableTokensWrapper) and not module.is_tied
    if apart or id(module) in taken or isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
        raise TargetError(
            f"trainable_token_indices: {place.name!r} shares the table of {owner.name!r}, so its rows are trained too, "
            f"but {'it has rows of its own' if apart else 'it is adapted or trained in full itself'}. Take it out of "
            "one of the two."
        )
    return True


def _input_embedding(model: nn.Module, named: list[Place]) -> str:
    table = embedding_of(model, "get_input_embeddings")
    name = next((p.name for p in named if p.module is table), None)
    if name is None:
        raise TargetError(
            "trainable_token_indices: the model does not say which module is its input embedding. "
            "Name it: trainable_token_indices={'embed_tokens': [...]}."
        )
    return name


def _tokens_wrapper(
    module: nn.Module, tied_to: TrainableTokensWrapper | None, parents: Parents
) -> TrainableTokensWrapper:
    if isinstance(module, TrainableTokensWrapper):
        return module
    wrapper = TrainableTokensWrapper(module, tied_to)
    parents.replace(module, wrapper)
    return wrapper
