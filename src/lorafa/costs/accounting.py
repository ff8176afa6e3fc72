"""What an adapter costs: parameters, file, gradients and the optimizer's state, counted before any training.

Shapes are all it takes, so a model on the meta device (`lorafa.models.shapes.shape_model`) is counted like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from lorafa.config import LoraConfig
from lorafa.costs.rehearsal import rehearse
from lorafa.errors import ConfigError
from lorafa.initializers.settings import START_SETTINGS
from lorafa.io.peft_format import file_tensors
from lorafa.io.tables import which_tables
from lorafa.layers.base import LoraLayer
from lorafa.optimizers.pairs import Pair
from lorafa.optimizers.state_bytes import Sizes
from lorafa.surgery.activate import set_adapter
from lorafa.surgery.apply import apply
from lorafa.surgery.available import require_available
from lorafa.surgery.biases import BaseBiases
from lorafa.surgery.build import Options
from lorafa.surgery.plan import Plan, plan
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import base_parameters, lora_layers
from lorafa.train.settings.optim import OptimConfig, entry_of

_NAME = "default"


@dataclass(frozen=True)
class KindCost:
    """All adapted layers of one last name and one class."""

    name: str
    """Last part of the layers' dotted names: ``q_proj``."""
    kind: str
    """Class of the base layers: ``Linear``."""
    modules: int
    ranks: tuple[int, ...]
    """The different ranks among them, rising."""
    base: int
    """Parameters of the base layers."""
    A: int
    B: int
    extras: int
    """Parameters beside A and B: a bias of B, magnitudes."""
    trainable: int
    """How many of A, B and extras are trained."""


@dataclass(frozen=True)
class AdapterCost:
    """What one adapter on one model costs. Activations are no part of it: they depend on the batch."""

    base: int
    """Parameters of the base model, shared ones once."""
    base_bytes: int
    kinds: tuple[KindCost, ...]
    """In the order of the model."""
    other: int
    """Numbers trained beside the factors: copies of modules_to_save, token rows, base biases."""
    stored: int
    """Numbers in the adapter's file: A where it is frozen too, and what a start has taken out of the base."""
    gradient_bytes: int
    state_bytes: int
    """What the optimizer holds after its first step, step counters apart."""
    factors: str
    """Which are trained: "AB", "A" or "B"."""

    @property
    def trainable(self) -> int:
        return self.other + sum(kind.trainable for kind in self.kinds)

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base model (PEFT prints them over base and adapter together)."""
        return self.trainable / self.base


def adapter_cost(model: nn.Module, config: LoraConfig, optim: OptimConfig | None = None) -> AdapterCost:
    """Put the adapter on without its numbers, count, and take it off again; the model is bit-identical afterwards.

    On a model with weights only ``modules_to_save`` are copied for that time; on the meta device nothing is allocated.
    A start is not computed: one that is subtracted from the base (PiSSA) keeps frozen copies of A and B besides, and is
    written as an adapter of twice the rank.

    Args:
        model: the user's model, without adapters.
        optim: the optimizer whose state is counted; default AdamW. That of LoRA-FA freezes A.

    Raises:
        NotAvailableError: the config asks for a feature this version does not have.
        ConfigError: the model carries adapters, or the config does not go with the model.
        TargetError: a pattern matches nothing, or something that cannot carry an adapter.
        AdapterError: the optimizer cannot train what the start and the config leave to train.
    """
    with put_on(model, config, optim) as counted:
        return counted()


@contextmanager
def put_on(
    model: nn.Module, config: LoraConfig, optim: OptimConfig | None = None
) -> Iterator[Callable[[], AdapterCost]]:
    """The adapter is on the model inside the block, as :func:`adapter_cost` puts it on, and raises what that raises.

    Yields:
        What it costs, when it is called inside the block.
    """
    optim = optim or OptimConfig()
    require_available(config)
    if any(True for _ in lora_layers(model)):
        raise ConfigError("The model carries adapters already, so what one costs cannot be told. Give the base model.")
    base = list({id(p): p for _, p in base_parameters(model)}.values())
    factors = _trained_factors(config, optim)
    planned = _planned(model, config, factors)
    named = [(p.target.name, p.target.layer_type.is_table, p.parts.variant) for p in planned.layers]
    rehearse(named, planned.layers[0].parts.rank, config, optim)

    def counted() -> AdapterCost:
        layers = list(lora_layers(model))
        kinds = _kinds(layers)
        trained = [p for p in model.parameters() if p.requires_grad]
        tables = which_tables(planned.config, model, "auto")
        file = file_tensors(model, _NAME, planned.config, tables=tables)
        stored = sum(tensor.numel() for tensor in file.values())
        if config.start.initializer.moves_base:
            stored += sum(kind.A + kind.B for kind in kinds)  # the start, which was left out of the plan: rank 2r
        return AdapterCost(
            base=sum(p.numel() for p in base),
            base_bytes=_bytes(base),
            kinds=kinds,
            other=sum(p.numel() for p in trained) - sum(kind.trainable for kind in kinds),
            stored=stored,
            gradient_bytes=_bytes(trained),
            state_bytes=entry_of(optim).state(Sizes(trained, _pairs(layers)), optim.own),
            factors=factors,
        )

    with _applied(model, planned):
        yield counted


def _planned(model: nn.Module, config: LoraConfig, factors: str) -> Plan:
    """The adapter with these factors trained, and a start that reads nothing unless the formula is the start's own."""
    if config.start.initializer.variant is None:
        config = replace(config, init_lora_weights=True, **dict.fromkeys(START_SETTINGS))  # type: ignore[arg-type]
    planned = plan(resolve(model, config), _NAME, Options(low_cpu_mem_usage=True))
    layers = [replace(layer, parts=replace(layer.parts, trains=factors)) for layer in planned.layers]
    return replace(planned, layers=layers)


