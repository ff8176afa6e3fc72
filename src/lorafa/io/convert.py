"""Any adapter whose update is a matrix as a plain LoRA adapter of another rank, by PEFT's functions and names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, CheckpointError, ConfigError, shorten, warn
from lorafa.io.base_prints import base_fingerprint
from lorafa.io.layouts.base import taken_apart
from lorafa.io.peft_format import file_tensors
from lorafa.io.save import write_adapter
from lorafa.io.tables import which_tables
from lorafa.layers.base import LoraLayer
from lorafa.numerics.truncation import Truncated
from lorafa.storage.tensors import is_part
from lorafa.surgery.plain import Lost, check_rank, largest_rank, require_matrices, require_other_ranks, truncated
from lorafa.surgery.plain_config import plain_config
from lorafa.surgery.walk import PREFIX, full_name, layers_at, places, user_model
from lorafa.version import VERSION

_NOTEWORTHY = 1e-4
"""The share of the energy from which on a conversion warns of what it loses."""


@dataclass(frozen=True)
class Converted:
    """An adapter as plain LoRA, its scaling in B, in the form of PEFT's files."""

    config: LoraConfig
    """With alpha = r for every layer."""
    tensors: dict[str, Tensor]
    """By their names in the user's model, without prefix."""
    lost: Lost


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The plain LoRA adapter of a rank that is nearest to an adapter of any other formula, on the pristine base.

    The update of each layer is truncated by its singular values (Eckart and Young): of s B A, and of every formula that
    is such a product, without forming it. What is trained beside the layers goes along (``modules_to_save``, token
    rows, biases). Warns of what a whole ``rank`` loses of the energy, ||update||_F^2, where that is more than 0.01 %.

    Args:
        model: a PeftModel, or a model with injected adapters; it is not changed.
        rank: of every layer. A float is the share of the energy to keep, in (0, 1]: each layer gets the least rank that
            does, which the config has in ``rank_pattern`` and ``alpha_pattern``.
        progressbar: show one, with the package tqdm.
        compile_kwargs: compile the truncation with ``torch.compile`` and these arguments.

    Returns:
        The config, with alpha = r and so a scaling of 1, and the tensors under the names of a file.

    Raises:
        ConfigError: ``rank`` is neither, or larger than a layer can have.
        AdapterError: the model has no such adapter, or it is merged.
        BackendError: its update changes with the input (aLoRA, Arrow, GOAT), so that no LoRA does the same.
        CheckpointError: only parts of it are in this process (FSDP, DeepSpeed ZeRO-3).
    """
    made = convert(model, rank, adapter_name, progressbar=progressbar, compile_kwargs=compile_kwargs)
    prefix = "" if user_model(model) is model else PREFIX
    return made.config, {prefix + key: tensor for key, tensor in made.tensors.items()}


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write what :func:`convert_to_lora` makes as the files of an adapter, for ``PeftModel.from_pretrained``.

    Raises:
        CheckpointError: the folder cannot be written to; what was there is as it was.
        LoraError: as :func:`convert_to_lora`.
    """
    made = convert(model, rank, adapter_name, progressbar=progressbar, compile_kwargs=compile_kwargs)
    write_plain(path, made.config, made.tensors, base_fingerprint(user_model(model), adapter=adapter_name))


def write_plain(path: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor], base: Mapping[str, Any]) -> None:
    """Write the two files of a plain adapter, both or neither.

    Args:
        tensors: by their names in the user's model.
        base: the fingerprint of the base it is for.

    Raises:
        CheckpointError: they cannot be written; what was there is as it was.
    """
    write_adapter(Path(path), replace(config, inference_mode=True), tensors, {"version": VERSION, "base": dict(base)})


