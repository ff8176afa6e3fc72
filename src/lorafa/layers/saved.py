"""ModulesToSaveWrapper: whole modules trained beside the adapters (``modules_to_save``), one copy an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lorafa.layers.wrapper import Wrapper


class ModulesToSaveWrapper(Wrapper):
    """Runs the copy of the active adapter, or the original module if that adapter has none or adapters are off."""

    _own = "modules_to_save"

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__(original_module)
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.modules_to_save.training = self.training

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

    def held(self) -> Iterable[str]:
        return self.modules_to_save

    def answering(self) -> nn.Module:
        return self.current()

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
