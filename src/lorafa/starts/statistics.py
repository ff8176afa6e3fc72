"""Statistics of a model over data: what a data-aware start reads, collected once, kept and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.offload import in_memory, value_of
from lorafa.calibration import STATISTICS
from lorafa.calibration.base import CalibrationOptions, Measured, Statistic
from lorafa.calibration.batches import Batches, digest_of
from lorafa.calibration.collect import collect
from lorafa.calibration.processes import together
from lorafa.calibration.projections import Projections
from lorafa.calibration.teacher import Known
from lorafa.config import LoraConfig
from lorafa.errors import CalibrationError, CheckpointError, ConfigError, shorten
from lorafa.io.base_prints import base_fingerprint
from lorafa.processes import gathered, rank
from lorafa.settings.checks import names
from lorafa.starts.of_teacher import stamp_of, teacher_of_shapes
from lorafa.storage.fingerprint import compare_fingerprints, digest_of_all, from_metadata, to_metadata
from lorafa.storage.tensors import is_pickle, read_tensors, write_tensors
from lorafa.surgery.activate import disabled
from lorafa.surgery.resolve import Resolved
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import adapter_names, skeleton

_SEPARATOR = "::"


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, Mapping[str, Tensor]]):
    """Full name of a target -> "<statistic>.<tensor>" -> value; ``get_peft_model(..., stats=)`` takes it."""

    values_by_layer: dict[str, dict[str, Tensor]]
    about: dict[str, Any]
    """How they were made. ``key`` is a hash of all that decides their values beside the data. ``data`` is a hash of the
    data, or None where no cache was used. ``base`` is the fingerprint of the layers' weights."""

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        return self.values_by_layer[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_layer)

    def __len__(self) -> int:
        return len(self.values_by_layer)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensors in self.values() for tensor in tensors.values())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        flat = {f"{layer}{_SEPARATOR}{name}": tensor for layer in self for name, tensor in self[layer].items()}
        write_tensors(path, flat, to_metadata({"statistics": self.about, "layers": list(self)}))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        if is_pickle(Path(path)):
            raise CheckpointError(
                f"{path} is a pickle, as PEFT keeps what it has collected; statistics of lorafa are safetensors files, "
                "whatever they are called. Delete it, or name another file for them to be collected into."
            )
        tensors, metadata = read_tensors(path, require_finite=False)
        entries = from_metadata(metadata)
        if "statistics" not in entries:
            raise CheckpointError(
                f"{path} holds no statistics of lorafa. Delete it, or give the path of a file that Statistics.save or "
                "cache= has written."
            )
        values: dict[str, dict[str, Tensor]] = {layer: {} for layer in entries.get("layers", ())}
        for key, tensor in tensors.items():
            layer, _, name = key.partition(_SEPARATOR)
            if layer not in values:
                raise CheckpointError(
                    f"{path} has a tensor {key!r} of a layer that its header does not list. It was changed after it "
                    "was written: collect the statistics again."
                )
            values[layer][name] = tensor
        return cls(values, entries["statistics"])

    def check_fits(self, model: nn.Module) -> None:
        """Refuse statistics of other weights.

        Raises:
            CalibrationError: a layer they describe is not in the model, or has other weights there.
        """
        stored = self.about.get("base", {})
        actual = base_fingerprint(model, list(stored))
        other = [name for name in stored if name not in actual] or compare_fingerprints(stored, actual)
        if other:
            raise CalibrationError(
                f"The statistics were collected on another model: {len(other)} of {len(stored)} layers are missing or "
                f"have other weights here: {shorten(other, 3)}. Collect them on this model."
            )

    def check_read_as(self, config: LoraConfig, also: Sequence[str] = ()) -> None:
        """Refuse statistics that were collected by other settings than those of the config's start.

        Args:
            also: what is read beside those of the start.

        Raises:
            CalibrationError: a setting that one of these statistics goes by differs.
        """
        collected, now = self.about.get("settings") or {}, config.start_settings()
        for need in (*config.start.initializer.needs, *also):
            for name, usual in STATISTICS.get(need).settings_read.items():
                then, wanted = collected.get(name, usual), getattr(now, name, usual)
                if then != wanted:
                    raise CalibrationError(
                        f"The statistics were collected with {name}={then!r}, and the config has {name}={wanted!r}. "
                        "Collect them with this config, or set it as it was."
                    )


