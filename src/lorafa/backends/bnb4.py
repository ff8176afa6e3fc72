"""bitsandbytes.nn.Linear4bit: blocks of weights share a scale, codes index 16 levels, NF4 or FP4 (QLoRA,
arXiv:2305.14314); with double quantization the scales are in 8 bits.

The product is that of bitsandbytes, but its layer's own forward does not run. On a CPU with AVX512-BF16 that packs the
codes anew at the first call in eval mode: it rounds the scales to bfloat16, in place, and has no gradient afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorafa.backends.base import Backend
from lorafa.backends.oddities import own_methods
from lorafa.backends.offload import hooked_as, rests_elsewhere, without_hooks
from lorafa.errors import BackendError
from lorafa.numerics.fused import Codes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What bitsandbytes multiplies in and dequantizes to."""
_PACKED = (
    "its codes were packed for inference on this CPU, as bitsandbytes does at the first call in eval mode, which "
    "rounds the scales and has no gradient; load the model again, and let prepare_model_for_kbit_training keep it from "
    "packing before it is called"
)


def _state(layer: nn.Module) -> Any:
    """The scales and settings of the codes; None as long as there are none."""
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state  # FSDP leaves the weight without


def _is_packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(_state(layer))
    if _is_packed(state):
        raise BackendError(f"The weight of this Linear4bit cannot be read: {_PACKED}.")
    state.dtype = dtype if dtype in _DTYPES else torch.float32
    codes = cast(Tensor, layer.weight).detach().view(-1, 1)
    return cast(Tensor, dequantize_4bit(codes, state)).to(dtype)


def quantized(weight: Tensor, like: Any, storage: torch.dtype) -> Any:
    """The codes of a weight (out, in) as a Params4bit, by the settings of ``like``, the state of other codes."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    codes, state = quantize_4bit(
        weight.detach().float().contiguous(),
        blocksize=like.blocksize,
        compress_statistics=like.nested,
        quant_type=like.quant_type,
        quant_storage=storage,
    )
    state.dtype = like.dtype
    return Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )


class _Codes:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from bitsandbytes import matmul_4bit

        dtype = cast("torch.dtype | None", self.layer.compute_dtype) or x.dtype
        dtype = dtype if dtype in _DTYPES else torch.float32
        inner_bias = None if bias is None else bias.detach().to(dtype)
        codes = cast(Tensor, self.layer.weight).detach()
        y: Tensor = matmul_4bit(x.detach().to(dtype), codes, bias=inner_bias, quant_state=_state(self.layer))
        return y.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return _dequantized(self.layer, dtype)


class Bnb4Backend(Backend):
    host = "linear"
    quantized = True
    can_rest = False
    fills = False
    inherits = True
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        "forward": frozenset({"bitsandbytes.nn.modules.Linear4bit.forward"})
    }

    def serves(self, layer: nn.Module) -> str | None:
        weight = layer._parameters.get("weight")
        if rests_elsewhere(layer):
            return "its codes rest elsewhere and are brought in without their scales; keep it on a device (device_map)"
        state = None if weight is None else _state(layer)
        if state is None:
            return "its weight is not quantized yet; bitsandbytes does so when the model is moved to its device (.to)"
        return _PACKED if _is_packed(state) else None

    def weight(self, layer: nn.Module) -> Tensor:
        return _dequantized(layer, torch.float32)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        linear = cast(nn.Linear, layer)
        return linear.out_features, linear.in_features

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """The one it multiplies in, where that is settled, else that of the weight it was made from."""
        return cast("torch.dtype | None", layer.compute_dtype) or cast(torch.dtype, _state(layer).dtype)

    def codes(self, layer: nn.Module) -> Codes | None:
        if own_methods(layer, self.formula):
            return None
        if _is_packed(_state(layer)):
            if torch.is_grad_enabled():
                raise BackendError(f"Nothing can be trained through this Linear4bit: {_PACKED}.")
            return None
        return _Codes(layer)

    def prepare(self, layer: nn.Module) -> None:
        """Keep it from packing its codes, on a CPU in eval mode."""
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    def keeps_beside(self, layer: nn.Module) -> tuple[object, ...]:
        state = _state(layer)
        return () if state is None else (state,)

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.to(torch.float32)

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """Quantizes again, by the same settings: the merged weight is rounded anew to codes."""
        new: Any = without_hooks(layer)
        old = cast(Tensor, layer.weight)
        new._parameters["weight"] = quantized(weight.to(old.device), _state(layer), old.dtype)
        new.quant_state = new.weight.quant_state
        if bias is not None:
            new._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return hooked_as(new, layer)

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return linear_4bit(weight, bias)


def linear_4bit(
    weight: Tensor, bias: Tensor | None, *, quant_type: str = "nf4", double: bool = True, blocksize: int = 64
) -> nn.Module:
    """A Linear4bit with the codes of a weight (out, in), that multiplies in the weight's dtype and never packs.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    dtype = weight.dtype if weight.dtype in _DTYPES else torch.float32
    out, in_ = weight.shape
    layer: nn.Module = Linear4bit(
        in_, out, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type=quant_type, device="meta"
    )
    like = QuantState(weight.new_empty(0), dtype=dtype, blocksize=blocksize, quant_type=quant_type)
    like.nested = double
    layer._parameters["weight"] = quantized(weight, like, torch.uint8)
    layer.quant_state = layer.weight.quant_state  # type: ignore[union-attr, assignment]
    layer.weight.module = layer  # type: ignore[union-attr]
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
