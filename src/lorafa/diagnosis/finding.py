"""What a check finds, and what the checks of one call share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafa.diagnosis.trial import Outcome, outcomes

State = Literal["ok", "note", "no", "bad"]
"""ok: as it should be; note: works, with something to know; no: not here, and not needed; bad: wrong."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of what was found."""

    subject: str
    state: State
    said: str
    remedy: str = ""
    """What to do, a command or a sentence; "" where there is nothing to do."""
    needed: bool = False
    """Whether training does without it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and names for programs: what json holds."""

    @property
    def stops_training(self) -> bool:
        return self.needed and self.state == "bad"


class Bench:
    """Trials in another process, made when a check first asks for one, and then in their order, each once."""

    def __init__(self, jobs: Sequence[str] = (), *, quick: bool = False, patience: float = 180.0) -> None:
        """
        Args:
            jobs: all trials that may be asked for, in the order they are made in (:mod:`lorafa.diagnosis.jobs`).
            quick: try nothing.
            patience: seconds that a trial may take.
        """
        self._made: dict[str, Outcome] = {}
        self._left = outcomes([] if quick else jobs, patience)

    def outcome(self, job: str) -> Outcome | None:
        """What became of a trial; None where it is none of those that are made."""
        while job not in self._made:
            made = next(self._left, None)
            if made is None:
                return None
            self._made[made[0]] = made[1]
        return self._made[job]

    def close(self) -> None:
        """End the other process, if it is there."""
        self._left.close()