def statistics_of(
    resolved: Resolved,
    batches: Batches,
    *,
    options: CalibrationOptions | None = None,
    also: Sequence[str] = (),
    cache: str | Path | None = None,
    beside: Statistics | None = None,
) -> Statistics:
    """Collect what the start of a config reads of its targets, over passes of ``batches``.

    Args:
        resolved: the config, and the user's model, with or without adapters; they are off meanwhile.
        options: their seed is the config's.
        also: more statistics, by name.
        cache: file to take them from if it holds those of this model, config and data, and to write otherwise.
        beside: what was collected by the task's loss, where ``batches`` run over the same data by another: then only
            gradients are, and what these are made after is taken from there.

    Raises:
        CalibrationError: nothing to collect, or collecting failed; see :func:`lorafa.calibration.collect.collect`.
        CheckpointError: ``cache`` is a file that cannot be read or written.
    """
    model, config, targets = resolved.model, resolved.config, resolved.targets
    wanted = _wanted(config, names("also", also))
    options = _as_read(config, wanted, options or CalibrationOptions())
    _require_folder(cache)
    data = _together(batches.digest)
    about = _about(model, config, targets, wanted, options, data)
    if cache is not None:
        about["key"] += digest_of_all(_base_tensors(model))
        if (stored := _stored(cache, about["key"], data)) is not None:
            _finish(wanted, stored.values_by_layer)
            return stored
    layers = {target.full_name: target.base for target in targets}
    statistics = _statistics(model, config, targets, wanted, options)
    if beside is not None:
        statistics = {layer: _of_gradients(named, beside[layer]) for layer, named in statistics.items()}
        wanted = [name for name in wanted if STATISTICS.get(name).linear]
    replication = resolved.replication
    with (
        disabled(model) if adapter_names(model) else nullcontext(),
        nullcontext() if replication is None else replication.standing(),
    ):
        values = collect(model, layers, statistics, batches)
    _finish(wanted, values)
    result = Statistics(values, about)
    if cache is not None:
        with together():
            if rank() == 0:
                result.save(cache)
    return result


def _require_folder(cache: str | Path | None) -> None:
    """Raises CheckpointError for a file that could not be written, ConfigError where a process has none."""
    if len({given is None for given in gathered(cache)}) > 1:
        raise ConfigError(
            "cache= is given in some processes and not in others. Pass it in all: it serves all of them or none, and "
            "the first one writes it."
        )
    with together():
        if cache is not None and not Path(cache).parent.is_dir():
            raise CheckpointError(
                f"cache={str(cache)!r} is in a folder that does not exist, so what is collected could not be written "
                "there. Make the folder, or name a file in another one."
            )


def _together(digest: str | None) -> str | None:
    """One hash for the data of all processes, made of those of their shares."""
    digests = gathered(digest)
    return digest if len(digests) == 1 or None in digests else digest_of(digests)


def _stored(cache: str | Path, key: str, data: str | None) -> Statistics | None:
    """The statistics in the file, if they have this key and are of this data. None if not.

    It is None in all processes where it is None in one, because they collect together.

    Raises:
        CheckpointError: a process cannot read it.
    """
    with together():
        stored = Statistics.load(cache) if Path(cache).exists() else None
    fits = stored is not None and stored.about.get("key") == key and data in (None, stored.about.get("data"))
    return stored if all(gathered(fits)) else None


