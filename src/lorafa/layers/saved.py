"""ModulesToSaveWrapper: whole modules trained beside the adapters (``modules_to_save``), one copy an adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends.offload import copied_to_memory
from lorafa.layers.mixed import by_parts
from lorafa.layers.own_modules import require_kept
from lorafa.layers.parts import Stored
from lorafa.layers.wrapper import Wrapper


class ModulesToSaveWrapper(Wrapper):
    """Runs the copy of the active adapter, or the original module if that adapter has none or adapters are off."""

    _own = "modules_to_save"
    wrapped_path = "original_module"
    peft_name = "ModulesToSaveWrapper"
    trains_whole = True

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__(original_module)
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.modules_to_save.training = self.training

    def attach(self, name: str) -> None:
        """Give adapter ``name`` a trainable copy of the original module."""
        duplicate = copied_to_memory(self.original_module)
        duplicate.requires_grad_(True)
        self.modules_to_save[name] = duplicate

    def forget(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def stored(self, name: str) -> Iterator[Stored]:
        """Parameters and persistent buffers of the copy."""
        copied = self.modules_to_save[name].state_dict(keep_vars=True) if name in self.modules_to_save else {}
        return (Stored(key, f"modules_to_save.{name}.{key}", tensor) for key, tensor in copied.items())

    def unwrapped(self, names: Sequence[str]) -> nn.Module:
        """The copy of the first of them that has one, else the original."""
        return next((self.modules_to_save[n] for n in names if n in self.modules_to_save), self.original_module)

    def held(self) -> Collection[str]:
        return list(self.modules_to_save)

    def wanted_twice(self, one: str, other: str, *, trains: bool) -> str | None:
        return "a copy (modules_to_save)"

    def answering(self) -> nn.Module:
        return self.current()

    def current(self) -> nn.Module:
        """The module that runs now."""
        for name in self.in_force():
            if name in self.modules_to_save:
                return self.modules_to_save[name]
        return self.original_module

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.current().weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.current(), "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.mixing()
        if rows is not None and self.is_in(rows):
            return by_parts(self, rows, self.forward, args, kwargs)
        current = self.current()
        if self.training and torch.is_grad_enabled() and current is not self.original_module:
            require_kept(", ".join(self.in_force()), current)
        return current(*args, **kwargs)
