"""Adapters on a base model whose weights stay in its files: found to fit, tensor by tensor, before anything is made."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends.offload import rests_elsewhere
from lorafa.config import LoraConfig
from lorafa.errors import BackendError, CheckpointError, SourceError, shorten
from lorafa.io.adapter_files import StoredAdapter
from lorafa.io.changes import Change, changes_of
from lorafa.io.layouts.base import OWN_LAYER, taken_apart
from lorafa.io.load import take_in
from lorafa.io.skeleton import Skeleton, empty_model, layers_with_a_weight, require_complete, require_numbers
from lorafa.models.carried import read_config
from lorafa.models.sourced import as_source_error
from lorafa.numerics.linalg import all_finite
from lorafa.settings.checks import repeated
from lorafa.storage.fingerprint import check_base
from lorafa.storage.model_files import model_files
from lorafa.surgery.activate import require_uniform, set_adapter
from lorafa.surgery.auxiliary import modules_called
from lorafa.surgery.build import Options
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.walk import embedding_of, layers_at, places

_TASKS = {
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Tasks of PEFT beside those that kinds of models have."""
_OF_HOSTS = (".token_adapter", OWN_LAYER, ".original_module", ".modules_to_save")
"""Parts of a key that are not in the model before adapters are on it."""


@dataclass(frozen=True)
class Attached:
    """A base model with adapters on it, all of which count, and what they change."""

    skeleton: Skeleton
    config: Any
    """The model's config of transformers."""
    stored_config: Mapping[str, Any]
    """The json of the base's config."""
    kind: type[nn.Module]
    names: tuple[str, ...]
    """The adapters."""
    changes: tuple[Change, ...]


def attached(
    stored: Sequence[StoredAdapter],
    base: Path,
    dtype: torch.dtype | None,
    *,
    ignore_base_mismatch: bool,
    trust_remote_code: bool = False,
) -> Attached:
    """Put adapters that were read on the base in ``base``.

    Args:
        dtype: that weights are to have in the end; None: each its own.

    Raises:
        SourceError, CheckpointError: the base cannot be read, or does not go with an adapter.
        AdapterError: two adapters want one place.
        BackendError: the base is quantized, or an update is no matrix.
        ConfigError: an adapter asks for what cannot be merged.
    """
    files, stored_config = model_files(base), read_config(base)
    require_numbers(files, stored_config)
    for one in stored:
        _require_mergeable(one)
    kind, config = class_of(base, stored, trust_remote_code=trust_remote_code)
    skeleton = Skeleton.of(empty_model(kind, config), files, dtype)
    filled = [name for one in stored for name in _base_tensors(skeleton, one)]
    if twice := sorted(repeated(filled)):
        raise CheckpointError(
            f"Several adapters bring tensors of the base: {shorten(twice, 3)}. Only one of them could be written. "
            "Merge one adapter, and the next one into what comes out."
        )
    if not ignore_base_mismatch:
        for one in stored:
            wanted = {name: value for name, value in one.base.items() if f"{name}.weight" not in filled}
            check_base(wanted, skeleton.fingerprint(wanted), one.path, base_name=one.config.base_model_name_or_path)
    _bring_in(skeleton, stored, filled)
    tuner = LoraModel(skeleton.model)
    readable = {name for name, module in skeleton.model.named_modules() if rests_elsewhere(module)}
    names = ["default"] if len(stored) == 1 else [f"adapter_{i}" for i in range(1, len(stored) + 1)]
    for name, one in zip(names, stored, strict=True):
        take_in(tuner, one, name, Options(), {"ignore_base_mismatch": True})
        if one.config.start.initializer.moves_base and not one.with_start:
            _require_started(skeleton, name, readable)
    set_adapter(skeleton.model, names, inference_mode=True)
    require_uniform(skeleton.model, names, "Merging")
    _require_filled(skeleton, filled)
    changes = changes_of(skeleton, names, filled)
    copied = [name for change in changes for name, source in change.sources().items() if _is_whole(source)]
    require_complete(skeleton, [*filled, *copied])
    return Attached(skeleton, config, stored_config, kind, tuple(names), tuple(changes))


