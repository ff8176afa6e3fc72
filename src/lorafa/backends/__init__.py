"""What the engine needs to know of a base layer it did not make, looked up by the types of its weight and of itself.

The table maps the full name of a layer type to its back end, so that looking up a plain nn.Linear imports no optional
package. ``"tensor:"`` before the full name of a type of tensor stands for every layer with such a weight.
"""

from __future__ import annotations

from torch import Tensor, nn

from lorafa.backends.base import Backend
from lorafa.backends.oddities import full_name, is_plain
from lorafa.backends.offload import in_memory
from lorafa.errors import BackendError
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
        "bitsandbytes.nn.modules.Linear4bit": "lorafa.backends.bnb4:Bnb4Backend",
        "bitsandbytes.nn.modules.Linear8bitLt": "lorafa.backends.bnb8:Bnb8Backend",
        "tensor:torchao.quantization.Int8Tensor": "lorafa.backends.torchao_int8:TorchaoInt8Backend",
        "tensor:torchao.quantization.IntxUnpackedToInt8Tensor": "lorafa.backends.torchao_intx:TorchaoIntxBackend",
        "tensor:torchao.quantization.Float8Tensor": "lorafa.backends.torchao_float8:TorchaoFloat8Backend",
    },
)


def backend_of(layer: nn.Module) -> Backend | None:
    """The back end of a layer; None where no adapter can be put on it.

    The type of its weight decides if it has a line (``"tensor:"`` and the type's full name), then its own type, then
    the types that this inherits from, of which a back end may not want to know (:attr:`Backend.inherits`). Whether it
    is sure of this very layer is another question: :meth:`Backend.serves`.
    """
    weight, layer_type = layer._parameters.get("weight"), type(layer)
    ordinary = type(weight) is nn.Parameter or is_plain(weight)
    if not ordinary and (key := f"tensor:{full_name(type(weight))}") in BACKENDS:
        return BACKENDS.get(key)()
    for cls in layer_type.__mro__:
        name = full_name(cls)
        if name in BACKENDS and (cls is layer_type or BACKENDS.get(name).inherits):
            return BACKENDS.get(name)()
    return None


def own_weight(layer: nn.Module, backend: Backend | None = None) -> Tensor:
    """The weight of a layer in its own layout: the tensor itself where it is dense, else the numbers its codes mean.

    Args:
        backend: what knows the layer, where its type does not tell.

    Raises:
        BackendError: no back end knows how the weight is stored.
    """
    backend = backend or backend_of(layer)
    if backend is None:
        raise BackendError(
            f"No back end knows how {type(layer).__name__} stores its weight, so its numbers cannot be read."
        )
    here: nn.Module = in_memory(layer)
    weight = here._parameters.get("weight")
    return backend.weight(here) if backend.quantized or weight is None else weight
