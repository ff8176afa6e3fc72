"""Put adapters on a model in two steps: plan (may fail, changes nothing), then apply (cannot fail halfway)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lorafa.adapter import update_factors
from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.backends.parameter import ParameterBackend
from lorafa.config import LoraConfig, require_available
from lorafa.errors import AdapterError, BackendError, CalibrationError, ConfigError
from lorafa.initializers import INITIALIZERS, Start, find_start
from lorafa.initializers.base import InitResult, LayerSpec, factor_shapes
from lorafa.layers import LAYERS
from lorafa.layers.base import LoraLayer
from lorafa.layers.experts import LoraExperts
from lorafa.layers.parts import AdapterParts
from lorafa.surgery.auxiliary import AuxiliaryPlan, plan_auxiliary, with_heads
from lorafa.surgery.targets import Target, find_targets, resolved_targets
from lorafa.surgery.walk import Host, Parents, base_parameters, hosts, lora_layers
from lorafa.variants import variant_of

Stats = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Options:
    """How adapters are made, apart from what the config says."""

    autocast_adapter_dtype: bool = True
    """Keep adapters in float32 where the base is float16 or bfloat16."""
    low_cpu_mem_usage: bool = False
    """Make the factors on the meta device, to be filled from a file."""
    from_file: bool = False
    """The config comes with a file that will fill every tensor: patterns may match nothing, starts are not drawn."""
    file_has_starts: bool = False
    """The file also holds the frozen starts A0 and B0, so none is computed."""


@dataclass(frozen=True)
class PlannedLayer:
    target: Target
    parts: AdapterParts


@dataclass(frozen=True)
class Plan:
    """Everything an adapter needs, built; the model is untouched."""

    name: str
    config: LoraConfig
    """A copy, in which defaults that depend on the model are spelled out."""
    targets: list[Target]
    layers: list[PlannedLayer]
    """One a target, and for nn.MultiheadAttention one more, for its output projection."""
    auxiliary: AuxiliaryPlan


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raises AdapterError for a name that is taken or that could not be a part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"An adapter name is a non-empty string without a dot, found {name!r}.")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise AdapterError(
            f"{name!r} cannot be an adapter name: torch's containers of modules have an attribute of that name. "
            f"Call it {name + '_1'!r}, for example."
        )
    if any(name in host.adapters for _, host in lora_layers(model)):
        raise AdapterError(
            f"The model already has an adapter {name!r}. Choose another name, or delete_adapter({name!r}) first."
        )


def adapter_names(model: nn.Module) -> list[str]:
    """Every adapter some layer of the model carries, in order of appearance."""
    names: dict[str, None] = {}
    for _, host in hosts(model):
        names |= dict.fromkeys(host.adapters if isinstance(host, LoraLayer) else ())
    return list(names)


def plan(
    model: nn.Module, config: LoraConfig, name: str, options: Options | None = None, stats: Stats | None = None
) -> Plan:
    """Build adapter ``name`` without touching the model; raise if any part of it cannot be built.

    Raises:
        NotAvailableError: the config asks for a feature this version does not have.
        AdapterError: the name is taken or unusable.
        TargetError: a pattern matches nothing, or something that cannot carry an adapter.
        ConfigError: rank, variant or start do not go with a layer.
        CalibrationError: the start needs statistics that were not given.
    """
    options = options or Options()
    config.check()
    require_available(config, trained=options.from_file)
    check_adapter_name(model, name)
    config = with_heads(config)
    targets = find_targets(model, config, lenient=options.from_file)
    config = replace(config, target_modules=resolved_targets(model, config, targets))
    auxiliary = plan_auxiliary(model, config, [target.module for target in targets], lenient=options.from_file)
    seed = torch.initial_seed() if config.init_seed is None else config.init_seed
    layers: list[PlannedLayer] = []
    for target in targets:
        layers.append(PlannedLayer(target, _build(target, config, name, seed, options, stats or {})))
        if _kind(target) == "attention":
            layers.append(_out_proj(target, config, name, seed, options, stats or {}))
    return Plan(name, config, targets, layers, auxiliary)


def _backend(target: Target) -> Backend:
    if target.parameter is not None:
        return ParameterBackend(target.parameter)
    base = target.module.get_base_layer() if isinstance(target.module, LoraLayer) else target.module
    backend = backend_of(base)
    assert backend is not None  # find_targets has checked
    return backend


def _kind(target: Target) -> str:
    return _backend(target).host


def _base(target: Target) -> nn.Module:
    module = target.module
    while isinstance(module, LoraLayer):
        if target.parameter is None and module._pristine:
            return module._pristine[0]
        module = module.base_layer
    return module


def _build(target: Target, config: LoraConfig, name: str, seed: int, options: Options, stats: Stats) -> AdapterParts:
    backend, base = _backend(target), _base(target)
    path = target.name if target.parameter is None else f"{target.name}.{target.parameter}"
    variant = variant_of(config).of(config)
    if backend.host not in variant.hosts:
        raise ConfigError(
            f"{path}: {variant.name} is not defined on {backend.host} layers. Exclude it, or use plain LoRA."
        )
    _check_fits(path, backend.host, base, target.rank, config)
    scaling = config.scaling(target.rank, target.alpha)
    start_of = cast(Start, find_start(config.init_lora_weights))  # config.check() has found it
    initializer = INITIALIZERS.get(start_of.name)
    groups = cast(nn.Conv1d, base).groups if backend.host == "conv" else 1
    spec = LayerSpec(
        path, backend.host, target.rank, scaling, seed, name, groups, config.start_settings(), start_of.number
    )
    weight = _weight_or_shape(backend, base, needed=initializer.reads_weight or variant.reads_weight)
    if options.low_cpu_mem_usage and initializer.reads_weight and not options.from_file:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} computes its start from the weight, but "
            "low_cpu_mem_usage=True computes none. Drop one of the two."
        )
    layer_stats = stats.get(target.name, {})
    missing = [statistic for statistic in initializer.needs if statistic not in layer_stats]
    if missing:
        raise CalibrationError(
            f"init_lora_weights={config.init_lora_weights!r} needs {', '.join(missing)} of {path!r}; none was given. "
            "Collect these statistics and pass them as stats=."
        )
    filled_later = options.from_file and (not initializer.reads_weight or options.file_has_starts)
    if filled_later or options.low_cpu_mem_usage:
        device = "meta" if options.low_cpu_mem_usage else None
        A_shape, B_shape = factor_shapes(weight, target.rank)
        A0, B0 = torch.empty(A_shape, device=device), torch.empty(B_shape, device=device)
        result = InitResult(A0, B0, subtract_from_base=options.file_has_starts)
    else:
        result = initializer(weight, layer_stats, spec)
    dtype = _adapter_dtype(base, backend, options)
    A, B = result.A.to(dtype), result.B[..., : target.rank // groups].to(dtype)  # a grouped B sees its own group only
    start = (A.clone(), B.clone()) if result.subtract_from_base else None
    if filled_later or options.low_cpu_mem_usage:
        shapes = variant.extra_shapes(weight, target.rank)
        extras = {kind: torch.empty(shape, device=A.device) for kind, shape in shapes.items()}
    else:
        whole_A, whole_B = update_factors(A, B, start)
        extras = variant.initial_extras(weight, whole_A.to(weight.device), whole_B.to(weight.device), spec)
    bias = torch.zeros(B.shape[-2], device=A.device) if config.lora_bias else None
    return AdapterParts(
        A, B, target.rank, target.alpha, scaling, variant, dtype, bias, config.lora_dropout, config.use_rslora,
        start, extras,
    )  # fmt: skip


def _check_fits(path: str, kind: str, base: nn.Module, rank: int, config: LoraConfig) -> None:
    if kind == "conv" and rank % cast(nn.Conv1d, base).groups:
        raise ConfigError(
            f"{path}: rank {rank} is not divisible by the convolution's groups={base.groups}. "
            "Choose another rank (rank_pattern), or exclude the layer."
        )
    if kind == "embedding" and type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
        raise BackendError(
            f"{path}: {type(base).__name__} has a forward of its own, so which rows it looks up cannot be known here, "
            "and an adapter on it might be wrong. Leave it out with exclude_modules."
        )
    if kind == "embedding" and getattr(base, "max_norm", None) is not None:
        raise BackendError(
            f"{path}: max_norm={base.max_norm} makes every lookup renormalise the rows it reads in the table itself, "
            "so an update beside the table is not one of the table. Leave it out with exclude_modules."
        )
    if config.lora_bias and kind == "attention" and cast(nn.MultiheadAttention, base).in_proj_bias is None:
        raise ConfigError(
            f"{path}: lora_bias has nothing to act on in nn.MultiheadAttention(bias=False). Exclude it, or set "
            "lora_bias=False."
        )
    if config.lora_bias and kind in ("embedding", "experts"):
        raise ConfigError(f"{path}: lora_bias is not defined on {kind} layers. Exclude it, or set lora_bias=False.")
    if config.lora_dropout and kind == "experts":
        raise ConfigError(
            f"{path}: lora_dropout={config.lora_dropout} cannot act on a bare parameter, which has no input of its "
            "own. Set lora_dropout=0."
        )
    if config.lora_dropout and not LAYERS.get(kind).takes_dropout:
        warnings.warn(
            f"{path}: lora_dropout does not act on {kind} layers: the update has no input to drop there.", stacklevel=2
        )


def _weight_or_shape(backend: Backend, base: nn.Module, *, needed: bool) -> Tensor:
    if needed or backend.host == "experts":  # whose number is in no shape (out, in)
        return backend.weight(base).detach()
    return torch.empty(backend.shape(base), device="meta")


def _adapter_dtype(base: nn.Module, backend: Backend, options: Options) -> torch.dtype:
    dtype = backend.dtype(base)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return torch.float32
    return torch.float32 if options.autocast_adapter_dtype and dtype.itemsize == 2 else dtype


def _out_proj(target: Target, config: LoraConfig, name: str, seed: int, options: Options, stats: Stats) -> PlannedLayer:
    """The adapter on the output projection that goes with the one on nn.MultiheadAttention's input projection."""
    attention = cast(nn.MultiheadAttention, _base(target))
    inner = replace(
        target,
        name=f"{target.name}.out_proj",
        path=f"{target.path}.base_layer.out_proj",
        module=attention.out_proj,
    )
    parts = _build(inner, config, name, seed, options, stats)
    if config.attention_out_proj_twice:
        parts = replace(parts, times=2)
    return PlannedLayer(inner, parts)


