"""What wrappers of modules trained beside the factors have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import nn

from lorafa.errors import AdapterError
from lorafa.layers.host import Host


class Wrapper(Host):
    """A host that runs as the module it wraps, and answers for it."""

    _own: ClassVar[str]
    """The child that holds what adapters have; until it is there the wrapper answers for nobody."""

    @abstractmethod
    def answering(self) -> nn.Module:
        """The module that is asked for what the wrapper does not have: ``in_features``, ``padding_idx`` ..."""

    @abstractmethod
    def wanted_twice(self, one: str, other: str, *, trains: bool) -> str | None:
        """What two adapters both have here, of which one alone could count, for an error; None if they go together."""

    def require_together(self, names: Iterable[str], where: str, *, trains: bool) -> None:
        held = [name for name in dict.fromkeys(names) if name in self.held()]
        for one, other in combinations(held, 2):
            what = self.wanted_twice(one, other, trains=trains)
            if what is not None:
                raise AdapterError(
                    f"Adapters {one!r} and {other!r} cannot count together: both have {what} of {where}, and only one "
                    "can be there. Choose one of the two. Nothing was changed."
                )

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """What a file calls the tensors of an adapter here -> their names on the wrapper; transformers asks for it."""
        return {entry.key: entry.live or entry.key for entry in self.stored(adapter_name)}

    @torch.no_grad()
    def copy_values(self, source: str, name: str) -> None:
        """Give adapter ``name`` the values that adapter ``source`` has here."""
        values = {entry.key: entry.tensor for entry in self.stored(source)}
        for entry in self.stored(name):
            entry.tensor.copy_(values[entry.key])

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters count, and train (unless ``inference_mode``).

        Raises:
            AdapterError: two of them want one place here.
        """
        listed = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.require_together(listed, f"this {type(self.answering()).__name__}", trains=not inference_mode)
        super().set_adapter(listed, inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self._own not in self.__dict__.get("_modules", {}):  # not made yet, or being copied
                raise
            return getattr(self.answering(), name)
