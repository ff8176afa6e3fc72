"""Modules whose weights rest elsewhere, and are brought in by hooks of accelerate for each call of their forward.

``device_map`` with "cpu" or "disk", ``cpu_offload`` and ``dispatch_model`` leave the tensors of a module on the meta
device. A hook around its forward puts the values in, and takes them out again. Who needs the values at another time
reads them here; the module itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import BackendError

_OF_ACCELERATE = ("_hf_hook", "_old_forward", "forward")
"""What accelerate puts on a module that it hooks."""
_TAKEN_OVER = ("execution_device", "io_same_device", "offload_buffers", "skip_keys")


def _hooks(module: nn.Module) -> Iterator[Any]:
    waiting = [module.__dict__.get("_hf_hook")]
    while waiting:
        hook = waiting.pop(0)
        inner = getattr(hook, "hooks", None)  # accelerate's SequentialHook
        if inner is not None:
            waiting = [*inner, *waiting]
        elif hook is not None:
            yield hook


def _bringing(module: nn.Module) -> Any:
    """The hook that brings the module's weights in, or None."""
    if "_hf_hook" not in module.__dict__:  # on the way of every call
        return None
    return next((h for h in _hooks(module) if getattr(h, "offload", False) and h.weights_map is not None), None)


def rests_elsewhere(module: nn.Module) -> bool:
    """Whether the module has its weights for the length of a call only."""
    return _bringing(module) is not None


def rests_inside(module: nn.Module) -> bool:
    """Whether the module's hook brings in the weights of all modules inside it, by names that wrappers change."""
    hook = _bringing(module)
    return hook is not None and bool(hook.place_submodules)


def is_only_moved(module: nn.Module) -> bool:
    """Whether hooks of accelerate on the module move tensors to a device and back, and change nothing else."""
    hooks = list(_hooks(module))
    own = getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward
    return bool(hooks) and own and all(_moves(hook) for hook in hooks)


def _moves(hook: Any) -> bool:
    return all(hasattr(hook, name) for name in (*_TAKEN_OVER, "offload", "weights_map"))


def execution_device(module: nn.Module) -> torch.device | None:
    """The device to which the weights are brought, or None where none are."""
    hook = _bringing(module)
    return None if hook is None else _device(hook)


def device_of(model: nn.Module) -> torch.device:
    """Where the first of all weights of a model is, or is brought to when it is used; the CPU if there is none."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            return execution_device(module) or tensor.device
    return torch.device("cpu")


def in_memory(module: nn.Module) -> Any:
    """A module with the values of its own parameters and buffers, on the device that they are brought to.

    It is the module itself, or, if its weights rest elsewhere, a copy without accelerate's hooks.
    """
    hook = _bringing(module)
    if hook is None:
        return module
    new = without_hooks(module)
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta and name in hook.weights_map:
            value = _brought(hook, name, parameter)
            new._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta and name in hook.weights_map:
            new._buffers[name] = _brought(hook, name, buffer)
    return new


@contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """A with-block in which the module's own weights, if they rest elsewhere, are on the device of its calls.

    What is written to them inside is not kept.
    """
    hook = _bringing(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.empty(0))


def _brought(hook: Any, name: str, resting: Tensor) -> Tensor:
    value: Tensor = hook.weights_map[name]
    return value.detach().to(_device(hook), resting.dtype)


def _device(hook: Any) -> torch.device:
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def value_of(module: nn.Module, tensor: Tensor | None) -> Tensor | None:
    """A parameter or buffer of the module with its values, wherever they rest; None for None."""
    if tensor is None or not tensor.is_meta:
        return tensor
    hook, own = _bringing(module), (*module._parameters.items(), *module._buffers.items())
    name = next((name for name, mine in own if mine is tensor), None)
    return tensor if hook is None or name not in hook.weights_map else _brought(hook, str(name), tensor)


def identity_of(module: nn.Module, name: str) -> Hashable:
    """Equal for modules that share a parameter, also where each of them has it brought in for itself."""
    parameter, hook = module._parameters[name], _bringing(module)
    if parameter is None or hook is None or not parameter.is_meta:
        return id(parameter)
    values = hook.weights_map
    while hasattr(values, "prefix"):  # accelerate's view of one module in a map of the whole model
        name, values = f"{values.prefix}{name}", values.dataset
    kept = getattr(values, "state_dict", values)
    if name in kept:
        return ("memory", kept[name].data_ptr())
    on_disk = getattr(values, "index", {}).get(name, {})
    file = on_disk.get("safetensors_file")
    return id(parameter) if file is None else (file, on_disk.get("weight_name", name))


def weight_of(module: nn.Module, key: str = "weight") -> Tensor:
    """``module.weight``, or another tensor of it, with its values, wherever they rest."""
    weight = module._parameters.get(key)
    if weight is None:  # a buffer, or computed from other parameters
        weight = getattr(module, key)
    return getattr(in_memory(module), key) if weight.is_meta else weight  # type: ignore[union-attr, return-value, no-any-return]


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy of the module without accelerate's hooks that shares its tensors and its children."""
    new = copy.copy(module)
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    if "_hf_hook" in module.__dict__:
        before = module.__dict__.get("_old_forward")
        for name in _OF_ACCELERATE:
            new.__dict__.pop(name, None)
        if before is not None and getattr(before, "__func__", None) is not type(module).forward:
            new.forward = before
    return new


def hooked_as(new: nn.Module, old: nn.Module, *, rests: bool = True) -> nn.Module:
    """``new`` with the hooks of accelerate that ``old`` has: inputs are moved, and weights rest, as those of ``old``.

    Args:
        new: has its values in memory and no hooks of accelerate.
        rests: False lets the weights stay on the device that those of ``old`` are brought to.

    Raises:
        BackendError: ``old`` has a hook of another kind.
    """
    hooks = list(_hooks(old))
    for hook in hooks:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        if not _moves(hook):
            raise BackendError(
                f"A {type(hook).__name__} is on this {type(old).__name__}, and what it does to a layer's weights is "
                "not known here, so no other weight can take their place. Remove it with "
                "accelerate.hooks.remove_hook_from_module, and put it on again afterwards."
            )
        settings = {name: getattr(hook, name) for name in _TAKEN_OVER}
        add_hook_to_module(new, AlignDevicesHook(**settings, offload=rests and hook.offload), append=True)
    return new


def copied_to_memory(module: nn.Module) -> nn.Module:
    """A deep copy of a module whose weights are in memory to stay, on the devices that the module's are brought to."""
    if not any(rests_elsewhere(inner) for inner in module.modules()):
        return copy.deepcopy(module)
    return _copied(module, {})


def _copied(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in copies:
        here = in_memory(module)
        children, shell = here._modules, without_hooks(here)
        shell._modules = {}
        new = copies[id(module)] = copy.deepcopy(shell)  # hooks of accelerate would take the whole model with them
        new._modules = {name: None if child is None else _copied(child, copies) for name, child in children.items()}
        hooked_as(new, module, rests=False)
    return copies[id(module)]
