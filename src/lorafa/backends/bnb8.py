"""bitsandbytes.nn.Linear8bitLt: every output row has a scale, codes are -127 .. 127 (LLM.int8(), arXiv:2208.07339).

Its inputs are rounded to 8 bits as well, by row of x, but for those of columns with an outlier where it has a
threshold; on a CPU not in training. So its output is that of its weight up to about 1 % only. Gradients are those of
the weight it multiplies with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorafa.backends.base import Backend
from lorafa.backends.oddities import own_methods
from lorafa.backends.offload import hooked_as, rests_elsewhere, without_hooks
from lorafa.numerics.fused import Codes

_LARGEST = 127


def _codes_and_scales(layer: Any) -> tuple[Tensor, Tensor] | None:
    """int8 (out, in) and float32 (out,): where they are before the first call, or after it; None if not quantized."""
    for holder in (layer.state, layer.weight):
        if getattr(holder, "CB", None) is not None and getattr(holder, "SCB", None) is not None:
            return holder.CB, holder.SCB
    return None


def _dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    codes, scales = cast("tuple[Tensor, Tensor]", _codes_and_scales(layer))
    return (codes * (scales / _LARGEST)[:, None]).to(dtype)


class _Codes:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        import bitsandbytes

        layer: Any = self.layer
        state = bitsandbytes.MatmulLtState()  # its own is moved about by the layer's forward
        state.CB, state.SCB = cast("tuple[Tensor, Tensor]", _codes_and_scales(layer))
        state.threshold, state.has_fp16_weights = layer.state.threshold, False
        state.use_pool, state.is_training = layer.state.use_pool, layer.training
        inner_bias = None if bias is None else bias.detach().to(x.dtype)
        rows = x.detach().reshape(-1, x.shape[-1])  # bitsandbytes takes no more than two dimensions before the last
        y: Tensor = bitsandbytes.matmul(rows, layer.weight.detach(), bias=inner_bias, state=state)
        return y.view(*x.shape[:-1], state.CB.shape[0])

    def dense(self, dtype: torch.dtype) -> Tensor:
        return _dequantized(self.layer, dtype)


class Bnb8Backend(Backend):
    host = "linear"
    quantized = True
    can_rest = False
    rounds_inputs = 0.02
    inherits = True
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        "forward": frozenset({"bitsandbytes.nn.modules.Linear8bitLt.forward"})
    }

    def serves(self, layer: nn.Module) -> str | None:
        if rests_elsewhere(layer):
            return "its codes rest elsewhere and are brought in without their scales; keep it on a device (device_map)"
        if cast(Any, layer).state.has_fp16_weights:
            return "it keeps its weight whole and rounds it anew at each call; make it with has_fp16_weights=False"
        if _codes_and_scales(layer) is None:
            return "its weight is not quantized yet; bitsandbytes does so when the model is moved to its device (.to)"
        return None

    def weight(self, layer: nn.Module) -> Tensor:
        return _dequantized(layer, torch.float32)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        linear = cast(nn.Linear, layer)
        return linear.out_features, linear.in_features

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """The dtype of the bias, which the layer keeps in that of its inputs; else float16, in which it rounds them."""
        bias = layer._parameters.get("bias")
        return torch.float16 if bias is None else bias.dtype

    def codes(self, layer: nn.Module) -> Codes | None:
        return None if own_methods(layer, self.formula) else _Codes(layer)

    def keeps_beside(self, layer: nn.Module) -> tuple[object, ...]:
        """Its state: the first call of its own forward takes codes and scales from the weight into it."""
        return (layer.state,)

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.to(torch.float32)

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """Quantizes again: the merged weight is rounded anew to the codes of the layer."""
        import bitsandbytes

        new: Any = without_hooks(layer)
        old: Any = layer
        state = bitsandbytes.MatmulLtState()
        state.threshold, state.use_pool = old.state.threshold, old.state.use_pool
        state.has_fp16_weights, state.is_training = False, old.state.is_training
        new.state = state
        new._parameters["weight"] = _quantized(weight.to(cast(Tensor, old.weight).device))
        if bias is not None:
            new._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return hooked_as(new, layer)

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return linear_8bit(weight, bias)


def _quantized(weight: Tensor) -> Any:
    """The codes of a weight (out, in) as an Int8Params; bitsandbytes rounds it to float16 before."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    codes, scales, _ = int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def linear_8bit(weight: Tensor, bias: Tensor | None, *, threshold: float = 0.0) -> nn.Module:
    """A Linear8bitLt with the codes of a weight (out, in).

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes.nn import Linear8bitLt

    out, in_ = weight.shape
    layer: nn.Module = Linear8bitLt(in_, out, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    layer._parameters["weight"] = _quantized(weight)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
