"""An evaluation as the runner knows it. The answer loss over all held-out records is measured besides, in every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafa.data.records import Record

if TYPE_CHECKING:
    from lorafa.evals.generation import Progress


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Any
    """A causal language model, with or without adapters."""
    tokenizer: Any
    ends: frozenset[int] = frozenset()
    """Ids with which the trained turns end: an answer is over there."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    words: str
    """One line for the terminal: "3 of 8 right (37.5%)"."""
    numbers: Mapping[str, Any]
    """What result.json has under "before" and "after", beside the answer loss."""
    answers: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Samples for the report, the same ones each time: question, gold, output, correct."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of ``EVALS``."""

    asks: Callable[[Sequence[Record], Any], list[Record]]
    """(held-out records, own settings) -> those it is measured on; where there are none it is left out."""
    check: Callable[[Subject, Sequence[Record], Any], None]
    """Raises DataError for records that the model cannot be asked, before any training."""
    measure: Callable[[Subject, Sequence[Record], Any, int, Progress], Scores]
    """(subject, records, own settings, batch size, progress) -> the scores; the model is left as it was. Every process
    of a run calls it and is to find the same; `lorafa.processes.by_turns` deals the work out."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, all with defaults; each is ``eval.<name>``."""