def _is_whole(source: object) -> bool:
    return isinstance(source, tuple) and source[0] == "copy"


def _require_mergeable(stored: StoredAdapter) -> None:
    """Raises for what no file of the base could take in, by what the adapter says of itself."""
    if stored.config.layer_replication is not None:
        raise BackendError(
            f"{stored.path} repeats layers (layer_replication): copies share the base's weights and have updates of "
            "their own, which no weight could hold. Nothing was written."
        )
    if stored.quantized:
        raise BackendError(
            f"{stored.path} belongs to a base that its start has quantized (init_lora_weights="
            f"{stored.config.init_lora_weights!r}), not to the weights in the files of the base. Merge in memory: load "
            "it with PeftModel.from_pretrained, then merge_into_dense and save_pretrained. Nothing was written."
        )


def class_of(
    base: Path, stored: Sequence[StoredAdapter], *, trust_remote_code: bool = False
) -> tuple[type[nn.Module], Any]:
    """The class the adapters were put on, of transformers or of the base's own code where that is trusted, and its
    config: the first one that has what they name."""
    import transformers

    with as_source_error(f"Could not read the config in {str(base)!r}", "give the folder of a model of transformers."):
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        kinds = _of_own_code(base, config, stored) if trust_remote_code else []
    kinds = list(dict.fromkeys([*kinds, *_classes(config, stored)]))
    if not kinds:
        raise SourceError(f"The config in {str(base)!r} names no model of transformers that is known here.")
    tried: list[tuple[type[nn.Module], Any]] = []
    for kind in kinds:
        own = _with_adapters_sizes(kind, config, stored)
        model = empty_model(kind, own)
        modules = {name for name, _ in model.named_modules()}
        tried.append((kind, own))
        if all(path in modules for one in stored for path in _paths(one.tensors)):
            return tried[-1]
    return tried[0]  # whose misfit says what is wrong


def _loader_for(config: LoraConfig) -> str | None:
    """The class of transformers that loads models for the task of an adapter."""
    from lorafa.models.kinds import KINDS

    tasks = {KINDS.get(name).task_type: KINDS.get(name).auto_class for name in KINDS.names()} | _TASKS
    return tasks.get(str(getattr(config.task_type, "value", config.task_type)))


def _of_own_code(base: Path, config: Any, stored: Sequence[StoredAdapter]) -> list[type[nn.Module]]:
    """The classes that the base's own code has for the adapters' tasks, or for any."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    written: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    wanted = [_loader_for(one.config) for one in stored]
    named = [name for name in (*wanted, "AutoModelForCausalLM", "AutoModel") if name in written]
    return [get_class_from_dynamic_module(written[name], base) for name in dict.fromkeys(named) if name is not None]


def _classes(config: Any, stored: Sequence[StoredAdapter]) -> Iterator[type[nn.Module]]:
    import transformers

    for one in stored:
        named = (one.config.auto_mapping or {}).get("base_model_class")
        task = _loader_for(one.config)
        for name in (named, *(config.architectures or ())):
            kind = getattr(transformers, str(name), None)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                yield kind
        if task is not None and type(config) in (mapping := getattr(transformers, task)._model_mapping):
            yield mapping[type(config)]
    for mapping in (transformers.AutoModelForCausalLM._model_mapping, transformers.AutoModel._model_mapping):
        if type(config) in mapping:
            yield mapping[type(config)]


def _paths(tensors: Mapping[str, Tensor]) -> set[str]:
    """The modules of the base that the tensors of an adapter are of."""
    layers, others = taken_apart(tensors)
    return {_base_key(layer) for layer in layers} | {_base_key(key).rpartition(".")[0] for key in others}


def _base_key(key: str) -> str:
    for part in _OF_HOSTS:
        key = key.replace(part, "")
    return key


def _with_adapters_sizes(kind: type[nn.Module], config: Any, stored: Sequence[StoredAdapter]) -> Any:
    """The config with the classes and the vocabulary that the adapters bring the tables for."""
    from lorafa.data.classes import classes_beside  # which brings rich

    config = copy.deepcopy(config)
    for one in stored:
        if (classes := classes_beside(str(one.path.parent))) is not None:
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: number for number, name in enumerate(classes)}
    model = empty_model(kind, config)
    ends = [embedding_of(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings")]
    modules = dict(model.named_modules())
    for one in stored:
        for path, rows in _tables_in(one):
            module = modules.get(path)
            weight = None if module is None else module._parameters.get("weight")
            if weight is None or weight.shape[0] == rows:
                continue
            if any(module is end for end in ends):
                config.get_text_config().vocab_size = config.vocab_size = rows
            elif getattr(config, "num_labels", None) == weight.shape[0]:
                config.num_labels = rows
    return config


def _tables_in(stored: StoredAdapter) -> Iterator[tuple[str, int]]:
    """(module, rows) of each whole matrix that a file holds."""
    for key, tensor in taken_apart(stored.tensors)[1].items():
        path, _, leaf = _base_key(key).rpartition(".")
        if leaf == "weight" and tensor.dim() == 2:
            yield path, tensor.shape[0]


def _base_tensors(skeleton: Skeleton, stored: StoredAdapter) -> list[str]:
    """The tensors of the base itself that an adapter's file holds: resized tables, trained biases."""
    saved = _copied(skeleton.model, stored)
    found = []
    for key in stored.tensors:
        name = _base_key(key)
        if name in skeleton.ties and not _is_inside(name.rpartition(".")[0], saved):
            found.append(name)
    return found


