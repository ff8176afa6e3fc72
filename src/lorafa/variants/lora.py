"""LoRA: delta W = s B A (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lorafa.adapter import Adapter, Variant
from lorafa.numerics.fused import compute_dtype, low_rank_linear


class LoRA(Variant):
    """s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""

    name = "lora"
    plain = True
    takes_bias = True
    takes_empty_ranks = True

    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        return adapter.product()

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        if not adapter.as_made:
            return adapter.layer.by_modules(adapter, x)
        p = adapter.dropout
        if p and adapter.running_start is not None:
            dropped = nn.functional.dropout(x, p)
            # s B A drop(x) - s B0 A0 x: the start belongs to the base, which sees x without dropout
            change = adapter.change(dropped) + cast(Tensor, adapter.start_of(dropped - x))
        else:
            change = adapter.low_rank(x, p)
        bias = adapter.scaled_bias
        return change if bias is None else change + adapter.layer.per_output(bias).to(change.dtype)

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        dense = adapter.layer.dense_weight(x)
        if dense is None:
            return None
        weight, bias = dense
        p = adapter.dropout
        if p and adapter.running_start is not None:
            return None
        change = adapter.scaled_bias
        if change is not None:
            bias = change if bias is None else bias + change
        factors = adapter.factors_in(compute_dtype(x))
        source = adapter.dropout_source if p else None
        return low_rank_linear(
            x, *factors, adapter.scaling, weight=weight, bias=bias, dropout=p, source=source, keep=adapter.kept(x, p)
        )
