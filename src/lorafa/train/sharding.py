"""The frozen base model spread over the processes (FSDP2), what is trained whole in each of them.

accelerate is asked for FSDP2 as ever: by its configuration, its environment, or ``TrainingArguments(fsdp=...)``. It
would spread adapters as well, of which optimizers that work on pairs of A and B then see parts, and does nothing at all
on CPUs. So the model is sharded here: the base, which is large, by torch's ``fully_shard``; adapters and all else that
is trained, which is small, stay plain parameters. Their gradients are averaged over the processes once a step. Every
optimizer steps as in one process, and checkpoints are those of one.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import ConfigError
from lorafa.layers.host import Host
from lorafa.processes import world_size

ASKED = "ACCELERATE_USE_FSDP"
"""Variable with which ``accelerate launch`` asks for FSDP."""


@dataclass(frozen=True)
class Sharding:
    """What accelerate was asked for."""

    blocks: frozenset[str] | None
    """Classes of the modules that are gathered one at a time; None for those the model names."""
    reshard_after_forward: bool
    """Whether a block is let go of between its forward and its backward pass."""
    from_first: bool
    """Whether only the first process has read the weights."""

    def shard(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Spread what is frozen of a model over the processes, in place; the parameters that are not spread.

        All start from what the first process has. In a forward pass each block is put together when it is reached; what
        is outside of the blocks, embedding and head among that, for the length of the pass and its backward pass.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        whole = kept_whole(model)
        kept = {id(parameter) for parameter in whole}
        with torch.no_grad():
            for parameter in whole:
                parameter.data = parameter.data.to(device)
            for tensor in (*model.parameters(), *model.buffers()):
                if self.from_first or id(tensor) in kept:
                    _take_from_first(tensor, device)
        options: dict[str, Any] = {
            "mesh": torch.distributed.device_mesh.init_device_mesh(device.type, (world_size(),)),
            "ignored_params": set(whole),
        }
        names = frozenset(getattr(model, "_no_split_modules", None) or ()) if self.blocks is None else self.blocks
        for module in reversed(list(model.modules())):  # those inside others first
            if type(module).__name__ in names:
                fully_shard(module, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(model, **options)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        return whole


def kept_whole(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that every process has whole: trained ones, those of adapters, and quantized weights,
    whose codes are no numbers."""
    kept = [p for p in model.parameters() if p.requires_grad or not p.is_floating_point()]
    for module in model.modules():
        if isinstance(module, Host):
            base = {id(p) for p in module.get_submodule(module.wrapped_path).parameters()}
            kept += [p for p in module.parameters() if id(p) not in base]
    return list({id(p): p for p in kept}.values())


def _take_from_first(tensor: Tensor, device: torch.device) -> None:
    moved = tensor.to(device)
    torch.distributed.broadcast(moved, src=0)
    tensor.copy_(moved)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; one that some processes do not have counts as zeros there.

    One that none of them has stays away. All of a device and dtype travel together.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for (device, dtype), members in groups.items():
        there = torch.tensor([float(p.grad is not None) for p in members], device=device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        flat = torch.cat([gradient.reshape(-1).to(dtype) for gradient in gradients])
        torch.distributed.all_reduce(there)
        torch.distributed.all_reduce(flat)
        flat /= world_size()
        means = torch.split(flat, [p.numel() for p in members])
        for parameter, some, mean in zip(members, there.tolist(), means, strict=True):
            if some:
                parameter.grad = mean.view(parameter.shape).clone()


def asked_for(args: Any) -> Sharding | None:
    """What a trainer's arguments and the environment ask for; None where it is not FSDP2.

    Raises:
        ConfigError: they ask for a part of it that is not there, or torch is too old.
    """
    settings = getattr(args, "fsdp_plugin_args", None)
    if world_size() == 1 or _version(settings) != 2:
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    refused = {
        "offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing (train.gradient_checkpointing does it)": plugin.activation_checkpointing,
        "auto_wrap_policy=SIZE_BASED_WRAP (TRANSFORMER_BASED_WRAP goes)": (
            getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is size_based_auto_wrap_policy
        ),
        "torch_compile": args.torch_compile,
    }
    if found := [name for name, there in refused.items() if there]:
        raise ConfigError(f"With FSDP2 a model with adapters is not trained with {' and '.join(found)}. Leave it out.")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(
            f"With FSDP2 adapters stay whole, which takes torch 2.7 or newer, found {torch.__version__}. Install one, "
            "or train without FSDP."
        )
    names = plugin.transformer_cls_names_to_wrap
    return Sharding(
        frozenset(names) if names else None, bool(plugin.reshard_after_forward), bool(plugin.cpu_ram_efficient_loading)
    )


def _version(settings: Mapping[str, Any] | None) -> int | None:
    """The version of FSDP that is asked for."""
    if settings is None and not spread_over_processes(os.environ):
        return None
    return int((settings or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION") or 1)


def spread_over_processes(environ: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` asks for FSDP."""
    return environ.get(ASKED, "").lower() == "true"


def require_known(environ: Mapping[str, str], full: bool = False) -> None:
    """Raises ConfigError where ``accelerate launch`` asks for a way to spread a model that a run does not go.

    Args:
        full: whether all weights are trained.
    """
    if full and spread_over_processes(environ):
        raise ConfigError(
            "accelerate asks for FSDP, and peft.full=true trains the whole model in each process: its weights are not "
            "spread. Launch it without FSDP (data parallel), or train an adapter."
        )
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ConfigError(
            "accelerate asks for DeepSpeed, with which no run was ever tried. Spread the model by FSDP2 (accelerate "
            "launch --use_fsdp --fsdp_version 2)."
        )
    if spread_over_processes(environ) and environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "accelerate asks for the first FSDP, which flattens adapters and base into one. Give it fsdp_version: 2 "
            "(accelerate launch --fsdp_version 2)."
        )


@contextmanager
def hidden_from_accelerate(args: Any) -> Iterator[None]:
    """An accelerator that is made inside the block does not see that FSDP is asked for."""
    asked, settings = os.environ.pop(ASKED, None), args.fsdp_plugin_args
    args.fsdp_plugin_args = None
    try:
        yield
    finally:
        args.fsdp_plugin_args = settings
        if asked is not None:
            os.environ[ASKED] = asked
