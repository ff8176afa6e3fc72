"""Adapters on disk combined to a new one on disk, without their base where the mathematics does without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, CheckpointError, ConfigError, shorten
from lorafa.io.find import find_adapter_files, require_once
from lorafa.io.load import read, take_in
from lorafa.io.loose import LooseAdapter, LooseLayer, belongs_to_saved, needs_base, read_loose
from lorafa.io.save import save_adapters, write_adapter
from lorafa.storage.fingerprint import compare_fingerprints
from lorafa.storage.folders import folder_written_whole, require_free
from lorafa.surgery.build import Options
from lorafa.surgery.combination import Combination, LayerError
from lorafa.surgery.combine import add_combination
from lorafa.surgery.combine_layer import Combined, Share, combine_layer
from lorafa.surgery.combined_config import combined_config
from lorafa.surgery.combining import Combining, check_weights
from lorafa.surgery.lora_model import LoraModel
from lorafa.version import VERSION

NAME = "default"
"""What the result is called: an adapter in a folder of its own."""


def why_base(sources: Sequence[str | Path]) -> str | None:
    """The first reason why adapters are to be combined on their base (:func:`combine_on_base`), or None.

    Raises:
        LoraError: as :func:`lorafa.io.loose.needs_base`.
    """
    reasons = ((source, needs_base(source)) for source in sources)
    return next((f"{source}: {reason}" for source, reason in reasons if reason is not None), None)


def require_one_named_base(sources: Sequence[str | Path]) -> None:
    """Raises AdapterError where the configs of adapters name different base models, ConfigError where one is needed and
    none is named."""
    configs = {str(source): find_adapter_files(source).peft_config() for source in sources}
    named = {name: c.base_model_name_or_path for name, c in configs.items() if c and c.base_model_name_or_path}
    if len(set(named.values())) > 1:
        _raise_other_bases(named)
    if not named:
        raise ConfigError(f"{why_base(sources)}. No adapter names its base model: give it by --base.")


def combine_files(
    sources: Sequence[str | Path], weights: Sequence[float], out: str | Path, asked: Combining
) -> Combination:
    """Combine adapters of folders or the Hub, read tensor by tensor, and write the result into a new folder.

    The result is plain LoRA with the scaling 1, on every layer one of them is on.

    Raises:
        AdapterError: they are for different bases, or both train the same thing in full.
        CheckpointError: a file is damaged or does not fit the others, or the result could not be written.
        ConfigError: as :meth:`lorafa.PeftModel.add_weighted_adapter`, or ``out`` is not empty. Nothing was written.
    """
    folder, names = require_free(out, overwrite=None), [str(source) for source in sources]
    given = dict(zip(names, check_weights(names, weights), strict=True))
    asked.say_what_it_adds(len(given))
    adapters = {name: read_loose(name) for name in given}
    require_once([adapter.path for adapter in adapters.values()])
    _require_one_base(adapters)
    rest = _rest(adapters, given)
    found = {path: _combined(path, adapters, given, asked) for path in _paths(adapters)}
    config = _config(adapters, found)
    tensors = {key: value for path in found for key, value in _stored(*found[path], config.lora_bias).items()} | rest
    base = {name: value for adapter in adapters.values() for name, value in adapter.base.items()}
    with folder_written_whole(folder) as stage:
        write_adapter(stage, config, tensors, {"version": VERSION, "base": dict(sorted(base.items()))}, card=True)
    made = Combination(
        str(folder), asked.combination_type, {layer.name: _error(layer, one.error) for layer, one in found.values()}
    )
    made.log()
    return made


def combine_on_base(
    model: nn.Module, sources: Sequence[str | Path], weights: Sequence[float], out: str | Path, asked: Combining
) -> Combination:
    """The same on the base model, which is given adapters for it and is not to be used after: any formula of a matrix.

    Raises:
        LoraError: as :func:`combine_files`; CheckpointError for an adapter that was made for another base.
    """
    folder, names = require_free(out, overwrite=None), [str(source) for source in sources]
    given = dict(zip(names, check_weights(names, weights), strict=True))
    require_once([find_adapter_files(name).weights for name in names])
    tuner, adapters = LoraModel(model), dict[str, float]()
    for source, weight in given.items():
        name = _adapter_name(source, adapters)
        take_in(tuner, read(source, "combine_on_base", model, is_trainable=False), name, Options(), {})
        adapters[name] = weight
    made = add_combination(tuner.model, tuner.peft_config, adapters, NAME, asked, tuner.apply_plan)
    config = tuner.peft_config[NAME]
    with folder_written_whole(folder) as stage:
        save_adapters(tuner.model, {NAME: config}, stage)
    return replace(made, adapter_name=str(folder))


def _adapter_name(source: str, taken: Mapping[str, float]) -> str:
    """A name for an adapter in a model, by its folder's."""
    stem = Path(source).name.replace(".", "_") or "adapter"
    return next(name for i in range(len(taken) + 2) if (name := f"{stem}-{i}" if i else stem) not in (*taken, NAME))


# ---- do they go together?


def _raise_other_bases(named: Mapping[str, str]) -> None:
    listed = ", ".join(f"{source} is for {base!r}" for source, base in named.items())
    raise AdapterError(
        f"The adapters are for different base models: {listed}. An update is nothing on weights it was not trained on. "
        "Combine adapters of one base. Nothing was written."
    )


