"""An objective as the runner knows it; nothing of torch or TRL is needed to read its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafa.data.encoding import Encoding
from lorafa.data.rows import ANSWERS, Reading


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A line of ``OBJECTIVES``."""

    words: str
    """What it is called in messages."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, all with defaults; each is ``objective.<name>``."""
    reading: Reading = ANSWERS
    """What the rows of the data are read for."""
    encoding: Encoding | None = None
    """How records become samples; None: as the kind of model has it."""
    kind: str | None = None
    """The kind of model that it trains, a line of ``KINDS``; None: any."""
    loads_as: str | None = None
    """The kind that a model is loaded as whatever its config says; None: that which it is."""
    rows: str | None = None
    """The function that makes its rows of records, as "module:function" (:mod:`lorafa.train.objectives.rows`); None
    where the samples of the run are trained on as they are, by our own trainer."""
    trainer: Callable[[Any], Any] | None = None
    """(:class:`lorafa.train.objectives.work.Work`) -> a trainer of TRL on it; None: our own."""
    check: Callable[[Any, Any], None] | None = None
    """(own settings, those of ``train``) raises ConfigError where the two do not go together."""
    passes: Callable[[Any, Any, int], int] | None = None
    """(own settings, those of ``train``, rows) -> how many samples a pass over them trains; None: as many as rows."""
    require: Callable[[Any], None] | None = None
    """(own settings) raises ConfigError where something they name is not there."""
    code: Callable[[Any], Sequence[str]] | None = None
    """(own settings) -> names, where some are functions of the user's that a training runs; None: there are none."""
    measure: str | None = None
    """The function that measures more on held-out rows than the loss of their answers, as "module:function"."""
    metrics: Mapping[str, str] | None = None
    """What its trainer logs -> the name in metrics.jsonl, beside those of all trainings."""
    by_length: bool = True
    """Whether rows of like length can stand in one batch (``train.group_by_length``)."""
    measures_loss: bool = True
    """Whether it has a loss on held-out rows that tells one checkpoint from another."""
    reads_head: bool = False
    """Whether its trainer multiplies by the weight of the output head itself, past an adapter on it."""
    answers: bool = True
    """Whether the rows' answers are measured by the loss of their tokens."""

    @property
    def is_own(self) -> bool:
        """Whether our own trainer does it, without TRL."""
        return self.trainer is None
