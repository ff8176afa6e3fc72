"""The three words of the mathematics: an Adapter is the numbers of one update, a Variant is its formula, and an
AdaptedLayer is what both may ask of the layer they are on.

An update is seen in three ways. The *whole* update s (B A - B0 A0) is what the adapter means on the pristine base: it
is merged, exported and measured. The *running* update is what a forward pass adds to the base that runs; it is the
whole one, but s B A where the start is taken out of that base (``mutate_base``). The *start* s B0 A0 is the part of
s B A that was there at step 0 and must not count.

Parameters lie on the layer under PEFT's names (``layer.lora_A[name].weight`` ...), because other people's code reads
and moves them there. The numbers (rank, alpha, scaling ...) are the adapter's own; the layer shows them under PEFT's
names too (:mod:`lorafa.layers.by_name`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from lorafa.backends.offload import in_memory
from lorafa.context import CurrentCall
from lorafa.errors import AdapterError, BackendError
from lorafa.numerics.dropping import Source
from lorafa.numerics.fused import Codes, Keep, compute_dtype, is_traced
from lorafa.numerics.linalg import working_dtype
from lorafa.spec import LayerSpec, Shape, factor_shapes

if TYPE_CHECKING:
    from typing_extensions import Self

Stage = Literal["factors", "norm", "gate"]
STAGES: tuple[Stage, ...] = ("factors", "norm", "gate")
"""From the inside out: how s B A is formed, what is made of its norm, when it applies."""


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor s on B A: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def full_precision(tensor: Tensor) -> torch.autocast:
    """A block in which products of ``tensor`` keep its dtype: weights are never computed in autocast's."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)  # meta has no autocast


def update_factors(A: Tensor, B: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Factors of B A - B0 A0 for a start (A0, B0): those of (B - B0) A + B0 (A - A0), of rank 2 r.

    Exactly zero as long as A and B are at their start, and nothing cancels when they have left it. In float32 at least:
    the differences of factors in half precision have more digits than these.
    """
    if start is None:
        return A, B
    A, B, A0, B0 = (factor.to(working_dtype(factor.dtype)) for factor in (A, B, *start))
    return _differences(A, B, A0, B0)


def _differences(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)


class Start(nn.Module):
    """A0 and B0: the part of s B A that was there at step 0 and must not count (frozen, moves with the model)."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


@dataclass(frozen=True)
class Extra:
    """A tensor of a variant beyond A and B."""

    holder: str
    """Its PEFT name on the layer: ``<holder>.<adapter>.<key>``."""
    trained: bool = True
    """Whether it is a parameter; if not it is a buffer, which no optimizer sees."""
    saved: bool = True
    """Whether files hold it; if not :meth:`Variant.changed` computes it again."""
    key: str = "weight"
    """What it is called in its holder, where that holds several."""

    @property
    def in_files(self) -> str:
        """Its name in a file: PEFT leaves the key out where a holder has one tensor alone."""
        return self.holder if self.key == "weight" else f"{self.holder}.{self.key}"


class Tensors(Protocol):
    """A, B and the extras of an adapter, wherever they are: on a layer, in a plan, in a file."""

    @property
    def A(self) -> Tensor: ...

    @property
    def B(self) -> Tensor: ...

    def extra(self, kind: str) -> Tensor: ...


@dataclass(frozen=True)
class LooseTensors:
    """The tensors of an adapter that no layer holds."""

    A: Tensor
    B: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def extra(self, kind: str) -> Tensor:
        return self.extras[kind]


class AdaptedLayer(Protocol):
    """What an adapter and its formula may ask of the layer they are on (:class:`lorafa.layers.base.LoraLayer`)."""

    training: bool
    takes_dropout: ClassVar[bool]
    is_linear: ClassVar[bool]
    factor_names: ClassVar[tuple[str, str]]
    adapters: dict[str, Adapter]
    _modules: dict[str, nn.Module | None]
    lora_dropout: nn.ModuleDict
    lora_start: nn.ModuleDict
    call: CurrentCall

    @property
    def without_start(self) -> bool: ...

    def factor_A(self, name: str) -> Tensor: ...

    def factor_B(self, name: str) -> Tensor: ...

    def factor_bias(self, name: str) -> Tensor | None: ...

    def extra(self, holder: str, name: str, key: str = "weight") -> Tensor: ...

    def holder_of(self, holder: str, name: str) -> nn.Module: ...

    def holders(self) -> Iterator[nn.ModuleDict | nn.ParameterDict]: ...

    def stored_parameters(self, name: str) -> dict[str, nn.Parameter]: ...

    def as_made(self, adapter: Adapter) -> bool: ...

    def fits(self, A: nn.Module, B: nn.Module) -> bool: ...

    def by_modules(self, adapter: Adapter, x: Tensor, *, drops: bool = True) -> Tensor: ...

    def require_readable(self, adapter: Adapter) -> None: ...

    def require_uncalled(self, adapter: Adapter, why: str) -> None: ...

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float = 0.0, keep: Keep | None = None
    ) -> Tensor: ...

    def per_output(self, vector: Tensor) -> Tensor: ...

    def dense_weight(self, x: Tensor) -> tuple[Tensor | Codes, Tensor | None] | None: ...

    def base_output(self, x: Tensor) -> Any: ...

    def base_weight(self) -> Tensor: ...

    def base_bias(self) -> Tensor | None: ...

    def before_rescaling(self) -> None: ...

    def require_fitting(self, y: Any, change: Tensor) -> None: ...