def _require_one_base(adapters: Mapping[str, LooseAdapter]) -> None:
    """Raises AdapterError unless names or fingerprints say that all adapters are for one base.

    Where fingerprints can be compared they decide: a model has many names, in a folder and on the Hub.
    """
    known: dict[str, Any] = {}
    compared = True
    for name, adapter in adapters.items():
        if different := compare_fingerprints(known, adapter.base):
            raise AdapterError(
                f"{name} is for another base model than the adapters before it: the weights of {len(different)} layers "
                f"differ: {shorten(different, 3)}. Combine adapters of one base. Nothing was written."
            )
        both = [layer for layer in known if known[layer] and adapter.base.get(layer)]
        compared = compared and (not known or bool(both))
        known |= adapter.base
    compared = compared and bool(known) and all(adapter.base for adapter in adapters.values())
    bases = {name: adapter.config.base_model_name_or_path for name, adapter in adapters.items()}
    named = {name: base for name, base in bases.items() if base}
    if not compared and len(set(named.values())) > 1:
        _raise_other_bases(named)


def _paths(adapters: Mapping[str, LooseAdapter]) -> list[str]:
    return list(dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers))


def _rest(adapters: Mapping[str, LooseAdapter], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """What belongs to no layer: copies of one adapter of weight 1, and tables of the base that all have alike.

    Raises:
        AdapterError: two adapters have trained one thing in full, or one of another weight than 1 has.
        CheckpointError: they hold different tables of the base.
    """
    rest: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for name, adapter in adapters.items():
        for key, tensor in adapter.rest.items():
            saved = belongs_to_saved(key, adapter.config)
            if saved and weights[name] != 1:
                raise AdapterError(
                    f"{name} has {key!r} trained in full (modules_to_save, trainable_token_indices), which is copied "
                    f"as it is and cannot be weighted by {weights[name]:g}. Give the adapter the weight 1. Nothing was "
                    "written."
                )
            if saved and key in owner:
                raise AdapterError(
                    f"{owner[key]} and {name} both have {key!r} trained in full (modules_to_save, "
                    "trainable_token_indices), which is no update that could be added up. Combine adapters of which "
                    "one at most has it. Nothing was written."
                )
            if key in rest and not (rest[key].shape == tensor.shape and bool((rest[key] == tensor).all())):
                raise CheckpointError(
                    f"{owner[key]} and {name} hold different values of {key!r}, which belongs to the base: they are "
                    "for bases of different vocabularies. Nothing was written."
                )
            rest[key], owner[key] = tensor, name
    return rest


# ---- layer by layer


def _combined(
    path: str, adapters: Mapping[str, LooseAdapter], weights: Mapping[str, float], asked: Combining
) -> tuple[LooseLayer, Combined]:
    """One of the layers at a path, which says how factors are stored there, and the combination.

    Raises:
        CheckpointError: the shapes differ: they are not on one model.
    """
    layers = {name: adapter.layers[path] for name, adapter in adapters.items() if path in adapter.layers}
    (first, pattern), *others = layers.items()
    for name, layer in others:
        if _form(layer) != _form(pattern):
            raise CheckpointError(
                f"{pattern.name} is {_text(pattern)} in {first} and {_text(layer)} in {name}: the adapters are for "
                "models of different shapes. Nothing was written."
            )
    shares = [Share(name, weights[name], one.scaling, one.A, one.B, one.bias) for name, one in layers.items()]
    made = combine_layer(asked, pattern.name, shares, of=len(adapters), groups=pattern.groups, key=NAME)
    return pattern, made


def _form(layer: LooseLayer) -> tuple[Any, ...]:
    return layer.A.shape[-1], layer.B.shape[0], layer.groups, layer.keys, layer.tails


def _text(layer: LooseLayer) -> str:
    return f"{layer.B.shape[0]} x {layer.A.shape[-1]}"


def _error(layer: LooseLayer, error: LayerError) -> LayerError:
    """The error of what a reader of the file adds."""
    square = layer.times**2
    return replace(error, energy=square * error.energy, lost=None if error.lost is None else square * error.lost)


def _stored(layer: LooseLayer, combined: Combined, has_bias: bool) -> dict[str, Tensor]:
    """The tensors of a layer as a file has them."""
    factors = zip(layer.keys, layer.stored(combined.A, combined.B), strict=True)
    tensors = {f"{layer.path}.{key}": factor for key, factor in factors}
    if has_bias:
        zeros = combined.B.new_zeros(combined.B.shape[0])
        tensors[f"{layer.path}.lora_B.bias"] = zeros if combined.bias is None else combined.bias
    return tensors


def _config(adapters: Mapping[str, LooseAdapter], found: Mapping[str, tuple[LooseLayer, Combined]]) -> LoraConfig:
    """The config of the result, whose shared weights (``ensure_weight_tying``) have an update each: a file does not
    say which of the modules is the one that the others follow."""
    numbers = {layer.target: (one.A.shape[0], one.alpha) for layer, one in found.values() if layer.target is not None}
    has_bias = any(one.bias is not None for _, one in found.values())
    without = [layer.name for layer, _ in found.values() if layer.is_table]
    if has_bias and without:
        raise ConfigError(
            f"{without[0]} is an embedding, on which lora_bias is not defined, and an adapter has it on other layers: "
            "one config cannot say both. Combine adapters that are alike in this. Nothing was written."
        )
    configs = {name: adapter.config for name, adapter in adapters.items()}
    config = combined_config(configs, numbers, {}, lora_bias=has_bias)
    return replace(
        config,
        ensure_weight_tying=False,
        inference_mode=True,
        auto_mapping=next((c.auto_mapping for c in configs.values() if c.auto_mapping), None),
    )
