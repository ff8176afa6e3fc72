"""An adapter as PEFT names it: the tensors of adapter_model.safetensors, out of a model and back into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafa.backends.offload import rests_elsewhere, value_of
from lorafa.config import LoraConfig
from lorafa.config_checks import START_SETTINGS
from lorafa.errors import CheckpointError, shorten
from lorafa.io.strict import Misfit, compare
from lorafa.io.ties import check_ties, tied_tensors
from lorafa.layers.base import LoraLayer
from lorafa.layers.experts import LoraExperts
from lorafa.layers.parts import Stored
from lorafa.layers.saved import ModulesToSaveWrapper
from lorafa.surgery.walk import HOSTS, base_parameters, hosts, lora_layers, places

PREFIX = "base_model.model."
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_EMBEDDING_GETTERS = ("get_input_embeddings", "get_output_embeddings")
START_A, START_B = "lora_start.A", "lora_start.B"
UNFOLDED_B = "lora_unfolded.B"
_PEFT_STARTS_ANYWHERE = (True, False, "gaussian")
_PEFT_STARTS_ON_SOME = ("orthogonal", "eva", "loftq", "mica")
_SOME = ("linear", "embedding")
_NO_SETTINGS: Mapping[str, Any] = {name: {} if name == "loftq_config" else None for name in START_SETTINGS}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by their names in the user's model.

    Files of PEFT with ``bias="all"`` hold the biases of ``modules_to_save`` twice; one of the two is left out.
    """
    named = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    copies = [key for key in named if ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in named]
    return {key: value for key, value in named.items() if key not in copies}


def entries(model: nn.Module, name: str, config: LoraConfig, *, embeddings: bool = False) -> Iterator[Stored]:
    """Every tensor of adapter ``name`` as it is stored, by its names from the model, frozen starts apart.

    Args:
        model: the user's model, wrapped layers in it.
        config: the adapter's; its ``bias`` says which base biases belong to the adapter.
        embeddings: also the base weights of input embedding and output head, for a resized vocabulary; where the
            config targets embeddings by their usual names, only of those that are adapted, as in PEFT.
    """
    for path, host in hosts(model):
        yield from (entry.at(path) for entry in host.stored(name))
    yield from _biases(model, name, config)
    if embeddings:
        yield from _embeddings(model, adapted_only=keeps_embeddings(config, model, "auto"))


def _pristine(model: nn.Module) -> dict[int, Tensor]:
    """Identity of a merged weight or bias -> the one it stands in for, which is what belongs with an adapter."""
    found: dict[int, Tensor] = {}
    for _, layer in lora_layers(model):
        for kept in layer._pristine:
            merged = dict(layer.base_layer.named_parameters(recurse=False))
            found |= {id(merged[k]): p for k, p in kept.named_parameters(recurse=False) if merged.get(k, p) is not p}
        if isinstance(layer, LoraExperts) and layer._kept:
            found[id(layer.weight)] = layer._kept[0]
    return found


def _base_entry(key: str, tensor: Tensor, pristine: Mapping[int, Tensor]) -> Stored:
    return Stored(key, None, pristine[id(tensor)]) if id(tensor) in pristine else Stored(key, key, tensor)


def _biases(model: nn.Module, name: str, config: LoraConfig) -> Iterator[Stored]:
    pristine = _pristine(model)
    if config.bias == "all":
        for key, parameter in base_parameters(model):
            if key.rpartition(".")[2] == "bias":
                yield _base_entry(key, parameter, pristine)
    elif config.bias == "lora_only":
        for path, layer in _adapted(model, name):
            bias = layer.base_layer._parameters.get("bias")
            if bias is not None:
                yield _base_entry(f"{path}.base_layer.bias", bias, pristine)


def _adapted(model: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer]]:
    return ((path, layer) for path, layer in lora_layers(model) if name in layer.adapters)


def _embeddings(model: nn.Module, *, adapted_only: bool = False) -> Iterator[Stored]:
    """Base weights of input embedding and output head; whole copies (``modules_to_save``) are in the file anyway."""
    modules = [getattr(model, getter)() for getter in _EMBEDDING_GETTERS if callable(getattr(model, getter, None))]
    pristine = _pristine(model)
    for path, module in model.named_modules():
        if not any(module is embedding for embedding in modules) or isinstance(module, ModulesToSaveWrapper):
            continue
        if isinstance(module, HOSTS):
            inner = module.get_submodule(module.wrapped_path)
            yield _base_entry(f"{path}.{module.wrapped_path}.weight", _weight(inner), pristine)
        elif not adapted_only:
            yield _base_entry(f"{path}.weight", _weight(module), pristine)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def keeps_embeddings(config: LoraConfig, model: nn.Module, wanted: str | bool) -> bool:
    """Whether a file also holds the base weights of adapted embeddings: PEFT's "auto" says yes if they are targets."""
    if isinstance(wanted, bool):
        return wanted
    targets = config.target_modules or ()
    if isinstance(targets, str):
        names = [place.name for place in places(model) if place.name.rpartition(".")[2] in _EMBEDDING_NAMES]
        targeted = any(re.fullmatch(targets, name) for name in names)
    else:
        targeted = any(name in targets for name in _EMBEDDING_NAMES)
    return targeted and config.trainable_token_indices is None


