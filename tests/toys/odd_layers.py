"""Layers that are more, or less, than their type says: what other libraries and users make of nn.Linear and the rest.

Each is a model of one module called ``layer``, beside a row that says what can be done with it: whether it can carry an
adapter, whether its weight is what it multiplies with (so that it can be read for a start or a norm), and whether
another weight can be merged into it. Where one of the three cannot be, the row has the reason the error has to give.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from toys.of_libraries import bitnet, bnb, fp8, packed_bnb, torchao

OUT, IN = 24, 8


@dataclass(frozen=True)
class Odd:
    """None: exact. A text: refused, and the pattern of the reason."""

    make: Callable[[], nn.Module]
    carries: str | None = None
    reads: str | None = None
    merges: str | None = None
    kind: str = "linear"
    """What it is called with: linear, conv, embedding or attention inputs, or experts."""
    runs: bool = True
    """Whether it can be run here as it is."""


class Named(nn.Linear):
    """A subclass that changes nothing."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Normalizing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class RowScaledCodes(nn.Linear):
    """8-bit codes with a scale a row, as several libraries have them."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        weight = self.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Packed(nn.Module):
    """Codes in a module that inherits from no layer of torch, as GPTQ's, AWQ's and HQQ's."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", torch.randint(-127, 127, (OUT, IN), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 127)


class Wrapped(Tensor):
    """A tensor that behaves as another one, as those of torchao."""


class CausalConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


class Standardized(nn.Conv1d):
    """Its forward is torch's, what that calls is not."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class NormedTable(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


class ScaledTable(nn.Embedding):
    """As Gemma's: the rows are multiplied on the way out."""

    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class ScaledNormedTable(NormedTable):
    """It has the scale that others multiply by, and does something else with it."""

    embed_scale = 3.0


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Stack(nn.Module):
    """Three experts (3, OUT, IN) on x (3, T, IN)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, OUT, IN) / IN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class Noisy(nn.Module):
    """A parametrization that draws."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def dense() -> nn.Linear:
    return nn.Linear(IN, OUT)


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer with that very tensor as a parameter that does not train."""
    layer._parameters["weight"] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
    return layer


def buffered(layer: nn.Module) -> nn.Module:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


Hook = Callable[..., Any]


def hooked(layer: nn.Module, *, before: Hook | None = None, after: Hook | None = None) -> nn.Module:
    if before is not None:
        layer.register_forward_pre_hook(before)
    if after is not None:
        layer.register_forward_hook(after)
    return layer


def patched(layer: nn.Module) -> nn.Module:
    old = layer.forward
    layer.forward = lambda *args, **kwargs: old(*args, **kwargs)  # type: ignore[method-assign]
    return layer


def tripled(layer: nn.Module) -> nn.Module:
    old = layer.forward
    layer.forward = lambda x: 3 * old(x)  # type: ignore[method-assign]
    return layer


def moved(layer: nn.Module) -> nn.Module:
    """As accelerate leaves the layers of a model that is spread over devices."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    return layer


