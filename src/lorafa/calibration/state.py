"""The state a model is in while statistics are collected: frozen, without dropout; blocks checkpoint if they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps what a block in training mode hands its computation to."""


@contextmanager
def calibrating(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Frozen weights and no dropout; blocks that checkpoint their activations still do.

    Yields:
        What sets the modes again, for the start of each call: a training step may begin with ``model.train()``.
    """
    with ExitStack() as cleanup:
        for parameter in model.parameters():
            cleanup.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        blocks, modules = _checkpointed(model), list(model.modules())
        for module in modules:
            cleanup.callback(setattr, module, "training", module.training)
        for block in blocks:
            checkpoint = getattr(block, CHECKPOINT, None)
            if checkpoint is not None:
                cleanup.callback(setattr, block, CHECKPOINT, checkpoint)
                setattr(block, CHECKPOINT, _in_evaluation(block, checkpoint))
        if blocks:
            embeddings = getattr(model, "get_input_embeddings", lambda: None)()
            if isinstance(embeddings, nn.Module):  # reentrant checkpointing needs an input with a gradient
                cleanup.callback(embeddings.register_forward_hook(_require_gradient).remove)

        def set_modes() -> None:
            for module in modules:
                module.training = module in blocks

        set_modes()
        yield set_modes


def _checkpointed(model: nn.Module) -> set[nn.Module]:
    """The modules that checkpoint: of those that have the flag the inner ones, for models have it because of these."""
    flagged = {module for module in model.modules() if getattr(module, "gradient_checkpointing", False)}
    return {module for module in flagged if not flagged & set(module.modules()) - {module}}


def _in_evaluation(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint`` of a block that must be in training mode to get there: what it computes it computes in the other,
    so that dropout applied by a function is off as well."""

    def checkpointed(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def without_dropout(*args: Any, **kwargs: Any) -> Any:
            block.training = False
            try:
                return compute(*args, **kwargs)
            finally:
                block.training = True

        return checkpoint(without_dropout, *args, **kwargs)

    return checkpointed


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
