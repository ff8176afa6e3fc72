"""Small functions that libraries take from ``peft.utils`` and ``peft.import_utils``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends import own_weight
from lorafa.backends.offload import brought_in
from lorafa.errors import ConfigError

_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


# ---- modules and tensors


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """(in, out) of (out, in) where ``fan_in_fan_out``; else the weight itself. A parameter gives a parameter."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module called ``key``, the module, and what it is called in its parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The name of the model's table of inputs; ``default`` where it has none."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    table = model.get_input_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is table), default)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of rows of a call.

    Raises:
        ConfigError: neither is given.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ConfigError("Neither input_ids nor inputs_embeds is given, so there is no batch. Pass one of the two.")
    return given.shape[0]


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Device, address and bytes of the memory of a tensor: equal for tensors that share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def infer_device() -> str:
    """The type of the accelerator that torch has here, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def str_to_bool(value: str) -> int:
    """1 or 0 of "yes", "true", "on", "1" and their opposites.

    Raises:
        ConfigError: another text.
    """
    word = value.lower()
    if word not in (*_TRUE, *_FALSE):
        raise ConfigError(f"{value!r} is neither true nor false. Use one of {', '.join((*_TRUE, *_FALSE))}.")
    return int(word in _TRUE)


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as numbers: its own tensor where it is dense, of a quantized one what its codes mean.

    Raises:
        BackendError: no back end knows how its weight is stored.
    """
    return own_weight(module)


def dequantize_bnb_weight(weight: Tensor, state: Any = None) -> Tensor:
    """The numbers of a weight of bitsandbytes, of 4 bits or, with the layer's ``state``, of 8.

    Raises:
        ConfigError: 8 bits without a state that has scales.
    """
    import bitsandbytes

    kind = type(weight).__name__
    if kind == "Params4bit":
        found: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
        return found
    if kind != "Int8Params":
        return weight
    scales = getattr(state, "SCB", None)
    scales = getattr(weight, "SCB", None) if scales is None else scales
    if scales is None:
        raise ConfigError("A weight of 8 bits needs its scales: pass the layer's state, or dequantize_module_weight.")
    numbers: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return numbers


# ---- contexts


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """A with-block in which parameters of new modules are made on the meta device; accelerate's."""
    from accelerate import init_empty_weights as on_meta

    with on_meta(include_buffers=bool(include_buffers)):
        yield


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """A with-block in which parameters that DeepSpeed (ZeRO-3) has spread are whole; nothing where it has not."""
    listed = [param] if isinstance(param, nn.Parameter) else list(param)
    if not any(hasattr(one, "ds_id") for one in listed):
        yield
        return
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        listed, modifier_rank=modifier_rank, fwd_module=fwd_module
    )
    with gathered:
        yield


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """A with-block in which weights that rest elsewhere (accelerate's offloading) are on their device, to be read.

    What is written to them inside is not kept; merging keeps it.
    """
    with ExitStack() as stack:
        for module in layer.modules():
            stack.enter_context(brought_in(module))
        yield


# ---- what is installed


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _is_installed("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed and has layers of 4 bits."""
    if not is_bnb_available():
        return False
    import bitsandbytes

    return hasattr(bitsandbytes.nn, "Linear4bit")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _is_installed("diffusers")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _is_installed("torchao")


def is_eetq_available() -> bool:
    """False: adapters do not go on layers of EETQ here, whether it is installed or not."""
    return False


def is_gptqmodel_available() -> bool:
    """False: adapters do not go on layers of GPTQModel here, whether it is installed or not."""
    return False


def is_hqq_available() -> bool:
    """False: adapters do not go on layers of HQQ here, whether it is installed or not."""
    return False


def is_aqlm_available() -> bool:
    """False: adapters do not go on layers of AQLM here, whether it is installed or not."""
    return False


def is_xpu_available() -> bool:
    """Whether torch has an Intel GPU."""
    return torch.xpu.is_available()


def _is_installed(name: str) -> bool:
    return find_spec(name) is not None
