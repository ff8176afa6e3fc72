"""The forward of a wrapper, with the signature of the one it wraps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class ForwardOfTheWrapped:
    """For ``forward`` of a class that has ``get_base_model``: trainers choose a dataset's columns by its parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, model: Any, owner: type | None = None) -> Callable[..., Any]:
        return self.function if model is None else _Bound(self.function, model)


class _Bound:
    """A bound method with the parameters of the forward of the model that its own model wraps."""

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        self.__func__, self.__self__ = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # as bound methods do
        if name in ("__func__", "__self__"):
            raise AttributeError(name)
        return getattr(self.__func__, name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__self__.get_base_model().forward)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether some block of the model recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def let_inputs_require_grad(model: Any) -> None:
    """Reentrant checkpointing recomputes only what depends on an input that requires a gradient."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
