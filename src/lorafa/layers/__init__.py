"""The kinds of layer that carry adapters, by the name back ends use for them."""

from lorafa.layers.base import LoraLayer
from lorafa.registry import Registry

LAYERS: Registry[type[LoraLayer]] = Registry(
    "kind of layer",
    {
        "linear": "lorafa.layers.linear:LoraLinear",
        "embedding": "lorafa.layers.embedding:LoraEmbedding",
        "conv": "lorafa.layers.conv:LoraConv",
        "attention": "lorafa.layers.attention:LoraAttention",
        "experts": "lorafa.layers.experts:LoraExperts",
    },
)
