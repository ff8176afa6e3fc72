"""BD-LoRA: A or B is block-diagonal, so that a sharded layer needs no communication for its adapter.

Source: PEFT's documentation of ``BdLoraConfig``. A layer whose inputs are spread over n devices (output and down
projections) takes a block-diagonal A: each device multiplies its share of the inputs with its own block. One whose
outputs are spread takes a block-diagonal B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafa.adapter import Adapter, Tensors, Variant
from lorafa.errors import ConfigError
from lorafa.settings.methods import BdLoraConfig
from lorafa.spec import LayerSpec, Shape
from lorafa.variants.lora import LoRA

if TYPE_CHECKING:
    from typing_extensions import Self


class BDLoRA(LoRA):
    """LoRA whose A or B is block_diag(M_1, ..., M_n), stored as the blocks one under the other.

    Of a block-diagonal A (r, in) that is (r, in / n), of B (out, r) it is (out, r / n).
    """

    name = "bdlora"
    switch = "use_bdlora"
    hosts = frozenset({"linear"})
    takes_bias = False
    takes_empty_ranks = False
    peft_stores = True
    peft_reads = True

    def __init__(self, settings: BdLoraConfig, blocked: str) -> None:
        """``blocked`` has the factors that are asked to be block-diagonal: "", "A", "B" or, which is refused, "AB"."""
        super().__init__()
        self.settings, self.blocked = settings, blocked
        self.factors_are_stored = not blocked or settings.nblocks == 1

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        """The factor by the layer's own name, the last part of its path, as in PEFT: an entry is any part of it."""
        settings: BdLoraConfig = config.use_bdlora
        own = spec.name.rpartition(".")[2]
        lists = {"A": settings.target_modules_bd_a, "B": settings.target_modules_bd_b}
        return cls(settings, "".join(factor for factor, names in lists.items() if any(n in own for n in names or ())))

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        """The shapes of the stacked blocks.

        Raises:
            ConfigError: the lists name the layer twice, or not at all and ``match_strict`` is set; or the blocks do not
                fill the factor.
        """
        self._check_lists(spec.name)
        shapes = super().shapes(weight, spec)
        if self.factors_are_stored:
            return shapes
        count = self.settings.nblocks
        rows, columns = shapes[self.blocked]
        if rows % count or columns % count:
            raise ConfigError(
                f"{spec.name}: {self.blocked} is {rows} x {columns}, and use_bdlora.nblocks={count} does not divide "
                "both numbers. Set one that does, another rank, or leave the layer out with exclude_modules."
            )
        return shapes | {self.blocked: (rows, columns // count)}

    def _check_lists(self, name: str) -> None:
        if len(self.blocked) == 2:
            raise ConfigError(
                f"{name} is named by target_modules_bd_a and by target_modules_bd_b, but only one of A and B can be "
                "block-diagonal. Entries are parts of a layer's own name: make one of them longer."
            )
        if not self.blocked and self.settings.match_strict:
            raise ConfigError(
                f"{name} is named by neither target_modules_bd_a nor target_modules_bd_b of use_bdlora. Add it to one "
                "of them, or set match_strict=False to give it plain LoRA."
            )

    def factors(self, tensors: Tensors, *, training: bool = False) -> tuple[Tensor, Tensor]:
        A, B = tensors.A, tensors.B
        if self.factors_are_stored:
            return A, B
        return (self._diagonal(A), B) if self.blocked == "A" else (A, self._diagonal(B))

    def is_called(self, adapter: Adapter) -> bool:
        return self.factors_are_stored

    def _diagonal(self, stacked: Tensor) -> Tensor:
        """The dense matrix of the blocks."""
        dense: Tensor = torch.block_diag(*stacked.chunk(self.settings.nblocks, dim=0))  # type: ignore[no-untyped-call]
        return dense
