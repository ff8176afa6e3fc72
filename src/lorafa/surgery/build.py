"""Build the adapter of one layer: check that everything goes with the layer, then make its factors and extras."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafa.adapter import update_factors
from lorafa.backends.base import Backend
from lorafa.config import LoraConfig
from lorafa.errors import CalibrationError, CheckpointError, ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult, LayerSpec, factor_shapes
from lorafa.layers import LAYERS
from lorafa.layers.parts import AdapterParts
from lorafa.surgery.quantize import require_replaceable, standing_in
from lorafa.surgery.targets import Target
from lorafa.variants import variant_of

Stats = Mapping[str, Mapping[str, Tensor]]
"""Full name of a target -> name of a statistic -> its value: what data-aware starts read."""


class LayerStats(dict[str, Tensor]):
    """The statistics of one layer. What its start reads and does not find is refused by name.

    Raises:
        CalibrationError: where it is indexed by what it does not have.
    """

    def __init__(self, layer: str, start: bool | str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._layer, self._start = layer, start

    def __missing__(self, name: str) -> Tensor:
        raise CalibrationError(
            f"{self._layer}: its statistics have no {name!r}, which init_lora_weights={self._start!r} reads; they have "
            f"{', '.join(self)}. Pass what collect_statistics returns as stats=."
        )


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

    def __init__(self, config: LoraConfig, name: str, options: Options, stats: Stats) -> None:
        """Take a config that has been checked.

        Raises:
            ConfigError: the start reads no statistics, and some were given.
        """
        self.config, self.name, self.options, self.stats = config, name, options, stats
        self.seed = config.seed
        self.variant = variant_of(config).of(config)
        self.initializer, self.number = config.start.initializer, config.start.number
        self.settings = config.start_settings()
        self._check_given()
        self.repeats = options.from_file and self.initializer.moves_base and not options.file_has_starts
        self.filled_later = options.low_cpu_mem_usage or (options.from_file and not self.repeats)
        self.trains = "".join(f for f in self.initializer.trains if not (config.freeze_A and f == "A"))

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
        self._check(target)
        spec, weight = self._spec(target), self._weight(target)
        result = self._empty(target, weight, spec) if self.filled_later else self._start(weight, spec)
        return self._parts(target, weight, spec, result)

    def _check(self, target: Target) -> None:
        """Raise unless variant, start and settings go with the layer."""
        name, kind = target.full_name, target.backend.host
        if kind not in self.variant.hosts:
            raise ConfigError(
                f"{name}: {self.variant.name} is not defined on {kind} layers. Exclude it, or use plain LoRA."
            )
        if self.initializer.needs and kind != "linear" and not self.filled_later:
            raise ConfigError(
                f"{name}: init_lora_weights={self.config.init_lora_weights!r} reads statistics of linear layers, and "
                f"this is {kind}. Leave it out with exclude_modules, or choose another start."
            )
        if self.quantizes(target):
            require_replaceable(target, str(self.config.init_lora_weights))
        LAYERS.get(kind).check(name, target.base, target.rank, self.config)

    def _spec(self, target: Target) -> LayerSpec:
        kind = target.backend.host
        scaling, groups = self.config.scaling(target.rank, target.alpha), LAYERS.get(kind).groups(target.base)
        return LayerSpec(
            name=target.full_name,
            kind=kind,
            rank=target.rank,
            scaling=scaling,
            seed=self.seed,
            key=self.name,
            groups=groups,
            settings=self.settings,
            freeze_A=self.config.freeze_A,
            number=self.number,
            repeats=self.repeats,
        )

    def _parts(self, target: Target, weight: Tensor, spec: LayerSpec, result: InitResult) -> AdapterParts:
        """The start in the adapter's dtype, with what goes with it: the variant's extras, a bias, a quantized base."""
        config, base = self.config, None
        if result.quantized is not None:
            base = standing_in(target.base, result.quantized)
            if self.variant.reads_weight:
                weight = result.quantized.dequantize()
        dtype = _adapter_dtype(target.base, target.backend, self.options)
        A, B = result.A.to(dtype), result.B[..., : spec.rank // spec.groups].to(dtype)
        start = (A.clone(), B.clone()) if result.subtract_from_base else result.taken
        empty = self.filled_later and not self.options.partly_filled
        extras = self._empty_extras(weight, A) if empty else self._extras(weight, A, B, start, spec)
        bias = torch.zeros(B.shape[-2], device=A.device) if config.lora_bias else None
        return AdapterParts(
            A=A,
            B=B,
            rank=spec.rank,
            alpha=target.alpha,
            scaling=spec.scaling,
            variant=self.variant,
            dtype=dtype,
            bias=bias,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            start=start,
            extras=extras | dict(result.extras),
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
        if self.initializer.reads_weight or self.variant.reads_weight:
            return target.weight().detach()
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
        if (result.A.shape, result.B.shape) != factor_shapes(weight, spec.rank):
            raise CalibrationError(
                f"{spec.name}: its statistics are those of a layer of another shape: they give A "
                f"{tuple(result.A.shape)} and B {tuple(result.B.shape)} for a weight {tuple(weight.shape)}. Collect "
                "them on this model."
            )
        return result

    def _empty(self, target: Target, weight: Tensor, spec: LayerSpec) -> InitResult:
        quantizer = self.initializer.quantizer if self.quantizes(target) else None
        device = "meta" if self.options.low_cpu_mem_usage else None
        A_shape, B_shape = factor_shapes(weight, spec.rank)
        A, B = torch.empty(A_shape, device=device), torch.empty(B_shape, device=device)
        if self.options.partly_filled:
            default = by_default(weight, spec)
            A, B = default.A, default.B
        quantized = None if quantizer is None else quantizer(weight, spec)
        return InitResult(A, B, subtract_from_base=self.options.file_has_starts, quantized=quantized)

    def _extras(
        self, weight: Tensor, A: Tensor, B: Tensor, start: tuple[Tensor, Tensor] | None, spec: LayerSpec
    ) -> dict[str, Tensor]:
        whole_A, whole_B = update_factors(A, B, start)
        return self.variant.initial_extras(weight, whole_A.to(weight.device), whole_B.to(weight.device), spec)

    def _empty_extras(self, weight: Tensor, A: Tensor) -> dict[str, Tensor]:
        shapes = self.variant.extra_shapes(weight, A.shape[-2])
        return {kind: torch.empty(shape, device=A.device) for kind, shape in shapes.items()}


def _adapter_dtype(base: nn.Module, backend: Backend, options: Options) -> torch.dtype:
    if options.dtype is not None:
        return options.dtype
    dtype = backend.dtype(base)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return torch.float32
    return torch.float32 if options.autocast_adapter_dtype and dtype.itemsize == 2 else dtype


def by_default(weight: Tensor, spec: LayerSpec) -> InitResult:
    """A Kaiming A and B = 0."""
    return INITIALIZERS.get("kaiming")(weight, {}, spec)


def _is_of(name: str, statistic: str) -> bool:
    """Whether a tensor called ``name`` is the statistic, or one of its tensors ("gradient.S")."""
    return name == statistic or name.startswith(f"{statistic}.")