def _copied(model: nn.Module, stored: StoredAdapter) -> set[str]:
    """The modules that an adapter has a copy of (``modules_to_save``)."""
    everything = list(places(model))
    names = stored.config.modules_to_save or ()
    return {place.name for name in names for place in modules_called(everything, name)}


def _is_inside(path: str, around: Collection[str]) -> bool:
    return any(path == outer or path.startswith(f"{outer}.") for outer in around)


def _bring_in(skeleton: Skeleton, stored: Sequence[StoredAdapter], filled: Sequence[str]) -> None:
    """Let the base give the values that putting these adapters on it reads."""
    biases = any(one.config.bias != "none" for one in stored)  # trained ones have to be in memory
    skeleton.fill_in([*filled, *(name for name in skeleton.ties if biases and name.rpartition(".")[2] == "bias")])
    modules = [name for name, _ in skeleton.model.named_modules()]
    wanted = set(layers_with_a_weight(skeleton.model))
    for one in stored:
        for name in one.config.target_parameters or ():  # a parameter alone is adapted in memory only
            wanted -= {module for module in wanted if f".{module}".endswith(f".{name.rpartition('.')[0]}")}
    for one in stored:
        around = _copied(skeleton.model, one) | _token_tables(skeleton.model, one)
        wanted |= {name for name in modules if _is_inside(name, around)}
    skeleton.bring_in([name for name in modules if name in wanted])
    skeleton.fill_rest()


def _token_tables(model: nn.Module, stored: StoredAdapter) -> set[str]:
    """The tables of which single rows are trained (``trainable_token_indices``), or may be."""
    tokens = stored.config.trainable_token_indices
    if tokens is None:
        return set()
    ends = {id(embedding_of(model, getter)) for getter in ("get_input_embeddings", "get_output_embeddings")}
    named = tuple(f".{name}" for name in tokens) if isinstance(tokens, dict) else ()
    found = ((place.name, place.module) for place in places(model))
    return {name for name, module in found if id(module) in ends or f".{name}".endswith(named or "\n")}


def _require_started(skeleton: Skeleton, adapter: str, readable: Collection[str]) -> None:
    """Raises BackendError where a start was computed again for a layer whose weight was not at hand."""
    for place in places(skeleton.model):
        for layer in layers_at(place):
            if adapter in layer.adapters and place.name not in readable:
                raise BackendError(
                    f"{place.name}: what the start has taken from the base is not in the adapter's file, and cannot be "
                    f"computed again for {layer.kind} layers without loading the model. Merge in memory: "
                    "PeftModel.from_pretrained, merge_and_unload, save_pretrained. Nothing was written."
                )


def _require_filled(skeleton: Skeleton, filled: Sequence[str]) -> None:
    for name in filled:
        if not all_finite(skeleton.like[name]):
            raise CheckpointError(f"{name!r} was to come from the adapter and has values that are not finite.")
