"""Which layers a config means. Every pattern must match something; what cannot carry an adapter is an error."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.backends.oddities import described
from lorafa.backends.offload import in_memory
from lorafa.backends.parameter import ParameterBackend
from lorafa.config import LoraConfig
from lorafa.errors import TargetError, warn
from lorafa.layers import LAYERS
from lorafa.layers.base import LoraLayer
from lorafa.settings.expressions import COUNTED, INSIDE, expressions
from lorafa.surgery.architectures import DEFAULT_TARGETS
from lorafa.surgery.bypassed import Bypassed
from lorafa.surgery.carriers import check_carries, is_linear_of_others, kind_of_layer
from lorafa.surgery.matched import ALL_LINEAR, Patterns
from lorafa.surgery.stacked import name_stacked, stacked_parameters, warn_of_left_out
from lorafa.surgery.walk import Place, dotted_ends, embedding_of, places, uncompiled

_CLASSIFIER_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Target:
    """One layer, or one parameter of a module, that gets an adapter."""

    name: str
    """Dotted name of the module as it was before wrapping."""
    path: str
    """Dotted name of the module now."""
    module: nn.Module
    parameter: str | None
    rank: int
    alpha: float

    @property
    def full_name(self) -> str:
        return self.name if self.parameter is None else f"{self.name}.{self.parameter}"

    @property
    def base(self) -> nn.Module:
        """The module without wrappers."""
        return self.module.get_base_layer() if isinstance(self.module, LoraLayer) else self.module

    @property
    def backend(self) -> Backend:
        backend = backend_of(self.base) if self.parameter is None else ParameterBackend(self.parameter)
        assert backend is not None  # find_targets has checked
        return backend

    @property
    def layer_type(self) -> type[LoraLayer]:
        """The kind of layer that carries its adapters."""
        return LAYERS.get(self.backend.host)

    @property
    def wrapper(self) -> LoraLayer | None:
        """The layer that carries adapters of this very target already."""
        layer = self.module
        while isinstance(layer, LoraLayer) and layer.nests:
            if layer.parameter_name == self.parameter:
                return layer
            layer = layer.base_layer
        return layer if isinstance(layer, LoraLayer) else None

    def to_wrap(self, outermost: nn.Module) -> nn.Module:
        """What a new layer of a parameter goes around, where ``outermost`` stands in the place of the module now.

        Layers of several parameters of one module are nested as files have them, whichever was added first: those of
        parameters before this one are inside.
        """
        position, layer = list(self.base._parameters).index(str(self.parameter)), outermost
        while isinstance(layer, LoraLayer) and layer.nests and layer.position > position:
            layer = layer.base_layer
        return layer

    def weight(self) -> Tensor:
        """The pristine weight, (out, in) or (E, out, in)."""
        return self.backend.weight(in_memory(self.base)) if self.wrapper is None else self.wrapper.base_weight()


def find_targets(
    model: nn.Module, draft: LoraConfig, named: list[Place], *, lenient: bool = False
) -> list[Target]:
    """The layers a config means, in the order of the model, each once however many names it has.

    The stacked experts that "all-linear" takes in are named in ``target_parameters`` of the draft.

    Args:
        named: every named place of the model.
        lenient: warn of patterns that match nothing instead of raising; for a config that comes with a file, whose
            tensors are checked one by one anyway.

    Raises:
        TargetError: a pattern matches nothing, or matches something that cannot carry an adapter.
    """
    patterns = Patterns(draft)
    _take_stacked(draft, named, patterns)
    chosen = _modules(model, named, draft, patterns, lenient)
    targets = [_target(place, None, draft, patterns) for place in chosen]
    targets += _parameters(named, draft, patterns, taken={id(place.module) for place in chosen})
    patterns.report(named, warn_only=lenient and bool(targets), found=bool(targets))
    if not lenient and not _is_all_linear(draft.target_modules):
        warn_of_left_out(named, draft, {target.full_name for target in targets})
    if not targets and draft.exclude_modules and draft.target_modules:
        raise TargetError(
            f"exclude_modules={draft.exclude_modules!r} takes away every layer that target_modules names. Narrow it."
        )
    if not targets:
        raise TargetError(
            "The config names no layer at all: target_modules and target_parameters are both empty. "
            "Set target_modules='all-linear', or name layers in one of them."
        )
    return targets


def spelled_targets(
    model: nn.Module, config: LoraConfig, named: Sequence[Place], targets: Sequence[Target]
) -> set[str] | str | None:
    """``target_modules`` to keep and save, with None and "all-linear" spelled out.

    None becomes the architecture's usual layers, "all-linear" the shortest ends of names that mean just ``targets``.
    """
    wanted = config.target_modules
    if wanted is None:
        return None if config.target_parameters else _default_targets(model)
    if not _is_all_linear(wanted):
        return wanted if isinstance(wanted, str) else set(wanted)
    chosen = {id(target.module) for target in targets if target.parameter is None}
    others = {end for place in named if id(place.module) not in chosen for end in dotted_ends(place.name)}
    names = [target.name for target in targets if target.parameter is None]
    return {next((end for end in dotted_ends(name) if end not in others), name) for name in names}


def _is_all_linear(wanted: object) -> bool:
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def takes_parameters(model: nn.Module, config: LoraConfig) -> bool:
    """Whether a config means single parameters of the model, stacked experts among them."""
    draft = copy.copy(config)
    _take_stacked(draft, [place for place in places(model) if place.name], Patterns(draft))
    return bool(draft.target_parameters)


def _take_stacked(draft: LoraConfig, named: list[Place], patterns: Patterns) -> None:
    """Name in ``target_parameters`` of the draft the stacked experts that "all-linear" takes in."""
    if not _is_all_linear(draft.target_modules):
        return
    kept = [
        s.name
        for s in stacked_parameters(named)
        if not _inside_saved(s.place.name, draft)
        and not any(patterns.matches("exclude_modules", draft.exclude_modules, n) for n in (s.place.name, s.name))
    ]
    name_stacked(draft, named, kept)


def _modules(
    model: nn.Module, named: list[Place], config: LoraConfig, patterns: Patterns, lenient: bool
) -> list[Place]:
    wanted = config.target_modules
    if wanted is None:
        if config.target_parameters:
            return []
        wanted = _default_targets(model)
    bypassed = Bypassed(model, named)
    if _is_all_linear(wanted):
        found = [p for p in _all_linear(model, named, config) if not bypassed.why(p)]
        found = [p for p in found if not patterns.matches("exclude_modules", config.exclude_modules, p.name)]
        if not found and not config.target_parameters:
            raise TargetError(
                "target_modules='all-linear' finds no linear layer in the model that is not excluded. Name the layers "
                "to adapt, or narrow exclude_modules."
            )
    else:
        found = [place for place in named if _is_wanted(place.name, wanted, config, patterns)]
    for place in found:
        check_carries(place)
        why = bypassed.passed_by(place) if config.ensure_weight_tying else bypassed.why(place)
        if why is not None and not lenient:
            raise TargetError(why)
        if why is not None:
            warn(why)
    return _once(found)


def _is_wanted(name: str, wanted: Collection[str] | str, config: LoraConfig, patterns: Patterns) -> bool:
    if _inside_saved(name, config):
        return False
    excluded = patterns.matches("exclude_modules", config.exclude_modules, name)
    by_index = not isinstance(wanted, str) and config.layers_to_transform not in (None, []) and name not in wanted
    if by_index and not _has_index(name, config):
        return False
    return patterns.matches("target_modules", wanted, name) and not excluded


def is_meant(config: LoraConfig, name: str) -> bool:
    """Whether the names and expressions of a config mean a module of this name as a target.

    Raises:
        ConfigError: an expression takes too long.
    """
    return config.target_modules is not None and _is_wanted(name, config.target_modules, config, Patterns(config))


def _inside_saved(name: str, config: LoraConfig) -> bool:
    saved = tuple(config.modules_to_save or ())
    return bool(saved) and expressions("modules_to_save", saved, INSIDE).first(name) is not None


def _has_index(name: str, config: LoraConfig) -> bool:
    """Whether the first layer index in the name is one of layers_to_transform."""
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    found = expressions("layers_pattern", tuple(lists), COUNTED).index_after(name) if lists else _first_number(name)
    wanted = config.layers_to_transform
    return found is not None and found in ([wanted] if isinstance(wanted, int) else wanted or [])


def _first_number(name: str) -> int | None:
    """The first part of a name that is a number and stands between two others, of three or more before it first."""
    parts = name.split(".")
    inner = [part for part in parts[2:-1] if part.isdecimal()] or [part for part in parts[1:2] if part.isdecimal()]
    return int(inner[0]) if inner and len(parts) > 2 else None


def _default_targets(model: nn.Module) -> set[str] | str:
    config = getattr(model, "config", None)
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise TargetError(
            f"target_modules is not set, and there is no usual choice for models of type {model_type!r}. "
            "Set target_modules='all-linear', or name the layers."
        )
    targets = DEFAULT_TARGETS[model_type]
    return targets if isinstance(targets, str) else set(targets)


def _all_linear(model: nn.Module, named: list[Place], config: LoraConfig) -> list[Place]:
    """Every linear layer but the output head (of sequence classifiers: the classifier) and the insides of attention.

    Those that no back end knows are among them, so that they are refused: a model adapted by halves is no "all".
    """
    head = embedding_of(model, "get_output_embeddings")
    if head is None and config.task_type == "SEQ_CLS":
        head = next((h for h in (getattr(model, n, None) for n in _CLASSIFIER_HEADS) if h is not None), None)
        head = uncompiled(head) if head is not None else None
    kinds = [(place, kind_of_layer(place.module)) for place in named]
    with_inner = tuple(place.name + "." for place, kind in kinds if kind is not None and kind.inner_layers)
    return [
        place
        for place, kind in kinds
        if (is_linear_of_others(place.module) if kind is None else kind.is_linear)
        and place.module is not head
        and not place.name.startswith(with_inner)
        and not _inside_saved(place.name, config)
    ]


def _once(found: list[Place]) -> list[Place]:
    seen: set[int] = set()
    return [place for place in found if id(place.module) not in seen and not seen.add(id(place.module))]  # type: ignore[func-returns-value]


def _target(place: Place, parameter: str | None, config: LoraConfig, patterns: Patterns) -> Target:
    name = place.name if parameter is None else f"{place.name}.{parameter}"
    rank = patterns.lookup("rank_pattern", config.rank_pattern, name)
    alpha = patterns.lookup("alpha_pattern", config.alpha_pattern, name)
    return Target(
        place.name,
        place.path,
        place.module,
        parameter,
        int(config.r if rank is None else rank),
        config.lora_alpha if alpha is None else alpha,
    )


def _parameters(named: list[Place], config: LoraConfig, patterns: Patterns, taken: set[int]) -> list[Target]:
    wanted = set(config.target_parameters or ())
    targets: list[Target] = []
    seen: set[tuple[int, str]] = set()
    for place in named if wanted else ():
        inner = place.module.get_base_layer() if isinstance(place.module, LoraLayer) else place.module
        for parameter, value in inner.named_parameters(recurse=False):
            name = f"{place.name}.{parameter}"
            if (id(inner), parameter) in seen or not patterns.matches("target_parameters", wanted, name):
                continue
            seen.add((id(inner), parameter))
            if id(place.module) in taken or (isinstance(place.module, LoraLayer) and not place.module.nests):
                raise TargetError(
                    f"target_parameters: {name!r} belongs to a layer that target_modules adapts as a whole. "
                    "Take it out of one of the two (target_modules=[] adapts parameters only)."
                )
            if value.dim() not in (2, 3):
                raise TargetError(
                    f"target_parameters: {name!r} has {value.dim()} dimensions {tuple(value.shape)}; an adapter needs "
                    "a matrix (out, in) or a stack of them (experts, out, in)."
                )
            odd = ParameterBackend(parameter).serves(inner)
            if odd is not None:
                raise TargetError(
                    f"target_parameters: {name!r} cannot carry an adapter: of this {described(inner)}, {odd}. Take it "
                    "out of target_parameters."
                )
            targets.append(_target(place, parameter, config, patterns))
    return targets