def require_gradients(config: LoraConfig, also: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises ConfigError for arguments that say how gradients are collected, where none are."""
    wanted = _wanted(config, also)
    if given and not _read_gradients(wanted):
        raise ConfigError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())} would change nothing: init_lora_weights="
            f"{config.init_lora_weights!r} reads {', '.join(wanted)}, and no gradients. Drop it, or collect them with "
            "also=['gradient']."
        )


def _read_gradients(wanted: Iterable[str]) -> bool:
    return any(STATISTICS.get(name).reads_gradient for name in wanted)


def _wanted(config: LoraConfig, also: Sequence[str]) -> list[str]:
    asked = [*config.start.initializer.needs, *also]
    wanted = list(dict.fromkeys(name for one in asked for name in (*STATISTICS.get(one).after, one)))
    if not wanted:
        raise CalibrationError(
            f"init_lora_weights={config.init_lora_weights!r} reads no statistics, so there is nothing to collect. Call "
            "get_peft_model, or set a start that reads data: 'lora_one', 'eva', 'corda' ..."
        )
    return wanted


def _as_read(config: LoraConfig, wanted: Sequence[str], options: CalibrationOptions) -> CalibrationOptions:
    """The options with the config's seed, and with whole gradients where the start reads them.

    Raises:
        ConfigError: they say how gradients are collected, and none are.
        CalibrationError: they keep sketches of gradients alone, and the start reads whole ones; or there can be none.
    """
    whole, usual = config.start.initializer.whole_gradients, CalibrationOptions()
    if _read_gradients(wanted) and torch.is_inference_mode_enabled():
        raise CalibrationError(
            "Gradients are read, and under torch.inference_mode() there are none. Collect outside of it."
        )
    of_gradients = {name: getattr(options, name) for name in ("passes", "dense", "halves")}
    require_gradients(config, wanted, {name: of for name, of in of_gradients.items() if of != getattr(usual, name)})
    if whole and options.dense is False:
        raise CalibrationError(
            f"init_lora_weights={config.init_lora_weights!r} reads whole gradients, and dense=False keeps sketches of "
            "them only. Drop dense=False."
        )
    return replace(options, seed=config.init_seed or 0, dense=whole or options.dense)


def _statistics(
    model: nn.Module, config: LoraConfig, targets: Sequence[Target], wanted: Sequence[str], options: CalibrationOptions
) -> dict[str, dict[str, Statistic]]:
    settings, projections, made = config.start_settings(), Projections(options.seed), {}
    named = getattr(settings, "teacher", None)
    teacher = None if named is None else teacher_of_shapes(named, model, targets)
    for target in targets:
        shape = _linear_shape(target, config)
        change = None if teacher is None else partial(teacher.change, target)
        measured = Measured(target.full_name, *shape, target.rank, settings, options, projections, change)
        made[target.full_name] = {name: STATISTICS.get(name)(measured) for name in wanted}
    return made


def _of_gradients(named: Mapping[str, Statistic], known: Mapping[str, Tensor]) -> dict[str, Statistic]:
    """The statistics of a layer that are linear in its gradient, and what they are made after as it is known."""
    found: dict[str, Statistic] = {}
    for name, statistic in named.items():
        if not statistic.linear:
            continue
        for before in statistic.after:
            value = {key.removeprefix(f"{before}."): of for key, of in known.items() if key.startswith(f"{before}.")}
            found[before] = Known(statistic.layer, value)
        found[name] = statistic
    return found


def _linear_shape(target: Target, config: LoraConfig) -> tuple[int, int]:
    if not target.layer_type.is_linear:
        tied = config.ensure_weight_tying and target.layer_type.can_be_tied
        raise CalibrationError(
            f"{target.full_name}: statistics are collected of linear layers, and this is {target.layer_type.kind}. "
            + ("If it is a target because it shares a weight with one, set ensure_weight_tying=False. " if tied else "")
            + "Leave it out with exclude_modules, or choose another start."
        )
    return target.backend.shape(target.base)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the model without those of adapters; of a quantized layer the weight it stands for."""
    for path, module in skeleton(model):
        plain, backend = path.replace(".base_layer", ""), backend_of(module)
        if backend is not None and backend.quantized and backend.serves(module) is None:
            yield f"{plain}.weight", backend.weight(in_memory(module))  # scales may be in no tensor of the layer's own
            continue
        held = {name: value_of(module, tensor) for name, tensor in (module._parameters | module._buffers).items()}
        yield from ((f"{plain}.{name}", value) for name, value in held.items() if value is not None)


def _finish(wanted: Sequence[str], values: Mapping[str, dict[str, Tensor]]) -> None:
    for name in wanted:
        STATISTICS.get(name).finish(name, values)


def _about(
    model: nn.Module,
    config: LoraConfig,
    targets: Sequence[Target],
    wanted: Sequence[str],
    options: CalibrationOptions,
    data: str | None,
) -> dict[str, Any]:
    settings = config.start_settings()
    about: dict[str, Any] = {
        "statistics": list(wanted),
        "start": config.init_lora_weights,
        "settings": asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else None,
        "ranks": {target.full_name: target.rank for target in targets},
        "options": asdict(options),
        "base": base_fingerprint(model, [target.name for target in targets]),
    }
    if (teacher := getattr(settings, "teacher", None)) is not None:
        about["teacher"] = stamp_of(teacher)
    kinds, decides = [STATISTICS.get(name) for name in wanted], about
    if not any(kind.depends_on_rank for kind in kinds):  # such as the covariances CorDA keeps, which serve any rank
        read = {name: getattr(settings, name, usual) for kind in kinds for name, usual in kind.settings_read.items()}
        decides = {"statistics": about["statistics"], "base": about["base"], "read": read}
    text = json.dumps(decides, sort_keys=True, default=str)
    return about | {"data": data, "key": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}
