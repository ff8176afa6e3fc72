"""What scripts import from ``peft.helpers`` beside what lorafa has by the same name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from lorafa.errors import ConfigError
from lorafa.surgery.penalty import penalty_of

METHODS = ("forward", "generate", "all")


class DoraCaching:
    """A with-block, or a call, that has norms of DoRA kept in evaluation. It changes nothing here.

    lorafa takes the norms from products of the factors, in PEFT's numbers, and keeps no dense matrix to reuse.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        return None

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """A with-block in which PEFT's layers make no copy of their input in the dtype of the factors.

    lorafa's make none in any case: they cast the factors, and the result to the dtype of the base's output.
    """
    yield


def update_forward_signature(model: nn.Module) -> None:
    """Let ``model.forward`` have the signature, name and text of the wrapped model's, for ``help`` and trainers."""
    _take_over(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """The same for ``model.generate``; nothing where the wrapped model does not generate."""
    if hasattr(model.get_base_model(), "generate"):  # type: ignore[operator]
        _take_over(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """:func:`update_forward_signature`, :func:`update_generate_signature`, or both.

    Raises:
        ConfigError: ``method`` is not one of "forward", "generate", "all".
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(map(repr, METHODS))}, found {method!r}.")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _take_over(model: nn.Module, name: str) -> None:
    source = getattr(type(model.get_base_model()), name)  # type: ignore[operator]
    own = getattr(type(model), name)

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    called.__doc__, called.__name__ = source.__doc__, source.__name__
    called.__signature__ = inspect.signature(source)  # type: ignore[attr-defined]
    setattr(model, name, MethodType(called, model))


class MontecloraTrainerMixin:
    """Adds what MonteCLoRA adds to the loss (Amballa et al. 2024, arXiv:2411.04358) to that of a trainer behind it.

    ``class MyTrainer(MontecloraTrainerMixin, Trainer)``; :class:`lorafa.train.trainer.LoraTrainer` does so by itself.
    """

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss plus the mean over layers of their divergences."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        loss, outputs = found if return_outputs else (found, None)
        added = penalty_of(model, method="monteclora")
        if added is not None:
            loss = loss + added.to(loss.device)
        return (loss, outputs) if return_outputs else loss
