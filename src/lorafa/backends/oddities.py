"""What makes a layer another function than its type says, so that a back end cannot be sure of it.

Each question is answered by a reason, a clause that follows "but" or a colon, or by None where nothing is odd. Nothing
here runs a layer or computes a weight of the model: reading one can change it (spectral norm, in training).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lorafa.backends.offload import is_only_moved, rests_elsewhere

MOVERS = (
    "accelerate.", "deepspeed.", "lorafa.", "peft.", "torch.distributed.", "torch.nn.utils.",
    "transformers.modeling_utils.", "transformers.integrations.accelerate.",
    "transformers.integrations.tensor_parallel.",
)  # fmt: skip
"""Modules whose hooks move, gather or watch tensors, ask for gradients, or compute the weight (which other questions
here are about): what goes into the layer and comes out of it they leave as it is."""
_SHARDED = "torch.distributed.tensor.DTensor"


def full_name(thing: type | Callable[..., Any]) -> str:
    """``module.qualname`` of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def described(thing: object) -> str:
    """Type and package of a layer or tensor: "Linear8bitLt of bitsandbytes"."""
    return f"{type(thing).__name__} of {type(thing).__module__.partition('.')[0]}"


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is an ordinary one: no DTensor, no quantized subclass."""
    return tensor is None or type(tensor) in (Tensor, nn.Parameter, torch.nn.Buffer)


def own_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the layer; None where it has none of that name, or computes it."""
    found = layer._parameters.get(name)
    return layer._buffers.get(name) if found is None else found


def tensor_like(layer: nn.Module, name: str) -> Tensor | None:
    """The layer's tensor ``name``, or of one that is computed a tensor in its dtype and on its device."""
    found = own_tensor(layer, name)
    if found is None and parametrize.is_parametrized(layer, name):
        return next(layer.parametrizations[name].parameters(), None)  # type: ignore[index, union-attr]
    return layer.__dict__.get(name) if found is None else found


# ---- the weight


def odd_storage(layer: nn.Module, name: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the tensor ``name`` is not one of numbers that are stored as they are, in ``shape`` where one is given."""
    found = tensor_like(layer, name)
    if not isinstance(found, Tensor):
        return f"it holds no {name}"
    if is_lazy(found):
        return f"its {name} is not initialised; run the model once on an example first"
    if not (found.dtype.is_floating_point and found.dtype.itemsize > 1):
        kind = "complex" if found.dtype.is_complex else "quantized" if found.dtype is not torch.bool else "a mask"
        return f"its {name} is {kind}, {_a(found)} of {found.dtype}"
    if not (is_plain(found) or full_name(type(found)) == _SHARDED):
        return f"its {name} is {_a(found)} of {type(found).__module__.partition('.')[0]}, perhaps quantized"
    if found.layout is not torch.strided:
        return f"its {name} is stored as {found.layout}"
    held = tuple(getattr(found, "ds_shape", found.shape))  # DeepSpeed ZeRO-3 leaves an empty tensor between uses
    if shape is not None and own_tensor(layer, name) is not None and held != shape:
        return f"its {name} has shape {held}, and by its settings it has {shape}"
    return None


def _a(tensor: Tensor) -> str:
    name = type(tensor).__name__
    return f"an {name}" if name[0] in "AEIO" else f"a {name}"


_LIBRARIES = {"transformer_engine": "Transformer Engine", "megatron": "Megatron"}
"""Package -> the name of a library whose layers do more than x W^T + b: they share it out or round it to fp8."""


def is_of_other_library(module: nn.Module) -> str | None:
    """The library a layer with a matrix as its weight comes from, where that is one lorafa has no back end for."""
    weight = module._parameters.get("weight")
    packages = (cls.__module__.partition(".")[0] for cls in type(module).__mro__)
    known = next((_LIBRARIES[package] for package in packages if package in _LIBRARIES), None)
    return known if weight is not None and weight.dim() == 2 else None


def holds_codes(module: nn.Module) -> bool:
    """Whether a module that no back end knows looks like a quantized linear layer of another library."""
    sizes = any(hasattr(module, name) for name in ("in_features", "infeatures"))
    own = (*module._parameters.values(), *module._buffers.values())
    return sizes and any(t is not None and not (t.is_floating_point() and t.dtype.itemsize > 1) for t in own)


def computed(layer: nn.Module, *names: str) -> str | None:
    """Why no value can be put in the place of one of these tensors; those the layer does not have are passed over."""
    for name in names:
        if own_tensor(layer, name) is None and tensor_like(layer, name) is not None:
            return f"its {name} is computed from other parameters (weight norm, pruning or another parametrization)"
    return None


def fixed(layer: nn.Module, *names: str) -> str | None:
    """:func:`computed`, or why there is no value to add something to."""
    for name in names:
        own = own_tensor(layer, name)
        if own is not None and own.is_meta and not rests_elsewhere(layer):
            return f"its {name} is on the meta device and has no values here"
    return computed(layer, *names)


def unsettled(layer: nn.Module, *names: str) -> str | None:
    """Why one of these tensors may be another one each time it is read; a copy of the layer is asked."""
    for name in names:
        if computed(layer, name) is None:
            continue
        if not parametrize.is_parametrized(layer, name):
            return f"its {name} is set by a hook before each call (the old weight norm, pruning) and may be out of date"
        if not _is_repeated(copy.deepcopy(layer).train(), name):
            return f"its {name} is another one each time it is computed (spectral norm in training)"
    return None


def _is_repeated(layer: nn.Module, name: str) -> bool:
    like = tensor_like(layer, name)
    devices = [like.device] if like is not None and like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        first, second = getattr(layer, name), getattr(layer, name)
    return bool(first.is_meta or torch.equal(first, second))


# ---- forward


def own_methods(layer: nn.Module, formula: Mapping[str, frozenset[str]]) -> str | None:
    """Why the methods of its class are not those of ``formula``: method -> full names of functions that are known."""
    for method, known in formula.items():
        if full_name(getattr(type(layer), method)) not in known:
            return f"it has a {method} of its own"
    return None


def own_forward(layer: nn.Module, formula: Mapping[str, frozenset[str]]) -> str | None:
    """Why the layer does not run the methods of ``formula``: its class or itself has others."""
    if "forward" in layer.__dict__ and not is_only_moved(layer):
        return "its forward was replaced by another function"
    return own_methods(layer, formula)


def changing_hooks(layer: nn.Module, *, outputs: bool = True) -> str | None:
    """Why what goes into the layer, or (with ``outputs``) comes out, may not be what its formula says."""
    after = layer._forward_hooks.values() if outputs else ()
    for hook in (*layer._forward_pre_hooks.values(), *after):
        if not _is_mover(hook):
            return f"a hook is on it ({getattr(hook, '__qualname__', type(hook).__name__)}) that may change values"
    return None


def _is_mover(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}.".startswith(MOVERS)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see or change what passes through the layer."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__
