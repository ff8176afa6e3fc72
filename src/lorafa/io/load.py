"""Adapters into a model and out of it: what ``from_pretrained``, ``load_adapter`` and ``save_pretrained`` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from lorafa.backends.offload import device_of
from lorafa.config import CONFIG_NAME, LoraConfig
from lorafa.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    SourceError,
    did_you_mean,
    refuse,
    shape_text,
    shorten,
    warn,
)
from lorafa.io.adapter_files import (
    StoredAdapter,
    check_fits_base,
    note_history,
    read_adapter,
)
from lorafa.io.find import find_weights
from lorafa.io.key_names import renamed
from lorafa.io.layouts import as_peft
from lorafa.io.layouts.names import BaseNames
from lorafa.io.nesting import as_if_alone
from lorafa.io.peft_format import load_tensors, misfit, wanted_tensors
from lorafa.io.save import save_adapters
from lorafa.settings.checks import check_arguments, found
from lorafa.storage.hub import HubOptions, locate
from lorafa.storage.tensors import read_tensors
from lorafa.surgery.activate import require_adapters
from lorafa.surgery.build import Options
from lorafa.surgery.given import lora_config
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.replicate import planned_places, replication_of
from lorafa.surgery.resolve import Resolved, resolve
from lorafa.surgery.walk import lora_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack

MORE, FEW = 16, 2_000_000
"""How often more numbers than a file holds an adapter may have before the two are compared, and how many at least."""
_READING = ("subfolder", "allow_pickle", "use_safetensors", "weight_name", "ignore_config_mismatch")


class LoadOptions(HubOptions, total=False):
    """What may be said besides when an adapter is loaded; beside these the fields of :class:`HubOptions`.

    Scripts pass many of them for the base model. Those about where its weights lie change nothing for an adapter, whose
    tensors go where its layer's weight is, and are not read.
    """

    subfolder: str | None
    """Where in the folder or repository the adapter is; one not called "default" is in a folder of its own name."""
    allow_pickle: bool
    """Also read a ``.bin`` file, with torch's restricted unpickler. Default: refuse it."""
    use_safetensors: bool | None
    """True: read safetensors only. False: the pickle, which needs ``allow_pickle=True``. None: what is there."""
    weight_name: str | None
    """What the file of tensors is called, where it is not called as the programs that lorafa knows call theirs."""
    ignore_base_mismatch: bool
    """Load even if the base weights are not those the adapter was made for."""
    ignore_config_mismatch: bool
    """Load even if a number in the config is not what it was when the tensors were saved: it was edited on purpose."""
    ignore_mismatched_sizes: bool
    """Leave out tensors of another shape, with a warning that lists them: those of the adapter keep their start (B of
    zeros), copied modules and token rows the values the base has. Layers of another shape may have other weights."""
    dtype: torch.dtype | str | None
    """Keep the adapter's factors in this dtype, a ``torch.dtype`` or its name; None and "auto": as
    ``autocast_adapter_dtype`` says. PEFT passes it over. Optimizers are better off with float32."""
    torch_dtype: torch.dtype | str | None
    """The older name of ``dtype``."""
    device_map: Any
    """Not read, nor are the next five: an adapter goes to the device of its layer."""
    max_memory: Any
    offload_folder: Any
    offload_dir: Any
    offload_index: Any
    offload_buffers: Any
    trust_remote_code: bool
    """Not read: an adapter holds no code."""


class SaveOptions(TypedDict, total=False):
    """What transformers and accelerate pass to ``save_pretrained`` beside what an adapter needs; none of it is read."""

    max_shard_size: int | str | None
    """An adapter is one file, however large."""
    save_function: Callable[..., Any] | None
    """Files are written whole or not at all, by lorafa itself."""
    save_peft_format: bool
    """An adapter's format is PEFT's."""


