"""What wrappers of modules trained beside the factors have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from lorafa.layers.host import Host


class Wrapper(Host):
    """A host that runs as the module it wraps, and answers for it."""

    _own: ClassVar[str]
    """The child that holds what adapters have; until it is there the wrapper answers for nobody."""

    @abstractmethod
    def answering(self) -> nn.Module:
        """The module that is asked for what the wrapper does not have: ``in_features``, ``padding_idx`` ..."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self._own not in self.__dict__.get("_modules", {}):  # not made yet, or being copied
                raise
            return getattr(self.answering(), name)
