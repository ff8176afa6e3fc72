"""LoraLinear: adapters on anything that computes x W^T + b, whatever way it stores W."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorafa.adapter import bias_change
from lorafa.backends.base import is_hooked
from lorafa.errors import BackendError
from lorafa.layers.base import LoraLayer
from lorafa.layers.weights import updated_tensors
from lorafa.numerics.fused import (
    Codes,
    Keep,
    autocast_dtype,
    compute_dtype,
    frozen_linear,
    is_traced,
    low_rank_linear,
)


class LoraLinear(LoraLayer):
    """x is (..., in), the output (..., out).

    Where a module around it may read its ``weight`` (``weight_is_read``), that and ``bias`` hold the updates of the
    adapters that count; otherwise they are the base layer's, as in PEFT: dequantized where that has codes alone.
    """

    kind = "linear"
    peft_name = "lora.Linear"
    is_linear = True
    can_be_tied = True

    @property
    def weight(self) -> Tensor:
        if self._answers_updated():
            return self._updated_weight()
        base = self.running_base()
        if self.backend.quantized and not hasattr(base, "weight"):  # T5 asks its wo for the dtype
            return self.backend.weight(base)
        return base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        if self._answers_updated():
            return self._updated_bias()
        return getattr(self.running_base(), "bias", None)

    def _answers_updated(self) -> bool:
        return self.weight_is_read and bool(self.counting())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._of_nested(x) if x.is_nested and self.counting() else super().forward(x, *args, **kwargs)

    def _of_nested(self, x: Tensor) -> Tensor:
        """The output for a nested tensor, which has no rows to take: by the updated weight."""
        if any(adapter.dropout for adapter in self.counting()):
            raise BackendError(
                "lora_dropout does not act on nested tensors: the update is in the weight there, and has no input to "
                "drop. Set lora_dropout=0, or pass padded tensors."
            )
        return nn.functional.linear(x, self._updated_weight(), self._updated_bias())

    def _updated_weight(self) -> Tensor:
        return updated_tensors(self, "weight")["weight"]

    def _updated_bias(self) -> Tensor | None:
        bias, change = self.base_bias(), bias_change(self.counting())
        if change is None:
            return bias
        return change.to(self.base_weight().dtype) if bias is None else bias + change.to(bias.dtype)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float = 0.0, keep: Keep | None = None
    ) -> Tensor:
        source = self.call.dropout_source if dropout and not is_traced() else None
        return low_rank_linear(x, A, B, scaling, dropout=dropout, source=source, keep=keep)

    def run_base(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        codes = self.backend.codes(base)  # asked in any case: it raises where the forward would lose the gradient
        if codes is None or args or kwargs or is_hooked(base) or is_traced():
            return base(x, *args, **kwargs)
        return frozen_linear(x, codes, self.backend.bias(base))

    def dense_weight(self, x: Tensor) -> tuple[Tensor | Codes, Tensor | None] | None:
        base = self.base_layer
        if is_hooked(base):
            return None
        dense = self.backend.dense(base)
        if dense is None:
            codes = None if is_traced() else self.backend.codes(base)
            # the layer gives the dtype of x, where products of autocast would have another
            return None if codes is None or compute_dtype(x) is not x.dtype else (codes, self.backend.bias(base))
        if x.dtype is dense[0].dtype or compute_dtype(x) in (dense[0].dtype, autocast_dtype(x)):
            return dense
        return None  # the base layer says what is wrong with the dtypes
