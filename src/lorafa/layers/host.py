"""Host: what stands in the place of a module of the model and carries something of adapters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lorafa.context import CurrentCall, Rows
from lorafa.errors import BackendError
from lorafa.layers.parts import Stored


class Host(nn.Module):
    """Knows which adapters count and which of them train; what it has of each is up to the kind of host.

    An adapter that has nothing on a host is nothing to it: it may be active there all the same.
    """

    wrapped_path: ClassVar[str]
    """Where the module sits whose place the host takes."""
    nests: ClassVar[bool] = False
    """Whether it adapts one parameter of a module that stays the model's: the module's children are still found as the
    model's own, and the hosts of its other parameters are around this one or inside it."""
    position: int = 0
    """Where it ``nests``, the place of its parameter among those of the module. In files the first is innermost."""
    trains_whole: ClassVar[bool] = False
    """Whether it trains a copy of the whole module, which files hold in place of the module's own tensors."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.training = wrapped.training
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.call = CurrentCall()  # of the model; its hosts share one

    # ---- what a kind of host must say

    @property
    @abstractmethod
    def peft_name(self) -> str:
        """What PEFT calls this kind of host."""

    @abstractmethod
    def held(self) -> Collection[str]:
        """The adapters that have something here."""

    @abstractmethod
    def stored(self, name: str) -> Iterator[Stored]:
        """What a file holds of an adapter; nothing if it has nothing here, or what it has belongs to another host."""

    @abstractmethod
    def unwrapped(self, names: Sequence[str]) -> nn.Module:
        """The module without the host, as these adapters have it."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Drop what an adapter has here."""

    def tensors_of(self, name: str) -> list[Tensor]:
        """What an adapter that is held computes with here, whichever host has it in files."""
        return list(self.stored_parameters(name).values())

    def is_empty(self, name: str) -> bool:
        """Whether an adapter was left without anything here when it was exchanged, so that files pass it over."""
        return False

    def rows_from(self, names: Sequence[str]) -> Hashable | None:
        """What ``unwrapped(names)`` makes a new table from, where it does; hosts that say the same can share theirs."""
        return None

    def wrapped(self) -> nn.Module:
        """The module in whose place the host is, as it runs."""
        module: nn.Module = self
        for name in self.wrapped_path.split("."):
            module = module._modules[name]  # type: ignore[assignment]
        return module

    @property
    def pristine(self) -> nn.Module:
        """The module in whose place the host is, with the weight nothing was merged into."""
        return self.wrapped()

    def merged_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Every parameter that holds a merged value now, and the pristine one it stands in for."""
        return iter(())

    # ---- activity

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that count here, together."""
        return list(self._active_adapter)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def mixing(self) -> Rows | None:
        """Which adapters count in which row of the call in force, where they differ and all rows are looked at."""
        call = self.call
        return None if self._disable_adapters or call.part is not None else call.rows

    def in_force(self) -> Sequence[str]:
        """The adapters that count here now; in a batch that mixes adapters, those of the rows that are looked at.

        Raises:
            BackendError: they differ from row to row, and all rows are looked at.
        """
        if self._disable_adapters:
            return ()
        if self.call.part is not None:
            return self.call.part.adapters
        rows = self.call.rows
        if rows is None:
            return self._active_adapter
        if self.is_in(rows):
            raise BackendError(
                f"adapter_names lets other adapters count in each row, and {self.call.place_of(self)} "
                f"({self.peft_name}) is one for all rows: its weight takes in the update, or is read by the module "
                "around it. Leave it out with exclude_modules, or run one batch an adapter."
            )
        return ()

    def is_in(self, rows: Rows) -> bool:
        """Whether an adapter that counts in some row has something here."""
        held = self.held()
        return any(name in held for name in rows.names)

    @property
    def disable_adapters(self) -> bool:
        """Whether none counts for now."""
        return self._disable_adapters

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def require_together(self, names: Iterable[str], where: str, *, trains: bool) -> None:
        """Raise AdapterError if one of these adapters would take the place of what another one has here.

        Args:
            where: the path of the wrapped module, for the error.
            trains: whether they will be trained, so that what is equal now may differ later.
        """

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters count, and train (unless ``inference_mode``)."""
        self.activate([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        training = [] if inference_mode else [name for name in self._active_adapter if name in self.held()]
        self.freeze_all_but(training)
        for name in training:
            self.let_train(name, True)

    def activate(self, names: Sequence[str]) -> None:
        """Make exactly these adapters count, whether they train or not."""
        self._active_adapter = list(names)

    def detach_adapter(self, name: str) -> None:
        """Forget an adapter and all its parameters."""
        self.forget(name)
        self._active_adapter = [active for active in self._active_adapter if active != name]

    # ---- parameters

    def stored_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in a file."""
        return {e.key: e.tensor for e in self.stored(name) if isinstance(e.tensor, nn.Parameter)}

    def freeze_all_but(self, names: Collection[str]) -> None:
        """Freeze what all other adapters have here."""
        for name in self.held():
            if name not in names:
                self.let_train(name, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let what adapters train here train, or freeze it."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.let_train(name, requires_grad)

    def let_train(self, name: str, requires_grad: bool) -> None:
        """Let what one adapter trains here train, or freeze it."""
        for parameter in self.stored_parameters(name).values():
            parameter.requires_grad_(requires_grad)
