"""How FSDP1 is to wrap a model with adapters, as transformers' and users' scripts ask PEFT."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from lorafa.errors import ConfigError, shorten

CLASSES = "FSDP_TRANSFORMER_CLS_TO_WRAP"
"""An environment variable of accelerate's launcher: names of classes of blocks, by commas."""


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., Any]:
    """A policy for ``FullyShardedDataParallel(auto_wrap_policy=)``: blocks, and in them each trained leaf by itself.

    So the flat parameters hold frozen weights alone or trained ones alone, and one dtype each. The classes of blocks
    are those of the environment, ``FSDP_TRANSFORMER_CLS_TO_WRAP``, or the model's ``_no_split_modules``.

    Raises:
        ConfigError: the model has no module of such a class.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get(CLASSES)
    wanted = _of_model(model) if named is None else [name for name in named.split(",") if name]
    known = {type(module).__name__: type(module) for module in model.modules()}
    if missing := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"The model has no module of class {', '.join(missing)}, which FSDP is to wrap. Set {CLASSES} to one of "
            f"its classes: {shorten(known, 12)}."
        )
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={known[name] for name in wanted})
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _of_model(model: nn.Module) -> list[str]:
    """``_no_split_modules`` of every model inside."""
    found = (name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ())
    known = {type(module).__name__ for module in model.modules()}
    return [name for name in dict.fromkeys(found) if name in known]


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return next(module.children(), None) is None and weight is not None and bool(weight.requires_grad)
