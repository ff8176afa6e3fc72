"""Statistic: one quantity of one layer, gathered over calibration batches and handed on as plain tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorafa.calibration.processes import add_up
from lorafa.calibration.projections import Projections
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_flag, check_int

Tokens = Literal["all", "attended", "labelled"]
"""Which rows of a layer's input count: all, those the attention mask keeps, or those of these that have a label."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How statistics are computed, whichever start reads them."""

    seed: int = 0
    """The seed of random projections."""
    passes: int = 1
    """Passes over the data for a gradient: 1 keeps a range and a co-range sketch; 2 finds the range first and then
    projects on it; every further two passes are a power iteration."""
    dense: bool | None = None
    """Whether to add up whole gradients; None: where that is no more work than sketching."""
    halves: bool = False
    """Keep a gradient's two half samples apart, for ranks from data. With more than one pass the first half is followed
    by itself beside the whole sample, which doubles the products of all passes but the first."""
    keep_sums: bool = False
    """Keep beside the result what is linear in the gradient, so that gradients of several losses can be added up."""

    def __post_init__(self) -> None:
        check_int("seed", self.seed, at_least=0)
        check_int("passes", self.passes, at_least=1)
        check_flag("halves", self.halves)
        check_flag("keep_sums", self.keep_sums)
        if self.dense is not None:
            check_flag("dense", self.dense)
        if self.keep_sums and self.passes > 1:
            raise ConfigError(
                f"passes={self.passes} follows the range of one gradient, so what is kept of two losses could not be "
                "added up. Keep passes=1."
            )
        if self.passes > 1 and self.passes % 2:
            raise ConfigError(
                f"passes must be 1 or an even number, found {self.passes}: after the first, passes come in pairs, one "
                f"for each side of the gradient. Pass {self.passes - 1} or {self.passes + 1}."
            )


@dataclass(frozen=True)
class Measured:
    """The layer a statistic is about."""

    name: str
    """Full name of the target."""
    out: int
    in_: int
    rank: int
    """The number of directions a start will ask for at most."""
    settings: Any = None
    """The start's settings: EvaConfig, CordaConfig ..."""
    options: CalibrationOptions = field(default_factory=CalibrationOptions)
    projections: Projections = field(default_factory=lambda: Projections(0))
    """Shared by all layers."""
    change: Callable[[], Tensor] | None = None
    """Reads what a teacher changes of the layer's weight, (out, in); None where no teacher is named."""


class Statistic(ABC):
    """Sees every call of its layer; data-parallel ranks see their share and are brought together after each pass.

    Accumulators are float32, on the layer's device; they are made when the first rows arrive.
    """

    reads_gradient: ClassVar[bool] = False
    """Whether :meth:`update` needs the output's gradient; otherwise a forward pass is enough."""
    reads_data: ClassVar[bool] = True
    """Whether it sees any rows; one that does not has its value as soon as those in ``after`` are complete."""
    linear: ClassVar[bool] = False
    """Whether it is that of a gradient, and keeps the sums it is made of where the options say so."""
    depends_on_rank: ClassVar[bool] = True
    """Whether its value changes with the layer's rank, or with how the projections were drawn. One that does not serves
    any rank: a file of it is used again as long as the settings in ``settings_read`` are the same."""
    settings_read: ClassVar[Mapping[str, Any]] = {}
    """The fields of a start's settings that change what is collected. Each has the value that holds where a start has
    no such field. A field that only says how much is collected is not among them."""
    after: ClassVar[tuple[str, ...]] = ()
    """Statistics of the same layer that must be complete before this one's first pass."""

    def __init__(self, layer: Measured) -> None:
        self.layer = layer

    @property
    def tokens(self) -> Tokens:
        """Which rows it is given. Padding has no gradient, so what reads gradients may see all."""
        return "all"

    @property
    def shares_input(self) -> bool:
        """Whether layers with the same input object have the same value, so that one serves them all."""
        return False

    def wants_pass(self, number: int) -> bool:
        """Whether to go over the data once more; passes count from 0, and from the end of those in ``after``."""
        return number == 0

    def start_pass(self, number: int, done: Mapping[str, Statistic]) -> None:  # noqa: B027
        """Called before the first batch of a pass; ``done`` has those named in ``after``."""

    def start_batch(self, half: int) -> None:  # noqa: B027
        """Called before each batch of a pass: to which of the two half samples it belongs, 0 or 1."""

    def start_call(self, rows: int) -> None:  # noqa: B027
        """Called before :meth:`update` where gradients are read: how many rows of the batch this call holds."""

    @abstractmethod
    def update(self, x: Tensor, d: Tensor | None) -> None:
        """One call of the layer: its input (T, in) and, if it reads gradients, that of its output (T, out).

        Both are in the model's dtype and detached, and must not be kept. What reads gradients may be given zero rows
        too, which add nothing to a sum of d x^T.
        """

    @property
    def satisfied(self) -> bool:
        """Whether more batches would change nothing that matters; a pass ends early when all statistics say so."""
        return False

    @classmethod  # noqa: B027
    def compare(cls, layers: Sequence[tuple[Measured, Any]]) -> None:
        """Called after each batch and each pass, for a statistic in which what one layer needs depends on the others.

        Args:
            layers: every layer with the statistic that serves it; one may serve several.
        """

    def sums(self) -> list[Tensor]:
        """The accumulators of this pass that ranks add up, in place."""
        return []

    def reduce(self) -> None:
        """Bring the ranks of torch.distributed's default group together; the same on all of them afterwards."""
        for tensor in self.sums():
            add_up(tensor)

    def end_pass(self, number: int, weights: tuple[float, float]) -> None:  # noqa: B027
        """Called after :meth:`reduce`.

        Args:
            weights: of both half samples: the number of batches of all ranks, or the sum of their weights if batches
                were weighted. A sum over all batches divided by the sum of both is their mean. One may be 0.
        """

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """The value, as tensors that can be stored.

        Raises:
            CalibrationError: nothing was seen of this layer.
        """

    @classmethod  # noqa: B027
    def finish(cls, name: str, values: Mapping[str, dict[str, Tensor]]) -> None:
        """Called once all layers have their values, and again where they are read from a file: add to them what all
        decide together, or warn.

        Args:
            name: of the statistic; its tensors are "<name>.<tensor>".
            values: of all layers.
        """
