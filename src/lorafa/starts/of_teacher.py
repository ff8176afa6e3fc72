"""A teacher in the shapes of the model: what it changes of each weight, read from its files layer by layer.

It is a copy of the model that was trained, of which one weight at a time is in memory, or an adapter on the same base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafa.backends.offload import without_hooks
from lorafa.config import CONFIG_NAME
from lorafa.errors import BackendError, CheckpointError, ConfigError, SourceError, shorten
from lorafa.io.base_prints import base_fingerprint
from lorafa.io.loose import LooseAdapter, needs_base, read_loose
from lorafa.io.skeleton import Skeleton, empty_model, require_numbers
from lorafa.models.carried import fetched, read_config
from lorafa.numerics.linalg import float_matrix, working_dtype
from lorafa.storage.fingerprint import compare_fingerprints
from lorafa.storage.hub import locate
from lorafa.storage.model_files import model_files
from lorafa.storage.paths import user_path
from lorafa.surgery.targets import Target


class TeacherOfShapes(ABC):
    """What a teacher changes of the weights of a model."""

    @abstractmethod
    def change(self, target: Target) -> Tensor:
        """W_T - W of a target, (out, in), in float32 or float64; zero where the teacher leaves it alone."""


def teacher_of_shapes(source: str, model: nn.Module, targets: Sequence[Target]) -> TeacherOfShapes:
    """The teacher in a folder or on the Hub, found to have every target in its shape before anything is read.

    Raises:
        SourceError: it is neither a model nor an adapter, or cannot be fetched.
        CheckpointError: a file is damaged, or lacks a layer.
        ConfigError: a layer has another shape, or the teacher has layers that the model has not.
        BackendError: the teacher is quantized, or the model is none of transformers.
    """
    return (_Adapter if _is_adapter(source) else _Model)(source, model, targets)


def stamp_of(source: str) -> list[list[object]]:
    """What tells one state of a teacher's files from another: names, sizes and times; of one on the Hub its name."""
    folder = user_path(source)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [[source], *([path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files)]


def _is_adapter(source: str) -> bool:
    folder = user_path(source)
    if folder.is_dir():
        return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()
    try:
        locate(source, [CONFIG_NAME])
    except SourceError:
        return False
    return True


class _Model(TeacherOfShapes):
    """Another model of the same shapes."""

    def __init__(self, source: str, model: nn.Module, targets: Sequence[Target]) -> None:
        inner = getattr(model, "get_base_model", lambda: model)()
        config = getattr(inner, "config", None)
        if config is None or not hasattr(inner, "base_model_prefix"):
            raise BackendError(
                f"A start from the teacher {source!r} reads its files as a model of transformers has them, and this is "
                f"{type(inner).__name__}. Collect the change yourself: stats= takes 'teacher_change.U', '.S' and '.Vh'."
            )
        from lorafa.models.load import resolve_model  # brings rich

        place = resolve_model(source)
        folder = place if isinstance(place, Path) else fetched(place, None, {})
        files = model_files(folder)
        require_numbers(files, read_config(folder))
        self.source = source
        self.skeleton = Skeleton.of(empty_model(type(inner), config), files, None)
        self._require_shapes(targets)

    def _require_shapes(self, targets: Sequence[Target]) -> None:
        skeleton = self.skeleton
        names = {f"{target.name}.weight": target for target in targets}
        missing = [name for name in names if name not in skeleton.ties or skeleton.group_of(name) is None]
        other = [name for name in names if name not in missing and not skeleton.fits(name)]
        if other:
            group = skeleton.group_of(other[0])
            assert group is not None
            has, here = skeleton.files.tensors[group.stored[0]].shape, tuple(skeleton.like[other[0]].shape)
            raise ConfigError(
                f"The teacher {self.source!r} has {other[0]} of shape {has}, and the model {here}: {len(other)} of "
                f"{len(names)} layers are of other shapes. A start from a teacher copies layers of equal shapes; a "
                "teacher of any other goes beside the training: align=external."
            )
        if missing:
            raise CheckpointError(
                f"The teacher {self.source!r} has no {shorten(missing, 3)}, which the adapter is put on. Take a copy "
                "of this very model that was trained, or leave these layers out with exclude_modules."
            )
        more = [name for name in skeleton.names.unused if name.endswith(".weight")]
        if more:
            raise ConfigError(
                f"The teacher {self.source!r} has layers that the model has not: {shorten(more, 3)}. A start from a "
                "teacher copies layer by layer; a teacher of another depth goes beside the training: align=external."
            )

    def change(self, target: Target) -> Tensor:
        value = self.skeleton.value(f"{target.name}.weight")
        self.skeleton.forget()
        W = float_matrix(target.weight().detach())
        return self._in_shape(target, value).to(W) - W

    def _in_shape(self, target: Target, value: Tensor) -> Tensor:
        """The weight as (out, in), however the layer keeps it."""
        if target.backend.quantized:
            return value
        layer = without_hooks(target.base)
        layer._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        return target.backend.weight(layer).detach()


class _Adapter(TeacherOfShapes):
    """An adapter on the base of the model: s B A of each of its layers."""

    def __init__(self, source: str, model: nn.Module, targets: Sequence[Target]) -> None:
        reason = needs_base(source)
        if reason is not None:
            raise ConfigError(
                f"The teacher {source!r} cannot be read layer by layer: {reason}. Merge it into its base (lorafa "
                "merge) and name that folder."
            )
        adapter = read_loose(source)
        self.source, self.layers = source, {layer.name: layer for layer in adapter.layers.values()}
        self._require_base(adapter, model)
        for target in targets:
            self._require_shape(target)
        if not any(target.full_name in self.layers for target in targets):
            raise ConfigError(
                f"The teacher {source!r} is an adapter on {shorten(self.layers, 3)}, and on no layer that this one is "
                "put on, so there is nothing to start from. Name the same targets."
            )

    def _require_base(self, adapter: LooseAdapter, model: nn.Module) -> None:
        actual = base_fingerprint(model, list(adapter.base))
        known = {name: value for name, value in adapter.base.items() if name in actual}
        if different := compare_fingerprints(known, actual):
            raise CheckpointError(
                f"The teacher {self.source!r} was made for another base model: {len(different)} of {len(known)} of its "
                f"layers have other weights here: {shorten(different, 3)}. Load the base it was made for."
            )

    def _require_shape(self, target: Target) -> None:
        layer = self.layers.get(target.full_name)
        shape = target.backend.full_shape(target.base)
        if layer is not None and (layer.B.shape[0], layer.A.shape[1]) != tuple(shape):
            raise ConfigError(
                f"The teacher {self.source!r} changes {target.full_name} in the shape "
                f"{(layer.B.shape[0], layer.A.shape[1])}, and the model has {tuple(shape)} there. A start from a "
                "teacher copies layers of equal shapes."
            )

    def change(self, target: Target) -> Tensor:
        layer, W = self.layers.get(target.full_name), target.weight()
        if layer is None:
            return torch.zeros(tuple(W.shape), dtype=working_dtype(W.dtype), device=W.device)
        A, B = (float_matrix(factor).to(W.device) for factor in (layer.A, layer.B))
        return layer.scaling * (B @ A)
