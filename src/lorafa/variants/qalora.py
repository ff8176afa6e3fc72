"""QA-LoRA: A sees one number for each group of inputs (Xu et al. 2023, arXiv:2309.14717).

The update is then the same for all inputs of a group, as the zero points of a group-wise quantized weight are: a merge
moves those alone, and the codes stay (section 3.3 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorafa.adapter import Adapter, Tensors, Variant
from lorafa.errors import ConfigError
from lorafa.numerics.fused import Keep
from lorafa.spec import LayerSpec, Shape
from lorafa.variants.lora import LoRA

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _GroupMeans:
    """Keeps the mean of each group of inputs: all that the gradient of a factor with equal columns depends on."""

    size: int

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        return (_means(x, self.size),)

    def load(self, saved: tuple[Tensor, ...]) -> Tensor:
        return _over_groups(saved[0], self.size)


def _means(x: Tensor, size: int) -> Tensor:
    """(..., groups * size) -> (..., groups): the mean of each group."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size).mean(-1)


def _over_groups(values: Tensor, size: int) -> Tensor:
    """(..., groups) -> (..., groups * size): each number for all inputs of its group."""
    return values.unsqueeze(-1).expand(*values.shape, size).flatten(-2)


class QALoRA(LoRA):
    """LoRA on the means of groups of g inputs, times in / g; A is stored as (r, in / g).

    The factor in / g is PEFT's. The paper takes the sum over a group, which is the mean times g: the same where
    g = sqrt(in), and elsewhere the same with another learning rate and start of A.
    """

    name = "qalora"
    switch = "use_qalora"
    hosts = frozenset({"linear"})
    takes_bias = False
    factors_are_stored = False
    takes_empty_ranks = False
    peft_stores = True

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        return cls(config.qalora_group_size)

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        """A is (r, in / g).

        Raises:
            ConfigError: the groups do not fill the inputs.
        """
        inputs = weight.shape[-1]
        if inputs % self.group_size:
            raise ConfigError(
                f"{spec.name}: its {inputs} inputs are no whole number of groups of "
                f"qalora_group_size={self.group_size}. Set a size that divides {inputs}, such as that of the groups in "
                "which the base is quantized, or leave the layer out with exclude_modules."
            )
        return super().shapes(weight, spec) | {"A": (spec.rank, inputs // self.group_size)}

    def factors(self, tensors: Tensors, *, training: bool = False) -> tuple[Tensor, Tensor]:
        return _over_groups(tensors.A * self._factor(tensors.A) / self.group_size, self.group_size), tensors.B

    def kept(self, adapter: Adapter, x: Tensor, dropout: float) -> Keep | None:
        """The means of groups, which say all; where elements of a group are dropped they do not, and x is kept."""
        return None if dropout else _GroupMeans(self.group_size)

    def before(self, adapter: Adapter, x: Tensor) -> Tensor:
        return _means(x, self.group_size) * self._factor(adapter.A)

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        return z

    def _factor(self, A: Tensor) -> int:
        """What the mean of a group is multiplied by: the number of groups."""
        return A.shape[-1]
