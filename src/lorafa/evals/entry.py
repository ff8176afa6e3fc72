"""An evaluation as the runner knows it. The answer loss over all held-out records is measured besides, in every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafa.data.records import Record
from lorafa.models.kinds.entry import NEXT_TOKEN, Kind
from lorafa.models.kinds.found import kind_of

if TYPE_CHECKING:
    from lorafa.evals.by_length import Progress


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Any
    """A language model, with or without adapters."""
    tokenizer: Any
    ends: frozenset[int] = frozenset()
    """Ids with which the trained turns end: an answer is over there."""
    max_length: int | None = None
    """Longest text in tokens, as ``data.max_length`` says; None: as long as the model reads."""

    @property
    def kind(self) -> Kind:
        """What kind of model it is."""
        return kind_of(self.model)

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """What the model reads of each record before it answers.

        Raises:
            DataError: a record cannot be asked; the row is named.
        """
        return self.kind.prompts(records, self.tokenizer)


@dataclass(frozen=True)
class Measured:
    """The score by which models are compared, item by item."""

    name: str
    """accuracy, loss ..."""
    values: Sequence[float]
    """One an item, in the order of the items: equal orders can be compared pair by pair."""
    weights: Sequence[float] | None = None
    """How much of the mean each item is, the tokens of a text for example; None: all as much."""
    higher_is_better: bool = True

    def mean(self) -> float:
        """The score over all items."""
        weights = self.weights or [1.0] * len(self.values)
        return sum(w * v for w, v in zip(weights, self.values, strict=True)) / sum(weights)


@dataclass(frozen=True)
class Source:
    """Where the items of an evaluation are to be read from."""

    name: str | None
    """A file, or what else ``data=`` takes; None: the benchmark's own place."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Settings of how a file is read (``prompt_column`` ...)."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    words: str
    """One line for the terminal: "3 of 8 right (37.5%)"."""
    numbers: Mapping[str, Any]
    """What result.json has under "before" and "after", beside the answer loss."""
    answers: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Every item that is answered, with question, gold, output, correct. A run keeps the first few."""
    measured: Measured | None = None
    """The score of each item; None where nothing is graded."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A line of ``EVALS``.

    What it is measured on are its items: records of a run, or whatever else :attr:`read` makes of its benchmark's file.
    """

    asks: Callable[[Sequence[Record], Any], list[Any]]
    """(held-out records, own settings) -> the items among them; where there are none it is left out of a run."""
    check: Callable[[Subject, Sequence[Any], Any], None]
    """Raises DataError for items that the model cannot be asked, before any training."""
    measure: Callable[[Subject, Sequence[Any], Any, int, Progress], Scores]
    """(subject, items, own settings, batch size, progress) -> the scores; the model is left as it was. Every process
    of a run calls it and is to find the same; `lorafa.processes.by_turns` deals the work out."""
    read: Callable[[Source, Any], list[Any]] | None = None
    """(source, own settings) -> the items of a file, or of the benchmark itself, for `lorafa eval`; raises SourceError
    and DataError. None: it measures a run alone."""
    answer_length: Callable[[Subject, Sequence[Any], Any, list[list[int]]], int] | None = None
    """(subject, records, own settings, their prompts in tokens) -> tokens that the longest answer may have, also where
    there are no records yet; None: no answers are written. A plan goes by it."""
    of_run: bool = True
    """Whether it asks something of the records that a run holds out; others have items of their own alone."""
    cuts: bool = False
    """Whether it cuts texts at ``data.max_length``."""
    needs: frozenset[str] = frozenset({NEXT_TOKEN})
    """What it asks of a kind of model (:attr:`lorafa.models.kinds.entry.Kind.offers`)."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, all with defaults; each is ``eval.<name>``."""
