"""Base models known by name: all by their shape, some with a place their weights come from without the Hub; and the
ways in which the linear layers of a model are quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lorafa.models.entry import KnownModel

MODELS: Registry[KnownModel] = Registry(
    "model",
    {
        "minilm-l6": "lorafa.models.minilm:MINILM_L6",
        "smollm2-135m": "lorafa.models.smollm2:SMOLLM2_135M",
        "opt-125m": "lorafa.models.opt:OPT_125M",
        "opt-350m": "lorafa.models.opt:OPT_350M",
        "opt-1.3b": "lorafa.models.opt:OPT_1_3B",
        "llama-3-8b": "lorafa.models.llama:LLAMA_3_8B",
        "llama-3-70b": "lorafa.models.llama:LLAMA_3_70B",
    },
)

QUANTIZERS: Registry[Callable[[Tensor, Tensor | None], nn.Module]] = Registry(
    "way to quantize",
    {
        "nf4": "lorafa.backends.nf4:NF4Linear",
        "int8": "lorafa.backends.int8:Int8Linear",
        "bnb4": "lorafa.backends.bnb4:linear_4bit",
        "bnb8": "lorafa.backends.bnb8:linear_8bit",
        "torchao_int8": "lorafa.backends.torchao_int8:linear_8bit",
    },
)
"""A weight (out, in) and a bias (out,) or None -> a layer that a back end knows; ImportError where a package lacks."""


def loadable() -> list[str]:
    """The models whose weights can be had; of the others only the shape is known."""
    return [name for name in MODELS.names() if MODELS.get(name).fetch is not None]
