"""Variant: the formula of an update, written twice, as a change of the weight and as a change of the output.

The law every variant keeps, and tests/laws checks for each registered one on every back end:

    y + delta_output(x, y) == layer with weight W + delta_weight(W), applied to x          for every input x

Write ``delta_weight`` first: it is the definition. ``delta_output`` and ``fused`` exist to be fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorafa.adapter import Adapter
from lorafa.errors import BackendError
from lorafa.initializers.base import LayerSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class Variant(ABC):
    """Holds no tensors; parameters live on the layer and are read through the adapter."""

    name: ClassVar[str]
    """Its line in the registry."""
    switch: ClassVar[str | None] = None
    """The field of LoraConfig that asks for it where it is set; None for plain LoRA and for what a start asks for."""
    extras: ClassVar[Mapping[str, str]] = {}
    """Name of an extra parameter in the formulas -> its PEFT name on the layer and in files."""
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "attention", "experts"})
    """Kinds of layer the formula is defined on."""
    reads_weight: ClassVar[bool] = False
    """Whether ``initial_extras`` reads the base weight's values; if not it may get a tensor on the meta device."""
    plain: ClassVar[bool] = False
    """Whether the update is exactly s B A, with B as :meth:`fold` gives it, so that any reader of LoRA can use it."""
    takes_bias: ClassVar[bool] = False
    """Whether the formula has a place for a bias of B (``lora_bias``)."""
    folds: ClassVar[bool] = False
    """Whether :meth:`fold` changes B. Files then hold the folded B, for any reader, and B as it is beside it."""

    @classmethod
    def of(cls, config: Any) -> Self:
        """The variant with the settings a LoraConfig has for it; one object serves all layers of an adapter."""
        return cls()

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Start values of the extras, given the base weight (out, in) and the factors of the whole update."""
        return {}

    def extra_shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the extras; one number an output unless a variant says otherwise. ``weight`` has no values."""
        return dict.fromkeys(self.extras, (weight.shape[-2],))

    def fold(self, B: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """B (out, r) with the extras multiplied in, in the dtype of B: what takes its place in every formula."""
        return B

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        """What stands between A and B, applied to z = A x, for layers whose modules are called one by one.

        Raises:
            BackendError: the formula has no such place.
        """
        if self.folds:
            raise BackendError(
                f"A hook is on lora_A, lora_B or lora_dropout of adapter {adapter.name!r}, or another module in its "
                f"place, and {self.name} is not computed by calling them. Remove the hook."
            )
        return z

    @abstractmethod
    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """The update as a dense (out, in) matrix in float32 or float64; ``weight`` (out, in) is in that dtype."""

    @abstractmethod
    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The change of the base output y, given the layer's input x; dropout acts on x here."""

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        """Base output and change in one function, or None where the layer has no dense weight to fuse with."""
        return None
