"""Build the adapter of one layer: check that everything goes with the layer, then make its factors and extras."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafa.adapter import LooseTensors, Variant, update_factors
from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.backends.oddities import described
from lorafa.config import LoraConfig
from lorafa.errors import BackendError, CalibrationError, CheckpointError, ConfigError
from lorafa.initializers import INITIALIZERS, SWITCHES
from lorafa.initializers.base import DegenerateError, InitResult
from lorafa.layers.parts import AdapterParts
from lorafa.spec import LayerSpec, factor_shapes
from lorafa.surgery.quantize import require_replaceable, standing_in
from lorafa.surgery.resolve import Resolved
from lorafa.surgery.stats import LayerStats, Stats
from lorafa.surgery.targets import Target
from lorafa.variants import formula_of, variant_types


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
    partly_filled: bool = False
    """The file may leave some tensors out, so all have values before: B of zeros whatever the start, so that what is
    not filled changes nothing."""
    dtype: torch.dtype | None = None
    """Keep the factors in this dtype; None goes by ``autocast_adapter_dtype``."""
    quantized: Collection[str] = ()
    """Layers whose base was quantized when the file was made; here it is quantized the same way, if it is not yet."""


class Builder:
    """Builds the adapter ``name`` layer by layer; no model is touched."""

    def __init__(self, resolved: Resolved, name: str, options: Options, stats: Stats) -> None:
        """Read everything that is the same for all layers.

        Raises:
            ConfigError: the start reads no statistics, and some were given.
        """
        self.config, self.name, self.options, self.stats = resolved.config, name, options, stats
        self.seed = self.config.seed
        self.variants = variant_types(self.config)
        self.initializer, self.number = resolved.start.initializer, resolved.start.number
        self.settings = resolved.settings
        self.reads_weight = self.initializer.reads_weight or any(variant.reads_weight for variant in self.variants)
        self._check_given()
        self.repeats = options.from_file and self.initializer.moves_base and not options.file_has_starts
        self.filled_later = options.low_cpu_mem_usage or (options.from_file and not self.repeats)
        self.trains = trained_factors(self.config)

    def _check_given(self) -> None:
        """Raise for ``stats`` that are not read."""
        if self.stats and not self.initializer.needs:
            reading = (name for name in INITIALIZERS.names() if INITIALIZERS.get(name).needs)
            raise ConfigError(
                f"stats= was given, and init_lora_weights={self.config.init_lora_weights!r} reads none. Drop stats=, "
                f"or set a start that reads them: {', '.join(map(repr, reading))}."
            )

    def build(self, target: Target) -> AdapterParts:
        """The adapter of one target.

        Raises:
            ConfigError, BackendError: rank, variant, start or another setting does not go with the layer.
            AdapterError: the start replaces the base, and other adapters are on it.
            CalibrationError: the start needs statistics that were not given.
            CheckpointError: so does that of a file which does not hold it.
        """
        spec = self._spec(target)
        variant = formula_of(self.variants, self.config, spec)
        self._check(target, variant)
        weight = self._weight(target)
        spec = self._with_shapes(variant, weight, spec)
        result = self._empty(target, weight, spec) if self.filled_later else self._start(weight, spec)
        return self._parts(target, variant, weight, spec, result)

    def _with_shapes(self, variant: Variant, weight: Tensor, spec: LayerSpec) -> LayerSpec:
        """The spec with the shapes in which the variant stores A and B.

        Raises:
            ConfigError: the start makes dense factors only, and the variant stores others.
        """
        shapes = variant.shapes(weight, spec)
        stored = shapes["A"], shapes["B"]
        if stored != factor_shapes(weight, spec.rank) and not (self.initializer.any_shape or self.options.from_file):
            asking = variant.chain()[-1].switch or variant.name
            raise ConfigError(
                f"{spec.name}: init_lora_weights={self.config.init_lora_weights!r} makes A and B of shapes "
                f"{' and '.join(map(str, factor_shapes(weight, spec.rank)))}, and {variant.name} stores them as "
                f"{' and '.join(map(str, stored))}. Set init_lora_weights=True, or drop {asking}."
            )
        return replace(spec, shapes=stored)

    def _check(self, target: Target, variant: Variant) -> None:
        """Raise unless variant, start and settings go with the layer."""
        name, layer_type = target.full_name, target.layer_type
        kind = layer_type.kind
        if kind not in variant.hosts:
            raise ConfigError(f"{name}: {variant.name} is not defined on {kind} layers. Exclude it, or use plain LoRA.")
        if self.initializer.needs and not layer_type.is_linear and not self.filled_later:
            raise ConfigError(
                f"{name}: init_lora_weights={self.config.init_lora_weights!r} reads statistics of linear layers, and "
                f"this is {kind}. Leave it out with exclude_modules, or choose another start."
            )
        if self.quantizes(target):
            require_replaceable(target, str(self.config.init_lora_weights))
        self._check_weight(target, variant)
        layer_type.check(name, target.base, target.rank, bias=self.config.lora_bias, dropout=self.config.lora_dropout)

    def _check_weight(self, target: Target, variant: Variant) -> None:
        """Raise unless what the variant and the start take the weight for is what the layer computes with."""
        depends = self.initializer.reads_weight or self.initializer.moves_base
        started = depends and (self.repeats or not self.options.from_file)
        reading = next((one.name for one in variant.chain() if one.reads_weight), None)
        odd = target.backend.reads(target.base) if started or reading else None
        if odd is not None:
            start = f"init_lora_weights={self.config.init_lora_weights!r}"
            raise BackendError(
                f"{target.full_name}: {reading or start} needs the weight "
                f"that the layer multiplies with, and of this {described(target.base)} no back end is sure: {odd}. "
                "Leave it out with exclude_modules, remove what is odd about it, or use plain LoRA with "
                "init_lora_weights=True, which does not depend on it."
            )

    def _spec(self, target: Target) -> LayerSpec:
        scaling, layer_type = self.config.scaling(target.rank, target.alpha), target.layer_type
        return LayerSpec(
            name=target.full_name,
            kind=layer_type.kind,
            is_table=layer_type.is_table,
            rank=target.rank,
            scaling=scaling,
            seed=self.seed,
            key=self.name,
            groups=layer_type.rank_groups(target.base),
            settings=self.settings,
            freeze_A=self.config.freeze_A,
            number=self.number,
            repeats=self.repeats,
        )

    def _parts(
        self, target: Target, variant: Variant, weight: Tensor, spec: LayerSpec, result: InitResult
    ) -> AdapterParts:
        """The start in the adapter's dtype, with what goes with it: the variant's extras, a bias, a quantized base."""
        config, base = self.config, None
        if result.quantized is not None:
            base = standing_in(target.base, result.quantized)
            backend = backend_of(base)
            if self.reads_weight and backend is not None:
                weight = backend.weight(base)
        dtype = _adapter_dtype(target.base, target.backend, self.options)
        A, B = result.A.to(dtype), result.B[..., : spec.rank // spec.groups].to(dtype)
        taken = (A, B) if result.subtract_from_base else result.taken
        start = None if taken is None else (taken[0].clone(), taken[1].clone())  # A and B are trained in place
        if self.filled_later and not self.options.partly_filled:
            extras = _empty_extras(variant, weight, A, spec)
        else:
            there = weight.to(self._computes_on(variant, weight))
            extras = initial_extras(variant, there, A, B, start, spec, result.extras)
        bias = torch.zeros(B.shape[-2], device=A.device) if config.lora_bias else None
        return AdapterParts(
            A=A,
            B=B,
            rank=spec.rank,
            alpha=target.alpha,
            variant=variant,
            dtype=dtype,
            bias=bias,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            start=start,
            extras=extras,
            trains=self.trains,
            fallback=result.fallback,
            base=base,
        )

    def quantizes(self, target: Target) -> bool:
        """Whether a quantized layer takes the place of the target's base."""
        if self.initializer.quantizer is None:
            return False
        return not self.options.from_file or (
            target.full_name in self.options.quantized and not target.backend.quantized
        )

    def _weight(self, target: Target) -> Tensor:
        """The pristine weight where something reads it, else a tensor of its shape without values."""
        if self.reads_weight:
            weight = target.weight().detach()
            if weight.is_meta and not self.filled_later:
                raise BackendError(
                    f"{target.full_name}: its weight is on the meta device and has no values to read. Load it first, "
                    "or use plain LoRA with init_lora_weights=True."
                )
            return weight
        return torch.empty(target.backend.full_shape(target.base), device="meta")

    def _start(self, weight: Tensor, spec: LayerSpec) -> InitResult:
        stats = LayerStats(spec.name, self.config.init_lora_weights, self.stats.get(spec.name, {}))
        missing = [need for need in self.initializer.needs if not any(_is_of(name, need) for name in stats)]
        if missing and self.initializer.waits and not self.stats:
            return replace(by_default(weight, spec), fallback="its statistics are not collected yet")
        if missing and self.repeats:
            raise CheckpointError(
                f"The file does not hold what init_lora_weights={self.config.init_lora_weights!r} took from the base, "
                "and data decided that: it cannot be computed again. Save it again in PEFT, with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=) and the folder of the adapter as it "
                "was before training, or merged."
            )
        if missing:
            raise CalibrationError(
                f"init_lora_weights={self.config.init_lora_weights!r} needs {', '.join(missing)} of {spec.name!r}; "
                "none was given. Collect these statistics and pass them as stats=."
            )
        try:
            result = self.initializer(weight, stats, spec)
        except DegenerateError as error:
            if self.repeats:
                raise
            start = (self.initializer.otherwise or by_default)(weight, spec)
            return replace(start, subtract_from_base=self.initializer.moves_base, fallback=str(error))
        if (result.A.shape, result.B.shape) != spec.stored_shapes(weight):
            raise CalibrationError(
                f"{spec.name}: its statistics are those of a layer of another shape: they give A "
                f"{tuple(result.A.shape)} and B {tuple(result.B.shape)} for a weight {tuple(weight.shape)}. Collect "
                "them on this model."
            )
        return result

    def _computes_on(self, variant: Variant, weight: Tensor) -> torch.device:
        """Where norms of the weight are taken: on the accelerator, if that is asked for and there is one."""
        asked = self.config.runtime_config.ephemeral_gpu_offload and any(one.reads_weight for one in variant.chain())
        found = torch.accelerator.current_accelerator() if asked and torch.accelerator.is_available() else None
        return weight.device if found is None or weight.is_meta else found

    def _empty(self, target: Target, weight: Tensor, spec: LayerSpec) -> InitResult:
        quantizer = self.initializer.quantizer if self.quantizes(target) else None
        device = "meta" if self.options.low_cpu_mem_usage else None
        A_shape, B_shape = spec.stored_shapes(weight)
        A, B = torch.empty(A_shape, device=device), torch.empty(B_shape, device=device)
        if self.options.partly_filled:
            default = by_default(weight, spec)
            A, B = default.A, default.B
        quantized = None if quantizer is None else quantizer(weight, spec)
        return InitResult(A, B, subtract_from_base=self.options.file_has_starts, quantized=quantized)


