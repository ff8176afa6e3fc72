"""What an initializer gets and gives. It is a pure function: (weight, stats, spec) -> InitResult."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec

from torch import Tensor, nn

from lorafa.errors import CalibrationError, ConfigError
from lorafa.spec import LayerSpec


class DegenerateError(CalibrationError):
    """What a start is computed from has no directions to offer: all zero, not finite, or of too low a rank.

    Raised by an initializer with the reason, "its gradient is zero". The layer then starts as by default, with a
    Kaiming A and B = 0, or as :attr:`Initializer.otherwise` says, which is told in a warning and recorded in the
    adapter's file: one such layer is no reason to give up all others.
    """


@dataclass(frozen=True)
class InitResult:
    """A (r, in), B (out, r) (experts: (E, r, in), (E, out, r)) in float32 or float64."""

    A: Tensor
    B: Tensor
    subtract_from_base: bool = False
    """Whether s B A at step 0 belongs to the base weight and must not count."""
    fallback: str | None = None
    """Why the layer starts as by default instead of as asked."""
    quantized: nn.Module | None = None
    """Takes the place of the base layer, which gives it its bias; its back end says what it computes with."""
    taken: tuple[Tensor, Tensor] | None = None
    """A0 and B0, shaped as A and B, where something else than the start belongs to the base and must not count."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Start values of the variant's extras, by its names for them, where they are not the variant's own."""


TRAIN_ROWS = "train"
"""The value of a start's setting ``samples`` that means the number of rows trained on; a run puts that number in."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What a start does, stage by stage, in the words of one pipeline: a row of the table in docs/unification.md.

    A target T is decomposed in a metric, a part of it is selected and split over A and B, and scaled.
    """

    objective: Literal["product", "first update", "zero product"]
    """What is matched: the product B A, the first step that training takes, or none: only directions are chosen."""
    target: str
    """The matrix that is decomposed, G being the gradient of the objective, and C the second moment of the inputs."""
    metric: str
    """In which the target is decomposed."""
    selection: str
    """Which directions of it are taken."""
    split: str
    """How their singular values are shared out: what A and B carry."""
    scale: str
    """What the product is multiplied with."""
    base: str
    """What becomes of the base weight."""


Function = Callable[[Tensor, Mapping[str, Tensor], LayerSpec], InitResult]
"""(weight, stats, spec) -> A and B."""
Declarations = ParamSpec("Declarations")
_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")


