"""ModulesToSaveWrapper: whole modules trained beside the adapters (``modules_to_save``), one copy an adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ModulesToSaveWrapper(nn.Module):
    """Runs the copy of the active adapter, or the original module if that adapter has none or adapters are off."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.training = self.modules_to_save.training = original_module.training
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    def attach(self, name: str) -> None:
        """Give adapter ``name`` a trainable copy of the original module."""
        duplicate = copy.deepcopy(self.original_module)
        duplicate.requires_grad_(True)
        self.modules_to_save[name] = duplicate

    def detach_adapter(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        self._active_adapter = [active for active in self._active_adapter if active != name]

    def stored_parameters(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.modules_to_save[name].named_parameters()) if name in self.modules_to_save else {}

    def stored_tensors(self, name: str) -> dict[str, Tensor]:
        """What a file holds of this module: parameters and persistent buffers."""
        return dict(self.modules_to_save[name].state_dict(keep_vars=True)) if name in self.modules_to_save else {}

    def set_adapter(self, names: str | Sequence[str], inference_mode: bool = False) -> None:
        self._active_adapter = [names] if isinstance(names, str) else list(names)
        for name in self.modules_to_save:
            self.set_requires_grad(name, name in self._active_adapter and not inference_mode)

    def set_requires_grad(self, name: str, requires_grad: bool = True) -> None:
        for parameter in self.stored_parameters(name).values():
            parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active_adapter)

    def current(self) -> nn.Module:
        """The module that runs now."""
        if not self._disable_adapters:
            for name in self._active_adapter:
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
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is asked of the module that runs now: ``in_features``, ``padding_idx`` ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "modules_to_save" not in self.__dict__.get("_modules", {}):  # not made yet, or being copied
                raise
            return getattr(self.current(), name)