def has_start(model: nn.Module, name: str) -> bool:
    """Whether adapter ``name`` subtracts a frozen start from its update."""
    return any(name in layer.lora_start for _, layer in lora_layers(model))


def file_tensors(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: bool = False,
    with_start: bool = True,
) -> dict[str, Tensor]:
    """The tensors of adapter ``name`` as a file holds them, without prefix.

    s B A - s B0 A0 is written as the ordinary LoRA of rank 2 r it is: A and A0 stacked, B and -B0 side by side. Where
    the variant is no plain LoRA (DoRA), A0 and B0 go into keys of their own, which PEFT passes over. Where it is one
    once its extras are multiplied into B (LoRA-SB), B is written so, and as it is in a key of its own.

    Args:
        state_dict: take values from here by their live names (a gathered state dict) instead of from the model.
        with_start: False gives A and B alone.

    Raises:
        CheckpointError: ``state_dict`` lacks a tensor of the adapter.
    """
    found = list(entries(model, name, config, embeddings=embeddings))
    values = {e.key: _value(model, e) for e in found} if state_dict is None else _gathered(found, state_dict, name)
    for path, layer in _folding(model, name):
        key_B = f"{path}.{layer.factor_names[1]}"
        values |= {f"{path}.{UNFOLDED_B}": values[key_B], key_B: _folded(path, layer, name, values[key_B], values)}
    for path, layer, start in _starts(model, name) if with_start else ():
        values |= _stacked(path, layer, layer.adapters[name].variant.plain, start, values)
    values |= {key: values[key] / 2 for key in _factors_applied_twice(model, name, config)}
    return values | tied_tensors(model, name, values)


def _value(model: nn.Module, entry: Stored) -> Tensor:
    """The values of an entry, wherever they rest."""
    tensor = entry.tensor
    if tensor.is_meta and entry.live is not None:
        tensor = cast(Tensor, value_of(model.get_submodule(entry.live.rpartition(".")[0]), tensor))
    return tensor.detach()


