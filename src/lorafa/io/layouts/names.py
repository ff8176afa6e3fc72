"""The names of a model's layers and parameters, and where a name of an older version of the model is in this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from lorafa.backends import backend_of
from lorafa.backends.embedding import is_table
from lorafa.backends.parameter import ParameterBackend
from lorafa.errors import CheckpointError
from lorafa.surgery.stacked import stacked_parameters
from lorafa.surgery.walk import Place, dotted_ends, places, pristine_of, tied_groups

Shape = tuple[int, ...]

_MOVES = (
    (r"^module\.", ""),  # DistributedDataParallel around a model with adapters injected
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head(?=\.|$)", "lm_head"),
    (r"^(vision_tower|multi_modal_projector|visual|connector|audio_tower)(?=\.|$)", r"model.\1"),
    (r"^model\.(?=(layers|embed_tokens|norm)\b)", "model.language_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head(?=\.|$)", "language_model.lm_head"),
    (r"^model\.(vision_tower|multi_modal_projector|visual|connector|audio_tower)(?=\.|$)", r"\1"),
    (r"^model\.language_model\.", "model."),
)
"""Parts of models of images and text that transformers 4.52 has moved, in both directions, and a wrapper's name."""


class BaseNames:
    """What a file's names are compared with; nothing is looked up before it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._homes: dict[str, str | None] = {}

    @cached_property
    def _places(self) -> list[Place]:
        return [place for place in places(self._model) if place.name]

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every module by its name as it was before any layer was wrapped."""
        return {place.name: pristine_of(place.module) for place in self._places}

    @cached_property
    def layers(self) -> Mapping[str, Shape]:
        """The layers that can carry an adapter, with the shape of their weight: (out, in), or that of a kernel."""
        found: dict[str, Shape] = {}
        for name, module in self.modules.items():
            if (backend := backend_of(module)) is not None:
                weight = module._parameters.get(backend.weight_name)
                kernel = weight is not None and weight.dim() > 2
                found[name] = tuple(weight.shape) if weight is not None and kernel else backend.full_shape(module)
        return found

    @cached_property
    def parameters(self) -> Mapping[str, Shape]:
        """Every parameter with its shape; stacks of experts as (E, out, in), however they are stored."""
        found: dict[str, Shape] = {}
        for name, module in self.modules.items():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    stack = parameter.dim() == 3
                    shape = ParameterBackend(key).full_shape(module) if stack else tuple(parameter.shape)
                    found[f"{name}.{key}"] = shape
        return found

    @cached_property
    def routers(self) -> frozenset[str]:
        """Modules whose ``weight`` is what a linear layer was in transformers 4: those that choose among experts."""
        return frozenset(s.place.name for s in stacked_parameters(self._places) if s.parameter == "weight")

    @cached_property
    def tied(self) -> Mapping[str, list[str]]:
        """The first of each group of modules that share a weight -> the others."""
        return {group[0].name: [place.name for place in group[1:]] for group in tied_groups(self._places)}

    def carries(self, name: str, parameters: Collection[str]) -> bool:
        """Whether the model has a layer of that name, or a module with one of the ``parameters`` of a config."""
        module = self.modules.get(name)
        if module is None or backend_of(module) is not None:
            return module is not None
        return any(end in parameters for key in module._parameters for end in dotted_ends(f"{name}.{key}"))

    def is_table(self, name: str) -> bool:
        """Whether a module looks up rows."""
        return is_table(self.modules[name])

    def home(self, name: str) -> str | None:
        """The module that ``name`` stands for: of that name, or of one that it had in an older version of the model.

        Raises:
            CheckpointError: it may be one of two.
        """
        if name in self.modules:
            return name
        if name not in self._homes:
            self._homes[name] = self._elsewhere(name)
        return self._homes[name]

    def _elsewhere(self, name: str) -> str | None:
        found = sorted(other for other in self.former(name) if other in self.modules)
        if len(found) > 1:
            raise CheckpointError(
                f"The file's {name!r} may be {' or '.join(map(repr, found))} of this model. Say which by key_mapping. "
                "Nothing was loaded."
            )
        return found[0] if found else None

    def former(self, name: str) -> set[str]:
        """What a module of this name may be called here."""
        others = {re.sub(old, new, name, count=1) for old, new in _MOVES}
        for rename in self._renamings:
            others.add(rename(name))
        return others - {name}

    @cached_property
    def _renamings(self) -> list[Callable[[str], str]]:
        """How transformers itself reads files of older versions of this model; empty for models of others."""
        if not any(cls.__module__.partition(".")[0] == "transformers" for cls in type(self._model).__mro__):
            return []
        older: Any = getattr(self._model, "_checkpoint_conversion_mapping", None) or {}
        found = [_by_pattern(old, new) for old, new in dict(older).items()]
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key
        except ImportError:  # versions that had no such table
            return found
        table = get_model_conversion_mapping(self._model)  # type: ignore[arg-type]
        renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        if not renamings:
            return found

        def rename(name: str) -> str:
            return str(rename_source_key(f"{name}.weight", renamings, [])[0]).removesuffix(".weight")

        return [*found, rename]


def _by_pattern(old: str, new: str) -> Callable[[str], str]:
    return lambda name: re.sub(old, new, name)