@dataclass(frozen=True)
class Undo:
    """How to take an applied plan back: the model is bit-identical after it, ``requires_grad`` included."""

    name: str
    requires_grad: list[tuple[nn.Parameter, bool]]
    """Of the base's parameters; a plan changes no other adapter's."""
    replaced: list[tuple[nn.Module, str, nn.Module]]
    carriers: list[Host]
    """Wrappers that were there before and got the adapter."""

    def __call__(self) -> None:
        for parent, child, old in reversed(self.replaced):
            setattr(parent, child, old)
        for host in self.carriers:
            host.detach_adapter(self.name)
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)


def apply(model: nn.Module, planned: Plan) -> Undo:
    """Carry out a plan: wrap what is not wrapped, attach the adapter, freeze everything that is not an adapter.

    The adapter is attached inactive; :func:`lorafa.surgery.adapters.set_adapter` makes it count.
    """
    parents, before = Parents(model), [host for _, host in hosts(model)]
    flags = [(parameter, parameter.requires_grad) for _, parameter in base_parameters(model)]
    undo = Undo(planned.name, flags, parents.history, before)
    if not before:
        model.requires_grad_(False)
    try:
        for layer in planned.layers:
            _host_for(model, layer.target, parents).attach(planned.name, layer.parts)
        planned.auxiliary.apply(planned.name, parents)
        if planned.config.bias != "none":
            _train_biases(model, planned.config.bias)
    except BaseException:
        undo()
        raise
    return undo


def _host_for(model: nn.Module, target: Target, parents: Parents) -> LoraLayer:
    module = target.module
    if target.parameter is not None:
        while isinstance(module, LoraExperts):
            if module.parameter_name == target.parameter:
                return module
            module = module.base_layer
        module = model.get_submodule(target.path)  # with the wrappers of the module's other parameters around it
        wrapper: LoraLayer = LoraExperts(module, target.parameter)
    elif isinstance(module, LoraLayer):
        return module
    else:
        wrapper = LAYERS.get(_kind(target))(module)
    parents.replace(module, wrapper)
    return wrapper


def _train_biases(model: nn.Module, which: str) -> None:
    if which == "all":
        wrapped = {id(p) for _, host in hosts(model) if not isinstance(host, LoraLayer) for p in host.parameters()}
        for name, parameter in base_parameters(model):
            if name.rpartition(".")[2] == "bias" and id(parameter) not in wrapped:
                parameter.requires_grad_(True)
        return
    for _, layer in lora_layers(model):
        bias = layer.bias
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)
