"""Base models known by name: all by their shape, some with a place their weights come from without the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
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


def loadable() -> list[str]:
    """Those whose weights can be had; of the others only the shape is known."""
    return [name for name in MODELS.names() if MODELS.get(name).fetch is not None]