def _stacked(
    path: str, layer: LoraLayer, plain: bool, start: tuple[Tensor, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a file holds of one layer's A, B and start (A0, B0), for A and B among ``values``."""
    A0, B0 = start
    if not plain:
        return {f"{path}.{START_A}": layer.stored_A(A0), f"{path}.{START_B}": layer.stored_B(B0)}
    key_A, key_B = (f"{path}.{key}" for key in layer.factor_names)
    A, B = layer.matrix_A(values[key_A]), layer.matrix_B(values[key_B])
    return {
        key_A: layer.stored_A(torch.cat([A, A0.to(A)], dim=-2)),
        key_B: layer.stored_B(torch.cat([B, -B0.to(B)], dim=-1)),
    }


def _split(
    path: str, layer: LoraLayer, plain: bool, rank: int, values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The inverse of :func:`_stacked`: A and B by their keys where they change, and (A0, B0)."""
    if not plain:
        return {}, (layer.matrix_A(values[f"{path}.{START_A}"]), layer.matrix_B(values[f"{path}.{START_B}"]))
    key_A, key_B = (f"{path}.{key}" for key in layer.factor_names)
    A, B = layer.matrix_A(values[key_A]), layer.matrix_B(values[key_B])
    own = {key_A: layer.stored_A(A[..., :rank, :]), key_B: layer.stored_B(B[..., :, :rank])}
    return own, (A[..., rank:, :], -B[..., :, rank:])


def _gathered(found: list[Stored], state_dict: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The values of the entries by their names in a file; what the model itself holds may be a part only."""
    values, missing = {}, []
    for entry in found:
        if entry.live is None:
            values[entry.key] = entry.tensor.detach()
        elif key := next((key for key in (PREFIX + entry.live, entry.live) if key in state_dict), None):
            values[entry.key] = state_dict[key].detach()
        else:
            missing.append(entry.live)
    if missing:
        raise CheckpointError(
            f"state_dict lacks {len(missing)} of the {len(found)} tensors of adapter {name!r}: {shorten(missing)}. "
            "Gather the whole state dict of the model, frozen adapters included."
        )
    return values


def _factors_applied_twice(model: nn.Module, name: str, config: LoraConfig) -> list[str]:
    """Keys of the B that PEFT multiplies in twice: those of inner layers, nn.MultiheadAttention's out_proj.

    An adapter that counts once here is stored with half of that B (exact in binary) and read with twice the B of a
    file, so that a file means the same to both libraries.
    """
    if config.attention_out_proj_twice:
        return []
    return [
        f"{path}.base_layer.{child}.{LoraLayer.factor_names[1]}"
        for path, layer in _adapted(model, name)
        for child in layer.inner_layers
    ]


def _starts(model: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer, tuple[Tensor, Tensor]]]:
    for path, layer in _adapted(model, name):
        start = layer.adapters[name].start if name in layer.lora_start else None  # a tied one's is another layer's
        if start is not None:
            yield path, layer, (start.A, start.B)


def _folding(model: nn.Module, name: str) -> list[tuple[str, LoraLayer]]:
    return [(path, layer) for path, layer in _adapted(model, name) if layer.adapters[name].variant.folds]


def _folded(path: str, layer: LoraLayer, name: str, B: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """A stored B with the extras among ``values`` multiplied in, as it is stored."""
    variant = layer.adapters[name].variant
    extras = {kind: values[f"{path}.{holder}"] for kind, holder in variant.extras.items()}
    return layer.stored_B(variant.fold(layer.matrix_B(B), extras))


def _unfold(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with every B as it was before it was folded.

    Raises:
        CheckpointError: some folded B is not the product of what it was folded from.
    """
    tensors = dict(tensors)
    for path, layer in _folding(model, name):
        key_B, key_unfolded = f"{path}.{layer.factor_names[1]}", f"{path}.{UNFOLDED_B}"
        B = tensors.pop(key_unfolded)
        wanted, found = _folded(path, layer, name, B, tensors).float(), tensors[key_B].float()
        if bool((found - wanted).abs().max() > 0.01 * wanted.abs().max()):  # more than rounding in any dtype
            between = " and ".join(layer.adapters[name].variant.extras.values())
            raise CheckpointError(
                f"{key_B} is not {key_unfolded} times {between}: one of them was changed since adapter {name!r} was "
                f"saved. To go on from {key_B} as plain LoRA leave the keys of the other two and the metadata out of "
                "the file. Nothing was loaded."
            )
        tensors[key_B] = B
    return tensors


def file_config(model: nn.Module, name: str, config: LoraConfig) -> LoraConfig:
    """The config that goes with :func:`file_tensors`: rank and alpha grow where a start was stacked onto A and B.

    PEFT makes a start before it reads the tensors. One that it could not make on these layers, and that left the base
    alone, is history and written as True; one that moved the base of a variant stays, for PEFT to repeat or to refuse.
    """
    layers = [layer for _, layer in _adapted(model, name)]
    plain = all(layer.adapters[name].variant.plain for layer in layers)
    if not has_start(model, name):
        some = plain and not config.lora_bias and all(layer.kind in _SOME for layer in layers)
        anywhere = (True, False) if config.lora_bias else _PEFT_STARTS_ANYWHERE
        known = anywhere + (_PEFT_STARTS_ON_SOME if some else ())
        return config if config.init_lora_weights in known else replace(config, init_lora_weights=True, **_NO_SETTINGS)
    if not plain:
        return config
    factor = 2**0.5 if config.use_rslora else 2  # keeps alpha / sqrt(r), or alpha / r
    return replace(
        config,
        r=config.r * 2,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={key: value * 2 for key, value in config.rank_pattern.items()},
        alpha_pattern={key: value * factor for key, value in config.alpha_pattern.items()},
        init_lora_weights=True,
        **_NO_SETTINGS,
    )


@torch.no_grad()
def load_tensors(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], *, with_start: bool
) -> None:
    """Fill adapter ``name`` from the tensors of a file that fits (see :func:`misfit`).

    Raises:
        CheckpointError: they differ for what is one parameter here, or one rests elsewhere; nothing was changed.
    """
    check_ties(model, name, tensors)
    filled = [e for e in (*entries(model, name, config), *_embeddings(model)) if e.key in tensors]
    _require_memory(model, name, filled)
    tensors = dict(tensors)
    tensors |= {key: 2 * tensors[key] for key in _factors_applied_twice(model, name, config) if key in tensors}
    starts: list[tuple[Tensor, Tensor]] = []
    for path, layer, start in _starts(model, name) if with_start else ():
        own, stored = _split(path, layer, layer.adapters[name].variant.plain, start[0].shape[-2], tensors)
        tensors |= own
        starts += zip(start, stored, strict=True)
    tensors = _unfold(model, name, tensors)
    for live, value in starts:
        live.copy_(value)
    for entry in filled:
        entry.tensor.data.copy_(tensors[entry.key])


def _require_memory(model: nn.Module, name: str, filled: Iterable[Stored]) -> None:
    starts = (layer.lora_start[name] for _, layer in lora_layers(model) if name in layer.lora_start)
    resting = [e.key for e in filled if e.tensor.is_meta] + ["lora_start" for s in starts if rests_elsewhere(s)]
    if resting:
        raise CheckpointError(
            f"Adapter {name!r} cannot be filled: {shorten(resting, 3)} {'rests' if len(resting) == 1 else 'rest'} "
            "elsewhere (device 'meta'), and hooks of accelerate bring in a copy for each call. Load the adapter before "
            "the model is offloaded, or take the hooks off with accelerate.hooks.remove_hook_from_submodules. Nothing "
            "was loaded."
        )


def misfit(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], *, with_start: bool
) -> Misfit:
    """How the tensors of a file differ from those adapter ``name`` has; empty if they fit.

    Whole embeddings, which PEFT adds to some files, are wanted where the file has them.
    """
    want = file_tensors(model, name, config, with_start=with_start)
    whole = {entry.key: entry.tensor for entry in _embeddings(model) if entry.key in tensors}
    return compare(tensors, want | whole)
