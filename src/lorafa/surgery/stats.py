"""Statistics as an adapter takes them: those it is given, or those a preprocess function has left for its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import CalibrationError
from lorafa.settings.checks import found

Stats = Mapping[str, Mapping[str, Tensor]]
"""Full name of a target -> name of a statistic -> its value: what data-aware starts read."""


class LayerStats(dict[str, Tensor]):
    """The statistics of one layer. What its start reads and does not find is refused by name.

    Raises:
        CalibrationError: where it is indexed by what it does not have.
    """

    def __init__(self, layer: str, start: bool | str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._layer, self._start = layer, start

    def __missing__(self, name: str) -> Tensor:
        raise CalibrationError(
            f"{self._layer}: its statistics have no {name!r}, which init_lora_weights={self._start!r} reads; they have "
            f"{', '.join(self)}. Pass what collect_statistics returns as stats=."
        )


@runtime_checkable
class Checked(Protocol):
    """Statistics that know what they were collected on (:class:`lorafa.Statistics`)."""

    def check_fits(self, model: nn.Module) -> None:
        """Refuse them for a model they were not collected on."""

    def check_read_as(self, config: LoraConfig) -> None:
        """Refuse them for a start that reads them by other settings."""


_LEFT: WeakKeyDictionary[nn.Module, Stats] = WeakKeyDictionary()
"""What PEFT's preprocess functions, which return nothing, have found: model -> statistics, gone with the model."""


def require_statistics(stats: Any) -> None:
    """Raises CalibrationError for what is neither None nor a table of tensors for each layer."""
    tables = [stats, *stats.values()] if isinstance(stats, Mapping) else [] if stats is None else [stats]
    wrong = next((table for table in tables if not isinstance(table, Mapping)), None)
    if wrong is not None:
        raise CalibrationError(
            "stats= must be what collect_statistics has returned, by the name of each layer a table of its tensors by "
            f"name, found {found(wrong)} in the place of a table. Of a file, pass Statistics.load(path)."
        )


def leave_for(model: nn.Module, stats: Stats) -> None:
    """Leave statistics for the adapter that is made of the model next; nothing is put on the model itself."""
    _LEFT[model] = stats


def forget_left(model: nn.Module) -> None:
    """Drop what :func:`leave_for` has left: an adapter has taken it."""
    _LEFT.pop(model, None)


def given(model: nn.Module, config: LoraConfig, stats: Stats | None) -> Stats | None:
    """The statistics an adapter is made with: those passed, or those that were left for the model.

    Raises:
        CalibrationError: they were collected on another model or by other settings, or are no statistics.
    """
    require_statistics(stats)
    if stats is None and config.start.initializer.needs:
        stats = _LEFT.get(model)
    if isinstance(stats, Checked):
        stats.check_fits(model)
        stats.check_read_as(config)
    return stats