@torch.no_grad()
def convert(
    model: nn.Module,
    rank: int | float,
    name: str = "default",
    *,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Converted:
    """As :func:`convert_to_lora`, with the names of the user's model and with what is lost.

    Raises:
        LoraError: as :func:`convert_to_lora`.
    """
    check_rank("rank", rank)
    inner = user_model(model)
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(
            f"This {type(model).__name__} carries no adapter of lorafa. Call get_peft_model or inject_adapter_in_model."
        )
    layers = require_matrices(inner, name)
    require_other_ranks(layers)
    if parts := [path for path, layer in layers if is_part(layer.adapters[name].B, 2)]:
        raise CheckpointError(
            f"Adapter {name!r} cannot be converted: only parts of it are in this process (FSDP, DeepSpeed ZeRO-3): "
            f"{shorten(parts, 3)}. Save it, and convert it on a model that is not sharded."
        )
    for path, layer in layers if isinstance(rank, int) else ():
        if rank > largest_rank(layer):
            raise ConfigError(
                f"rank {rank} is larger than {largest_rank(layer)}, the smaller side of the weight of {path!r}. Choose "
                "a lower rank, or a share of the energy such as 0.99, which fits each layer."
            )
    config, names = configs[name], pattern_names(inner)
    truncate = truncated if compile_kwargs is None else torch.compile(truncated, **compile_kwargs)
    with _progress(len(layers), progressbar) as step:
        made = {}
        for path, layer in layers:
            made[path] = truncate(layer, name, rank)
            step()
    made |= _equal_inside(dict(layers), made)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers:
        tensors |= _stored(path, layer, name, made[path])
    tensors |= {f"{p}.{key}": tensors[f"{p}.{key}"] / 2 for p, key in _inner_B(dict(layers))}
    ranks = {names[id(layer)]: made[path].rank for path, layer in layers if id(layer) in names}
    numbers = {found: (one, float(one)) for found, one in ranks.items()}
    lost = Lost({path: (one.lost, one.total) for path, one in made.items()})
    if isinstance(rank, int) and lost.share > _NOTEWORTHY:  # a share is asked for with its loss
        warn(f"Adapter {name!r} as plain LoRA of rank {rank}: {lost.in_words()}")
    return Converted(with_numbers(plain_config(config), numbers), tensors | beside(inner, name, config), lost)


def _stored(path: str, layer: LoraLayer, name: str, made: Truncated) -> dict[str, Tensor]:
    """The tensors of one layer in the layout and dtype of a file, the bias of B scaled as B is."""
    adapter = layer.adapters[name]
    key_A, key_B = layer.factor_names
    dtype = adapter.B.dtype
    found = {
        f"{path}.{key_A}": layer.stored_A(made.A.to(dtype)).contiguous(),
        f"{path}.{key_B}": layer.stored_B(made.B.to(dtype)).contiguous(),
    }
    if (bias := adapter.scaled_bias) is not None:
        found[f"{path}.{key_B.removesuffix('.weight')}.bias"] = bias.to(dtype)
    return found


def _inner_B(layers: Mapping[str, LoraLayer]) -> Iterator[tuple[str, str]]:
    """(path, key) of each B that PEFT multiplies in twice, and lorafa reads twice: those inside of other layers."""
    for path, layer in layers.items():
        for child in layer.inner_layers:
            yield f"{path}.base_layer.{child}", layer.factor_names[1]


def _equal_inside(layers: Mapping[str, LoraLayer], made: Mapping[str, Truncated]) -> dict[str, Truncated]:
    """Layers and those inside them at one rank, as one target has it: the lower one filled up with zeros."""
    found: dict[str, Truncated] = {}
    for path, layer in layers.items():
        group = [path, *(f"{path}.base_layer.{child}" for child in layer.inner_layers)]
        largest = max(made[one].rank for one in group)
        found |= {one: made[one].at_least(largest) for one in group if made[one].rank < largest}
    return found


def pattern_names(model: nn.Module) -> dict[int, str]:
    """Layer -> the name by which patterns of a config find it."""
    return {id(layer): full_name(place, layer) for place in places(model) for layer in layers_at(place)}


def with_numbers(config: LoraConfig, numbers: Mapping[str, tuple[int, float]]) -> LoraConfig:
    """The config with these ranks and alphas: the usual ones for all layers, patterns for the others.

    Args:
        numbers: name of a layer, as patterns match it -> (rank, alpha).
    """
    counts = list(numbers.values())
    usual = max(set(counts), key=lambda pair: (counts.count(pair), pair))
    # a pattern matches the end of a name too: longer names come first, and have an entry where a shorter one would do
    longest = sorted(numbers, key=len, reverse=True)
    others = [name for name in longest if numbers[name] != usual]
    ends = tuple(f".{name}" for name in others)
    named = [name for name in longest if name in others or name.endswith(ends)]
    return replace(
        config,
        r=usual[0],
        lora_alpha=_shortest(usual[1]),
        rank_pattern={name: numbers[name][0] for name in named},
        alpha_pattern={name: _shortest(numbers[name][1]) for name in named},
    )


def _shortest(number: float) -> int | float:
    return int(number) if number == int(number) else number


def beside(model: nn.Module, name: str, config: LoraConfig) -> dict[str, Tensor]:
    """What a file holds beside the layers: copies of modules, rows of tables, biases, tables."""
    tables = which_tables(config, model, "auto")
    stored = file_tensors(model, name, config, tables=tables, with_start=False, dense=False)
    return taken_apart(stored)[1]


@contextmanager
def _progress(steps: int, shown: bool) -> Iterator[Callable[[], object]]:
    if not shown:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ConfigError("progressbar=True needs the package tqdm. Install it, or leave the bar out.") from error
    with tqdm(total=steps, desc="Converting to LoRA") as bar:
        yield bar.update