def asked_for_gradients(layer: nn.Module) -> nn.Module:
    """As transformers leaves an input embedding for gradient checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    model.enable_input_require_grads()
    hook = next(iter(model.get_input_embeddings()._forward_hooks.values()))
    return hooked(layer, after=hook)


def quietly(make: Callable[[nn.Module], Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer: nn.Module = make(dense())
    return layer


def falcon() -> nn.Module:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer: nn.Module = FalconLinear(IN, OUT)
    return layer


def attention(change: Hook = lambda layer: None, cls: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> nn.Module:
    layer = cls(IN, 2, batch_first=True)
    change(layer)
    return layer


def codes_in_out_proj(layer: nn.MultiheadAttention) -> None:
    with_weight(layer.out_proj, torch.ones(IN, IN, dtype=torch.int8))


def codes_in_stack() -> nn.Module:
    return with_weight(Stack(), torch.ones(3, OUT, IN, dtype=torch.int8))


COMPUTED = "its weight is computed from other parameters"
OUT_OF_DATE = "its weight is set by a hook before each call"
ANEW = "its weight is another one each time it is computed"
HOOK = r"a hook is on it \(.*\) that may change values"
FORWARD = "it has a forward of its own"
REPLACED = "its forward was replaced by another function"
QUANTIZED = "its weight is quantized, an? {} of {}"


ODD: dict[str, Odd] = {
    "a subclass that changes nothing": Odd(lambda: Named(IN, OUT)),
    "a subclass of transformers that computes the same": Odd(falcon),
    "a weight that is a buffer": Odd(lambda: buffered(dense())),
    "moved by accelerate": Odd(lambda: moved(dense())),
    "a hook of transformers that asks for gradients": Odd(lambda: asked_for_gradients(dense())),
    "weight norm": Odd(lambda: parametrizations.weight_norm(dense()), merges=COMPUTED),
    "an orthogonal weight": Odd(lambda: parametrizations.orthogonal(dense()), merges=COMPUTED),
    "a computed bias": Odd(
        lambda: parametrize.register_parametrization(dense(), "bias", nn.Tanh()),
        merges="its bias is computed from other parameters",
    ),
    "a bias that is drawn": Odd(
        lambda: parametrize.register_parametrization(dense(), "bias", Noisy()),
        reads="its bias is another one each time it is computed",
        merges="its bias is computed from other parameters",
    ),
    "spectral norm": Odd(lambda: parametrizations.spectral_norm(dense()), reads=ANEW, merges=COMPUTED),
    "a parametrization that draws": Odd(
        lambda: parametrize.register_parametrization(dense(), "weight", Noisy()), reads=ANEW, merges=COMPUTED
    ),
    "the old weight norm": Odd(lambda: quietly(nn.utils.weight_norm), reads=OUT_OF_DATE, merges=COMPUTED),
    "the old spectral norm": Odd(lambda: quietly(nn.utils.spectral_norm), reads=OUT_OF_DATE, merges=COMPUTED),
    "pruned": Odd(lambda: prune.l1_unstructured(dense(), "weight", 0.5), reads=OUT_OF_DATE, merges=COMPUTED),
    "a hook that looks on": Odd(lambda: hooked(dense(), after=lambda *_: None), reads=HOOK, merges=HOOK),
    "a hook that adds": Odd(lambda: hooked(dense(), after=lambda m, x, y: y + 1), reads=HOOK, merges=HOOK),
    "a hook that scales": Odd(lambda: hooked(dense(), after=lambda m, x, y: 2 * y), reads=HOOK, merges=HOOK),
    "a hook before it": Odd(lambda: hooked(dense(), before=lambda m, x: (3 * x[0],)), reads=HOOK, merges=HOOK),
    "a forward of this very layer": Odd(lambda: tripled(dense()), reads=REPLACED, merges=REPLACED),
    "a subclass that scales": Odd(lambda: Doubled(IN, OUT), reads=FORWARD, merges=FORWARD),
    "a subclass that normalizes": Odd(lambda: Normalizing(IN, OUT), reads=FORWARD, merges=FORWARD),
    "BitNet": Odd(bitnet, reads=FORWARD, merges=FORWARD),
    "on meta": Odd(lambda: dense().to("meta"), reads="meta device", merges="meta device", runs=False),
    "codes with a scale a row": Odd(RowScaledCodes, carries=QUANTIZED.format("Parameter", "torch.int8")),
    "8 bits of bitsandbytes that are not there yet": Odd(
        lambda: bnb("Linear8bitLt", moved=False, has_fp16_weights=False),
        carries="its weight is not quantized yet; bitsandbytes does so when the model is moved",
        runs=False,
    ),
    "8 bits of bitsandbytes, made anew at each call": Odd(
        lambda: bnb("Linear8bitLt"), carries="it keeps its weight whole and rounds it anew at each call; make it with",
        runs=False,
    ),
    "4 bits of bitsandbytes that are not there yet": Odd(
        lambda: bnb("Linear4bit", moved=False), carries="its weight is not quantized yet", runs=False
    ),
    "4 bits of bitsandbytes packed for a CPU": Odd(
        packed_bnb, carries="its codes were packed for inference on this CPU.* load the model again", runs=False
    ),
    "fp8 with scales": Odd(fp8, carries=QUANTIZED.format("Parameter", "torch.float8_e4m3fn"), runs=False),
    "inputs that torchao rounds too": Odd(
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        carries=r"it rounds or scales its inputs too \(act_quant_kwargs\), .* quantize the weight alone", runs=False,
    ),
    "packed codes": Odd(Packed, carries="is a quantized Packed of toys, which cannot carry an adapter"),
    "an unknown tensor": Odd(
        lambda: with_weight(dense(), torch.randn(OUT, IN).as_subclass(Wrapped)),
        carries="its weight is a Wrapped of toys, perhaps quantized",
    ),
    "a weight of truth values": Odd(
        lambda: with_weight(dense(), torch.ones(OUT, IN, dtype=torch.bool)),
        carries="its weight is a mask, a Parameter of torch.bool", runs=False,
    ),
    "a complex weight": Odd(
        lambda: with_weight(dense(), torch.ones(OUT, IN, dtype=torch.complex64)),
        carries="its weight is complex, a Parameter of torch.complex64", runs=False,
    ),
    "a sparse weight": Odd(
        lambda: with_weight(dense(), torch.eye(OUT, IN).to_sparse()),
        carries="its weight is stored as torch.sparse_coo", runs=False,
    ),
    "a weight of another shape": Odd(
        lambda: with_weight(dense(), torch.randn(OUT // 2, IN)),
        carries=rf"its weight has shape \({OUT // 2}, {IN}\), and by its settings it has \({OUT}, {IN}\)",
        runs=False,
    ),
    "a lazy layer": Odd(lambda: nn.LazyLinear(OUT), carries="its weight is not initialised; run the model", runs=False),
    "a convolution with weight norm": Odd(
        lambda: parametrizations.weight_norm(nn.Conv1d(IN, OUT, 3)), merges=COMPUTED, kind="conv"
    ),
    "a convolution with spectral norm": Odd(
        lambda: parametrizations.spectral_norm(nn.Conv1d(IN, OUT, 3)), reads=ANEW, merges=COMPUTED, kind="conv"
    ),
    "a convolution with a hook that scales": Odd(
        lambda: hooked(nn.Conv1d(IN, OUT, 3), after=lambda m, x, y: 2 * y), reads=HOOK, merges=HOOK, kind="conv"
    ),
    "a causal convolution": Odd(lambda: CausalConv(IN, OUT, 3), carries=FORWARD, kind="conv"),
    "a convolution that changes its kernel": Odd(
        lambda: Standardized(IN, OUT, 3), carries="it has a _conv_forward of its own", kind="conv"
    ),
    "a convolution padded by a hook": Odd(
        lambda: hooked(nn.Conv1d(IN, OUT, 3), before=lambda m, x: (nn.functional.pad(x[0], (2, 0)),)),
        carries=HOOK, kind="conv",
    ),
    "a table with a scale": Odd(lambda: ScaledTable(IN, OUT), kind="embedding"),
    "a table with weight norm": Odd(
        lambda: parametrizations.weight_norm(nn.Embedding(IN, OUT)), merges=COMPUTED, kind="embedding"
    ),
    "a table that asks for gradients": Odd(lambda: asked_for_gradients(nn.Embedding(IN, OUT)), kind="embedding"),
    "a table that normalizes": Odd(lambda: NormedTable(IN, OUT), carries=FORWARD, kind="embedding"),
    "a table with a scale that normalizes": Odd(
        lambda: ScaledNormedTable(IN, OUT), carries=FORWARD, kind="embedding"
    ),
    "a table whose indices a hook changes": Odd(
        lambda: hooked(nn.Embedding(IN, OUT), before=lambda m, x: (x[0].flip(-1),)), carries=HOOK, kind="embedding"
    ),
    "attention with a hook": Odd(
        lambda: hooked(attention(), after=lambda m, x, y: (2 * y[0], y[1])), kind="attention"
    ),
    "attention with a forward of its own": Odd(
        lambda: attention(cls=OwnAttention), carries=FORWARD, kind="attention"
    ),
    "attention with a forward of this very layer": Odd(
        lambda: patched(attention()), merges=REPLACED, kind="attention"
    ),
    "attention with weight norm": Odd(
        lambda: attention(lambda layer: parametrizations.weight_norm(layer, "in_proj_weight")),
        carries="its in_proj_weight is computed from other parameters", kind="attention",
    ),
    "attention with a computed bias": Odd(
        lambda: attention(lambda layer: parametrize.register_parametrization(layer, "in_proj_bias", nn.Tanh())),
        carries="its in_proj_bias is computed from other parameters",
        kind="attention",
    ),
    "attention with codes in its output projection": Odd(
        lambda: attention(codes_in_out_proj), carries="of its out_proj, " + QUANTIZED.format("Parameter", "torch.int8"),
        kind="attention", runs=False,
    ),
    "experts with a hook": Odd(lambda: hooked(Stack(), after=lambda m, x, y: 2 * y), kind="experts"),
    "experts with a forward of this very module": Odd(lambda: tripled(Stack()), kind="experts"),
    "experts in codes": Odd(
        codes_in_stack, carries=QUANTIZED.format("Parameter", "torch.int8"), kind="experts", runs=False
    ),
}  # fmt: skip
"""Every odd layer with what is exact on it."""