@dataclass(frozen=True, eq=False)
class Initializer:
    """A function that starts a layer, and what it declares of itself; made by :func:`initializer`.

    Only the statistics and weights declared here are collected and dequantized for it.
    """

    function: Function
    _: KW_ONLY
    needs: tuple[str, ...] = ()
    """Statistics of the layer it reads."""
    reads_weight: bool = False
    """Whether it reads the base weight's values; if not it is handed a tensor of the right shape on the meta device."""
    also: tuple[str, ...] = ()
    """Other values of ``init_lora_weights`` that mean it; a number may stand in place of the N in "..._N"."""
    settings: type | str | None = None
    """A dataclass of its settings, all with defaults, given as ``LoraConfig(init_config=...)``; or the field PEFT's
    LoraConfig has for them, which is found without if it is called after the start ("eva_config")."""
    check_rank: Callable[[int, str], None] | None = None
    """Raises ConfigError for a rank it cannot start from, given (rank, how it was set: "r=3")."""
    complete: Callable[[Any], None] | None = None
    """Raises ConfigError for settings by which nothing could be collected; an adapter may be made with them, of
    statistics that are there."""
    own_ranks: Callable[[Any, int], Mapping[str, Any] | None] | None = None
    """(settings, r of the config) -> the fields of a :class:`lorafa.RankRule` that shares its ranks out where the
    caller names none; None where the settings leave ranks as they are, or the start has no rule of its own."""
    own_scaling: bool = False
    """Whether, with ``use_rslora``, a layer's scaling is that of the rank :attr:`own_ranks` gave it; otherwise, and
    where the caller chooses ranks, it stays as it was."""
    trains: str = "AB"
    """The factors that are trained: "AB", or the one the method trains while the other stays at its start."""
    moves_base: bool = False
    """Whether it takes something out of the base, so that A and B alone do not say what was trained."""
    waits: bool = False
    """Whether its statistics may come after the adapter is on; until then it starts as by default."""
    keeps_function: bool = True
    """Whether the model computes at step 0 what the base does."""
    quantizer: Callable[[Tensor, LayerSpec], nn.Module] | None = None
    """Makes the layer that takes the base's place (:attr:`InitResult.quantized`), of a weight (out, in). It depends on
    the weight, the rank and the settings alone, and is run again where an adapter is loaded on the dense base."""
    whole_gradients: bool = False
    """Whether it reads single entries of a gradient, which a sketch does not have: ``gradient.dense``."""
    per_rank: int = 1
    """Directions it takes for each rank."""
    variant: str | None = None
    """The formula it is a start of, which it then asks for; None: any."""
    any_shape: bool = False
    """Whether it makes A and B in whatever shapes the variant stores them (:meth:`LayerSpec.stored_shapes`)."""
    asked_by_settings: bool = False
    """Whether its field of settings asks for it by itself, with ``init_lora_weights=True``, as in PEFT."""
    needs_settings: bool = False
    """Whether its settings have to be given; otherwise they are filled in with their defaults."""
    peft_makes_on: frozenset[str] | None = frozenset()
    """Kinds of layer on which PEFT makes it by this name; None: on all. It does so before it reads the tensors of a
    file, so a file names no start that PEFT does not make."""
    peft_makes_with: frozenset[Literal["formula", "lora_bias"]] = frozenset()
    """What PEFT makes it together with: another formula than s B A, a bias of B."""
    otherwise: Callable[[Tensor, LayerSpec], InitResult] | None = None
    """Starts a layer on which it raises DegenerateError, computing what the base does; None: as by default."""
    stages: Stages | None = None
    """What it does, for the table of all starts; every one of our own says it."""

    def __post_init__(self) -> None:
        """Go by the function's own name and docstring."""
        vars(self).update((name, getattr(self.function, name)) for name in _NAMES if hasattr(self.function, name))

    def __call__(self, weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
        return self.function(weight, stats, spec)


def _decorator(
    make: Callable[Concatenate[Function, Declarations], Initializer],
) -> Callable[Declarations, Callable[[Function], Initializer]]:
    """From make(function, ...) to declared(...)(function): type checkers see the same keywords, named once."""

    def declared(*args: Declarations.args, **kwargs: Declarations.kwargs) -> Callable[[Function], Initializer]:
        return lambda function: make(function, *args, **kwargs)

    return declared


initializer = _decorator(Initializer)
"""``@initializer(needs=..., ...)`` over a function: it becomes an :class:`Initializer` that declares this."""


def lower_the_rank(to: str = "") -> str:
    """What to do about a layer whose rank is too large; ``to``: " to 4" or " below 5", where that is known."""
    return f"Lower the rank{to} (rank_pattern sets it for single layers) or leave the layer out with exclude_modules."


def check_singular_vectors(name: str, rank: int, shape: Sequence[int]) -> None:
    """Raise unless a weight (..., out, in) has ``rank`` singular vectors: a slice of them would be silently short.

    Raises:
        ConfigError: it has fewer.
    """
    largest = min(shape[-2:])
    if rank > largest:
        raise ConfigError(
            f"{name}: rank {rank} is larger than min(out, in) = {largest} of its weight {tuple(shape)}, so it has no "
            f"{rank} singular vectors. {lower_the_rank()}"
        )


def check_rank(spec: LayerSpec, weight: Tensor) -> None:
    """:func:`check_singular_vectors` of the layer's weight and rank."""
    check_singular_vectors(spec.name, spec.rank, weight.shape)
