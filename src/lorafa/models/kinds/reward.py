"""Models that give an answer one score: a decoder's body with a head of one output, which is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lorafa.data.chat import Sample, encode_prompts
from lorafa.data.collate import Collate, Collator
from lorafa.data.encoding import CHAT, Encoding
from lorafa.data.records import Record
from lorafa.models.kinds.classification import Classification
from lorafa.models.kinds.entry import CLASSIFIER, Kind, RowLosses, architecture_of

SCORE = "score"
"""What its one output is called."""


class Reward(Classification):
    """A sequence classifier of one output, which reads whole conversations; objective=reward trains it."""

    name = "reward"
    words = "a reward model"
    offers = frozenset()
    usual_eval = "loss"
    own_template = True
    objective = "reward"

    def is_of(self, model: Any) -> bool:
        return False  # nothing but the objective says so

    def is_made_for(self, config: Any) -> bool:
        return False

    def classes(self, config: Any, answers: Callable[[], Sequence[str]] | None, where: str) -> tuple[str, ...]:
        return (SCORE,)

    def classes_in(self, model: Any) -> tuple[str, ...]:
        return ()

    def keeps_head(self, config: Any, classes: Sequence[str]) -> bool:
        """A head of one output gives scores already."""
        return not architecture_of(config).endswith(CLASSIFIER) or len(config.id2label) == 1

    def loading(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"id2label": {0: SCORE}, "label2id": {SCORE: 0}, "problem_type": "regression"}

    def fullest(self, length: int) -> Sample:
        return Kind.fullest(self, length)

    def longest(self, samples: Sequence[Sample]) -> int:
        return max((len(sample.input_ids) for sample in samples), default=0)

    def encoding(self, model: Any) -> Encoding:
        return CHAT

    def prompts(self, records: Iterable[Record], tokenizer: Any) -> list[list[int]]:
        return encode_prompts(records, tokenizer)

    def collator(self, pad_id: int) -> Collate:
        return Collator(pad_id)

    def row_losses(self) -> RowLosses | None:  # type: ignore[override]
        return None


REWARD = Reward()