def _trained_factors(config: LoraConfig, optim: OptimConfig) -> str:
    """ "AB", or the one factor that the start, the config and the optimizer leave."""
    frozen = ("A" if config.freeze_A else "") + entry_of(optim).freezes
    return "".join(factor for factor in config.start.initializer.trains if factor not in frozen)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _pairs(layers: Iterable[tuple[str, LoraLayer]]) -> list[Pair]:
    """Without what is tied, whose factors belong to another layer."""
    return [Pair(path, layer, _NAME) for path, layer in layers if layer.stored_parameters(_NAME)]


@contextmanager
def _applied(model: nn.Module, planned: Plan) -> Iterator[None]:
    undo, biases = apply(model, planned), BaseBiases()
    try:
        biases.take(_NAME, model, planned.config.bias)
        set_adapter(model, _NAME)
        biases.let_train([_NAME])
        yield
    finally:
        undo()


def _kinds(layers: Iterable[tuple[str, LoraLayer]]) -> tuple[KindCost, ...]:
    grouped: dict[tuple[str, str], list[LoraLayer]] = {}
    for path, layer in layers:
        key = _last_name(path, layer), type(layer.get_base_layer()).__name__
        grouped.setdefault(key, []).append(layer)
    return tuple(_kind(name, kind, members) for (name, kind), members in grouped.items())


def _kind(name: str, kind: str, layers: list[LoraLayer]) -> KindCost:
    parts = [part for layer in layers for part in layer.stored_parameters(_NAME).items()]
    names_A, names_B = zip(*(layer.factor_names for layer in layers), strict=True)
    A = sum(p.numel() for key, p in parts if key in names_A)
    B = sum(p.numel() for key, p in parts if key in names_B)
    base = {id(p): p.numel() for layer in layers for p in _own_parameters(layer)}
    return KindCost(
        name=name,
        kind=kind,
        modules=len(layers),
        ranks=tuple(sorted({layer.r[_NAME] for layer in layers})),
        base=sum(base.values()),
        A=A,
        B=B,
        extras=sum(p.numel() for _, p in parts) - A - B,
        trainable=sum(p.numel() for _, p in parts if p.requires_grad),
    )


def _own_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    base = layer.get_base_layer()
    own = layer.parameter_name
    return list(base.parameters(recurse=False)) if own is None else [base.get_parameter(own)]


def _last_name(path: str, layer: LoraLayer) -> str:
    """``layers.3.mlp.up_proj`` -> ``up_proj``; numbers of lists and the wrappers' own level are passed over."""
    words = [word for word in path.split(".") if word != "base_layer" and not word.isdigit()] or ["(model)"]
    return words[-1] if layer.parameter_name is None else f"{words[-1]}.{layer.parameter_name}"
