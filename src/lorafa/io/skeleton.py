"""A base model whose weights stay in its files: every layer is there, and its values are read when they are asked for.

It is a model on the meta device. Layers that something has to be read from while an adapter is put on (whole modules it
trains, rows of tables, starts from the weight) carry hooks of accelerate that find the values in the files, as those of
a model that is offloaded do. All others have no values, until they are mounted for the length of a merge.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.offload import rests_elsewhere, without_hooks
from lorafa.errors import BackendError, CheckpointError, shorten
from lorafa.layers import LAYERS
from lorafa.models.checkpoint_names import Group, Names, names_of
from lorafa.storage.fingerprint import describe, described_rows, some_rows
from lorafa.storage.model_files import ModelFiles
from lorafa.surgery.walk import joined


def empty_model(kind: type[nn.Module], config: Any) -> Any:
    """A model of transformers on the meta device, with weights tied as its config says."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and lasting buffers of a module and all inside it, shared ones at each of their names."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for path, inner in module.named_modules(remove_duplicate=False):
        for key, buffer in inner._buffers.items():
            if buffer is not None and key not in inner._non_persistent_buffers_set:
                found[joined(path, key)] = buffer
    return found


@dataclass
class Skeleton:
    """A model on the meta device beside the files of its weights."""

    model: Any
    files: ModelFiles
    names: Names
    ties: dict[str, tuple[str, ...]]
    """Name of a tensor -> all names of the parameter, itself among them."""
    by_name: dict[str, Group] = field(init=False)
    like: dict[str, Tensor] = field(init=False)
    """Name -> a tensor of the shape and dtype in which values are given."""
    _kept: tuple[Group, dict[str, Tensor]] | None = None
    """What was read last: a layer asks for its weight more than once."""
    _blank: dict[int, Tensor] = field(default_factory=dict)
    """Tensors that stand for values that are not read yet."""

    def __post_init__(self) -> None:
        self.by_name = self.names.by_name()

    @classmethod
    def of(cls, model: Any, files: ModelFiles, dtype: torch.dtype | None) -> Skeleton:
        """A model from :func:`empty_model` with the files of its weights.

        Args:
            dtype: that weights are to have in the end; None: each its own. Values are given in one that holds both
                what is stored and this.

        Raises:
            CheckpointError: the files hold what no update can be added to, or no conversion leads to the model.
        """
        names = names_of(model, {name: stored.shape for name, stored in files.tensors.items()})
        found = tensors_of(model)
        aliases: dict[int, list[str]] = {}
        for name, tensor in found.items():
            aliases.setdefault(id(tensor), []).append(name)
        ties = {name: tuple(aliases[id(tensor)]) for name, tensor in found.items()}
        skeleton = cls(model, files, names, ties)
        skeleton._set_dtypes(dtype)
        skeleton.like = tensors_of(model)
        return skeleton

    def group_of(self, name: str) -> Group | None:
        """The tensors in the files that hold a tensor of the model, under its own name or one it is tied to."""
        own = self.by_name.get(name)
        return own or next((self.by_name[alias] for alias in self.ties[name] if alias in self.by_name), None)

    def _set_dtypes(self, dtype: torch.dtype | None) -> None:
        new: dict[int, Tensor] = {}
        for owner, key, name in _slots(self.model):
            tensor = owner._parameters[key] if key in owner._parameters else owner._buffers[key]
            assert tensor is not None
            group = self.group_of(name)
            stored = [self.files.tensors[each].dtype for each in group.stored] if group else [tensor.dtype]
            wide = stored[0]
            for each in stored[1:]:
                wide = torch.promote_types(wide, each)
            if dtype is not None and wide.is_floating_point and wide.itemsize > 1:
                wide = torch.promote_types(wide, dtype)
            made = new.get(id(tensor))
            if made is None:
                made = torch.empty(tensor.shape, dtype=wide, device="meta")
                made = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
                new[id(tensor)] = made
            (owner._parameters if key in owner._parameters else owner._buffers)[key] = made  # type: ignore[index,assignment]

    def fits(self, name: str) -> bool:
        """Whether the files hold a tensor in the shape that the model has."""
        group = self.group_of(name)
        if group is None:
            return False
        if group.conversion is not None:
            return True  # was tried on shapes
        return self.files.tensors[group.stored[0]].shape == tuple(self.like[name].shape)

    def value(self, name: str) -> Tensor:
        """The values of a tensor of the model; nan where the files have none in its shape."""
        group, like = self.group_of(name), self.like[name]
        if group is not None:
            if self._kept is None or self._kept[0] is not group:
                self._kept = None  # before the next one is read
                read = {each: self.files.tensors[each].read() for each in group.stored}
                self._kept = group, group.to_model(read, self.model)
            made = self._kept[1]
            found = next(made[alias] for alias in (name, *self.ties[name]) if alias in made)
            if found.shape == like.shape:
                return found.to(like.dtype)
        return torch.full(like.shape, torch.nan if like.is_floating_point() else 0, dtype=like.dtype)

    def forget(self) -> None:
        """Let go of what was read last."""
        self._kept = None

    def fingerprint(self, layers: Iterable[str]) -> dict[str, Any]:
        """Describes the weights of layers by name, where they have one, as :mod:`lorafa.storage.fingerprint` does."""
        found: dict[str, Any] = {}
        for layer in layers:
            name = f"{layer}.weight"
            group = self.group_of(name) if name in self.ties else None
            if group is None:
                continue
            stored = self.files.tensors[group.stored[0]]
            if group.conversion is None and len(stored.shape) > 1 and stored.shape[0]:
                found[layer] = described_rows(stored.rows(some_rows(stored.shape[0])), stored.shape, stored.dtype)
            else:
                made = group.to_model({each: self.files.tensors[each].read() for each in group.stored}, self.model)
                found[layer] = describe(next(made[alias] for alias in (name, *self.ties[name]) if alias in made))
        return found

    # ---- values in the model

    def fill_in(self, names: Iterable[str]) -> None:
        """Give tensors memory of their own, with the values of the files where these have them."""
        new: dict[int, Tensor] = {}
        wanted = {alias for name in names for alias in self.ties[name]}
        for owner, key, name in _slots(self.model):
            tensor = owner._parameters.get(key)
            if name not in wanted or tensor is None or not tensor.is_meta:
                continue
            if id(tensor) not in new:
                value = self.value(name)
                new[id(tensor)] = nn.Parameter(value.clone(), requires_grad=False)
            owner._parameters[key] = new[id(tensor)]  # type: ignore[assignment]
            self.like |= dict.fromkeys(self.ties[name], new[id(tensor)])
        self.forget()

    def bring_in(self, modules: Iterable[str]) -> None:
        """Let the tensors of modules be read from the files when they are asked for; what is in memory stays there."""
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        for path in modules:
            module = self.model.get_submodule(path)
            own = {key: t for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
            lasting = [key for key in own if key not in module._non_persistent_buffers_set]
            if not any(own[key].is_meta for key in lasting):
                continue
            filled = {key: p for key, p in module._parameters.items() if p is not None and not p.is_meta}
            hook = AlignDevicesHook(offload=True, weights_map=_InFiles(self, path, lasting))
            add_hook_to_module(module, hook)
            module._parameters.update(filled)

    def fill_rest(self) -> None:
        """Put nan, which takes no memory, where nothing is brought in: what has to be in memory can be adapted then."""
        hooked = {id(module) for module in self.model.modules() if rests_elsewhere(module)}
        new: dict[int, Tensor] = {}
        for owner, key, _ in _slots(self.model):
            tensors = owner._parameters if key in owner._parameters else owner._buffers
            tensor = tensors[key]
            assert tensor is not None
            if id(owner) in hooked or not tensor.is_meta:
                continue
            if id(tensor) not in new:
                unknown = torch.nan if tensor.is_floating_point() else 0
                made = torch.full((), unknown, dtype=tensor.dtype).expand(tensor.shape)
                new[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
            tensors[key] = new[id(tensor)]  # type: ignore[assignment]
        self._blank = {id(tensor): tensor for tensor in new.values()}

    def _has_values(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and id(tensor) not in self._blank

    def mounted(self, module: nn.Module, path: str, *, empty: bool = False) -> nn.Module:
        """A copy of a module with the values of its own tensors; children are shared.

        Args:
            path: the module's name in the model before anything was put on it.
            empty: zeros in the place of the values, which no memory is taken for.
        """
        new = without_hooks(module)
        for tensors in (new._parameters, new._buffers):
            for key, tensor in tensors.items():
                if tensor is None or self._has_values(tensor) or key in module._non_persistent_buffers_set:
                    continue
                if empty:
                    value = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                else:
                    value = self.value(joined(path, key))
                made = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                tensors[key] = made  # type: ignore[assignment]
        return new


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, key, name) of every parameter and lasting buffer, shared ones at each of their names."""
    seen: set[tuple[int, str]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or key in module._non_persistent_buffers_set or (id(module), key) in seen:
                continue
            seen.add((id(module), key))
            yield module, key, joined(path, key)


def layers_with_a_weight(model: nn.Module) -> list[str]:
    """The layers whose weight a start could be computed from."""
    found, inside = [], set()
    for path, module in model.named_modules():
        backend = backend_of(module)
        if backend is None:
            continue
        inner = LAYERS.get(backend.host).inner_layers
        inside |= {f"{path}.{child}" for child in inner}
        if backend.can_rest and not inner and path not in inside:
            found.append(path)
    return found


class _InFiles(Mapping[str, Tensor]):
    """The tensors of one module by their keys in it, as a hook of accelerate asks for them."""

    def __init__(self, skeleton: Skeleton, path: str, keys: Sequence[str]) -> None:
        self._skeleton = skeleton
        self._names = {key: joined(path, key) for key in keys}
        self.state_dict: dict[str, Tensor] = {}  # nothing is in memory
        self.index = {
            key: {"safetensors_file": str(skeleton.files.folder), "weight_name": skeleton.ties[name][0]}
            for key, name in self._names.items()
        }
        """By which :func:`lorafa.backends.offload.identity_of` knows what shares a weight."""

    def __getitem__(self, key: str) -> Tensor:
        return self._skeleton.value(self._names[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def require_numbers(files: ModelFiles, config: Mapping[str, Any]) -> None:
    """Raises BackendError for a base whose files hold codes in the place of weights."""
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "quantized") if isinstance(found, dict) else "quantized"
        raise BackendError(
            f"The base {str(files.folder)!r} is quantized ({method}): its files hold codes, to which no update can be "
            "added. Give the model it was quantized from: --base, base=; or load it and call merge_into_dense. Nothing "
            "was written."
        )


def require_complete(skeleton: Skeleton, given: Iterable[str]) -> None:
    """Raises CheckpointError where a tensor of the model is in no file and is not among ``given``."""
    model, known = skeleton.model, set(given)
    lasting = set(model.state_dict())
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()  # transformers makes these by itself
    missing = [
        name
        for name in skeleton.ties
        if name in lasting and name not in known and not skeleton.fits(name)
        if not any(re.search(pattern, name) for pattern in patterns)
    ]
    if not missing:
        return
    stored = skeleton.files.tensors
    shapes = []
    for name in missing:
        group = skeleton.group_of(name)
        has = f"has {list(stored[group.stored[0]].shape)}, " if group else "has none, "
        shapes.append(f"{name} ({has}the model {list(skeleton.like[name].shape)})")
    raise CheckpointError(
        f"The files of {skeleton.files.folder} do not hold {len(missing)} tensors of a {type(model).__name__} as it "
        f"would be merged, and the adapter does not bring them: {shorten(shapes, 3)}. Give the base the adapter was "
        "trained on; where its vocabulary was resized, save the adapter with save_embedding_layers=True. Nothing was "
        "written."
    )