@dataclass(eq=False, slots=True, repr=False)
class Adapter:
    """The update called ``name`` of ``layer``; A is (r, in), B is (out, r), in the layer's own layout of weights.

    For a stack of E experts A is (E, r, in) and B is (E, out, r).
    """

    layer: AdaptedLayer
    name: str
    variant: Variant
    rank: int
    alpha: float
    use_rslora: bool = False
    times: int = 1
    """How often the update is applied: its scaling is this many times that of rank and alpha."""
    trains: str = "AB"
    """The factors that are trained: "B" for a frozen A (LoRA-FA)."""
    fallback: str | None = None
    """Why the layer starts as by default instead of as the config says."""
    has_bias: bool = False
    """Whether B was made with a bias."""
    slots: int | None = None
    """How many ranks A and B have room for, where that was settled for adapters to come: those beyond ``rank`` are
    zeros, which no file holds."""
    is_empty: bool = False
    """Whether it was exchanged for an adapter that has nothing on this layer: it changes nothing, no file holds it."""
    _scaling: float | Tensor = field(init=False)
    _held: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._scaling = self.initial_scaling

    @property
    def initial_scaling(self) -> float:
        """The scaling that rank and alpha give."""
        return self.times * scaling(self.rank, self.alpha, self.use_rslora)

    @property
    def scaling(self) -> float | Tensor:
        """The factor s in force: a number, or a tensor without dimensions, which compiled code reads anew each time."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float | Tensor) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number and not (isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()):
            raise AdapterError(
                f"The scaling of an adapter is a number or a floating-point tensor without dimensions, found {value!r}."
            )
        if isinstance(value, Tensor) and value.requires_grad:
            raise AdapterError(
                "The scaling of an adapter gets no gradient, and the tensor requires one. Pass scaling.detach()."
            )
        self.layer.before_rescaling()
        if self._held is not None and self._scaling is self._held and not isinstance(value, Tensor):
            self._held.fill_(value)
        else:
            self._scaling = value

    @property
    def written_scaling(self) -> float | Tensor:
        """The scaling as it was written: a number, also where that is held in a tensor of the adapter's own."""
        return float(self._scaling) if self._scaling is self._held else self._scaling

    def hold_scaling(self) -> None:
        """Keep the scaling in a tensor of its own from now on: a number is written into that, and compiled code and
        captured graphs see it."""
        A = self.A
        held = torch.empty((), dtype=working_dtype(A.dtype), device="cpu" if A.is_meta else A.device)
        self._held = held.copy_(self._scaling) if isinstance(self._scaling, Tensor) else held.fill_(self._scaling)
        self._scaling = self._held

    def move_held(self) -> None:
        """Let the tensor of :meth:`hold_scaling` follow A to its device."""
        if self._held is not None and not self.A.is_meta and self._held.device != self.A.device:
            moved = self._held.to(self.A.device)
            self._held, self._scaling = moved, moved if self._scaling is self._held else self._scaling

    @property
    def A(self) -> Tensor:
        return self.layer.factor_A(self.name)

    @property
    def B(self) -> Tensor:
        return self.layer.factor_B(self.name)

    @property
    def dropout(self) -> float:
        """The probability in force: 0 in eval mode, and where it cannot act."""
        module = self.layer.lora_dropout[self.name]
        acts = module.training and self.layer.takes_dropout
        return float(module.p) if acts and isinstance(module, nn.Dropout) else 0.0

    @property
    def dropout_source(self) -> Source | None:
        """Where the dropout of the call in force comes from, as :func:`lorafa.dropout_source` has said."""
        return None if is_traced() else self.layer.call.dropout_source

    @property
    def bias(self) -> Tensor | None:
        """The bias of B (``lora_bias``), (out,), not yet scaled."""
        return self.layer.factor_bias(self.name)

    @property
    def scaled_bias(self) -> Tensor | None:
        """What the bias of B adds to the output, (out,): once, however often s B A is applied, as in PEFT."""
        bias = self.bias
        return None if bias is None else self.scaling / self.times * bias

    @property
    def start(self) -> Start | None:
        start: Start | None = self.layer.lora_start._modules.get(self.name)  # type: ignore[assignment]
        return start if start is None else in_memory(start)

    @property
    def tied_to(self) -> tuple[AdaptedLayer, bool] | None:
        """The layer whose factors it counts as its own, and whether turned round; None: they are those of its layer."""
        return None

    def extra(self, kind: str) -> Tensor:
        """A tensor the variant added, by the variant's own name for it."""
        extra = self.variant.extras[kind]
        return self.layer.extra(extra.holder, self.name, extra.key)

    @property
    def modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        """``lora_A`` and ``lora_B``; None where the factors are in no module, on an embedding."""
        held = self.layer._modules  # each attribute of a module costs a search
        A, B = held["lora_A"]._modules, held["lora_B"]._modules  # type: ignore[union-attr]
        return A.get(self.name), B.get(self.name)

    def extra_holders(self) -> Iterator[nn.Module]:
        """The modules that hold what the variant added, in the order of its ``extras``."""
        return (self.layer.holder_of(extra.holder, self.name) for extra in self.variant.extras.values())

    @property
    def as_made(self) -> bool:
        """Whether its modules need not be called: no hook is on them, and no other is in their place."""
        return self.layer.as_made(self)

    @property
    def fact(self) -> Any:
        """What the variant's :meth:`Variant.fact` has found for the call of the model that runs.

        Raises:
            BackendError: the model was not called through its PeftModel, so nobody has looked.
        """
        return self.layer.call.fact(self.name, self.variant.of_rows)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Dense A (r, in) and B (out, r) of the whole update; of rank 2 r, in float32 at least, where a frozen start is
        subtracted."""
        start = self.start
        return update_factors(*self.variant.factors(self), None if start is None else (start.A, start.B))

    @property
    def running_start(self) -> Start | None:
        """The start that a forward pass has to subtract: none where the base that runs is without it already."""
        return None if self.layer.without_start else self.start

    @property
    def running_factors(self) -> tuple[Tensor, Tensor]:
        """Like :attr:`factors`, of what a forward pass adds to the base that runs, as it is in training if it is.

        In the dtype of A and B.
        """
        factors, start = self.variant.factors(self, training=self.layer.training), self.running_start
        return factors if start is None else _differences(*factors, start.A, start.B)

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:attr:`running_factors`, in ``dtype`` where those of all layers are made together for the call in force."""
        A, B = self.running_factors
        casts = None if is_traced() else self.layer.call.casts
        return (A, B) if casts is None else (casts.of(A, dtype), casts.of(B, dtype))

    def product(self) -> Tensor:
        """The low-rank update s (B A - B0 A0), (out, in), in float32 (float64 where the factors are)."""
        return self._product(*self.factors)

    def start_product(self) -> Tensor:
        """s B0 A0, (out, in), in the same dtype; there must be a start."""
        assert self.start is not None
        return self._product(self.start.A, self.start.B)

    def checked_factors(self) -> tuple[Tensor, Tensor]:
        """:attr:`factors` for who makes a weight of them; as :meth:`delta_weight` it refuses modules that were swapped.
        """
        if not self.as_made:
            self.layer.require_readable(self)
        return self.factors

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        dtype = working_dtype(A.dtype)
        with full_precision(A):
            product = B.to(dtype) @ A.to(dtype)
        if torch.is_grad_enabled():
            return self.scaling * product
        return product.mul_(self.scaling)  # the same numbers, without a second matrix of this size

    def drop(self, x: Tensor) -> Tensor:
        """x with the adapter's dropout; x itself where it drops nothing."""
        if not self.as_made and self.layer.takes_dropout:
            dropped: Tensor = self.layer.lora_dropout[self.name](x)
            return dropped
        return nn.functional.dropout(x, self.dropout) if self.dropout else x

    def change(self, x: Tensor) -> Tensor:
        """What the update adds to the output of the base that runs: s (B A - B0 A0) x, in the layout of the output."""
        return self.low_rank(x) if self.as_made else self.layer.by_modules(self, x, drops=False)

    def low_rank(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """s (B A - B0 A0) drop(x) by the factors of a forward pass, with what the formula keeps of x for backward."""
        factors = self.factors_in(compute_dtype(x)) if self.layer.is_linear else self.running_factors
        return self.layer.low_rank(x, *factors, self.scaling, dropout, self.kept(x, dropout))

    def kept(self, x: Tensor, dropout: float = 0.0) -> Keep | None:
        """What the formula keeps of x for the gradient of A, with the dropout on x after that; None: x as it is."""
        trains = torch.is_grad_enabled() and self.A.requires_grad
        return self.variant.kept(self, x, dropout) if trains else None

    def start_of(self, x: Tensor) -> Tensor | None:
        """s B0 A0 x, or None: what dropout on the adapter's input must not touch, because it belongs to the base."""
        start = self.running_start
        return None if start is None else self.layer.low_rank(x, start.A, start.B, self.scaling)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """The change of the weight, (out, in), given the base weight (out, in); differentiable in A, B and extras."""
        if not self.as_made:
            self.layer.require_readable(self)
        if self.variant.plain:  # reads no number of the weight, which would be converted for nothing
            return self.variant.delta_weight(self, weight)
        return self.variant.delta_weight(self, weight.to(working_dtype(weight.dtype)))

    def delta_output(self, x: Tensor, y: Tensor) -> Tensor:
        """The change of the layer's output, given its input x and the base layer's output y."""
        return self.variant.delta_output(self, x, y)


def bias_change(adapters: Sequence[Adapter]) -> Tensor | None:
    """The sum of the adapters' biases, scaled, (out,); None where none has one."""
    changes = [change for change in [adapter.scaled_bias for adapter in adapters] if change is not None]
    return torch.stack(changes).sum(0) if changes else None


class Variant(ABC):
    """The formula of an update, written twice: as a change of the weight and as a change of the output.

    The law every variant keeps, and tests/laws checks for each registered one on every back end:

        y + delta_output(x, y) == layer with weight W + delta_weight(W), applied to x          for every input x

    Write ``delta_weight`` first: it is the definition. ``delta_output`` and ``fused`` exist to be fast. A variant holds
    no tensors; they are on the layer and are read through the adapter.

    Variants are of three stages, and an adapter has one of each at most: *factors* (how s B A is formed), *norm* over
    any factors, *gate* over any norm. One that is not of the first stage holds the formula inside it as ``inner`` and
    speaks to it through this interface only.
    """

    name: str
    """Its line in the registry; of one that is over another than plain LoRA, both: "dora over kasa"."""
    stage: ClassVar[Stage] = "factors"
    switch: ClassVar[str | None] = None
    """The field of LoraConfig that asks for it where it is set; None for plain LoRA and for what a start asks for."""
    extras: Mapping[str, Extra] = {}
    """Name of an extra tensor in the formulas -> what it is; those of the formula inside among them."""
    hosts: frozenset[str] = frozenset({"linear", "embedding", "conv", "attention", "experts"})
    """Kinds of layer the formula is defined on."""
    reads_weight: ClassVar[bool] = False
    """Whether ``initial_extras`` reads the base weight's values; if not it may get a tensor on the meta device."""
    reads_call: bool = False
    """Whether it has to know something of each call of the model, which :meth:`fact` then finds."""
    gathers: bool = False
    """Whether the layers gather something of each call of the model in what :meth:`fact` gives, for :meth:`penalty`.
    Unlike with ``reads_call`` the update is the same without it."""
    call_arguments: frozenset[str] = frozenset()
    """Arguments of a call of the PeftModel that are for the formula and not for the model inside."""
    uniform: bool = True
    """Whether the update is one matrix whatever the input, so that it can be merged, exported and combined."""
    plain: bool = False
    """Whether that matrix is s B A with the dense A and B of :meth:`factors`, which any reader of LoRA can use."""
    factors_are_stored: bool = True
    """Whether :meth:`factors` gives A and B as they are stored."""
    one_product: bool = True
    """Whether the update is one product of A and B wherever it counts, for all that the gradient of the two is taken
    for; not where each token has parts of them."""
    peft_stores: bool = False
    """Whether PEFT has the formula and stores A and B as they are stored here, where :meth:`factors` gives others."""
    peft_reads: bool = False
    """Whether PEFT then reads them on every kind of layer here, without harm to the base. Files then hold them as they
    are stored; otherwise the dense A and B, for any reader, and beside them what is stored."""
    learns_from_A: ClassVar[bool] = False
    """Whether it is about the gradient of A, and so nothing where A is frozen."""
    has_own_update: ClassVar[bool] = True
    """Whether there is an update where it is the only adapter; not of a router to other adapters."""
    averages_penalty: ClassVar[bool] = False
    """Whether :meth:`penalty` counts by its mean over layers, as the method has it, and not by the sum."""
    takes_bias: bool = False
    """Whether the formula has a place for a bias of B (``lora_bias``)."""
    takes_empty_ranks: bool = False
    """Whether a row of A and a column of B that are zero add nothing, and no other tensor has an entry a rank."""
    inner: Variant | None = None
    """The formula inside; None for one of the first stage."""
    follows: bool = False
    """Whether :meth:`changed` does anything: set for formulas that have one of their own, and for those over them."""

    def __init_subclass__(cls) -> None:
        if "changed" in vars(cls):
            cls.follows = True

    def __init__(self, inner: Variant | None = None) -> None:
        if inner is not None:
            self.inner = inner
            self.extras = {**inner.extras, **self.extras}
            self.hosts = self.hosts & inner.hosts
            self.uniform = self.uniform and inner.uniform
            self.plain = self.plain and inner.plain
            self.takes_bias = self.takes_bias and inner.takes_bias
            self.reads_call = self.reads_call or inner.reads_call
            self.gathers = self.gathers or inner.gathers
            self.one_product = self.one_product and inner.one_product
            self.takes_empty_ranks = self.takes_empty_ranks and inner.takes_empty_ranks
            self.call_arguments = self.call_arguments | inner.call_arguments
            self.follows = self.follows or inner.follows
            self.factors_are_stored = inner.factors_are_stored
            self.peft_stores = inner.peft_stores
            self.name = self.name if inner.is_plain_lora else f"{self.name} over {inner.name}"

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        """The variant with the settings a LoraConfig has for it, on one layer, over the formula inside."""
        return cls(inner)

    def chain(self) -> tuple[Variant, ...]:
        """This formula and those inside it, from the outside in."""
        return (self,) if self.inner is None else (self, *self.inner.chain())

    @property
    def is_plain_lora(self) -> bool:
        """Whether the update is s B A with A and B as they are stored, and nothing beside them."""
        return self.plain and self.factors_are_stored and not self.extras

    @property
    def has_dense_files(self) -> bool:
        """Whether files hold the dense factors, with those that are stored beside them."""
        return not self.factors_are_stored and not self.peft_reads

    @property
    def stacks_start(self) -> bool:
        """Whether s B A - s B0 A0 may be written as one product of rank 2 r: wherever it counts, it is just that."""
        return self.plain

    # ---- tensors

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        """Shapes of "A", "B" and the extras as they are stored; one number an output for an extra unless it says
        otherwise. ``weight``, (out, in) or (E, out, in), has no values."""
        A, B = factor_shapes(weight, spec.rank)
        inside = {"A": A, "B": B} if self.inner is None else self.inner.shapes(weight, spec)
        return inside | dict.fromkeys(type(self).extras, (weight.shape[-2],))

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Start values of its own extras.

        Args:
            weight: the base weight (out, in).
            A, B: the dense factors of the whole update as the formula inside forms them; for one of the first stage
                those that are stored.
        """
        return {}

    def factors(self, tensors: Tensors, *, training: bool = False) -> tuple[Tensor, Tensor]:
        """Dense A (r, in) and B (out, r), in the dtype of the factors: what merging, export and norms are made of.

        Args:
            tensors: an adapter, or tensors that no layer holds.
            training: as a forward pass in training sees them, where that differs (noise).
        """
        return (tensors.A, tensors.B) if self.inner is None else self.inner.factors(tensors, training=training)

    def changed(self, layer: AdaptedLayer, name: str) -> None:
        """Compute again what follows from other tensors: adapters of the layer were added, loaded, deleted or replaced.

        Args:
            name: of the adapter on this layer that has this formula.
        """
        if self.inner is not None:
            self.inner.changed(layer, name)

    def kept(self, adapter: Adapter, x: Tensor, dropout: float) -> Keep | None:
        """What is kept of the input x of A for the gradient of A, which is trained; None: x as it is.

        Args:
            dropout: the probability of dropping an element of x on the way to A, after this.
        """
        return None if self.inner is None else self.inner.kept(adapter, x, dropout)

    def is_called(self, adapter: Adapter) -> bool:
        """Whether it is what calls of ``lora_A`` and ``lora_B`` compute, where they are not as they were made."""
        return self.inner is None or self.inner.is_called(adapter)

    def before(self, adapter: Adapter, x: Tensor) -> Tensor:
        """What goes into ``lora_A`` for x, where the modules are called one by one."""
        return x if self.inner is None else self.inner.before(adapter, x)

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        """What stands between A and B, applied to z = A x, for layers whose modules are called one by one.

        Raises:
            BackendError: the formula has no such place.
        """
        if self.inner is not None:
            return self.inner.between(adapter, z)
        if not self.factors_are_stored:
            raise BackendError(
                f"A hook is on lora_A, lora_B or lora_dropout of adapter {adapter.name!r}, or another module in its "
                f"place, and {self.name} is not computed by calling them. Remove the hook."
            )
        return z

    # ---- the formula

    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """The update as a dense (out, in) matrix in float32 or float64; ``weight`` (out, in) is in that dtype.

        Raises:
            BackendError: the update changes with the input (``uniform = False``), so it is no matrix.
        """
        raise BackendError(
            f"The update of {self.name} changes with the input, so there is no matrix that could be added to the "
            "weight. Keep the adapter beside it."
        )

    def row_gain(self, adapter: Adapter, weight: Tensor) -> Tensor | None:
        """g (out,) of a formula whose whole weight is diag(g) (W + s B A); None where it has no such g.

        Args:
            weight: the base weight (out, in).
        """
        return None if self.inner is None else self.inner.row_gain(adapter, weight)

    def extras_of_gain(self, gain: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> dict[str, Tensor]:
        """The extras with which :meth:`row_gain` of these dense factors is ``gain`` (out,)."""
        return {} if self.inner is None else self.inner.extras_of_gain(gain, weight, A, B, scaling)

    @abstractmethod
    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The change of the base output y, given the layer's input x; dropout acts on x here."""

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        """Base output and change in one function, or None where the layer has no dense weight to fuse with."""
        return None

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """What the method adds to the loss for this adapter, a weighted scalar in float32 or wider; None: nothing."""
        return None if self.inner is None else self.inner.penalty(adapter)

    def fact(self, arguments: Mapping[str, Any]) -> Any:
        """What the formula has to know of one call of the model, found once and before its layers run.

        Args:
            arguments: of the model's forward (or generate), by name; those of :attr:`call_arguments` among them.
        """
        return None if self.inner is None else self.inner.fact(arguments)

    def step(self, fact: Any, arguments: Mapping[str, Any]) -> Any:
        """What it has to know of one of the forward passes that ``generate`` makes, given what holds for the prompt.

        Args:
            fact: what :meth:`fact` has found in the arguments of ``generate``.
            arguments: of the model's forward, by name.
        """
        return fact if self.inner is None else self.inner.step(fact, arguments)

    def of_rows(self, fact: Any, index: Tensor) -> Any:
        """What :meth:`fact` (or :meth:`step`) says of some rows of the call, those with these indices, (rows,)."""
        return fact if self.inner is None else self.inner.of_rows(fact, index)

    def counts_in(self, tokens: Sequence[int]) -> bool:
        """Whether the update counts anywhere in a row of token ids; a training on rows where it never does is none."""
        return self.inner is None or self.inner.counts_in(tokens)
