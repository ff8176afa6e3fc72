"""LoRA: delta W = s B A (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafa.adapter import Adapter
from lorafa.functional import low_rank_linear
from lorafa.variants.base import Variant


class LoRA(Variant):
    """s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""

    name = "lora"
    plain = True

    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        return adapter.product()

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        change = adapter.layer.low_rank(x, adapter.A, adapter.B, adapter.scaling, adapter.dropout)
        if adapter.bias is None:
            return change
        return change + adapter.layer.per_output(adapter.scaling * adapter.bias).to(change.dtype)

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        dense = adapter.layer.dense_weight(x)
        if dense is None:
            return None
        weight, bias = dense
        A, B, p = adapter.A, adapter.B, adapter.dropout
        start = adapter.start
        if start is not None:
            if p:  # the frozen start belongs to the base, which sees x without dropout
                return None
            # B A - B0 A0 = (B - B0) A + B0 (A - A0): exactly zero at step 0, and nothing cancels later
            A, B = torch.cat([A, A - start.A]), torch.cat([B - start.B, start.B], dim=1)
        if adapter.bias is not None:
            change = adapter.scaling * adapter.bias
            bias = change if bias is None else bias + change
        return low_rank_linear(x, A, B, adapter.scaling, weight=weight, bias=bias, dropout=p)