def read(
    source: str | Path,
    method: str,
    model: nn.Module,
    *,
    is_trainable: bool,
    config: LoraConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **options: Unpack[LoadOptions],
) -> StoredAdapter:
    """Read an adapter for ``method``, which errors name; its config says whether it will be trained.

    One that another program wrote, or that was made for another version of the model, is brought into the form it has
    in PEFT, for the layers of ``model``, which is not changed.

    Raises:
        ConfigError: an option that does not exist, or options that contradict each other.
        LoraError: as :func:`lorafa.io.adapter_files.read_adapter` and :func:`lorafa.io.layouts.as_peft`.
    """
    check_arguments(method, options, LoadOptions.__optional_keys__)
    if options.get("use_safetensors") is False and not options.get("allow_pickle"):
        error = ConfigError(
            "use_safetensors=False asks for the pickle of an adapter, and opening a pickle can run any code its author "
            "put in. Drop it, or pass allow_pickle=True as well if you trust the source."
        )
        refuse(error, "The pickle was looked for.")
    hub: HubOptions = {name: options[name] for name in HubOptions.__optional_keys__ if name in options}  # type: ignore[assignment,literal-required]
    reading: dict[str, Any] = {name: options[name] for name in _READING if name in options}  # type: ignore[literal-required]
    given = None if config is None else lora_config(config)
    names = BaseNames(model)
    return read_adapter(
        source,
        config=given,
        key_mapping=key_mapping,
        inference_mode=not is_trainable,
        convert=lambda raw: as_peft(raw, names),
        **reading,
        **hub,
    )


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    use_safetensors: bool | None = None,
    **hub: Unpack[HubOptions],
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, by the names they have in its file.

    Args:
        model_id: folder or Hub repository.
        device: where to put them; None: the CPU.
        key_mapping: as for :func:`lorafa.io.key_names.renamed`.
        subfolder, allow_pickle, use_safetensors, hub: see :class:`LoadOptions`.

    Raises:
        SourceError: there is no such folder, repository or file, or the Hub cannot be reached.
        CheckpointError: the file is damaged, or a pickle and ``allow_pickle`` is False.
        ConfigError: an argument that does not exist.
    """
    check_arguments("load_peft_weights", hub, HubOptions.__optional_keys__)
    path = find_weights(model_id, subfolder=subfolder, use_safetensors=use_safetensors, **hub)
    tensors = renamed(read_tensors(path, allow_pickle=allow_pickle)[0], key_mapping)
    return tensors if device is None else {key: tensor.to(device) for key, tensor in tensors.items()}


def check_if_peft_model(model_name_or_path: str | Path, **hub: Unpack[HubOptions]) -> bool:
    """Whether a folder or a repository of the Hub holds an adapter: an ``adapter_config.json``.

    Raises:
        SourceError: that cannot be told: the Hub cannot be reached, or lets nobody in.
    """
    check_arguments("check_if_peft_model", hub, HubOptions.__optional_keys__)
    try:
        locate(model_name_or_path, [CONFIG_NAME], **hub)
    except SourceError as error:
        if error.__cause__ is not None:  # the Hub's; a place that is there and has no such file has none
            raise
        return False
    return True


def adapter_dtype(options: LoadOptions) -> torch.dtype | None:
    """The dtype that ``dtype`` or ``torch_dtype`` names, None where neither does.

    Raises:
        ConfigError: what they name is no floating-point dtype, or they differ.
    """
    named = [(name, options[name]) for name in ("dtype", "torch_dtype") if options.get(name) not in (None, "auto")]  # type: ignore[literal-required]
    dtypes = [_dtype(name, value) for name, value in named]
    if len(set(dtypes)) > 1:
        raise ConfigError(f"dtype={named[0][1]!r} and torch_dtype={named[1][1]!r} differ. Pass one of them.")
    return dtypes[0] if dtypes else None


def _dtype(name: str, value: Any) -> torch.dtype:
    known = ("float32", "bfloat16", "float16", "float64")
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if isinstance(dtype, torch.dtype) and str(dtype).removeprefix("torch.") in known:
        return dtype
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    raise ConfigError(
        f"{name} is that of the adapter's factors, one of {', '.join(known)}, found {found(value)}.{hint} Drop it to "
        "go by autocast_adapter_dtype."
    )


def take_in(tuner: LoraModel, stored: StoredAdapter, name: str, options: Options, given: LoadOptions) -> None:
    """Add an adapter that was read under a new name; it does not count until it is activated.

    Raises:
        CheckpointError, ConfigError, TargetError: it does not fit the model, which is as it was.
    """
    ignore_sizes = given.get("ignore_mismatched_sizes", False)
    if ignore_sizes and options.low_cpu_mem_usage:
        raise ConfigError(
            "ignore_mismatched_sizes=True keeps the start of what the file does not fit, and low_cpu_mem_usage=True "
            "makes none. Drop one of the two."
        )
    replication = replication_of(tuner.model, stored.config)
    everything = planned_places(tuner.model, replication)
    if not given.get("ignore_base_mismatch"):
        check_fits_base(tuner.model, everything, stored, ignore_sizes=ignore_sizes)
    options = replace(
        options,
        dtype=adapter_dtype(given),
        from_file=True,
        partly_filled=ignore_sizes,
        file_has_starts=stored.with_start,
        quantized=frozenset(stored.quantized),
    )
    resolved = resolve(
        tuner.model, stored.config, lenient=True, checked=True, replication=replication, everything=everything
    )
    if not ignore_sizes:
        _require_memory_for(resolved, stored, name)
    take_back = tuner.apply_plan(tuner.plan_adapter(resolved, name, options))
    try:
        _fill(tuner, stored, name, ignore_sizes)
        note_history(tuner.model, name, stored)
    except BaseException:
        take_back()
        raise


def _require_memory_for(resolved: Resolved, stored: StoredAdapter, name: str) -> None:
    """Raises CheckpointError where the ranks of a config ask for far more numbers than the file holds.

    They are compared tensor by tensor once the adapter is made, and a number in a file can ask for any memory.
    """
    held = sum(tensor.numel() for tensor in stored.tensors.values())
    asked = sum(target.rank * sum(target.backend.full_shape(target.base)[-2:]) for target in resolved.targets)
    if asked > MORE * held + FEW:
        largest = max(resolved.targets, key=lambda target: target.rank)
        raise CheckpointError(
            f"{stored.path} does not fit adapter {name!r}: by its config A and B have {asked:.3g} numbers, and it "
            f"holds {held}. {largest.full_name!r} has rank {largest.rank} there. Nothing was loaded."
        )


def _fill(tuner: LoraModel, stored: StoredAdapter, name: str, ignore_sizes: bool) -> None:
    model, config = tuner.model, tuner.peft_config[name]
    tensors = fitting(
        model, name, config, stored.tensors, with_start=stored.with_start, path=stored.path, ignore_sizes=ignore_sizes
    )
    put_in(model, name, config, tensors, with_start=stored.with_start)


def fitting(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    *,
    with_start: bool,
    path: str | Path,
    ignore_sizes: bool = False,
) -> Mapping[str, Tensor]:
    """The tensors of a file as they are to be loaded into adapter ``name``.

    Args:
        ignore_sizes: put what the adapter has in the place of tensors of another shape, and warn.

    Raises:
        CheckpointError: they do not fit, or what the adapter has must stay and has no values.
    """
    found = misfit(model, name, config, tensors, with_start=with_start)
    if found:
        want = wanted_tensors(model, name, config, tensors, with_start=with_start, values=False)
        tensors = as_if_alone(model, name, tensors, want, path)
        found = misfit(model, name, config, tensors, with_start=with_start)
    if ignore_sizes and (shapes := found.misshapen):
        own = wanted_tensors(model, name, config, tensors, with_start=with_start)
        if any(own[key].is_meta for key in shapes):
            raise CheckpointError(
                f"{path} has tensors of another shape: {shorten(shapes, 3)}. Adapter {name!r} has no values that could "
                "stay there: it was made with low_cpu_mem_usage=True. Drop that. Nothing was loaded."
            )
        tensors = {**tensors, **{key: own[key] for key in shapes}}
        found = misfit(model, name, config, tensors, with_start=with_start)
        if not found:
            listed = (
                f"{key} ({shape_text(have)} in the file, {shape_text(want)} here)"
                for key, (have, want) in shapes.items()
            )
            warn(
                f"{path}: {len(shapes)} of {len(tensors)} tensors have another shape in the model and were not loaded "
                f"(ignore_mismatched_sizes=True): {shorten(listed, 8)}. What stands in the model there is not trained."
            )
    if found.only_more():
        refuse(found.error(path, name), "Tensors that are not in the model were passed over; all others were loaded.")
        return {key: tensor for key, tensor in tensors.items() if key not in found.unexpected}
    found.raise_if_any(path, name)
    return tensors


def put_in(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], *, with_start: bool
) -> None:
    """Fill an adapter from tensors that fit (:func:`fitting`); one on the meta device gets its memory first."""
    materialize(model, name)
    load_tensors(model, name, config, tensors, with_start=with_start)


def materialize(model: nn.Module, name: str) -> None:
    """Give an adapter that was made on the meta device memory on the device of its layer; its values are undefined."""
    for _, layer in lora_layers(model):
        if name not in layer.adapters or not layer.adapters[name].A.is_meta:
            continue
        device = device_of(layer.get_base_layer())
        for holder in layer.holders():
            if name not in holder:
                continue
            if isinstance(holder, nn.ModuleDict):
                holder[name].to_empty(device=device)
            else:
                trains = holder[name].requires_grad
                holder[name] = nn.Parameter(torch.empty_like(holder[name], device=device), requires_grad=trains)


def save_all(
    tuner: LoraModel,
    directory: str | Path,
    names: Iterable[str],
    *,
    write: bool,
    save_embedding_layers: str | bool,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """Write adapters, "default" into the folder itself and others into folders of their name, with one model card.

    Args:
        write: False writes nothing, in all processes but one: it helps to gather what is sharded.

    Raises:
        AdapterError: an unknown adapter name.
        CheckpointError: as :func:`lorafa.io.save.save_adapters`.
    """
    names = list(names)
    if not names:
        raise AdapterError("selected_adapters names no adapter, so there is nothing to save. Drop it to save all.")
    require_adapters(tuner.model, names)
    save_adapters(
        tuner.model, {name: tuner.peft_config[name] for name in names}, directory, state_dict=state_dict,
        save_embedding_layers=save_embedding_layers, is_main_process=write,
    )  # fmt: skip