def trained_factors(config: LoraConfig) -> str:
    """The factors that an adapter of this config trains: "AB", or one of the two."""
    return "".join(factor for factor in config.start.initializer.trains if not (config.freeze_A and factor == "A"))


def initial_extras(
    variant: Variant,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    start: tuple[Tensor, Tensor] | None,
    spec: LayerSpec,
    given: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Start values of the extras of a formula and of those inside it, each made for what the one inside computes.

    Args:
        weight: the base weight (out, in).
        A, B: as they are stored, at their start.
        start: A0 and B0 that must not count, or None.
        given: values that the start has for extras, in place of the variants' own.
    """
    extras: dict[str, Tensor] = {}
    for one in reversed(variant.chain()):
        dense = (A, B) if one.inner is None else one.inner.factors(LooseTensors(A, B, extras))
        whole_A, whole_B = (factor.to(weight.device) for factor in update_factors(*dense, start))
        extras |= one.initial_extras(weight, whole_A, whole_B, spec)
        extras |= {kind: given[kind] for kind in type(one).extras if kind in given}
    return extras


def _empty_extras(variant: Variant, weight: Tensor, A: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
    shapes = variant.shapes(weight, spec)
    return {kind: torch.empty(shapes[kind], device=A.device) for kind in variant.extras}


def _adapter_dtype(base: nn.Module, backend: Backend, options: Options) -> torch.dtype:
    if options.dtype is not None:
        return options.dtype
    dtype = backend.dtype(base)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return torch.float32
    return torch.float32 if options.autocast_adapter_dtype and dtype.itemsize == 2 else dtype


def by_default(weight: Tensor, spec: LayerSpec) -> InitResult:
    """A Kaiming A and B = 0."""
    return INITIALIZERS.get(SWITCHES[True])(weight, {}, spec)


def _is_of(name: str, statistic: str) -> bool:
    """Whether a tensor called ``name`` is the statistic, or one of its tensors ("gradient.S")."""
    return name == statistic or name.startswith(f"{statistic}.")
