"""What the engine needs to know of a base layer it did not make, looked up by the layer's type.

The table maps the full name of a layer type to its back end, so that looking up a plain nn.Linear imports no optional
package. A subclass finds its own line first, then its parent's.
"""

from __future__ import annotations

from torch import nn

from lorafa.backends.base import Backend
from lorafa.registry import Registry

BACKENDS: Registry[type[Backend]] = Registry(
    "back end",
    {
        "torch.nn.modules.linear.Linear": "lorafa.backends.dense:DenseBackend",
        "torch.nn.modules.sparse.Embedding": "lorafa.backends.embedding:EmbeddingBackend",
        "torch.nn.modules.conv.Conv1d": "lorafa.backends.conv:ConvBackend",
        "torch.nn.modules.conv.Conv2d": "lorafa.backends.conv:Conv2dBackend",
        "torch.nn.modules.conv.Conv3d": "lorafa.backends.conv:Conv3dBackend",
        "torch.nn.modules.activation.MultiheadAttention": "lorafa.backends.attention:AttentionBackend",
        "transformers.pytorch_utils.Conv1D": "lorafa.backends.conv1d:Conv1DBackend",
        "lorafa.backends.nf4.NF4Linear": "lorafa.backends.nf4:NF4Backend",
        "lorafa.backends.int8.Int8Linear": "lorafa.backends.int8:Int8Backend",
    },
)


def backend_of(layer: nn.Module | type) -> Backend | None:
    """The back end of a layer (or layer type), or None where no adapter can be put on it."""
    layer_type = layer if isinstance(layer, type) else type(layer)
    for cls in layer_type.__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in BACKENDS:
            return BACKENDS.get(name)()
    return None
