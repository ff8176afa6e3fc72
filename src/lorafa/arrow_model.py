"""Many adapters and a router over them on one model: PEFT's ``create_arrow_model``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, ConfigError, shorten, warn
from lorafa.layers.base import LoraLayer
from lorafa.peft_model import PeftModel
from lorafa.settings.checks import found
from lorafa.settings.methods import ArrowConfig, from_nested
from lorafa.surgery.walk import dotted_ends, lora_layers, places
from lorafa.variants.arrow import Arrow

ROUTER, TASK, GENERAL = "arrow_router", "task_", "gks_"
"""PEFT's names of the router, of the experts and of general adapters; a number follows the latter two."""


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters and let each token go to those that fit it best (Arrow, arXiv:2405.11157).

    The experts are called "task_0", "task_1" ..., general adapters "gks_0" ..., and the router "arrow_router", which
    alone is active. They may have different ranks. Adapters that are loaded later are experts too, and those that are
    deleted no longer; the files and the values of all stay as they are, with GenKnowSub too, which PEFT computes in
    place.

    Args:
        base_model: changed in place.
        task_specific_adapter_paths: folders or Hub repositories of the experts; what follows "owner/name/" is a folder
            in the repository.
        arrow_config: how to route; copied, and its ``task_adapter_names`` and ``gks_adapter_names`` set in the copy:
            ``model.peft_config["arrow_router"].arrow_config``. PEFT's own ArrowConfig is read, too.
        general_adapter_paths: of which the mean is taken out of the experts, with ``use_gks=True``.
        adapter_kwargs: passed on to :meth:`PeftModel.from_pretrained` and :meth:`PeftModel.load_adapter`.

    Raises:
        ConfigError: no adapters, settings that contradict the paths, or adapters on layers that are not linear.
        AdapterError: the adapters are not on the same layers, or do not go with the settings.
        SourceError, CheckpointError, TargetError: an adapter cannot be found, read or used.

    After any of them the model is as it was.
    """
    tasks = _paths("task_specific_adapter_paths", task_specific_adapter_paths)
    settings = _settings(arrow_config)
    general = _general(general_adapter_paths, settings)
    if settings.top_k > len(tasks):
        raise ConfigError(
            f"top_k={settings.top_k} is more than the {len(tasks)} adapters of task_specific_adapter_paths. Pass "
            f"ArrowConfig(top_k={len(tasks)}), or more adapters."
        )
    sources = {f"{TASK}{i}": path for i, path in enumerate(tasks)}
    sources |= {f"{GENERAL}{i}": path for i, path in enumerate(general)}
    settings.task_adapter_names = [f"{TASK}{i}" for i in range(len(tasks))]
    settings.gks_adapter_names = [f"{GENERAL}{i}" for i in range(len(general))]
    was = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    modes = [(module, module.training) for module in base_model.modules()]
    model: PeftModel | None = None
    try:
        for name, path in sources.items():
            arguments = _source(path) | adapter_kwargs
            if model is None:
                model = PeftModel.from_pretrained(base_model, adapter_name=name, **arguments)
            else:
                model.load_adapter(adapter_name=name, **arguments)
        assert model is not None
        model.add_adapter(ROUTER, _router_config(model, sources, settings))
        for path, layer in lora_layers(model.get_base_model()):
            _find_prototypes(path, layer)
        _say_what_is_left_out(model, sources)
        model.set_adapter(ROUTER, inference_mode=True)
    except BaseException:
        if model is not None:
            model.unload()
        for module, mode in modes:
            module.training = mode
        for parameter, flag in was:
            parameter.requires_grad = flag
        raise
    return model


def _paths(name: str, paths: Any) -> list[str | Path]:
    if isinstance(paths, (list, tuple)) and paths and all(isinstance(path, (str, Path)) for path in paths):
        return list(paths)
    raise ConfigError(f"{name} is a list of folders or Hub repositories of adapters, found {found(paths)}.")


def _settings(arrow_config: Any) -> ArrowConfig:
    """A checked copy of the settings of a caller, of PEFT's class too."""
    if is_dataclass(arrow_config) and not isinstance(arrow_config, (type, ArrowConfig)):
        arrow_config = asdict(arrow_config)
    given = from_nested(ArrowConfig, arrow_config, "arrow_config")
    if given is None:
        raise ConfigError("arrow_config is None. Pass arrow_config=ArrowConfig() for the defaults.")
    return replace(given)


def _general(paths: Any, settings: ArrowConfig) -> list[str | Path]:
    if settings.use_gks:
        return _paths("general_adapter_paths, which use_gks=True of arrow_config takes out of the experts,", paths)
    if paths:
        raise ConfigError(
            f"general_adapter_paths={paths!r} would be ignored: use_gks of arrow_config is False. Pass "
            "ArrowConfig(use_gks=True), or drop the paths."
        )
    return []


def _source(path: str | Path) -> dict[str, Any]:
    """A path as arguments of ``load_adapter``: "owner/name/folder" is a folder in a repository."""
    owner, _, rest = str(path).strip("/").partition("/")
    name, _, folder = rest.partition("/")
    if Path(path).is_dir() or not folder or str(path).startswith(("/", ".", "~")):
        return {"model_id": path}
    return {"model_id": f"{owner}/{name}", "subfolder": folder}


def _router_config(model: PeftModel, sources: dict[str, Any], settings: ArrowConfig) -> LoraConfig:
    """The config of a router on the layers the adapters are on.

    Raises:
        AdapterError: they are not on the same layers.
    """
    base = model.get_base_model()
    layers: dict[str, dict[str, LoraLayer]] = {
        name: {path: layer for path, layer in lora_layers(base) if name in layer.adapters} for name in sources
    }
    first, *others = layers
    for name in others:
        for one, other in ((first, name), (name, first)):
            if missing := [path for path in layers[one] if path not in layers[other]]:
                raise AdapterError(
                    f"{shorten(missing, 3)}: adapter {one!r} ({sources[one]}) is there and {other!r} "
                    f"({sources[other]}) is not, and Arrow routes among the same adapters on every layer. Train all of "
                    "them with the same target_modules."
                )
    rank = max(layer.adapters[name].rank for name in layers for layer in layers[name].values())
    taken = {end for place in places(base) if place.name not in layers[first] for end in dotted_ends(place.name)}
    ends = {next((end for end in dotted_ends(path) if end not in taken), path) for path in layers[first]}
    return LoraConfig(r=rank, target_modules=ends, arrow_config=settings)


def _find_prototypes(path: str, layer: LoraLayer) -> None:
    router = cast(Arrow, layer.adapters[ROUTER].variant)
    try:
        router.prototypes(layer, ROUTER)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def _say_what_is_left_out(model: PeftModel, sources: dict[str, Any]) -> None:
    for name, path in sources.items():
        beside = model.peft_config[name].modules_to_save or model.peft_config[name].trainable_token_indices
        if beside:
            warn(
                f"Adapter {name!r} ({path}) has trained {beside!r} besides, in modules_to_save or "
                "trainable_token_indices; the router decides over updates of layers alone, and the base's own count "
                "there."
            )
