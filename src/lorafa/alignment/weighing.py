"""The teacher's weight as a training has it: a number, or one that is read once of both gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from lorafa.alignment.balance import balanced_weight
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_number, found

BALANCED = "balanced"
FIRST = 0.5
"""What counts until the two gradients could be balanced."""

Norms = tuple[Sequence[float], Sequence[float]]
"""Layer by layer the norms of the task's gradient and of the teacher's."""


def check_weight(name: str, weight: object) -> None:
    """Raises ConfigError for what is neither a number >= 0 nor "balanced"."""
    if weight == BALANCED:
        return
    if isinstance(weight, str):
        raise ConfigError(f"{name} must be a number >= 0 or {BALANCED!r}, found {found(weight)}. Pass one of them.")
    check_number(name, weight, "a number >= 0", 0.0, closed="[")


class Weighing:
    """When the weight is read of the gradients, and what came out.

    A teacher that starts as the student has no gradient there: until it has more than a thousandth of the task's the
    weight is 0.5. Then it is balanced once. With a probe that is asked where the probe is measured; without one before
    steps 0, 1, 2, 4, 8 and so on, on the step's first batch.
    """

    def __init__(self, balances: bool, starts_as_student: bool) -> None:
        self.pending = balances
        """Whether the weight is still to be balanced."""
        self.weight: float | None = None
        """What it was balanced to."""
        self._next = 1 if starts_as_student else 0

    def due(self, step: int) -> bool:
        """Whether to measure before step ``step``, which counts from 0, where there is no probe."""
        return self.pending and step >= self._next

    def measure(self, norms: Callable[[], Norms], step: int) -> str | None:
        """Measure, and say in words what was found where the weight is balanced now."""
        task, align = norms()
        weight = balanced_weight(task, align)
        if weight is None:
            self._next = max(1, 2 * step)
            return None
        self.pending, self.weight = False, weight
        return (
            f"in the median of {len(task)} layers the gradient of the task is {median(task):.4g} and that of the "
            f"teacher {median(align):.4g}: weight {FIRST:g} -> {weight:.4g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a training to go on, in json's types."""
        return {"pending": self.pending, "weight": self.weight, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept."""
        self.pending, self.weight, self._next = state["pending"], state["weight"], state["next"]
