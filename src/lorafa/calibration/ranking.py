"""What a rule for ranks gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A layer that a rank is chosen for."""

    name: str
    """Full name of the target."""
    shape: tuple[int, int]
    """(out, in)."""
    rank: int
    """Its rank in the config."""
    most: int
    """The largest rank its start can be made with."""
    tensors: Mapping[str, Tensor]
    """Its statistics, "<statistic>.<tensor>"."""
    weight: Callable[[], Tensor]


@dataclass(frozen=True)
class Asked:
    """What ranks are chosen by."""

    layers: Mapping[str, Layer]
    """The layers whose statistics are finite."""
    measured: Mapping[str, Any]
    """What :attr:`Rule.measure` made of each."""
    r_min: int | None
    """None: not given."""
    r_max: int
    settings: Any
    """The rule's own."""

    @property
    def least(self) -> int:
        """``r_min``, or 1."""
        return self.r_min or 1

    @property
    def budget(self) -> int:
        """Parameters that the ranks of the config cost together."""
        return sum(layer.rank * sum(layer.shape) for layer in self.layers.values())

    @property
    def average(self) -> float:
        """The one rank of all layers that costs as much."""
        return self.budget / sum(sum(layer.shape) for layer in self.layers.values())


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How ranks are chosen: a line of ``RANK_RULES``."""

    choose: Callable[[Asked], dict[str, int]]
    """The rank of every layer; what is larger than the layer's ``most`` is cut to it."""
    measure: Callable[[Layer, Any], Any]
    """(layer, own settings) -> what the rule compares; raises CalibrationError for statistics that do not hold it."""
    is_finite: Callable[[Any], bool]
    """Whether what was measured is; a layer of which it is not keeps its rank."""
    also: str = "gradient"
    """The statistic it reads."""
    of: str = "gradient"
    """What that is a statistic of, for messages."""
    dense: bool = False
    """Whether it reads single entries of a gradient."""
    halves: bool = False
    """Whether it is better with two half samples kept apart."""
    needs_halves: bool = False
    """Whether it cannot do without them."""
    unbounded: str | None = None
    """Why it does not read ``r_min`` and ``r_max``; None where it does."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, all with defaults."""
    check: Callable[[Any, Mapping[str, Any], Any], None] | None = None
    """(own settings, what the caller tells :func:`lorafa.collect_statistics`, settings of the start): raises
    ConfigError for what excludes each other."""

    def reads(self) -> dict[str, object]:
        """What :func:`lorafa.collect_statistics` must be told for it."""
        collecting: dict[str, object] = {"also": (self.also,)}
        if self.also == "gradient":
            collecting |= {"dense": True} if self.dense else {"halves": self.halves or self.needs_halves}
        return collecting
