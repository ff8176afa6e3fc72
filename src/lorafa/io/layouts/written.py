"""An adapter that was taken apart, as PEFT writes it: names, and a config that means just these layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, shorten, warn
from lorafa.io.layouts.base import OWN_LAYER, Contents, most_common
from lorafa.io.layouts.names import BaseNames
from lorafa.surgery.patterns import any_of, exactly, key_of, lookup
from lorafa.surgery.plain_config import NO_START
from lorafa.surgery.walk import dotted_ends


def written(contents: Contents, base: BaseNames, *, strict: bool) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors of the adapter, by PEFT's names without its prefix.

    Args:
        strict: the config is the file's own, so that each layer it means has to be in the file.

    Raises:
        CheckpointError: the file has lost a layer; or its start took something out of layers that the model has not.
    """
    config = contents.config
    if contents.rearranged and config.start.initializer.moves_base:
        raise CheckpointError(
            f"{contents.path}: its layers have to be cut otherwise for this model, and init_lora_weights="
            f"{config.init_lora_weights!r} took something out of the weights of those it was made for, which is not in "
            "the file. Save it there as plain LoRA (save_pretrained of lorafa, or of PEFT with "
            "path_initial_model_for_weight_conversion=). Nothing was loaded."
        )
    stacked = [name for name in contents.factors if name in base.parameters]
    owners = _layers(contents, stacked)
    targets = [name for name in owners if name in base.layers]
    bare = [f"{name}.weight" for name in owners if name in base.routers]
    if not config.target_parameters:  # nor is it known of what else they are then: loading says so
        targets += [name for name in owners if name not in base.layers and name not in base.routers]
    given = config.target_parameters or []
    if strict:
        _require_all(contents, targets, base)
    bare = [name for name in [*bare, *stacked] if not any(end in given for end in dotted_ends(name))]
    named = {name: name for name in [*targets, *stacked]} | {name.removesuffix(".weight"): name for name in bare}
    kept = [name for name in base.parameters if any(end in given for end in dotted_ends(name))]
    changed: dict[str, Any] = {}
    if contents.rearranged and not kept:
        usual = [contents.factors.get(name) or contents.factors[full] for name, full in named.items()]
        changed["r"] = most_common([one.rank for one in usual])
        changed["lora_alpha"] = most_common([one.alpha for one in usual if one.rank == changed["r"]])
        contents = replace(contents, config=replace(config, **changed))
    ranks, alphas = _patterns(contents, named, kept)
    changed |= {
        "target_modules": _short(targets, base),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": [*given, *bare] or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    if contents.rearranged:
        changed |= NO_START
    if (stacked or bare) and config.lora_dropout:
        warn(
            f"{contents.path}: lora_dropout={config.lora_dropout} is taken as 0: {shorten([*stacked, *bare], 3)} are "
            "bare parameters of this model, where it cannot act. It matters only if the adapter is trained on."
        )
        changed["lora_dropout"] = 0.0
    return replace(config, **changed), _tensors(contents, stacked, base) | contents.others


def _require_all(contents: Contents, targets: Collection[str], base: BaseNames) -> None:
    """Raises CheckpointError for a layer of the model that the config means by its end, and the file has not."""
    config = contents.config
    if isinstance(config.target_modules, str):  # it is for names that the model may not have
        return
    saved = config.modules_to_save or []
    for name in base.layers:
        if name not in targets and not any(part in saved for part in name.split(".")):
            contents.require_meant(name)


def _layers(contents: Contents, stacked: Collection[str]) -> list[str]:
    """The modules that carry adapters, each once; what lies inside one is adapted with it."""
    heads = (name.partition(OWN_LAYER)[0] for name in contents.factors if name not in stacked)
    return list(dict.fromkeys(heads))


def _short(names: Collection[str], base: BaseNames) -> list[str] | str:
    """``target_modules`` that mean just these layers: the last one or two parts of their names, or all of them."""
    wanted = set(names)
    for parts in (1, 2):
        ends = {".".join(name.split(".")[-parts:]) for name in names}
        if _meant(ends, base) <= wanted:
            return sorted(ends)
    if _meant(wanted, base) <= wanted:
        return sorted(wanted)
    return any_of(wanted)


def _meant(ends: Collection[str], base: BaseNames) -> set[str]:
    return {name for name in base.modules if any(end in ends for end in dotted_ends(name))}


def _patterns(
    contents: Contents, named: Mapping[str, str], kept: Collection[str]
) -> tuple[dict[str, int], dict[str, int | float]]:
    """``rank_pattern`` and ``alpha_pattern``: those of the config that still mean something, others by full names.

    Args:
        named: layer or parameter -> the name that patterns are compared with.
        kept: names of parameters that the config has as targets already.
    """
    config, names = contents.config, [*named.values(), *kept]
    ranks, alphas = _used(config.rank_pattern, names), _used(config.alpha_pattern, names)
    own_ranks: dict[str, int] = {}
    own_alphas: dict[str, int | float] = {}
    for name, full in named.items():
        if name not in contents.factors and full not in contents.factors:
            continue
        factors = contents.factors.get(name) or contents.factors[full]
        exact = exactly(full)
        if lookup(ranks, full, config.r) != factors.rank:
            own_ranks[exact] = factors.rank
        if lookup(alphas, full, config.lora_alpha) != factors.alpha:
            own_alphas[exact] = factors.alpha
    return own_ranks | ranks, own_alphas | alphas


def _used(table: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if any(key_of([key], name) for name in names)}


def _tensors(contents: Contents, stacked: Collection[str], base: BaseNames) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, factors in contents.factors.items():
        place = _nested(name, stacked, base) if name in stacked else name
        found |= {f"{place}.{key}": tensor for key, tensor in factors.tensors.items()}
    return found


def _nested(name: str, stacked: Iterable[str], base: BaseNames) -> str:
    """Where PEFT has the adapter of a parameter: the first of a module's is the innermost."""
    owner = name.rpartition(".")[0]
    order = [other for other in base.parameters if other in set(stacked) and other.rpartition(".")[0] == owner]
    return owner + OWN_LAYER * (len(order) - 1 - order.index(name))


def stored_stack(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of a stack of experts as PEFT's files have them: (E r, in) and (out, r E).

    A is expert by expert; in B the expert runs fastest.
    """
    return stored_stack_A(A), stored_stack_B(B)


def stored_stack_A(A: Tensor) -> Tensor:
    """A (E, r, in) as (E r, in)."""
    return A.reshape(-1, A.shape[-1])


def stored_stack_B(B: Tensor) -> Tensor:
    """B (E, out, r) as (out, r E)."""
    return B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()


def stack_of(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`stored_stack`."""
    return A.view(experts, -1, A.shape[-1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)
